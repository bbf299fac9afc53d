"""Killed at any moment, every stage goes on with the same command, and ends where an uninterrupted run ends."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import rows

from folders import ROOT, TRAINING_SETTINGS, options, save_backbones, write_rows

SETTINGS = {
    **TRAINING_SETTINGS,
    "compressor_type": "modernbert",
    "lora_dropout": 0.1,  # what is random goes on too
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "compression_batch_size": 2,
    "max_shard_size": "4KB",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    save_backbones(folder)
    write_rows(folder / "train.jsonl", rows(repeat=10))
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(words, encoding="utf-8")
    return folder


def start(folder, output, **settings):
    arguments = {
        **SETTINGS,
        "generator_name_or_path": folder / "generator",
        "compressor_name_or_path": folder / "encoder",
        "output_dir": output,
        **settings,
    }
    command = [sys.executable, str(ROOT / "train.py"), *options(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process) -> str:
    text = process.communicate(timeout=280)[0].decode()
    assert process.returncode == 0, text[-4000:]
    return text


def progress(output) -> int:
    """Checkpoints and shards that are there, whole or not."""
    return len(
        [*output.glob("checkpoint-*"), *output.glob("cache/train/*.safetensors"), *output.glob("cache/train/.*")]
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint", "pretrain", "streaming", "compress", "generate"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(folder, tmp_path, stage):
    generator = random.Random(stage)
    settings = {"train_file": folder / ("train.txt" if stage in ("pretrain", "streaming") else "train.jsonl")}
    if stage in ("compress", "generate"):
        settings["two_stage"] = True
    elif stage in ("pretrain", "streaming"):
        settings.update(stage="pretrain", streaming=stage == "streaming")
    finish(start(folder, tmp_path / "whole", **settings))
    kills = 0
    if stage == "generate":  # only the second stage is interrupted
        finish(start(folder, tmp_path / "killed", **{**settings, "two_stage": None, "stage": "compress"}))
    for _ in range(3):
        before = progress(tmp_path / "killed")
        process = start(folder, tmp_path / "killed", **settings)
        while process.poll() is None and progress(tmp_path / "killed") <= before:
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if (tmp_path / "killed" / "all_results.json").exists():
            break
    assert kills >= 1
    if not (tmp_path / "killed" / "all_results.json").exists():
        finish(start(folder, tmp_path / "killed", **settings))
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "killed" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for shard in (tmp_path / "whole" / "cache" / "train").glob("*"):
        assert (tmp_path / "killed" / "cache" / "train" / shard.name).read_bytes() == shard.read_bytes()
