"""Shortcuts through transformers' layers are taken only where they change no result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_compressors import CASES, build
from transformers.utils import logging

import shortcuts_scaledown
from shortcuts_scaledown import CACHE_NAME, SharedPrefixes, _uncompiled
from tiny import DOCUMENTS, QUESTIONS, build_model

ROOT = Path(__file__).resolve().parents[2]


def _few_keys(self, keys, values, *args, **kwargs):
    return keys, values


def _from_the_first_position(self, attention_mask):
    inputs = _BACKBONE_INPUTS(self, attention_mask)
    return {**inputs, "position_ids": torch.arange(attention_mask.shape[1]).expand(len(attention_mask), -1)}


_BACKBONE_INPUTS = SharedPrefixes.backbone_inputs
# What a release of transformers may change: what an attention does with its cache, how arguments are called, where a
# model begins to count, and where its layers are.
CHANGES = {
    "keys": lambda patch: patch.setattr(shortcuts_scaledown._AllKeys, "update", _few_keys),
    "name": lambda patch: patch.setattr(shortcuts_scaledown, "CACHE_NAME", "memory"),
    "positions": lambda patch: patch.setattr(SharedPrefixes, "backbone_inputs", _from_the_first_position),
    "layers": lambda patch: patch.setitem(shortcuts_scaledown.PRUNABLE_LAYERS, "llama", "blocks"),
}


@pytest.fixture(autouse=True)
def _shortcuts_checked_once():
    """Here every model checks."""


@pytest.fixture
def warnings_of(monkeypatch):
    found = []
    logger = logging.get_logger("shortcuts_scaledown")
    monkeypatch.setattr(logger, "warning_once", found.append)
    return found


def test_threads_that_leave_in_another_order_leave_torch_as_it_was():
    from torch._dynamo import eval_frame

    first, second = _uncompiled(), _uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_after_a_change_in_transformers_the_plain_way_is_taken(change, monkeypatch, warnings_of):
    expected = build_model(num_layers=4)
    expected.compressor.prunes_last_layer = expected.compressor.shares_prefixes = False
    expected = expected.compress(QUESTIONS, DOCUMENTS)
    CHANGES[change](monkeypatch)
    model = build_model(num_layers=4)
    for _ in range(2):
        compressed = model.compress(QUESTIONS, DOCUMENTS)
    torch.testing.assert_close(compressed.memory_embeddings, expected.memory_embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compressed.reranking_scores, expected.reranking_scores, rtol=1e-4, atol=1e-5)
    assert len(warnings_of) == (change != "layers")
    assert all("LlamaModel" in warning and "slower" in warning for warning in warnings_of)


@pytest.mark.parametrize(("kind", "name", "attention"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_shortcuts_hold_for_every_listed_backbone(kind, name, attention, warnings_of):
    compressor = build(kind, name, attention).compressor
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert compressor._may_take_shortcuts()
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings_of == []


def test_the_output_names_its_cache_as_transformers_does():
    model = build_model(num_layers=4)
    output = model(**model.processor(QUESTIONS, DOCUMENTS), use_cache=True)
    assert output[CACHE_NAME].get_seq_length() == output.logits.shape[1]
    assert output.to_tuple()[0] is output.logits


@pytest.mark.parametrize(
    "statement",
    [
        "from scaledown import ScaleDownModel",
        "import modeling_scaledown",
        pytest.param("import processing_scaledown", marks=pytest.mark.slow),
    ],
)
def test_an_old_transformers_is_told_by_its_version(statement, tmp_path):
    (tmp_path / "transformers").mkdir()
    names = "AutoConfig = AutoProcessor = BatchFeature = PreTrainedTokenizerBase = ProcessorMixin = object"
    (tmp_path / "transformers" / "__init__.py").write_text(f'__version__ = "4.57.0"\n{names}\n')
    (tmp_path / "transformers" / "utils.py").write_text("import logging\nlogging.get_logger = logging.getLogger\n")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; {statement}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "needs transformers 5.17 or newer, and this is 4.57.0" in run.stderr.splitlines()[-1]


def test_the_check_leaves_the_seeds_of_accelerators_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model = build_model(num_layers=4)
    state, seeds[:] = torch.random.get_rng_state(), []
    model.compress(QUESTIONS, DOCUMENTS)
    assert model.compressor._shortcuts_hold
    assert seeds == []
    assert torch.equal(torch.random.get_rng_state(), state)
