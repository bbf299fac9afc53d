"""Evaluation during training: losses, answers, the best checkpoint, and patience."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import build_trainer, model_arguments, rows, training_arguments

from scaledown import ScaleDownProcessor
from scaledown.data.records import write_records
from scaledown.training.arguments import DataArguments
from scaledown.training.collators import JointCollator
from scaledown.training.run import run
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    DOCUMENTS,
    QUESTIONS,
    build_model,
    randomize_lora,
)


def test_evaluation_reports_both_losses(tmp_path):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, per_device_eval_batch_size=1)
    metrics = trainer.evaluate(rows())
    batches = [model(**JointCollator(model.processor)([row])) for row in rows()]
    expected = sum(b.generation_loss for b in batches).item() / 3
    assert metrics["eval_generation_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_reranking_loss"] > 0


def test_evaluation_after_training_does_not_use_the_counts_of_training(tmp_path):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, learning_rate=0.0, compressor_learning_rate=0.0, weight_decay=0.0)
    before = trainer.evaluate(rows())
    trainer.train()
    after = trainer.evaluate(rows())
    for name in ("eval_loss", "eval_generation_loss", "eval_reranking_loss"):
        assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_parts_of_the_evaluation_loss_add_up_when_batches_are_uneven(tmp_path):
    model = build_model(lora=True, reranking_loss_weight=0.5)
    trainer = build_trainer(model, tmp_path, per_device_eval_batch_size=2)
    scored = [row for row in rows(2) if row["reranking_scores"] is not None]
    metrics = trainer.evaluate(scored[:3])
    expected = metrics["eval_generation_loss"] + 0.5 * metrics["eval_reranking_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def answer_by_heart(monkeypatch, answers):
    """The model answers as it is told, whatever it reads."""

    def decode_answers(self, sequences, prompt_length=0):
        taken = [answers[(decode_answers.count + i) % len(answers)] for i in range(len(sequences))]
        decode_answers.count += len(sequences)
        return taken

    decode_answers.count = 0
    monkeypatch.setattr(ScaleDownProcessor, "decode_answers", decode_answers)


@pytest.mark.parametrize("form", [list, "".join])  # as a list, and as plain text
def test_evaluation_answers_and_compares(tmp_path, monkeypatch, form):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2)
    answer_by_heart(monkeypatch, ["walter scott.", "In the Cévennes", "no idea"])
    metrics = trainer.evaluate([{**row, "answer": form(row["answer"])} for row in rows()])
    assert metrics["eval_exact_match"] == pytest.approx(1 / 3)
    assert metrics["eval_match"] == pytest.approx(1 / 3)
    # "in cévennes" against "in cévennes 1006 kilometres": 2 of 2 and 2 of 4.
    assert metrics["eval_f1"] == pytest.approx((1 + 2 * 2 / 6) / 3)
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_answers_are_compared_with_the_gold_ones_not_with_the_teachers(backbones, tmp_path, monkeypatch, stage):
    path = tmp_path / "data.jsonl"
    gold = [["Walter Scott"], None, ["a bird", "x"]]
    write_records(path, [{**row, "gold_answers": right} for row, right in zip(rows(), gold, strict=True)])
    answer_by_heart(monkeypatch, ["walter scott.", "In the Cévennes; 1,006 kilometres", "a bird"])
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 2, "max_steps": 1}
    args = training_arguments(tmp_path / "out", two_stage=stage == "generate", **settings)
    data = DataArguments(train_file=str(path), eval_file=str(path))
    assert run(model_arguments(backbones), data, args)["eval_exact_match"] == 1.0


def test_compute_metrics_gets_the_logits_and_labels_of_the_answers(tmp_path):
    model = build_model(lora=True)
    seen = []

    def compute_metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        seen.append((logits, labels))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return {"cross_entropy": loss.item()}

    trainer = ScaleDownTrainer(
        model=model,
        args=training_arguments(tmp_path, per_device_eval_batch_size=2),
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        data_collator=JointCollator(model.processor),
        processing_class=model.processor,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_cross_entropy"] == pytest.approx(metrics["eval_generation_loss"], rel=1e-4)
    assert trainer.evaluate(rows())["eval_cross_entropy"] > 0  # batches of different lengths
    assert seen[1][0].shape[:2] == seen[1][1].shape and len(seen[1][0]) == 3


def test_answers_of_the_evaluation_are_those_of_inference(tmp_path, monkeypatch):
    model = randomize_lora(build_model(lora=True))
    given = []
    original = ScaleDownProcessor.decode_answers

    def decode_answers(self, *args):
        given.extend(original(self, *args))
        return given[-len(args[0]) :]

    monkeypatch.setattr(ScaleDownProcessor, "decode_answers", decode_answers)
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 2, "generation_max_new_tokens": 5}
    build_trainer(model, tmp_path, **settings).evaluate(rows())
    monkeypatch.undo()
    assert given == model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_the_best_checkpoint_is_kept_and_training_stops_early(backbones, train_file, tmp_path, stage):
    settings = {
        "two_stage": stage == "generate",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 12,
        # So high that the loss grows at once; the first steps are the best.
        "learning_rate": 100.0,
        "compressor_learning_rate": 100.0,
        "warmup_steps": 0,
        "early_stopping_patience": 2,
        "metric_for_best_model": "generation_loss",
        "greater_is_better": False,
    }
    data = DataArguments(train_file=str(train_file), eval_file=str(train_file))
    arguments = model_arguments(backbones, "modernbert", merge_lora=False)
    args = training_arguments(tmp_path / "out", **settings)
    metrics = run(arguments, data, args)
    losses = {}
    for file in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        for line in json.loads(file.read_text(encoding="utf-8"))["log_history"]:
            if "eval_loss" in line:
                losses[line["step"]] = line["eval_generation_loss"]
    assert len(losses) < 12
    best = min(losses, key=losses.get)
    assert metrics["eval_generation_loss"] == pytest.approx(losses[best], rel=1e-4)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors").items():
        assert torch.equal(saved[name], value), name


def test_answers_are_not_asked_for_where_there_are_no_questions(tmp_path):
    with pytest.raises(ValueError, match="needs answers, and the stage pretrain has none"):
        training_arguments(tmp_path, stage="pretrain", predict_with_generate=True)


def test_patience_goes_on_where_it_was(backbones, train_file, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 8,
        "learning_rate": 100.0,
        "compressor_learning_rate": 100.0,
        "warmup_steps": 0,
        "early_stopping_patience": 3,
    }
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file), eval_file=str(train_file)))
    run(*arguments, training_arguments(tmp_path / "whole", **settings))
    last = len(list((tmp_path / "whole").glob("checkpoint-*")))
    assert last < 8
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [tmp_path / "cut" / "all_results.json", *(tmp_path / "cut").glob(f"checkpoint-{last}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The checkpoints name the best one by its path.
    for file in (tmp_path / "cut").glob("checkpoint-*/trainer_state.json"):
        file.write_text(file.read_text("utf-8").replace(str(tmp_path / "whole"), str(tmp_path / "cut")), "utf-8")
    shutil.copytree(tmp_path / "cut", tmp_path / "longer")
    run(*arguments, training_arguments(tmp_path / "cut", **settings))
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == last
    settings["early_stopping_patience"] = 5  # of the command that goes on, not of the one that was stopped
    run(*arguments, training_arguments(tmp_path / "longer", **settings))
    assert len(list((tmp_path / "longer").glob("checkpoint-*"))) == last + 2
