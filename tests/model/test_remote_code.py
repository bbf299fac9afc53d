"""What travels with the weights runs by itself: in processes that know nothing of this repository."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from folders import CODE, ISOLATION_CHECK, ROOT, from_backbones, outputs, save_backbones
from tiny import DOCUMENTS, QUESTIONS, build_model, randomize_lora

# Goes before every script below.
PREAMBLE = f"""
import json, logging, sys

QUESTIONS, DOCUMENTS = {QUESTIONS!r}, {DOCUMENTS!r}
warnings = []


class Warnings(logging.Handler):
    def emit(self, record):
        if not record.name.startswith("bitsandbytes"):  # which peft imports, and which says what it lacks itself
            warnings.append(record.getMessage())


for name in ("", "transformers"):
    logging.getLogger(name).addHandler(Warnings(logging.WARNING))

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer


{ISOLATION_CHECK}


def run(model, file):
    with torch.no_grad():
        out = model(**model.processor(QUESTIONS, DOCUMENTS))
    tensors = {{"logits": out.logits, "memory_embeddings": out.memory_embeddings, "scores": out.reranking_scores}}
    save_file(tensors, file)
"""


def run_elsewhere(script: str, folder: Path, *arguments) -> dict:
    """Runs a script in a process of its own, in an empty folder, offline; returns what it printed last, as JSON."""
    work = folder / "elsewhere"
    work.mkdir(exist_ok=True)
    file = work / "script.py"
    file.write_text(PREAMBLE + textwrap.dedent(script), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(
        [sys.executable, "-I", str(file), *map(str, arguments)],
        cwd=work,
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def assert_same(file: Path, expected: dict):
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Not to the last bit: how a product is shared out among threads depends on how busy the machine is.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{file.name} {name}")


# -- the files ---------------------------------------------------------------------------------------------------------


# torch and what transformers itself cannot do without.
PACKAGES = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}


@pytest.mark.parametrize("name", sorted(CODE))
def test_imports_of_the_files_that_travel(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    guarded = {node for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in ast.walk(outer)}
    allowed = PACKAGES | set(sys.stdlib_module_names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), ast.unparse(node)
            continue
        packages = {module.split(".")[0] for module in modules}
        own = {Path(file).stem for file in CODE}
        assert packages <= allowed | (own | {"gguf", "jinja2", "peft"} if node in guarded else set()), ast.unparse(node)


@pytest.mark.parametrize("name", sorted(CODE))
def test_transformers_own_scanner_agrees(name):
    """It is a regular expression that docstrings can mislead; what it finds must be installed at the user's."""
    assert set(get_imports(ROOT / name)) - set(sys.stdlib_module_names) <= PACKAGES
    assert {Path(file).name for file in get_relative_import_files(ROOT / name)} <= set(CODE)


def test_saved_code_is_the_code_of_the_repository(tmp_path):
    build_model().save_pretrained(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")) == sorted(CODE)
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


# -- in processes of their own -----------------------------------------------------------------------------------------


def save(model, folder, **kwargs) -> dict[str, torch.Tensor]:
    """Saves a model and returns what it gives."""
    model.save_pretrained(folder, **kwargs)
    return outputs(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a model saved with LoRA unmerged and merged, and what each gives."""
    folder = tmp_path_factory.mktemp("remote")
    expected = {}
    model = randomize_lora(build_model("n_layers", lora=True))
    expected["unmerged"] = save(model, folder / "unmerged")
    model.merge_lora()
    expected["answers"] = model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6, do_sample=False)
    expected["ranking"] = [item["corpus_id"] for item in model.rank(QUESTIONS[2], DOCUMENTS[2])]
    expected["merged"] = save(model, folder / "merged")
    return folder, expected


@pytest.fixture(scope="module")
def saved_in_other_ways(saved):
    """The same folder with deltas, other kinds and another architecture too."""
    folder, expected = saved
    backbones = save_backbones(folder / "backbones")
    others = {}
    for kind in ("modernbert", "llm"):
        model = randomize_lora(_with_lora(from_backbones(backbones[kind])))
        others[kind] = save(model, folder / kind, weights_format="delta")
    others["gemma"] = save(build_model("modernbert", generator="gemma", compressor="bert"), folder / "gemma")
    return folder, {**expected, **others}


def _with_lora(model):
    model.add_lora(r=4)
    return model


@pytest.fixture(scope="module")
def elsewhere(saved):
    """A process without peft that loads the merged model in every way, uses it and saves it again."""
    folder, _ = saved
    return run_elsewhere(
        """
        sys.modules["peft"] = None  # as if it were not installed
        folder, again, out = sys.argv[1:4]
        config = AutoConfig.from_pretrained(folder + "/merged", trust_remote_code=True)
        assert type(config).__module__.startswith("transformers_modules."), type(config)
        model = AutoModel.from_pretrained(folder + "/merged", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.") and not model.training
        causal = AutoModelForCausalLM.from_pretrained(folder + "/merged", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder + "/merged", trust_remote_code=True)
        assert type(processor).__name__ == "ScaleDownProcessor"
        tokenizer = AutoTokenizer.from_pretrained(folder + "/merged", trust_remote_code=True)
        assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        run(model, out + "/auto_model.safetensors")
        run(causal, out + "/auto_causal.safetensors")
        batch = processor(QUESTIONS, DOCUMENTS)
        sequences = causal.generate(**batch, max_new_tokens=6, do_sample=False)
        result = {
            "answers": model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=6, do_sample=False),
            "generated": processor.decode_answers(sequences, batch["input_ids"].shape[1]),
            "ranking": [item["corpus_id"] for item in model.rank(QUESTIONS[2], DOCUMENTS[2])],
        }
        model.save_pretrained(again)
        try:
            AutoModel.from_pretrained(folder + "/unmerged", trust_remote_code=True)
        except ImportError as error:
            result["without_peft"] = str(error)
        check_isolated()
        print(json.dumps({**result, "warnings": warnings}))
        """,
        folder,
        folder,
        folder / "again",
        folder,
    )


def test_a_merged_model_runs_without_the_repository_and_without_peft(saved, elsewhere):
    folder, expected = saved
    result = elsewhere
    assert result["warnings"] == []
    assert_same(folder / "auto_model.safetensors", expected["merged"])
    assert_same(folder / "auto_causal.safetensors", expected["merged"])
    assert result["answers"] == result["generated"] == expected["answers"]
    assert result["ranking"] == expected["ranking"]
    assert "pip install peft" in result["without_peft"]

    # What is saved over there is complete: it could be pushed, and loads over here and in the third process below.
    names = {path.relative_to(folder / "merged").as_posix() for path in (folder / "merged").rglob("*")}
    assert {path.relative_to(folder / "again").as_posix() for path in (folder / "again").rglob("*")} == names
    config, again = (json.loads((folder / name / "config.json").read_text()) for name in ("merged", "again"))
    assert again["auto_map"] == config["auto_map"]
    for name in CODE:
        assert (folder / "again" / name).read_bytes() == (folder / "merged" / name).read_bytes()


@pytest.mark.slow
def test_everything_else_runs_without_the_repository(saved_in_other_ways, elsewhere, tmp_path):
    """One process for what was saved over there, for unmerged LoRA, deltas, other kinds and other code."""
    folder, expected = saved_in_other_ways
    changed = shutil.copytree(folder / "merged", tmp_path / "changed")
    for name in CODE:
        with (changed / name).open("a", encoding="utf-8") as file:
            file.write("\nCHANGED = True\n")
    result = run_elsewhere(
        """
        folder, out = sys.argv[1:3]
        for name in ("again", "unmerged", "modernbert", "llm", "gemma"):
            model = AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
            run(model, f"{out}/{name}.safetensors")
        model.save_pretrained(f"{out}/saved")
        # Another model that comes with other code, in the same process: each runs its own.
        code = {}
        for name, path in (("changed", f"{out}/changed"), ("merged", f"{folder}/merged")):
            model = AutoModel.from_pretrained(path, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
            code[name] = [hasattr(sys.modules[type(x).__module__], "CHANGED") for x in (model, model.config, processor)]
        check_isolated()
        print(json.dumps({"warnings": warnings, "code": code}))
        """,
        tmp_path,
        folder,
        tmp_path,
    )
    assert result["warnings"] == []
    assert result["code"] == {"changed": [True] * 3, "merged": [False] * 3}
    assert_same(tmp_path / "again.safetensors", expected["merged"])
    for name in ("unmerged", "modernbert", "llm", "gemma"):
        assert_same(tmp_path / f"{name}.safetensors", expected[name])
