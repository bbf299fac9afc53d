"""What space/README.md tells Hugging Face is true of this repository."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from folders import ROOT
from scaledown.app.answers import Answerer, Request
from scaledown.app.arguments import AppArguments
from scaledown.app.examples import draw_examples
from scaledown.app.model import load

PAGE = (ROOT / "space/README.md").read_text(encoding="utf-8")
_, FRONT_MATTER, TEXT = PAGE.split("---\n", 2)


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_metadata_names_what_is_here():
    metadata = yaml.safe_load(FRONT_MATTER)
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] == pins("requirements-app.txt")["gradio"]
    assert metadata["python_version"] == "3.11"
    assert (ROOT / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60  # the Hub refuses longer ones
    assert {"torch", "transformers", "peft"} <= pins("requirements.txt").keys()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder of the files that are named, and no others."""
    folder = tmp_path_factory.mktemp("space")
    listed = TEXT.rpartition("What the page needs of it:")[2]
    names = re.findall(r"`([^`]+)`", listed)
    assert "app.py" in names and "model.safetensors" in names
    for name in names:
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, name
        for path in found:
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder)
    return folder


def test_the_modules_it_lists_import_no_others_of_ours(space):
    ours = {path.stem for path in ROOT.glob("*.py")} - {"evaluate"} | {"tests", "experiments"}  # a library's name too
    imported = set()
    for path in space.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert "modeling_scaledown" in imported
    assert imported & ours <= {path.stem for path in space.glob("*.py")}


def test_the_model_it_lists_answers(space):
    example = draw_examples()[0]
    request = Request(example.question, example.passages)
    *_, answers = Answerer(load(AppArguments(model=str(space)))).answer(request)
    assert answers.from_slots.answer == example.answer


@pytest.mark.slow
def test_what_it_lists_is_all_the_page_needs(space):
    """In a process that starts there and sees nothing of the repository."""
    code = """
from scaledown.app.answers import Answerer, Request
from scaledown.app.arguments import ROOT, AppArguments
from scaledown.app.examples import draw_examples
from scaledown.app.model import load
example = draw_examples()[0]
*_, answers = Answerer(load(AppArguments())).answer(Request(example.question, example.passages))
print(ROOT, answers.from_slots.answer == example.answer)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"{space} True", done.stderr
