"""A run goes on after it was stopped, and a trained model is trained further."""

import shutil

import pytest
import torch
from combinations import combinations
from tiny_training import build_trainer, model_arguments, rows, training_arguments
from transformers import AutoModel, TrainerCallback

from folders import write_rows
from scaledown.training.arguments import DataArguments, ModelArguments
from scaledown.training.build import build_model as build_model_for_training
from scaledown.training.run import run, train
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    DOCUMENTS,
    QUESTIONS,
    build_model,
)

EVERY_STEP = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished(backbones, tmp_path_factory):
    """A finished run with a checkpoint of every step, to be copied, and the data it learned from."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_rows(folder / "train.jsonl", rows(repeat=4))
    arguments = training_arguments(folder / "run", **EVERY_STEP)
    train(model_arguments(backbones), DataArguments(train_file=str(data)), arguments)
    return folder / "run", data


class StopAt(TrainerCallback):
    """Ends a run without notice, as a power cut would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("weights_format", "sampling"),
    combinations(
        ("full", "delta"), ("random", "group_by_length"), fast=[("full", "random"), ("delta", "group_by_length")]
    ),
)
def test_resumed_run_equals_an_uninterrupted_one(
    backbones, train_file, tmp_path, monkeypatch, weights_format, sampling, caplog
):
    model_args = model_arguments(backbones, weights_format=weights_format, merge_lora=False, lora_dropout=0.1)
    data_args = DataArguments(train_file=str(train_file))
    # Twelve questions in steps of four: the run stops in its second epoch.
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "seed": 3}
    settings["train_sampling_strategy"] = sampling
    whole, _ = train(model_args, data_args, training_arguments(tmp_path / "whole", **settings))

    stopped = training_arguments(tmp_path / "stopped", **settings)
    with monkeypatch.context() as patch:
        original = ScaleDownTrainer.__init__
        patch.setattr(ScaleDownTrainer, "__init__", lambda self, **kw: original(self, **kw, callbacks=[StopAt(5)]))
        with pytest.raises(KeyboardInterrupt):
            train(model_args, data_args, stopped)
    assert not (tmp_path / "stopped" / "config.json").exists()
    torch.manual_seed(99)
    resumed, _ = train(model_args, data_args, training_arguments(tmp_path / "stopped", **settings))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert "missing keys" not in caplog.text


def test_checkpoint_is_a_whole_model_without_pickled_weights(backbones, train_file, tmp_path):
    args = training_arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    trained, _ = train(model_arguments(backbones), DataArguments(train_file=str(train_file)), args)
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_scaledown.py", "processor_config.json"} <= names
    assert not names & {"training_args.bin", "pytorch_model.bin"}
    again = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again.config.lora_config is None
    expected = trained.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4)
    assert again.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4) == expected
    checkpoint = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-2", trust_remote_code=True)
    torch.testing.assert_close(
        checkpoint(**checkpoint.processor(QUESTIONS, DOCUMENTS)).logits,
        again(**again.processor(QUESTIONS, DOCUMENTS)).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_training_goes_on_from_a_trained_model(backbones, train_file, tmp_path):
    data_args = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones, "modernbert"), data_args, training_arguments(tmp_path / "first"))
    further = ModelArguments(model_name_or_path=str(tmp_path / "first"), lora_r=2)
    trained, metrics = train(further, data_args, training_arguments(tmp_path / "second"))
    assert metrics["train_loss"] > 0
    assert trained.config.compressor_type == "modernbert"
    assert (tmp_path / "second" / "model.safetensors").is_file()


def test_parts_of_the_loss_add_up_after_a_resume(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    build_trainer(build_model(lora=True, reranking_loss_weight=0.5), tmp_path, **settings).train()
    trainer = build_trainer(build_model(lora=True, reranking_loss_weight=0.5), tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (line,) = [line for line in trainer.state.log_history if line["step"] == 4 and "loss" in line]
    assert line["loss"] == pytest.approx(line["generation_loss"] + 0.5 * line["reranking_loss"], rel=1e-3)


def test_a_run_that_ended_while_saving_goes_on(backbones, finished, tmp_path):
    whole, train_file = finished
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("all_results.json"))
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file)))
    train(*arguments, training_arguments(tmp_path / "out", **EVERY_STEP))
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(*arguments, training_arguments(tmp_path / "out", **EVERY_STEP))


def trained(backbones, folder, **settings):
    model = build_model_for_training(model_arguments(backbones, **settings), training_arguments(folder))
    model.save_pretrained(folder / "trained")
    return {
        "generator_name_or_path": None,
        "compressor_name_or_path": None,
        "model_name_or_path": str(folder / "trained"),
    }


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_settings_that_may_change_reach_model_processor_and_card(backbones, train_file, tmp_path, weights_format):
    source = trained(backbones, tmp_path, weights_format=weights_format)
    changes = {
        "reranking_loss_weight": 5.0,
        "compression_rate": 16,
        "system_prompt": "Hallo.",
        "weights_format": "delta",
    }
    arguments = ModelArguments(**source, **changes)
    train(arguments, DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out"))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    for name, value in changes.items():
        assert getattr(loaded.config, name) == value
    assert loaded.processor.compression_rate == 16 and loaded.processor.system_prompt == "Hallo."
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| reranking_loss_weight | 5 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_memory_tokens": 2}, "num_memory_tokens=2 cannot be changed in a trained model"),
        ({"compressor_type": "llm"}, "compressor_type=llm cannot be changed"),
        ({"lora_r": 64}, "LoRA has r=4, not 64"),
        ({"generator_revision": "abc"}, "generator_revision=abc says nothing about model_name_or_path"),
        ({"compressor_name_or_path": "x"}, "compressor_name_or_path=x says nothing about model_name_or_path"),
    ],
)
def test_settings_that_cannot_change_are_refused(backbones, train_file, tmp_path, change, message):
    source = trained(backbones, tmp_path)
    with pytest.raises(ValueError, match=message):
        train(
            ModelArguments(**{**source, **change}),
            DataArguments(train_file=str(train_file)),
            training_arguments(tmp_path),
        )


@pytest.mark.parametrize("unread", ["revision", "compressor_revision"])
def test_a_revision_of_nothing_is_refused(backbones, unread):
    with pytest.raises(ValueError, match=f"{unread}=abc says nothing about generator_name_or_path"):
        model_arguments(backbones, **{unread: "abc"})


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_a_delta_of_a_merged_generator_is_refused_before_it_is_trained(finished, tmp_path, stage):
    merged, train_file = finished
    further = ModelArguments(model_name_or_path=str(merged), weights_format="delta")
    with pytest.raises(ValueError, match="its LoRA was merged into it"):
        run(
            further,
            DataArguments(train_file=str(train_file)),
            training_arguments(tmp_path / "out", two_stage=stage == "generate"),
        )


@pytest.mark.parametrize("damage", ["no state", "short weights"])
def test_a_checkpoint_that_was_not_finished_is_left_aside(backbones, finished, tmp_path, damage, caplog):
    whole, train_file = finished
    for step in (1, 2):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    if damage == "no state":
        (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").unlink()
    else:
        weights = tmp_path / "cut" / "checkpoint-2" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    data = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones), data, training_arguments(tmp_path / "cut", **EVERY_STEP))
    assert "checkpoint-2 is not whole" in caplog.text
    expected = AutoModel.from_pretrained(whole).state_dict()
    for name, value in AutoModel.from_pretrained(tmp_path / "cut").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_run_that_was_killed_while_it_saved_its_only_model_starts_anew(backbones, finished, tmp_path):
    whole, train_file = finished
    left_out = ("model.safetensors", "all_results.json", "checkpoint-*")
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns(*left_out))
    data = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones), data, training_arguments(tmp_path / "out", max_steps=1))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_somebody_elses_model_is_not_overwritten(backbones, train_file, tmp_path):
    build_model().save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(
            model_arguments(backbones), DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out")
        )


@pytest.mark.parametrize("change", ["lora_r", "train_file", "learning_rate"])
def test_a_run_goes_on_with_its_own_settings_only(backbones, finished, tmp_path, change):
    whole, train_file = finished
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("all_results.json"))
    settings, data = dict(EVERY_STEP), DataArguments(train_file=str(train_file))
    model = model_arguments(backbones, **({"lora_r": 8} if change == "lora_r" else {}))
    text = train_file.read_text(encoding="utf-8")
    if change == "train_file":
        train_file.write_text(text * 2, encoding="utf-8")
    if change == "learning_rate":
        settings["learning_rate"] = 5.0
    name = {"train_file": "bytes of train_file"}.get(change, change)
    try:
        with pytest.raises(ValueError, match=f"unfinished run of other settings: {name} was"):
            train(model, data, training_arguments(tmp_path / "out", **settings))
    finally:
        train_file.write_text(text, encoding="utf-8")
