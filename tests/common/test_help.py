"""Help is there at once, and says what the heavy modules know."""

import subprocess
import sys

import pytest

import scaledown
from folders import ROOT
from scaledown.common.choices import FORMATS
from scaledown.data.formats import FIELDS


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("train.py", "--compressor_learning_rate"),
        ("evaluate.py", "--baselines"),
        ("prepare_data.py", "--reranker"),
        ("benchmark.py", "--compressors"),
        ("app.py", "--share"),
    ],
)
def test_help_needs_no_torch(script, option, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert option in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "datasets", "peft", "modeling_scaledown"})


@pytest.mark.slow
def test_all_options_of_training_are_listed_on_demand(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--help_all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--compressor_learning_rate" in done.stdout
    assert "--lr_scheduler_type" in done.stdout


def test_every_format_that_is_offered_is_read():
    assert set(FORMATS) == {*FIELDS, "columns"}


def test_the_package_offers_its_classes_and_nothing_it_has_not():
    assert scaledown.ScaleDownModel.config_class is scaledown.ScaleDownConfig
    assert "ScaleDownProcessor" in dir(scaledown)
    with pytest.raises(AttributeError, match="ScaleDownTeacher"):
        _ = scaledown.ScaleDownTeacher
