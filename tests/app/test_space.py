"""What space/README.md tells Hugging Face is true of this repository."""

import re
import shutil
import subprocess
import sys

import yaml

from folders import ROOT

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


def test_what_it_lists_is_all_the_page_needs(tmp_path):
    """A folder of the files that are named, and no others, loads the model and answers."""
    listed = TEXT.rpartition("What the page needs of it:")[2]
    names = re.findall(r"`([^`]+)`", listed)
    assert "app.py" in names and "model.safetensors" in names
    for name in names:
        found = list(ROOT.glob(name.rstrip("/")))
        assert found, name
        for path in found:
            if path.is_dir():
                shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, tmp_path)
    code = """
from scaledown.app.answers import Answerer, Request
from scaledown.app.arguments import ROOT, AppArguments
from scaledown.app.examples import draw_examples
from scaledown.app.model import load
example = draw_examples()[0]
*_, answers = Answerer(load(AppArguments())).answer(Request(example.question, example.passages))
print(ROOT, answers.from_slots.answer == example.answer)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"{tmp_path} True", done.stderr
