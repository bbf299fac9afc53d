"""What the reranking head learns from, and what is said where it is untrained."""

import json
import logging

import pytest

from folders import TRAINING_SETTINGS, save_backbones, write_rows
from scaledown import ScaleDownConfig, ScaleDownError, ScaleDownModel
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.run import run
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_config, build_model

NOT_LEARNED = "is untrained"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))["n_layers"]


def train(backbones, tmp_path, stage="joint", model=None, **fields):
    rows = [{"query": q, "documents": d, "answer": a} for q, d, a in zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True)]
    for name, values in fields.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    settings = {"max_steps": 2, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "two_stage": stage == "two_stage"}
    tmp_path.mkdir(exist_ok=True)
    args = ScaleDownTrainingArguments(output_dir=str(tmp_path / "out"), **settings)
    start = {"generator_name_or_path": str(backbones[0]), **TRAINING_SETTINGS} if model is None else {}
    model_args = ModelArguments(**start, **({} if model is None else {"model_name_or_path": str(model)}))
    run(model_args, DataArguments(train_file=str(write_rows(tmp_path / "rows.jsonl", rows))), args)
    return tmp_path / "out"


POSITIVES = [[0], None, [2, 1]]


@pytest.mark.parametrize("stage", ["joint", "two_stage"])
def test_positives_stand_in_for_a_teachers_scores(backbones, tmp_path, caplog, stage):
    with caplog.at_level(logging.INFO):
        folder = train(backbones, tmp_path, stage, positives=POSITIVES)
    assert "learns from the positives of 2 of 3 records" in caplog.text
    assert json.loads((folder / "config.json").read_text())["reranking_trained"] is True
    history = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any(row.get("reranking_loss", 0) > 1 for row in history)
    caplog.clear()
    ScaleDownModel.from_pretrained(folder).rank(QUESTIONS[0], DOCUMENTS[0])
    assert NOT_LEARNED not in caplog.text
    assert "| Reranking | yes |" in (folder / "README.md").read_text("utf-8")


def test_what_positives_are_worth():
    processor = build_model().processor
    rows = [{"query": q, "documents": d, "answer": a} for q, d, a in zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True)]
    rows = [{**row, "positives": right} for row, right in zip(rows, POSITIVES, strict=True)]
    labels = JointCollator(processor, scores_from_positives=True)(rows)["reranking_labels"].tolist()
    assert [label for label in labels if label == label] == [2.0, -2.0, -2.0, 2.0, 2.0]
    assert "reranking_labels" not in JointCollator(processor)(rows)


def test_a_head_that_learns_nothing_is_told_of_in_the_log_the_card_and_at_ranking(backbones, tmp_path, caplog):
    folder = train(backbones, tmp_path)
    assert "the reranking head does not learn" in caplog.text
    card = (folder / "README.md").read_text("utf-8")
    assert "the head is untrained" in card and "model.rank" not in card
    model = ScaleDownModel.from_pretrained(folder)
    caplog.clear()
    assert model.rank(QUESTIONS[0], DOCUMENTS[0])
    assert NOT_LEARNED in caplog.text
    # What it is trained further on teaches the head as from the start.
    again = train(backbones, tmp_path / "again", model=folder, reranking_scores=[[1.0, 0.0], None, [0.0, 1.0, 2.0]])
    assert ScaleDownModel.from_pretrained(again).config.reranking_trained is True


def test_a_head_that_learned_from_a_teacher_does_not_learn_from_positives(backbones, tmp_path, caplog):
    scores = [[1.0, 0.0], None, [0.0, 1.0, 2.0]]
    folder = train(backbones, tmp_path, reranking_scores=scores, positives=POSITIVES)
    train(backbones, tmp_path / "again", model=folder, positives=POSITIVES)
    assert "the reranking head stays as it is" in caplog.text


def test_old_checkpoints_do_not_say_and_are_not_warned_of(tmp_path, caplog):
    build_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("reranking_trained", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ScaleDownModel.from_pretrained(tmp_path)
    assert model.config.reranking_trained is None
    model.rank(QUESTIONS[0], DOCUMENTS[0])
    assert NOT_LEARNED not in caplog.text
    with pytest.raises(ScaleDownError, match="reranking_trained='yes' must be"):
        ScaleDownConfig(**{**build_config("n_layers").to_dict(), "reranking_trained": "yes"})
