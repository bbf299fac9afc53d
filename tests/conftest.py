"""Tiny random backbones and a tokenizer trained on the spot: nothing here needs a network or a download."""

import gc
import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import compressor_scaledown
from tiny import build_model, build_tokenizer

# The models are too small for several threads to pay, and several workers may share the machine.
torch.set_num_threads(1)


def pytest_configure():
    """Imports make millions of objects, and none of them goes: looking for garbage among them is in vain."""
    gc.disable()


def pytest_collection_finish():
    """Whatever was imported stays: a collection, with which every training run begins, need not walk through it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _warned_of_nothing():
    """What is told once per process is told to each test anew, whichever ran before."""
    logging.getLogger("transformers").warning_once.cache_clear()


_HELD = set()


@pytest.fixture(autouse=True)
def _shortcuts_checked_once(monkeypatch):
    """Every new model checks its shortcuts at their first use; once for equal backbones will do here."""
    check = compressor_scaledown.shortcuts_hold

    def shortcuts_hold(backbone) -> bool:
        fields = {**backbone.config.to_dict(), "_name_or_path": None, "dtype": None}
        key = type(backbone), backbone.config._attn_implementation, json.dumps(fields, default=str, sort_keys=True)
        if key not in _HELD and check(backbone):
            _HELD.add(key)
        return key in _HELD

    monkeypatch.setattr(compressor_scaledown, "shortcuts_hold", shortcuts_hold)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session", params=["n_layers", "modernbert", "llm"])
def any_model(request):
    """One model per kind of compressor; read-only."""
    return build_model(request.param)


@pytest.fixture(scope="session")
def model():
    """The default kind, `n_layers`, with more layers than most tests need; read-only."""
    return build_model("n_layers", num_layers=4)
