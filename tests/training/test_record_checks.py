"""Records that do not fit are found before the first step."""

import logging

import datasets
import pytest
from combinations import combinations

from folders import TRAINING_SETTINGS, save_backbones, write_rows
from scaledown import ScaleDownError
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.record_checks import doubtful_records, keep_fitting
from scaledown.training.run import run
from scaledown.training.trainer import ScaleDownTrainer
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_model


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))["n_layers"]


def records() -> list[dict]:
    rows = [{"query": q, "documents": d, "answer": a} for q, d, a in zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True)]
    return [*rows[:2], {**rows[2], "query": "why " * 600, "id": "long"}, {**rows[2], "documents": DOCUMENTS[2] * 90}]


def arguments(tmp_path, stage):
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 1}
    settings |= {"gradient_accumulation_steps": 1, "two_stage": stage == "two_stage"}
    if stage != "two_stage":
        settings["stage"] = stage
    return ScaleDownTrainingArguments(output_dir=str(tmp_path / "out"), **settings)


@pytest.mark.parametrize(
    ("stage", "split"),
    combinations(
        ("joint", "two_stage", "reader"),
        ("train", "eval"),
        fast=[("joint", "train"), ("joint", "eval"), ("two_stage", "train"), ("reader", "eval")],
    ),
)
def test_records_that_do_not_fit_are_found_before_the_first_step_or_skipped(
    backbones, tmp_path, monkeypatch, caplog, stage, split
):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    write_rows(good, records()[:2])
    write_rows(bad, records())
    files = {"train_file": str(good), "eval_file": str(good), f"{split}_file": str(bad)}
    model_args = ModelArguments(generator_name_or_path=str(backbones[0]), **TRAINING_SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(ScaleDownTrainer, "train", lambda *args, **kwargs: pytest.fail("a step was taken"))
        patch.setattr("scaledown.training.run.compress_records", lambda *args, **kwargs: pytest.fail("compressed"))
        patch.setattr("scaledown.training.run.ReaderTrainer.train", lambda *a, **k: pytest.fail("a step was taken"))
        with pytest.raises(ScaleDownError, match=rf"{split}_file=.*bad.jsonl.*long.* 1 more of 4 .*too_long=skip"):
            run(model_args, DataArguments(**files), arguments(tmp_path, stage))
    with caplog.at_level(logging.WARNING):
        run(model_args, DataArguments(**files, too_long="skip"), arguments(tmp_path / "skipped", stage))
    assert f"2 of 4 records of {split}_file" in caplog.text


def test_only_doubtful_records_are_tokenized():
    processor = build_model().processor
    doubtful = doubtful_records(processor, 128)
    record = {"query": "Who?", "documents": ["A heron."] * 3, "answer": ["a bird"]}
    assert not doubtful(record)
    assert doubtful({**record, "documents": ["สวัสดี"]})  # perhaps without a token
    assert doubtful({**record, "query": "why " * 200})
    # Whoever is not doubtful fits: the longest of them are tried.
    collate = JointCollator(processor)
    for count in range(1, 200):
        long = {**record, "documents": ["x " * 40] * count}
        if not doubtful(long):
            collate([long])
    assert doubtful(long)


def test_rows_that_do_not_fit_are_found_wherever_they_stand(caplog):
    wrong = [0, 62, 63, 64, 149]

    def collate(rows):
        for row in rows:
            if row["number"] in wrong:
                raise ScaleDownError(f"{row['number']} is too long")

    data = {"train": datasets.Dataset.from_dict({"number": range(150)})}
    settings = DataArguments(train_file="rows.jsonl", too_long="skip")
    kept = keep_fitting(data, collate, lambda row: row["number"] != 149, settings)["train"]
    assert kept["number"] == [number for number in range(150) if number not in wrong[:-1]]  # 149 was not tried
    assert "4 of 150 records of train_file=rows.jsonl are left out; the first: 0 is too long" in caplog.text
    with pytest.raises(ScaleDownError, match=r"rows\.jsonl: 0 is too long 3 more of 150"):
        keep_fitting(data, collate, lambda row: row["number"] != 149, DataArguments(train_file="rows.jsonl"))
