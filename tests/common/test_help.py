"""Help is there at once, and says what the heavy modules know."""

import json
import subprocess
import sys

import pytest

import scaledown
from folders import ROOT
from scaledown.common.choices import FORMATS
from scaledown.data.formats import FIELDS

SCRIPTS = {
    "train.py": "--compressor_learning_rate",
    "evaluate.py": "--baselines",
    "prepare_data.py": "--reranker",
    "benchmark.py": "--compressors",
    "app.py": "--share",
}
# Asks each script for its help, all in one process, and tells what that printed and which modules there are then.
ASK = """
import contextlib, io, json, runpy, sys
root, *scripts = sys.argv[1:]
sys.path[0] = root
found = {}
for script in scripts:
    sys.argv = [f"{root}/{script}", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code
    found[script] = code, printed.getvalue(), list(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    command = [sys.executable, "-c", ASK, str(ROOT), *SCRIPTS]
    folder = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script, asked):
    code, printed, imported = asked[script]
    assert not code
    assert SCRIPTS[script] in printed
    assert "argparse" in imported
    assert {"torch", "datasets", "peft", "modeling_scaledown"}.isdisjoint(imported)


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
