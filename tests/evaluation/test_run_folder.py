"""Folders of runs that are read again: what is none, or damaged, is told; what makes runs unlike is said."""

import json

import pytest

from scaledown.evaluation.report import _differences
from scaledown.evaluation.run_folder import REQUIRED, EvaluationRun, read_metrics

METRICS = {**dict.fromkeys(REQUIRED), "data": {"num_asked": 2}}


def write(folder, metrics, predictions=None):
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if predictions is not None:
        (folder / "predictions.jsonl").write_text(predictions, encoding="utf-8")
    return folder


@pytest.mark.parametrize("metrics", [{"f1": 0.5}, [1], {name: {} for name in REQUIRED if name != "systems"}])
def test_metrics_of_another_program_are_told(tmp_path, metrics):
    with pytest.raises(ValueError, match=r"was not written by evaluate\.py: it has no .*systems"):
        read_metrics(write(tmp_path, metrics))


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (None, "is missing"),
        ("", "has 0 lines where 2"),
        ('{"id": "a"}\n', "has 1 lines where 2"),
        ('{"id": "a', "damaged"),
    ],
)
def test_answers_that_are_not_whole_are_not_judged(tmp_path, predictions, message):
    with pytest.raises(ValueError, match=message):
        EvaluationRun.read(write(tmp_path, METRICS, predictions))


def test_a_comparison_says_what_is_unlike():
    run = {
        "data": {"sha256": "a", "num_asked": 2},
        "hardware": {},
        "model": {},
        "settings": {"max_new_tokens": 4},
        "batch_sizes": [8],
        "judge": {"model": "one"},
    }
    assert _differences([("a", run), ("b", run)]) == ""
    found = _differences([("a", run), ("b", {**run, "batch_sizes": [1], "judge": {"model": "other"}})])
    assert "batch size" in found and "the judge" in found and found.count("- ") == 2
