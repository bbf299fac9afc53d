"""The package that pyproject.toml describes; `make test-wheel` installs it and tries it outside the checkout."""

import re
import sys
import tomllib
from importlib import import_module
from types import SimpleNamespace

import pytest

from folders import ROOT
from scaledown import commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_every_travelling_file_is_installed():
    assert PROJECT["tool"]["setuptools"]["py-modules"] == sorted(path.stem for path in ROOT.glob("*_scaledown.py"))


def test_every_command_exists():
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


def test_every_requirement_is_pinned():
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt")]
    pinned = {name_of(line) for text in texts for line in text.splitlines() if re.match(r"[\w.-]+==", line)}
    extras = PROJECT["project"]["optional-dependencies"].values()
    required = {name_of(line) for group in [PROJECT["project"]["dependencies"], *extras] for line in group}
    assert required - {"scaledown"} <= pinned


def run_command_that_imports(name: str, monkeypatch) -> int:
    module = SimpleNamespace(main=lambda: import_module(name))
    monkeypatch.setitem(sys.modules, "scaledown.stand_in", module)
    return commands._run("stand_in", "data")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert run_command_that_imports("bm25s", monkeypatch) == 2
    assert capsys.readouterr().err == 'error: the package bm25s is missing: pip install "scaledown[data]"\n'


def test_a_broken_import_keeps_its_traceback(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run_command_that_imports("scaledown.no_such_module", monkeypatch)
