"""The notebook: clean as committed, its commands known, and in its demo mode running from top to bottom offline."""

import os
import re
import shutil
import sys
from dataclasses import fields

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from folders import ROOT
from scaledown.data.arguments import PreparationArguments
from scaledown.evaluation.arguments import EvaluationArguments
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments

NOTEBOOK = ROOT / "notebooks" / "ScaleDown_Colab.ipynb"
ARGUMENTS = {
    "train.py": (ModelArguments, DataArguments, ScaleDownTrainingArguments),
    "prepare_data.py": (PreparationArguments,),
    "evaluate.py": (EvaluationArguments,),
}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_holds_no_output(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
    assert sources(notebook)[0].startswith("DEMO = True")


def test_the_address_to_clone_is_asked_for(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install = next(source for source in sources(notebook) if "git clone" in source)
    code = TransformerManager().transform_cell(install)
    with pytest.raises(RuntimeError, match="Set REPOSITORY"):
        exec(compile(code, "notebook", "exec"), {"REPOSITORY": "", "get_ipython": lambda: None})  # our own notebook


def test_every_cell_compiles(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(TransformerManager().transform_cell(cell.source), cell.id, "exec")


def test_every_option_of_a_command_exists(notebook):
    commands = []
    for source in sources(notebook):
        commands += re.findall(r"^!python (\w+\.py)(.*)$", source.replace("\\\n", ""), flags=re.MULTILINE)
    commands += [("prepare_data.py", text) for text in re.findall(r"_QUESTIONS = f?\"(.*)\"", sources(notebook)[0])]
    assert {script for script, _ in commands} == set(ARGUMENTS)
    for script, rest in commands:
        known = {field.name for arguments in ARGUMENTS[script] for field in fields(arguments)}
        assert set(re.findall(r"--(\w+)", rest)) <= known, script


@pytest.mark.slow
def test_the_demo_runs_from_top_to_bottom_without_a_network(notebook, tmp_path, monkeypatch):
    for name in ("scaledown", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "model_card.md"]:
        shutil.copy(path, tmp_path)
    # Commands of the notebook are to be those of this Python, as in an environment that is active.
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nobody answers
    from nbclient import NotebookClient  # which takes long to import

    client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path / "notebooks")}})
    client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    text = {name: "".join(output.get("text", "") for output in given) for name, given in outputs.items()}
    for name, printed in text.items():
        assert not re.search(r"^(error:|Traceback)", printed, flags=re.MULTILINE), (name, printed[-3000:])
    for answer in ("Walter Scott", "in the Cévennes", "in 1819"):
        assert answer in text["three-answers"]
    (table,) = (output for output in outputs["answers"] if output.output_type == "execute_result")
    for column in ("question", "right", "compressed", "full_text", "no_documents"):
        assert f"<th>{column}</th>" in table.data["text/html"]
    for plot in ("loss", "reranking"):
        assert any("image/png" in output.get("data", {}) for output in outputs[plot]), plot
    run = tmp_path / "runs" / "notebook-demo"
    assert (run / "model" / "config.json").is_file() and (run / "evaluation" / "metrics.json").is_file()
    assert not list(run.glob("*/cache")) and not list(run.glob("*/checkpoint-*"))
