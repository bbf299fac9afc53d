"""The package that pyproject.toml describes; `make test-wheel` installs it and tries it outside the checkout."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
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


def test_the_extra_all_holds_every_extra_of_users_and_the_readme_names_each():
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    names = re.fullmatch(r"scaledown\[(.*)\]", everything)[1].split(",")
    assert set(names) == set(extras) - {"all", "dev"}
    (line,) = re.findall(r'pip install "\.\[.*', (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(names) <= set(re.findall(r"[\w-]+", line))


def run_command_that_imports(name: str, monkeypatch) -> int:
    module = SimpleNamespace(main=lambda: import_module(name))
    monkeypatch.setitem(sys.modules, "scaledown.stand_in", module)
    return commands._run("stand_in", "data")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert run_command_that_imports("bm25s", monkeypatch) == 2
    assert capsys.readouterr().err == 'error: the package bm25s is missing: pip install ".[data]" in the checkout\n'


def test_a_broken_import_keeps_its_traceback(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run_command_that_imports("scaledown.no_such_module", monkeypatch)


def packages_of(extra: str) -> set[str]:
    """What an extra installs, the package's own requirements included."""
    names = set(map(name_of, PROJECT["project"]["dependencies"]))
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        others = re.fullmatch(r"scaledown\[(.*)\]", requirement)
        names |= set().union(*map(packages_of, others[1].split(","))) if others else {name_of(requirement)}
    return names


# Reading what every installed package holds takes long.
distributions_of_packages = functools.cache(packages_distributions)


@functools.cache
def imported_at_once(module: str) -> set[str]:
    """The modules that a module of ours imports when it is loaded, not those imported inside functions."""
    path = Path(ROOT, *module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    names, nodes = set(), ast.parse(path.read_text(encoding="utf-8")).body
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*folders, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


def packages_needed_by(module: str) -> set[str]:
    """The packages without which a module of ours cannot be loaded."""
    seen, waiting, needed = set(), [module], set()
    distributions = distributions_of_packages()
    while waiting:
        name = waiting.pop()
        top, path = name.partition(".")[0], Path(ROOT, *name.split("."))
        if top != "scaledown" and not top.endswith("_scaledown"):
            if top not in sys.stdlib_module_names:
                needed |= set(map(name_of, distributions.get(top, [top])))
        elif name not in seen and (path.is_dir() or path.with_suffix(".py").is_file()):
            seen.add(name)
            waiting += imported_at_once(name)
    return needed


EXTRAS = {
    "training.run": "train",
    "evaluation.evaluate": "eval",
    "data.preparation": "data",
    "benchmark.run": "eval",
    "serving.serve": "serve",
    "app.launch": "app",
}
# Parts of fastapi, which brings them.
BROUGHT = {"pydantic", "starlette"}
# Packages of one option or mode alone, which others must do without.
OPTIONAL = {"bm25s", "openai", "pystemmer", "scipy", "sentence-transformers"}


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items(), ids=EXTRAS)
def test_a_command_needs_the_packages_of_its_extra_alone(module, extra):
    needed = packages_needed_by(f"scaledown.{module}")
    assert {"torch", "transformers"} <= needed
    assert needed - BROUGHT <= packages_of(extra)
    if extra != "serve":
        assert not needed & OPTIONAL


@pytest.mark.slow
def test_commands_load_without_the_packages_of_other_modes():
    blocked = "for name in ('bm25s', 'openai', 'scipy', 'sentence_transformers', 'sklearn', 'Stemmer', 'matplotlib'"
    code = f"""
import sys
{blocked}, 'evaluate', 'ir_measures'): sys.modules[name] = None
import scaledown.training.run
for name in ('evaluate', 'ir_measures', 'matplotlib'): del sys.modules[name]
import scaledown.benchmark.run, scaledown.data.preparation, scaledown.evaluation.evaluate
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
