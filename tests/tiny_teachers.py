"""Tiny random teachers and encoders in folders, as their libraries load them."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
)

from tiny import ENCODER_SHAPE, SHAPE, build_tokenizer


def save_reranker(folder: Path, num_labels: int = 1) -> str:
    """A cross-encoder."""
    return _save(BertForSequenceClassification(BertConfig(**ENCODER_SHAPE, num_labels=num_labels)), folder, pair=True)


def save_splade(folder: Path) -> str:
    """A masked language model, of which sentence-transformers makes a SparseEncoder."""
    return _save(BertForMaskedLM(BertConfig(**ENCODER_SHAPE)), folder, pair=True)


def save_dense(folder: Path) -> str:
    """An encoder, of which sentence-transformers makes a SentenceTransformer."""
    return _save(BertModel(BertConfig(**ENCODER_SHAPE)), folder, pair=True)


def save_teacher(folder: Path, chat: bool = True) -> str:
    """A causal language model with a chat template."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    folder = Path(_save(model, folder, pair=False))
    build_tokenizer(chat=chat).save_pretrained(folder)
    return str(folder)


def save_all(folder: Path) -> dict[str, str]:
    """One of each, the same in every process."""
    torch.manual_seed(0)
    return {
        "splade": save_splade(folder / "splade"),
        "dense": save_dense(folder / "dense"),
        "reranker": save_reranker(folder / "reranker"),
        "teacher": save_teacher(folder / "teacher"),
    }


def _save(model: torch.nn.Module, folder: Path, pair: bool) -> str:
    model.save_pretrained(folder)
    build_tokenizer(pair=pair).save_pretrained(folder)
    return str(folder)
