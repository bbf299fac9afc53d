"""What the documentation shows runs."""

import doctest
import json
import re
from pathlib import Path

import pytest
from transformers import set_seed

import configuration_scaledown
import modeling_scaledown
import processing_scaledown
from folders import from_backbones, save_generator, write_rows
from scaledown import ScaleDownModel
from scaledown.data.records import read_records
from tiny import build_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model("n_layers").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "module", [configuration_scaledown, processing_scaledown, modeling_scaledown], ids=lambda m: m.__name__
)
def test_examples_in_docstrings(module, folder):
    result = doctest.testmod(module, extraglobs={"folder": folder}, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_python_in_the_readme(folder, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(blocks[1:3]).replace('"your-name/your-scaledown"', repr(str(folder)))
    assert "trust_remote_code=True" in code and 'revision="<commit>"' in code
    code = re.sub(r', revision="<commit>"', "", code).replace("max_new_tokens=32", "max_new_tokens=4")
    # The tiny model was built for chunks of 32 tokens, the README speaks of 128.
    code = code.replace("compression_rate=32", "compression_rate=16")
    set_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the project's own README
    assert len(names["answers"]) == len(names["scores"]) == 2
    assert [len(row) for row in names["scores"]] == [2, 1]


def test_the_training_script_in_the_readme(tmp_path, monkeypatch):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[3]
    generator = save_generator(tmp_path / "generator")
    write_rows(tmp_path / "train.jsonl", [{"query": "Who?", "documents": ["A heron."], "answer": "A heron"}] * 4)
    monkeypatch.chdir(tmp_path)
    code = block.replace('"mistralai/Mistral-7B-Instruct-v0.2"', repr(str(generator)))
    code = code.replace('    revision="<commit>",\n', "").replace("num_compressor_layers=8", "num_compressor_layers=2")
    exec(compile(code, "README.md", "exec"), {})  # the project's own README
    assert (tmp_path / "runs/mine/model.safetensors").is_file()
    assert ScaleDownModel.from_pretrained(str(tmp_path / "runs/mine")).config.lora_config is None


def test_python_in_the_page_on_use(folder, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/use.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    generator = save_generator(tmp_path / "generator")
    monkeypatch.chdir(tmp_path)
    model = from_backbones((generator, None))
    model.generation_config.max_new_tokens = 4
    generator = str(generator.rename(tmp_path / "elsewhere"))
    model.config.generator_name_or_path = generator
    documents = ["Ivanhoe is a novel by Walter Scott.", "A heron is a bird."]
    names = {"model": model, "documents": documents, "generator": generator}
    exec(compile("\n".join(blocks), "use.md", "exec"), names)  # the project's own page
    assert len(names["output"].documents_read) == 1
    assert names["answer"] == names["output"].answers
    assert names["embeddings"].shape[:2] == names["mask"].shape == (1, names["mask"].shape[1])
    assert names["model"].config.generator_name_or_path == generator


def test_the_embedded_model_in_the_readme(monkeypatch):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    monkeypatch.chdir(ROOT)
    code = block.replace("model.answer(", "answer = model.answer(").replace("model.rank(", "ranking = model.rank(")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the project's own README
    assert f'# "{names["answer"]}"' in block
    assert names["ranking"][0]["corpus_id"] == 0


def test_record_in_the_readme_is_in_the_format(tmp_path):
    (line,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "records.jsonl").write_text(line, encoding="utf-8")
    (record,) = read_records(tmp_path / "records.jsonl")
    assert record["answer"] == [json.loads(line)["answer"]]
