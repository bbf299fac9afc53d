"""Pushing to the Hub and loading from it, against a stand-in on this machine (`hub_standin.py`)."""

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from folders import (
    CODE,
    ISOLATION_CHECK,
    ROOT,
    SETTINGS,
    assert_same_outputs,
    outputs,
    put_in_cache,
    save_generator,
)
from hub_standin import HubStandIn
from scaledown import ScaleDownModel
from tiny import DOCUMENTS, QUESTIONS, build_model

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
PUSHED = (
    CODE
    | TOKENIZER
    | {f"compressor_tokenizer/{name}" for name in TOKENIZER}
    | {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    | {"README.md", "model_card.md"}
)

PREAMBLE = f"""
import json, sys, urllib.request
from pathlib import Path

QUESTIONS, DOCUMENTS, SETTINGS = {QUESTIONS!r}, {DOCUMENTS!r}, {SETTINGS!r}

import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file


def mark(name):
    try:
        urllib.request.urlopen(constants.ENDPOINT + "/mark/" + name, timeout=30)
    except urllib.error.HTTPError:
        pass


{ISOLATION_CHECK}


def run(model, file):
    with torch.no_grad():
        out = model(**model.processor(QUESTIONS, DOCUMENTS))
    tensors = {{"logits": out.logits, "memory_embeddings": out.memory_embeddings, "scores": out.reranking_scores}}
    save_file(tensors, file)
    return model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=5, do_sample=False)
"""


def client(hub: HubStandIn, folder: Path, script: str, *arguments) -> dict:
    """Runs a script in a process of its own for which the stand-in is the Hub; returns what it printed, as JSON."""
    folder.mkdir(exist_ok=True)
    file = folder / "script.py"
    file.write_text(PREAMBLE + textwrap.dedent(script), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    process = subprocess.run(
        [sys.executable, "-I", str(file), *map(str, arguments)],
        cwd=folder,
        env={**environment, **hub.environment(folder / "home"), "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def after(hub: HubStandIn, name: str) -> int:
    """Number of requests up to a mark."""
    return hub.log.index(("GET", f"/mark/{name}")) + 1


def test_the_stand_in_ends_with_its_block():
    with HubStandIn() as hub:
        sha = hub.commit("me/model", {"a.txt": b"one"})
        hub.commit("me/model", {"a.txt": b"two"})
        for revision, content in ((sha, b"one"), ("main", b"two")):
            url = f"{hub.endpoint}/me/model/resolve/{revision}/a.txt"
            with urllib.request.urlopen(url, timeout=10) as response:
                assert response.read() == content
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{hub.endpoint}/me/model/resolve/main/b.txt", timeout=10)
        assert error.value.headers["X-Error-Code"] == "EntryNotFound"
        assert hub.downloads("me/model") == ["a.txt", "b.txt"]
    assert not hub._thread.is_alive()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub with a generator in two revisions, and a card somebody wrote."""
    folder = tmp_path_factory.mktemp("generators")
    with HubStandIn() as hub:
        shape = {"shards": "60KB", "num_hidden_layers": 4}
        pinned = hub.commit("them/generator", save_generator(folder / "first", seed=1, **shape))
        hub.commit("them/generator", save_generator(folder / "second", seed=2, **shape))
        hub.commit("me/handwritten", {"README.md": b"# Mine\n", "notes.txt": b"keep"})
        hub.pinned = pinned
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """What one process that has this repository built, pushed and saved."""
    folder = tmp_path_factory.mktemp("publisher")
    script = f"""
    sys.path[:0] = [{str(ROOT)!r}]
    from weights_scaledown import load_first_layers
    from scaledown import ScaleDownConfig, ScaleDownModel
    from transformers import AutoConfig

    out, pinned = sys.argv[1:3]
    config = ScaleDownConfig(
        generator_config=AutoConfig.from_pretrained("them/generator", revision=pinned),
        **{{**SETTINGS, "num_compressor_layers": 1}},
    )
    mark("first-layers")
    load_first_layers("them/generator", config, {{}}, {{"revision": pinned, "cache_dir": out + "/cache"}})
    mark("from-backbones")
    model = ScaleDownModel.from_backbones("them/generator", revision=pinned, **SETTINGS)
    answers = run(model, out + "/expected.safetensors")
    unpinned = ScaleDownModel.from_backbones("them/generator", **SETTINGS)
    mark("push")
    commit = model.push_to_hub("me/tiny-scaledown", private=True)
    model.save_pretrained(out + "/saved")
    model.save_pretrained(out + "/delta", push_to_hub=True, repo_id="me/delta", private=True, weights_format="delta")
    model.push_to_hub("me/handwritten")
    model.push_to_hub("me/resharded", max_shard_size="60KB")
    shards = HfApi().list_repo_files("me/resharded")
    model.push_to_hub("me/resharded", revision="whole", commit_message="One file")
    model.push_to_hub("me/two", revision="dev")
    model.push_to_hub("me/two")
    model.push_to_hub("me/two", variant="fp16")
    moving = model.push_to_hub("me/moving-on")
    HfApi().upload_file(path_or_fileobj=b"{{}}", path_in_repo="config.json", repo_id="me/moving-on")
    pinned = ScaleDownModel.from_pretrained("me/moving-on", revision=moving.oid)
    print(json.dumps({{
        "pinned": [run(pinned, out + "/pinned.safetensors"), pinned.processor.system_prompt],
        "commit": commit.oid,
        "answers": answers,
        "revisions": [model.config.generator_revision, unpinned.config.generator_revision],
        "fingerprints": [model.config.generator_fingerprint, unpinned.config.generator_fingerprint],
        "shards": shards,
    }}))
    """
    return {**client(hub, folder, script, folder, hub.pinned), "folder": folder}


def test_only_the_shards_with_the_first_layers_are_fetched(hub, pushed):
    """One layer of four, without the head and the final norm, which lie in the last shard."""
    weight_map = json.loads(hub.files("them/generator", hub.pinned)["model.safetensors.index.json"])["weight_map"]
    wanted = {file for name, file in weight_map.items() if "embed_tokens" in name or "layers.0." in name}
    span = after(hub, "first-layers"), after(hub, "from-backbones")
    assert {name for name in hub.downloads("them/generator", *span) if "-of-" in name} == wanted
    assert len(wanted) <= 2 < len(set(weight_map.values()))
    assert weight_map["model.norm.weight"] not in wanted


def test_backbones_come_at_the_revision_asked_for(hub, pushed):
    assert pushed["revisions"] == [hub.pinned, hub.repositories["them/generator"].branches["main"]]
    assert pushed["fingerprints"][0] != pushed["fingerprints"][1]


def test_pushed_files_are_those_save_pretrained_writes(hub, pushed):
    repository = hub.repositories["me/tiny-scaledown"]
    assert repository.private
    assert pushed["commit"] == repository.branches["main"]
    files = hub.files("me/tiny-scaledown")
    saved = pushed["folder"] / "saved"
    assert files.keys() == PUSHED | {".gitattributes"}
    for name in PUSHED - {"README.md", "config.json"}:
        assert files[name] == (saved / name).read_bytes(), name
    card = files["README.md"].decode()
    assert "<!-- rendered from model_card.md -->" in card and "base_model: them/generator" in card
    assert '"me/tiny-scaledown",' in card and f"`{hub.pinned}`" in card
    assert card.count("---\n") >= 2 and "Model Card for" not in card


def test_save_pretrained_pushes_too(hub, pushed):
    files = hub.files("me/delta")
    assert hub.repositories["me/delta"].private
    assert files.keys() == PUSHED | {".gitattributes"}
    assert json.loads(files["config.json"])["weights_format"] == "delta"
    assert len(files["model.safetensors"]) < len(hub.files("me/tiny-scaledown")["model.safetensors"])
    assert files["model.safetensors"] == (pushed["folder"] / "delta" / "model.safetensors").read_bytes()
    assert "| Weights format | delta |" in files["README.md"].decode()


def test_a_card_on_the_hub_that_somebody_wrote_stays(hub, pushed):
    files = hub.files("me/handwritten")
    assert files["README.md"] == b"# Mine\n" and files["notes.txt"] == b"keep"
    assert files.keys() == PUSHED | {"notes.txt"}


def test_stale_shards_leave_the_hub(hub, pushed):
    assert sum("-of-" in name for name in pushed["shards"]) > 2 and "model.safetensors" not in pushed["shards"]
    assert hub.files("me/resharded", "whole").keys() == PUSHED | {".gitattributes"}
    assert hub.files("me/resharded").keys() == set(pushed["shards"])  # the other branch is left alone
    assert 'revision="whole"' in hub.files("me/resharded", "whole")["README.md"].decode()


def test_a_variant_lies_beside_the_weights_and_the_card_names_the_branch_it_is_on(hub, pushed):
    assert hub.files("me/two").keys() == PUSHED | {".gitattributes", "model.fp16.safetensors"}
    assert 'revision="dev"' in hub.files("me/two", "dev")["README.md"].decode()
    assert 'revision="main"' in hub.files("me/two")["README.md"].decode()


def test_a_commit_that_is_pinned_loads_after_its_branch_has_moved_on(hub, pushed):
    assert hub.files("me/moving-on")["config.json"] == b"{}"
    assert pushed["pinned"] == [pushed["answers"], SETTINGS["system_prompt"]]
    expected, found = (load_file(pushed["folder"] / f"{name}.safetensors") for name in ("expected", "pinned"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_hub_that_does_not_answer_does_not_cost_a_card(monkeypatch):
    written = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: written.append(kwargs))

    def no_answer(self, *args, **kwargs):
        raise LocalEntryNotFoundError("the connection timed out")

    monkeypatch.setattr(HfApi, "hf_hub_download", no_answer)
    with pytest.raises(LocalEntryNotFoundError, match="timed out"):
        build_model().push_to_hub("me/model")
    assert not written


def test_a_generator_whose_name_has_no_owner(tmp_path):
    """As gpt2; there is no connection, so all is read from the cache."""
    cache = put_in_cache(tmp_path / "cache", "tiny", save_generator(tmp_path / "generator"))
    model = ScaleDownModel.from_backbones("tiny", cache_dir=cache, **SETTINGS)
    model.save_pretrained(tmp_path / "delta", weights_format="delta")
    assert "base_model: tiny\n" in (tmp_path / "delta" / "README.md").read_text(encoding="utf-8")
    assert_same_outputs(ScaleDownModel.from_pretrained(tmp_path / "delta", cache_dir=cache), outputs(model))


def test_weights_that_are_not_in_the_cache_are_told(tmp_path):
    generator = save_generator(tmp_path / "generator")
    cache = put_in_cache(tmp_path / "cache", "them/tiny", generator, only="*.json")
    with pytest.raises(ValueError, match="weights of 'them/tiny' are not in the cache, and cannot be downloaded"):
        ScaleDownModel.from_backbones("them/tiny", cache_dir=cache, **SETTINGS)
    # Who has asked with a connection knows that there are none.
    for name in ("model.safetensors", "model.safetensors.index.json"):
        known = cache / "models--them--tiny" / ".no_exist" / ("0" * 40) / name
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors"):
        ScaleDownModel.from_backbones("them/tiny", cache_dir=cache, **SETTINGS)


@pytest.mark.slow
def test_a_process_without_the_repository_loads_from_the_hub(hub, pushed, tmp_path):
    expected = load_file(pushed["folder"] / "expected.safetensors")
    # The branch moves on: whoever pinned the commit must not notice, the processor included.
    good = hub.files("me/tiny-scaledown", pushed["commit"])
    processor = {**json.loads(good["processor_config.json"]), "system_prompt": "Moved on."}
    broken = {"processor_config.json": json.dumps(processor).encode(), "model.safetensors": b"", "config.json": b"{}"}
    hub.commit("me/tiny-scaledown", broken, keep=True)
    hub.commit("me/moving", good)
    result = client(
        hub,
        tmp_path,
        """
        from transformers import AutoConfig, AutoModel, AutoProcessor

        out, commit, moved = sys.argv[1:4]
        model = AutoModel.from_pretrained("me/tiny-scaledown", trust_remote_code=True, revision=commit)
        answers = run(model, out + "/pinned.safetensors")
        run(AutoModel.from_pretrained("me/delta", trust_remote_code=True), out + "/delta.safetensors")

        moving = [AutoModel.from_pretrained("me/moving", trust_remote_code=True)]
        moving += [type(moving[0]).from_pretrained("me/moving")]
        HfApi().upload_file(path_or_fileobj=moved.encode(), path_in_repo="processor_config.json", repo_id="me/moving")

        model.push_to_hub("me/again")
        check_isolated()
        print(json.dumps({
            "answers": answers,
            "prompts": [m.processor.system_prompt for m in (model, *moving)],
            "module": type(model).__module__,
        }))
        """,
        tmp_path,
        pushed["commit"],
        json.dumps(processor),
    )
    for name in ("pinned", "delta"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert result["answers"] == pushed["answers"]
    assert result["module"].startswith("transformers_modules.me.")
    assert json.loads(hub.files("me/moving")["processor_config.json"])["system_prompt"] == "Moved on."
    assert result["prompts"] == [SETTINGS["system_prompt"]] * 3

    # What is pushed from over there is complete and points at no other repository.
    again = hub.files("me/again")
    assert again.keys() == PUSHED | {".gitattributes"}
    for name in CODE | {"model.safetensors", "processor_config.json", "model_card.md"}:
        assert again[name] == good[name], name
    assert json.loads(again["config.json"])["auto_map"] == json.loads(good["config.json"])["auto_map"]
    assert '"me/again",' in again["README.md"].decode()
