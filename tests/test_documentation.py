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


def blocks_of(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_in_the_readme(folder):
    blocks = blocks_of("README.md")
    assert len(blocks) == 2
    code = blocks[1].replace('"your-name/your-scaledown"', repr(str(folder)))
    assert "trust_remote_code=True" in code and 'revision="<commit>"' in code
    code = re.sub(r', revision="<commit>"', "", code).replace("max_new_tokens=32", "max_new_tokens=4")
    set_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the project's own README
    assert len(names["answers"]) == len(names["scores"]) == 2
    assert [len(row) for row in names["scores"]] == [2, 1]


def test_the_script_in_the_page_on_training(tmp_path, monkeypatch):
    (block,) = blocks_of("docs/training.md")
    generator = save_generator(tmp_path / "generator")
    write_rows(tmp_path / "train.jsonl", [{"query": "Who?", "documents": ["A heron."], "answer": "A heron"}] * 4)
    monkeypatch.chdir(tmp_path)
    code = block.replace('"mistralai/Mistral-7B-Instruct-v0.2"', repr(str(generator)))
    code = code.replace('    revision="<commit>",\n', "").replace("num_compressor_layers=8", "num_compressor_layers=2")
    exec(compile(code, "training.md", "exec"), {})  # the project's own page
    assert (tmp_path / "runs/mine/model.safetensors").is_file()
    assert ScaleDownModel.from_pretrained(str(tmp_path / "runs/mine")).config.lora_config is None


def test_python_in_the_page_on_use(folder, tmp_path, monkeypatch, capsys):
    blocks = blocks_of("docs/use.md")
    assert len(blocks) == 7
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
    assert names["inputs"]["slot_mask"].any()
    assert names["embeddings"].shape[:2] == names["mask"].shape == (1, names["mask"].shape[1])
    assert names["model"].config.generator_name_or_path == generator


def test_the_embedded_model_in_the_readme(monkeypatch):
    block = blocks_of("README.md")[0]
    monkeypatch.chdir(ROOT)
    code = block.replace("model.answer(", "answer = model.answer(").replace("model.rank(", "ranking = model.rank(")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # the project's own README
    assert f'# "{names["answer"]}"' in block
    assert names["ranking"][0]["corpus_id"] == 0


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_record_that_is_shown_is_in_the_format(page, tmp_path):
    (line,) = blocks_of(page, "json")
    (tmp_path / "records.jsonl").write_text(line, encoding="utf-8")
    (record,) = read_records(tmp_path / "records.jsonl")
    assert record["answer"] == [json.loads(line)["answer"]]


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files of relative links exist, and so do the headings they name."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_modules_and_files_in_commands_exist(page):
    """What a page tells a reader to run is there under that name."""
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (scaledown[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name}: {module}"
    for name in re.findall(
        r"(?:experiments|recipes|tests|scaledown)/[\w./-]*\.(?:py|yaml|sh)\b|\b\w+_scaledown\.py", text
    ):
        assert (ROOT / name).is_file(), f"{page.name}: {name}"
