"""Data and backbones that tests of training begin with."""

import pytest
import torch
from tiny_training import rows
from transformers import AutoModel, AutoModelForCausalLM

from folders import write_rows
from tiny import (
    ENCODERS,
    GENERATORS,
    build_tokenizer,
)


@pytest.fixture
def train_file(tmp_path):
    return write_rows(tmp_path / "train.jsonl", rows(repeat=4))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GENERATORS["llama"]()).save_pretrained(folder / "generator")
    build_tokenizer().save_pretrained(folder / "generator")
    AutoModel.from_config(ENCODERS["modernbert"]()).save_pretrained(folder / "encoder")
    build_tokenizer(pair=True).save_pretrained(folder / "encoder")
    return folder
