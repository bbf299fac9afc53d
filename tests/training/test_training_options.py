"""Options and recipes of train.py: what they become, and what is refused."""

import re
import subprocess
import sys

import pytest
import torch
from tiny_training import model_arguments, training_arguments
from transformers import TrainingArguments

from folders import ROOT
from scaledown.training.arguments import DataArguments, ScaleDownTrainingArguments, parse_arguments
from scaledown.training.finish import recorded_settings
from scaledown.training.run import main, train
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    build_model,
)


def test_command_line_trains_from_recipe_and_overrides(backbones, train_file, tmp_path, capsys):
    argv = [str(ROOT / "recipes" / "cpu-smoke.yaml"), "--generator_name_or_path", str(backbones / "generator")]
    argv += ["--train_file", str(train_file), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    assert main([*argv, "--save_steps", "100", "--eval_file", str(train_file), "--disable_tqdm", "true"]) == 0
    printed = capsys.readouterr().out
    assert "train_loss" in printed and "eval_generation_loss" in printed
    assert main(argv) == 2
    assert "holds a finished model" in capsys.readouterr().err


def test_recipe_values_have_the_options_types(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "generator_name_or_path: g\ntrain_file: t.jsonl\nlearning_rate: 1e-3\nlora_r: 4\nenable_reranking: false\n"
        "use_cpu: true\n"
    )
    model_args, data_args, args = parse_arguments([str(recipe), "--lora_r", "8"])
    assert (model_args.lora_r, model_args.enable_reranking) == (8, False)
    assert (args.learning_rate, args.compressor_learning_rate) == (1e-3, None)
    assert data_args.train_file == "t.jsonl"


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1\n", "did you mean learning_rate"),
        ("- a\n", "not a recipe"),
        ("train_file: t.jsonl\n", "Name either model_name_or_path"),
        ("generator_name_or_path: g\n", "train_file is missing"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, capsys, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main([str(recipe)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--eval_strategy", "steps"], "set eval_file"),
        (["--resume_from_checkpoint", "nowhere"], "is not a folder"),
        (["--compressor_type", "llm"], "does not go with compressor_type"),
        (["--num_compressor_layers", "9"], "exceeds the generator's 2 layers"),
        (["--metric_for_best_model", "f2"], "expected one of loss, generation_loss, reranking_loss, pointer_loss."),
        (["--metric_for_best_model", "generation_loss", "--stage", "reader"], "expected one of loss."),
        (
            ["--metric_for_best_model", "generation_loss", "--stage", "pointer", "--slot_pooling", "pointer"],
            "expected one of loss, reranking_loss, pointer_loss.",
        ),
    ],
)
def test_wrong_options_are_named(backbones, train_file, tmp_path, capsys, options, message):
    argv = ["--generator_name_or_path", str(backbones / "generator"), "--train_file", str(train_file)]
    argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert main([*argv, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_malformed_data_names_file_and_line(backbones, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "q", "documents": ["d"], "answer": "a"}\n{"query": "q"}\n')
    argv = ["--generator_name_or_path", str(backbones / "generator"), "--train_file", str(path)]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]) == 2
    assert f"{path}, line 2" in capsys.readouterr().err


def test_help_from_another_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0
    assert "--compressor_learning_rate" in result.stdout


def test_named_modules_get_lora(backbones, train_file, tmp_path):
    settings = model_arguments(backbones, lora_target_modules="q_proj, v_proj", merge_lora=False)
    model, _ = train(settings, DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out"))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"two_stage": True, "stage": "pretrain"}, "contradicts"),
        ({"stage": "pretrain", "train_sampling_strategy": "group_by_length"}, "passages are of one length"),
        ({"two_stage": True, "train_sampling_strategy": "batch_rebalance"}, "does not work on a cache"),
        ({"metric_for_best_model": "f1"}, "set predict_with_generate"),
        ({"metric_for_best_model": "eval_exact_match"}, "set predict_with_generate"),
        ({"early_stopping_patience": 2}, "set eval_strategy"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"data_seed": 2**32}, "expected less than"),
    ],
)
def test_what_is_not_supported_is_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **settings)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_no_run_has_left_yet_is_not_looked_up(train_file, tmp_path, monkeypatch, capsys, dry_run):
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / "recipes" / "mistral-7b-modernbert.yaml"), "--train_file", str(train_file), "--use_cpu", "true"]
    assert main([*argv, "--dry_run", str(dry_run)]) == 2
    assert "runs/mistral-7b-modernbert-pretrain is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generator_name_or_path", "runs/nothere"], "generator_name_or_path=runs/nothere is not a folder"),
        (["--generator_name_or_path", "/no/such"], "generator_name_or_path=/no/such is not a folder"),
        (["--generator_name_or_path", "nobody/nothing"], "generator_name_or_path.* nobody/nothing.*cannot be loaded"),
    ],
)
def test_a_name_or_folder_that_is_not_there_is_named_with_its_option(
    train_file, tmp_path, monkeypatch, capsys, options, message, dry_run
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = ["--train_file", str(train_file), "--use_cpu", "true", "--report_to", "none", *options]
    assert main([*argv, "--dry_run", str(dry_run)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("generator_name_or_path=nobody", "generator_name_or_path nobody"))
    assert not dry_run or "configuration and tokenizer" in error


def test_lists_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "scaledown.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard", "wandb"]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text("report_to: [tensorboard, wandb]\nlora_target_modules: [q_proj, v_proj]\nlabel_names: [labels]\n")
    model_args, _, args = parse_arguments([str(path), "--generator_name_or_path", "x", "--train_file", "y"])
    assert (args.report_to, args.label_names) == (["tensorboard", "wandb"], ["labels"])
    assert model_args.lora_target_modules == "q_proj,v_proj"


@pytest.mark.parametrize(
    "line, message",
    [
        ("stage: pretraining", "sets stage to 'pretraining'; expected one of joint, pretrain"),
        ("stage: [", "is not YAML"),
        ("load_in_4bit: maybe", "sets load_in_4bit to 'maybe'; expected true or false"),
    ],
)
def test_mistakes_in_a_recipe_are_told(tmp_path, line, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path), "--generator_name_or_path", "x", "--train_file", "y"])


def test_a_bare_no_in_a_recipe_is_the_word(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("save_strategy: no\neval_strategy: no\nmerge_lora: no\n", encoding="utf-8")
    model_args, _, args = parse_arguments(
        [str(path), "--generator_name_or_path", "x", "--train_file", "y", "--output_dir", str(tmp_path)]
    )
    assert args.save_strategy == "no" and args.eval_strategy == "no" and model_args.merge_lora is False


@pytest.mark.parametrize("count", [0, -3])
def test_a_number_of_examples_below_one_is_refused(count):
    with pytest.raises(ValueError, match=f"max_train_examples is {count}, expected at least 1"):
        DataArguments(train_file="x", max_train_examples=count)


def test_plain_training_arguments_are_refused(tmp_path):
    model = build_model(lora=True)
    with pytest.raises(TypeError, match="must be ScaleDownTrainingArguments, got TrainingArguments"):
        ScaleDownTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name):
    argv = ["--generator_name_or_path", "x", "--train_file", "y", "--output_dir", str(tmp_path), "--report_to", name]
    monkeypatch.setattr("scaledown.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=f"report_to={name} needs {name}.*pip install {name}"):
        parse_arguments(argv)
    monkeypatch.setattr("scaledown.training.arguments.get_available_reporting_integrations", lambda: [name])
    assert parse_arguments(argv)[-1].report_to == [name]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
        ({"fp16": False}, torch.float32),
        ({"bf16": False, "fp16": False}, torch.float32),
        ({"fp16": True}, torch.float16),
    ],
)
def test_only_an_unset_precision_is_chosen_on_a_gpu(tmp_path, monkeypatch, settings, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    args = ScaleDownTrainingArguments(output_dir=str(tmp_path), report_to=[], **settings)
    assert args.generator_dtype == dtype
    assert isinstance(args.bf16, bool) and isinstance(args.fp16, bool)


def test_precision_is_read_from_the_command_line():
    argv = ["--generator_name_or_path", "x", "--train_file", "y", "--report_to", "none"]
    *_, args = parse_arguments([*argv, "--bf16", "false", "--fp16", "no"])
    assert args.precision_is_set and args.generator_dtype == torch.float32
    assert not parse_arguments(argv)[-1].precision_is_set


def test_the_card_lists_no_setting_that_the_trainer_fills_in(tmp_path):
    args = training_arguments(tmp_path, bf16=None, fp16=None)
    loader = {"dataloader_num_workers", "dataloader_pin_memory"}
    assert not {"disable_tqdm", "bf16", "fp16", "output_dir", *loader} & recorded_settings(args).keys()
    assert recorded_settings(args)["max_steps"] == args.max_steps
