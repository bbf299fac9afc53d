"""Metrics and intervals against values known from elsewhere."""

import math
import os
import random
import subprocess
import sys

import evaluate
import numpy as np
import pytest

from folders import ROOT
from scaledown.common.metrics import exact_match, match
from scaledown.evaluation.bootstrap import Bootstrap, Estimate
from scaledown.evaluation.metric_loader import ANSWER_MODULES, MODULES, load_metric
from scaledown.evaluation.ranking_metrics import rank_questions

# Made by hand. The values are what the definitions of SQuAD's official script give: lower case, punctuation off (not
# replaced by blanks), articles off, words as a multiset, the best over the gold answers.
ANSWERS = [
    # prediction, gold answers, exact match, F1
    ("Walter Scott", ["Walter Scott"], 1.0, 1.0),
    ("the  walter SCOTT.", ["Walter Scott"], 1.0, 1.0),
    ("Walter-Scott", ["walterscott"], 1.0, 1.0),
    ("Sir Walter Scott", ["Walter Scott"], 0.0, 0.8),
    ("cat cat", ["cat cat dog"], 0.0, 0.8),
    ("cat dog", ["cat cat dog"], 0.0, 0.8),
    ("cat cat cat", ["cat"], 0.0, 0.5),
    ("Scott", ["Loire", "Walter Scott", "Scott of Abbotsford"], 0.0, 2 / 3),
    ("1,006 kilometres", ["1006 kilometres"], 1.0, 1.0),
    ("a theory", ["theory"], 1.0, 1.0),
    ("", ["Loire"], 0.0, 0.0),
    ("In the Cévennes", ["Cévennes"], 0.0, 2 / 3),
]
# As the package rouge_score has them, without stemming.
ROUGE_L = [
    ("the cat sat on the mat", "a cat was on the red mat", 0.6153846153846153),
    ("Walter Scott, 1819", "In 1819 Walter Scott wrote it", 0.4444444444444444),
    ("", "x", 0.0),
    ("b a", "a b", 0.5),
]


def test_answers_are_scored_as_the_official_script_does():
    predictions, references = [row[0] for row in ANSWERS], [row[1] for row in ANSWERS]
    for name, column in (("exact_match", 2), ("f1", 3)):
        expected = [row[column] for row in ANSWERS]
        arguments = {"predictions": predictions, "references": references}
        assert load_metric(name).compute(**arguments, per_question=True)[name] == pytest.approx(expected)
        assert load_metric(name).compute(**arguments)[name] == pytest.approx(np.mean(expected))


def test_answers_are_scored_as_a_port_of_the_official_script_does():
    from torchmetrics.functional.text import squad

    rng = random.Random(0)
    words = [
        "the",
        "The",
        "a",
        "An",
        "cat",
        "Cat's",
        "cats",
        "1,006",
        "1006",
        "u.s.",
        "US",
        "Cévennes",
        "–",
        "x-ray",
        ".",
    ]
    predictions = [" ".join(rng.choices(words, k=rng.randint(1, 5))) + " cat" for _ in range(400)]
    references = [
        [" ".join(rng.choices(words, k=rng.randint(1, 5))) + " us" for _ in range(rng.randint(1, 3))]
        for _ in predictions
    ]
    references[::4] = [
        [*gold, rng.choice((said, said.upper(), f"the {said}!"))]
        for gold, said in zip(references[::4], predictions[::4], strict=True)
    ]
    theirs = [
        squad(
            {"prediction_text": said, "id": "0"},
            {"answers": {"text": gold, "answer_start": [0] * len(gold)}, "id": "0"},
        )
        for said, gold in zip(predictions, references, strict=True)
    ]
    for name in ("exact_match", "f1"):
        expected = [float(scored[name]) / 100 for scored in theirs]
        assert 0.1 < np.mean(expected) < 0.9
        found = load_metric(name).compute(predictions=predictions, references=references, per_question=True)[name]
        assert found == pytest.approx(expected, abs=1e-6)


def test_match_finds_a_gold_answer_inside_the_prediction():
    result = load_metric("match").compute(
        predictions=["It was Sir Walter Scott, of course.", "Scott"], references=[["Loire", "walter scott"], ["Scotty"]]
    )
    assert result == {"match": 0.5}


def test_match_never_misses_what_matches_exactly():
    """An article or punctuation alone has an empty normal form."""
    assert exact_match("A", ["a"]) == match("A", ["a"]) == 1.0
    assert match("Paris", ["A", "-"]) == 0.0


def test_a_ratio_to_a_mean_that_is_often_0_has_no_interval():
    often, seldom = [1.0] + [0.0] * 9, [1.0] * 5 + [0.0] * 5
    values = [1.0] * 3 + [0.0] * 7
    assert Bootstrap().ratio(values, often) == Estimate(3.0)  # a third of the resamples has only zeros below the line
    assert Bootstrap().ratio(values, seldom).high == 1.0


def test_rouge_l():
    for prediction, gold, expected in ROUGE_L:
        result = load_metric("rouge_l").compute(predictions=[prediction], references=[["qqq", gold]])
        assert result["rouge_l"] == pytest.approx(expected)


def test_every_metric_is_a_module_of_its_own():
    assert {path.name for path in MODULES.iterdir() if path.name != "__pycache__"} == {*ANSWER_MODULES, "ranking"}
    assert all((MODULES / name / f"{name}.py").is_file() for name in (*ANSWER_MODULES, "ranking"))


def test_rankings():
    scores = [[0.1, 0.9, 0.3, 0.2], [5.0, 1.0], [0.0, 0.0, 0.0]]
    positives = [[2, 3], [0], [1]]
    found = rank_questions(scores, positives)
    # The first ranks 1, 2, 3, 0: the right ones come second and third.
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx([(1 / math.log2(3) + 1 / 2) / ideal, 1.0, 1 / math.log2(3)])
    assert found["mrr"] == pytest.approx([1 / 2, 1.0, 1 / 2])
    assert found["recall@1"] == pytest.approx([0.0, 1.0, 0.0])
    assert found["success@1"] == pytest.approx([0.0, 1.0, 0.0])
    assert found["recall@3"] == pytest.approx([1.0, 1.0, 1.0])
    means = load_metric("ranking").compute(predictions=scores, references=positives)
    assert means["mrr"] == pytest.approx(2 / 3)
    one_of_two = rank_questions([[3.0, 2.0, 1.0]], [[0, 2]])
    assert (one_of_two["success@1"], one_of_two["recall@1"]) == ([1.0], [0.5])


@pytest.mark.parametrize("positives", [[], [2]])
def test_a_ranking_needs_right_documents(positives):
    with pytest.raises(ValueError, match="question 0"):
        rank_questions([[1.0, 2.0]], [positives])


def test_many_documents_keep_their_order():
    """More than ten, so that an order by name would be another one."""
    scores = [[-float(place) for place in range(30)]]
    assert rank_questions(scores, [[10]])["mrr"] == pytest.approx([1 / 11])


class TestBootstrap:
    def test_interval_of_a_mean_is_about_two_standard_errors_wide(self):
        values = np.random.default_rng(1).normal(5, 2, size=400)
        found = Bootstrap(2000).mean(values)
        error = values.std() / 20
        assert found.value == pytest.approx(values.mean())
        assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
        assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)

    def test_intervals_do_not_vanish_at_0_and_1(self):
        # Wilson's of 20 of 20, as statsmodels' proportion_confint(20, 20, method="wilson") gives it.
        found = Bootstrap().mean([1.0] * 20, share=True)
        assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.838875, abs=1e-5)
        found = Bootstrap().mean([0.0] * 20, share=True)
        assert (found.value, found.low) == (0.0, 0.0) and found.high == pytest.approx(0.161125, abs=1e-5)
        found = Bootstrap().difference([1.0] * 20, [1.0] * 20, share=True)
        assert (found.low, found.high) == (pytest.approx(-0.161125, abs=1e-5), pytest.approx(0.161125, abs=1e-5))
        found = Bootstrap().difference([1.0] * 20, [0.0] * 20, share=True)
        assert (found.low, found.high) == (pytest.approx(0.838875, abs=1e-5), 1.0)
        # Counts are no shares.
        assert Bootstrap().mean([1.0] * 20).low == 1.0
        assert Bootstrap().mean([1.0, math.nan], share=True).low is None

    def test_equal_seeds_give_equal_intervals(self):
        values = [0.03, 1.7, 0.41, 2.9, 0.77, 5.1]
        assert Bootstrap(200, 3).mean(values) == Bootstrap(200, 3).mean(values)
        assert Bootstrap(200, 3).mean(values) != Bootstrap(200, 4).mean(values)

    def test_comparisons_are_paired(self):
        reference = np.random.default_rng(0).normal(size=100)
        found = Bootstrap().difference(reference + 0.1, reference)
        assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
        found = Bootstrap().ratio(2 * np.abs(reference), np.abs(reference))
        assert (found.value, found.low, found.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))

    def test_unknown_values_are_left_out_of_both(self):
        found = Bootstrap().difference([1.0, math.nan, 3.0], [0.0, 5.0, math.nan])
        assert found.value == 1.0 and found.low is None
        assert Bootstrap().mean([math.nan]).value is None
        assert Bootstrap().ratio([1.0, 2.0], [0.0, 0.0]).value is None

    def test_groups_are_resampled_whole(self):
        """Four batches of a hundred questions are four observations, not four hundred."""
        seconds = np.repeat([1.0, 1.2, 0.8, 1.1], 100)
        batches = np.repeat([0, 1, 2, 3], 100)
        whole, single = Bootstrap().clustered_mean(seconds, batches), Bootstrap().mean(seconds)
        assert whole.value == pytest.approx(single.value)
        assert whole.high - whole.low > 5 * (single.high - single.low)


def test_import_evaluate_is_the_library(tmp_path):
    """Here, where the repository comes first on the path, and in a process that starts in its root."""
    assert evaluate.__file__.endswith("evaluate/__init__.py") and hasattr(evaluate, "load")
    (tmp_path / "evaluate").mkdir()  # the library itself takes seconds to import
    (tmp_path / "evaluate" / "__init__.py").write_text("class Metric: pass\n", encoding="utf-8")
    code = "import evaluate, sys; assert sys.modules['evaluate'] is evaluate; print(evaluate.Metric.__name__)"
    settings = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **settings)
    assert done.stdout == "Metric\n", done.stderr


def test_the_script_runs_from_another_folder(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--baselines" in done.stdout and "full_text" in done.stdout
