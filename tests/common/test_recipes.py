"""The recipes that ship: understood, explained, and as the paper has it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments, parse_arguments

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
OPTIONS = {f.name for c in (ModelArguments, DataArguments, ScaleDownTrainingArguments) for f in fields(c)}
NOT_PUBLISHED = "cpu-smoke"
PUBLISHED = [path for path in RECIPES if path.stem != NOT_PUBLISHED and not path.stem.startswith("embedded")]
OF_THE_PAPER = [path for path in PUBLISHED if not path.stem.startswith("smollm2")]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
published_recipe = pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda path: path.stem)


def parse(recipe, tmp_path):
    argv = [str(recipe), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "train_file" not in settings:  # left to the command line
        argv += ["--train_file", "t.jsonl"]
    if not {"generator_name_or_path", "model_name_or_path"} & settings.keys():
        argv += ["--generator_name_or_path", "g"]
    return parse_arguments(argv)


@every_recipe
def test_every_option_is_known_and_explained(recipe, tmp_path):
    parse(recipe, tmp_path)
    text = recipe.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    explained = re.findall(r"^(\w+): .*\S +# \S", text, flags=re.MULTILINE)
    assert sorted(explained) == sorted(settings)
    assert settings.keys() <= OPTIONS


@pytest.mark.parametrize("recipe", OF_THE_PAPER, ids=lambda path: path.stem)
def test_settings_are_those_of_the_paper(recipe, tmp_path):
    model_args, data_args, args = parse(recipe, tmp_path)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert (args.learning_rate, args.weight_decay, args.warmup_steps, args.max_grad_norm) == (1e-4, 0.1, 0.05, 1.0)
    assert args.lr_scheduler_type == "linear"
    n_layers = model_args.compressor_type == "n_layers"
    assert args.compressor_learning_rate == (5e-5 if n_layers else 1e-4)
    if args.stage == "pretrain":
        assert data_args.streaming and args.max_steps > 0
    else:
        assert args.num_train_epochs == 1 and data_args.max_answer_length == 128
    if model_args.generator_name_or_path is not None:
        assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (16, 32, 0.1)
        sizes = (model_args.chunk_length, model_args.compression_rate, model_args.num_memory_tokens)
        assert sizes == (128, 16, 8)


@published_recipe
def test_every_repository_has_a_commit_or_a_line_to_name_one(recipe):
    text = recipe.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    for side in ("generator", "compressor"):
        pinned = re.fullmatch(r"[0-9a-f]{40}", str(settings.get(f"{side}_revision", "")))
        assert f"{side}_name_or_path" not in settings or pinned or f"# {side}_revision: COMMIT" in text


@pytest.mark.parametrize("name", ["mistral-7b-modernbert", "mistral-7b-llama-1b"])
def test_joint_training_goes_on_from_the_pretrained_folder(name):
    recipes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES}
    assert recipes[name]["model_name_or_path"] == recipes[f"{name}-pretrain"]["output_dir"]
