"""Several processes train the model that one process trains; what FSDP saves is an ordinary model."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_training import rows

from folders import ROOT, TRAINING_SETTINGS, files, load_silently, options, outputs, save_backbones, write_rows
from hub_standin import HubStandIn
from scaledown import ScaleDownError
from scaledown.common.devices import check_processes

CONFIGS = ROOT / "recipes" / "accelerate"
SETTINGS = {
    **TRAINING_SETTINGS,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "compressor_learning_rate": 1e-3,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Backbones, and records of which some have scores."""
    folder = tmp_path_factory.mktemp("distributed")
    save_backbones(folder)
    write_rows(folder / "train.jsonl", rows(repeat=6))
    return folder


def train(folder, output, kind, how, more_environment=None, **settings):
    """Run train.py; `how` is one, ddp or fsdp. Returns its losses by step."""
    compressor = {"n_layers": None, "modernbert": folder / "encoder", "llm": folder / "llm"}[kind]
    arguments = {
        **SETTINGS,
        "generator_name_or_path": folder / "generator",
        "compressor_name_or_path": compressor,
        "compressor_type": kind,
        "train_file": folder / "train.jsonl",
        "gradient_accumulation_steps": 2 if how == "one" else 1,
        "output_dir": output,
        **settings,
    }
    command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(more_environment or {})}
    if how != "one":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if how == "fsdp":
        command += [str(ROOT / "tests" / "cpu_fsdp.py")]
        # What `accelerate launch` makes of the recipe.
        fsdp = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
        environment["ACCELERATE_USE_FSDP"] = "true"
        for name, value in fsdp.items():
            environment[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    command += [str(ROOT / "train.py"), *options(arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    last = max((output / "checkpoint-4", output / "checkpoint-2"), key=lambda path: path.exists())
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {line["step"]: line["loss"] for line in history if "loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint", "generate"])
@pytest.mark.parametrize("kind", ["n_layers", "modernbert"])
def test_two_processes_train_what_one_does(folder, tmp_path, kind, stage):
    settings = {"two_stage": stage == "generate", "cache_dtype": "float32"}
    expected = train(folder, tmp_path / "one", kind, "one", **settings)
    reference = load_silently(tmp_path / "one").state_dict()
    assert len(expected) == 4
    for how in ("ddp", "fsdp"):
        losses = train(folder, tmp_path / how, kind, how, **settings)
        assert losses == pytest.approx(expected, rel=1e-3)
        for name, value in load_silently(tmp_path / how).state_dict().items():
            torch.testing.assert_close(value, reference[name], rtol=1e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    # With FSDP as without, checkpoints are ordinary models, with the same files beside the weights.
    checkpoint = load_silently(tmp_path / "fsdp" / "checkpoint-2")
    assert torch.isfinite(outputs(checkpoint)["logits"]).all()
    ordinary = {name for name in files(tmp_path / "one" / "checkpoint-2") if name.endswith((".json", ".py", ".md"))}
    assert ordinary <= files(tmp_path / "fsdp" / "checkpoint-2")
    assert not [name for name in files(tmp_path / "fsdp") if name.split("/")[-1].startswith(("_fsdp", "pytorch_model"))]


@pytest.mark.slow
def test_fsdp_goes_on_from_its_checkpoint(folder, tmp_path):
    expected = train(folder, tmp_path / "whole", "n_layers", "fsdp", merge_lora=False)
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    checkpoint.parent.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(checkpoint)
    losses = train(folder, tmp_path / "stopped", "n_layers", "fsdp", merge_lora=False)
    assert losses == pytest.approx(expected, rel=1e-5)
    reference = load_silently(tmp_path / "whole").state_dict()
    for name, value in load_silently(tmp_path / "stopped").state_dict().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_fsdp_saves_a_delta(folder, tmp_path):
    train(folder, tmp_path / "delta", "n_layers", "fsdp", weights_format="delta", max_steps=2)
    model = load_silently(tmp_path / "delta")
    assert model.config.weights_format == "delta" and model.config.lora_config is not None


@pytest.mark.slow
def test_fsdp_pushes_the_finished_model(folder, tmp_path):
    with HubStandIn() as hub:
        settings = {"push_to_hub": True, "hub_model_id": "me/model", "max_steps": 2}
        train(folder, tmp_path / "out", "n_layers", "fsdp", hub.environment(tmp_path / "home"), **settings)
        pushed = hub.files("me/model")
    assert pushed["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert json.loads(pushed["config.json"])["lora_config"] is None  # merged, as asked for by default
    assert b"## Training" in pushed["README.md"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_configurations_of_accelerate_are_understood(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 8


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there are devices to share out")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_processes_on_cpus_meet_without_being_told_that_these_are_cpus(folder, tmp_path, launcher):
    settings = {name: value for name, value in SETTINGS.items() if name != "use_cpu"}
    settings |= {"generator_name_or_path": folder / "generator", "train_file": folder / "train.jsonl"}
    settings |= {"gradient_accumulation_steps": 1, "output_dir": tmp_path / "out"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if launcher == "accelerate":
        start = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2"]
    evaluation = {"model": tmp_path / "out", "data": folder / "train.jsonl", "output_dir": tmp_path / "measured"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script, arguments in (("train.py", settings), ("evaluate.py", {**evaluation, "max_new_tokens": 4})):
        command = [sys.executable, *start, str(ROOT / script), *options(arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == 4 / 5  # a step takes two records in each of two processes, of 18
    assert json.loads((tmp_path / "measured" / "metrics.json").read_text())["hardware"]["processes"] == 2


def test_processes_that_did_not_meet_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ScaleDownError, match=r"WORLD_SIZE=2.* in a group of 1"):
        check_processes(1)
