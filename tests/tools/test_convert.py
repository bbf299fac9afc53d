"""Published checkpoints become ScaleDown models with the same outputs; what cannot is refused."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from folders import ROOT
from published import (
    DOCUMENTS,
    MAX_LENGTH,
    QUESTIONS,
    Variant,
    assert_same,
    build,
    converted,
    read_here,
    set_config,
)
from scaledown import ScaleDownModel
from scaledown.tools.convert import source
from scaledown.tools.convert.arguments import ConversionArguments
from scaledown.tools.convert.command import main
from scaledown.tools.convert.model import convert
from scaledown.tools.convert.source import open_source

TRIMMED = {"compr_model_name": "mistral_trimmed", "compr_n_layers": 2}
SEPARATE = {"compr_use_mlp": True}
VARIANTS = {
    "trimmed": Variant(TRIMMED, expected={"compressor_type": "n_layers", "use_projector": False}),
    "trimmed padded right": Variant(
        TRIMMED, decoder="qwen2", padding_side="right", expected={"compressor_padding_side": "right"}
    ),
    "trimmed with projector": Variant({**TRIMMED, "compr_use_mlp": True}, expected={"use_projector": True}),
    "trimmed with LoRA": Variant({**TRIMMED, "lora_compressor": True, "lora_r_compressor": 3}),
    "trimmed, another PEFT": Variant(
        {**TRIMMED, "lora_compressor": True}, saved={"adapter_prefix": "base_model.model.", "with_ends": True}
    ),
    "trimmed with norm": Variant({**TRIMMED, "compr_rms_norm": True}, expected={"keep_final_norm": True}),
    "trimmed, another base": Variant(
        {**TRIMMED, "compr_use_mlp": True}, compressor="other", expected={"compressor_type": "llm"}
    ),
    "trimmed without question": Variant(TRIMMED, with_questions=False),
    "trimmed without separator": Variant({**TRIMMED, "sep": False}, expected={"learned_separator": False}),
    "llama": Variant(SEPARATE, compressor="llama", expected={"compressor_type": "llm"}),
    "llama with LoRA": Variant({**SEPARATE, "lora_compressor": True}, compressor="llama"),
    "bert": Variant(SEPARATE, compressor="bert", expected={"compressor_padding_side": "left"}),
    "bert without question": Variant(SEPARATE, compressor="bert", with_questions=False),
    "modernbert": Variant(SEPARATE, compressor="modernbert", expected={"compressor_type": "modernbert"}),
    "decoder": Variant({"training_form": "both_separately"}, with_questions=False),
    "decoder with question": Variant({"training_form": "both_separately"}),
    "decoder, one adapter": Variant({"different_mem_tokens": False}, with_questions=False),
    "trimmed with penalty": Variant(TRIMMED, generation={"repetition_penalty": 1.6}),
    "decoder, unigram": Variant({}, tokenizer="unigram", max_length=110),
    "trimmed, unigram": Variant(TRIMMED, tokenizer="unigram", max_length=110),
    "trimmed, split": Variant(TRIMMED, tokenizer="split"),
    "decoder, split": Variant({}, tokenizer="split"),
    "decoder, whole": Variant({"lora": False}, with_questions=False),
    "trimmed, whole": Variant({**TRIMMED, "compr_use_mlp": True, "lora": False}),
}


# Each of a kind of its own; the others differ in what one of these shows.
FAST = ("trimmed", "trimmed padded right", "bert", "decoder")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in FAST]


@pytest.fixture(autouse=True)
def read_without_a_process(request, monkeypatch):
    """Pickles of ours are read here; the process that reads them takes seconds to start."""
    if "reads_pickles" not in request.keywords:
        monkeypatch.setattr(source, "read_pickles", read_here)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_outputs_are_those_of_the_published_class(name, tmp_path):
    variant = VARIANTS[name]
    reference = build(tmp_path, variant)
    model = converted(tmp_path, variant)
    for field, value in variant.expected.items():
        assert getattr(model.config, field) == value
    assert_same(model, reference, variant)


class Payload:
    """Runs something when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.reads_pickles
@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torch", "pickle"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(plain, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "adapters.pth"
    value = {"decoder_adapter": Payload(marker)}
    if plain:
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path)
    with pytest.raises(ValueError, match=r"adapters\.pth is no pickle of tensors alone, and nothing in it was run"):
        source.read_pickles([path])
    assert not marker.exists()
    if plain:
        pickle.loads(path.read_bytes())  # the payload is one
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_pickles_are_opened_in_one_place():
    paths = [path for folder in ("scaledown", "experiments") for path in (ROOT / folder).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.py"), *paths]
        if any(call in path.read_text(encoding="utf-8") for call in ("torch.load(", "pickle.load"))
    }
    assert found == {"scaledown/tools/convert/read_pickle.py"}
    assert "weights_only=True" in (ROOT / found.pop()).read_text(encoding="utf-8")


def test_only_files_of_the_layout_are_downloaded(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    asked = {}
    monkeypatch.setattr(source, "snapshot_download", lambda name, **given: asked.update(given) or str(folder))
    found = source.open_source("naver/oscar-mistral-7B", "main")
    assert found.commit == "a" * 40 and asked["revision"] == "main"
    assert not any(pattern.endswith((".py", "*")) for pattern in asked["allow_patterns"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a trimmed model's checkpoint, which is to be copied, and its reference."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, build(folder, VARIANTS["trimmed"])


def copied(saved, target: Path) -> Path:
    shutil.copytree(saved[0], target, dirs_exist_ok=True)
    return target


REFUSED = {
    "every n-th layer": ({"compr_every_n_layer": 2}, "compr_every_n_layer=2"),
    "kbtc": ({"kbtc_training": True}, "kbtc_training=True"),
    "older class": ({"compr_linear_type": "concat"}, "older COCOM class .* compr_linear_type"),
    "older class, no length": ({"doc_max_length": ...}, "older COCOM class .* no doc_max_length"),
    "another model": (
        {"decoder_model_name": ..., "model_type": "llama"},
        "model_type='llama' and no decoder_model_name",
    ),
    "no rate": ({"compr_rate": ...}, "compr_rate=None in its config.json, which must be a whole number"),
    "a rate of nothing": ({"compr_rate": 0}, "compr_rate=0 in its config.json"),
    "no number": ({"doc_max_length": "128"}, "doc_max_length='128' in its config.json"),
    "no slot": ({"compr_rate": 64}, "compr_rate=64: no memory token"),
    "no depth": ({"compr_n_layers": None}, "no compr_n_layers"),
    "too deep": ({"compr_n_layers": 9}, "compr_n_layers=9, and .* has 4 layers"),
    "another depth": ({"compr_n_layers": 3}, "do not fit its base model: .* missing"),
    "another rank": ({"lora_r": 8}, "expected A and B of rank 8"),
    "a projector": ({"compr_use_mlp": True}, "mlp.pth holds nothing, expected two linear layers"),
    "other slots": ({"different_mem_tokens": False, "compr_model_name": None}, "of which the layout says nothing"),
    "more slots": ({"doc_max_length": 320}, "has a table of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equivalent_or_does_not_fit_is_refused(name, saved, tmp_path):
    changes, message = REFUSED[name]
    set_config(copied(saved, tmp_path) / "oscar", **changes)
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, VARIANTS["trimmed"])


def test_whether_the_question_is_read_is_asked_for(saved, tmp_path):
    copied(saved, tmp_path)
    assert "{question}" in converted(tmp_path, VARIANTS["trimmed"], reads_question=None).config.compressor_prompt
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "question and document and their frame exceed 48 tokens" in card
    (tmp_path / "oscar").rename(tmp_path / "model-7b")
    args = ConversionArguments(source=str(tmp_path / "model-7b"), output="nowhere")
    with pytest.raises(ValueError, match="Say it: --reads_question true or --reads_question false"):
        convert(open_source(args.source, None), args)


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "leaves out"])
def test_a_template_without_system_message_is_refused(refuses, saved, tmp_path):
    path = copied(saved, tmp_path) / "decoder" / "chat_template.jinja"
    assert path.is_file()
    first = "{{ raise_exception('System role not supported') }}" if refuses else ""
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}FIRST{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    path.write_text(template.replace("FIRST", first), encoding="utf-8")
    with pytest.raises(ValueError, match="takes no system message"):
        converted(tmp_path, VARIANTS["trimmed"], decoder=str(tmp_path / "decoder"))


def add_head(folder: Path, name: str = "score", **more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A reranking head as a published one may be: a token behind the memory tokens, and a layer to one number."""
    torch.manual_seed(3)
    row, weight, bias = torch.randn(1, 32), torch.randn(1, 32), torch.randn(1)
    path = folder / "compressor" / "compressor.pth"
    state = torch.load(path, weights_only=True)
    for key in ("custom_model.model.embed_tokens.weight", "custom_model.lm_head.weight"):
        state[key] = torch.cat([state[key], row])
    torch.save(state, path)
    torch.save({f"{name}.weight": weight, f"{name}.bias": bias, **more}, folder / "head.pth")
    return row, weight, bias


@torch.no_grad()
def test_a_reranking_head_is_told_by_its_shape(saved, tmp_path):
    reference = saved[1]
    row, weight, bias = add_head(copied(saved, tmp_path) / "oscar")
    model = converted(tmp_path, VARIANTS["trimmed"])
    assert model.config.enable_reranking and model.config.reranking_trained
    assert_same(model, reference, VARIANTS["trimmed"])
    ids, mask = reference.rows(DOCUMENTS[0], [QUESTIONS[0]] * 2, MAX_LENGTH)
    embeds = reference.compressor.custom_model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds, row.expand(2, 1, -1)], dim=1)
    states = reference.compressor(inputs_embeds=embeds, attention_mask=torch.cat([mask, mask[:, -1:]], dim=1))
    expected = (states[:, -1] @ weight.T + bias).squeeze(1)
    found = {entry["corpus_id"]: entry["score"] for entry in model.rank(QUESTIONS[0], DOCUMENTS[0])}
    torch.testing.assert_close(torch.tensor([found[0], found[1]]), expected, rtol=1e-5, atol=1e-4)


def test_what_may_be_a_reranking_head_is_asked_for(saved, tmp_path):
    add_head(copied(saved, tmp_path) / "oscar", other=torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"score.weight \(1, 32\).* Say which: --reranking NAME --reranking_row ROW"):
        converted(tmp_path, VARIANTS["trimmed"])
    with pytest.raises(ValueError, match="--reranking nothing is none of the tensors"):
        converted(tmp_path, VARIANTS["trimmed"], reranking="nothing")
    assert converted(tmp_path, VARIANTS["trimmed"], reranking="score.weight").config.enable_reranking
    assert not converted(tmp_path, VARIANTS["trimmed"], reranking="none").config.enable_reranking


def test_a_tensor_without_a_place_is_not_left_out_in_silence(saved, tmp_path):
    copied(saved, tmp_path)
    torch.save({"gate.weight": torch.zeros(3, 3)}, tmp_path / "oscar" / "more.pth")
    with pytest.raises(ValueError, match=r"more.pth:gate.weight \(3, 3\).*of which the layout says nothing"):
        converted(tmp_path, VARIANTS["trimmed"])


@pytest.mark.slow
def test_a_delta_needs_the_weights_of_the_base(saved, tmp_path):
    variant, folder = VARIANTS["trimmed"], copied(saved, tmp_path)
    with pytest.raises(ValueError, match="a delta would leave out what it learned"):
        converted(folder, variant, weights_format="delta")
    path = folder / "oscar" / "decoder_first_last_layers.pth"
    base = AutoModelForCausalLM.from_pretrained(folder / "decoder")
    ends = torch.load(path, weights_only=True)
    for key, module in (("model.embed_tokens.weight", base.get_input_embeddings()), ("lm_head.weight", base.lm_head)):
        ends[key][:400] = module.weight.data
    torch.save(ends, path)
    shutil.rmtree(folder / "model", ignore_errors=True)
    full = converted(folder, variant)
    expected = full.answer(QUESTIONS, DOCUMENTS, max_new_tokens=8)
    sizes = [(folder / "model" / "model.safetensors").stat().st_size]
    set_config(folder / "oscar", decoder_model_name=str(folder / "decoder"))
    delta = converted(folder, variant, weights_format="delta")
    sizes.append((folder / "model" / "model.safetensors").stat().st_size)
    assert sizes[1] < sizes[0] * 0.8
    assert delta.answer(QUESTIONS, DOCUMENTS, max_new_tokens=8) == expected
    merged = converted(folder, variant, merge_lora=True)
    assert merged.config.lora_config is None
    assert merged.answer(QUESTIONS, DOCUMENTS, max_new_tokens=8) == expected


def run(monkeypatch, capsys, **options) -> tuple[int, str]:
    """The command; its exit status, and what it printed."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["convert", *words])
    status = main()
    printed = capsys.readouterr()
    return status, printed.out + "".join(line for line in printed.err.splitlines(True) if line.startswith("error"))


@pytest.mark.slow
@pytest.mark.reads_pickles
@pytest.mark.parametrize("name", ["trimmed", "decoder"])
def test_the_command_converts_and_compares_with_the_class_of_the_repository(name, tmp_path, monkeypatch, capsys):
    build(tmp_path, VARIANTS[name])
    repository = tmp_path / ("oscar" if name == "trimmed" else "pisco")
    (tmp_path / "oscar").rename(repository)
    shutil.copy(ROOT / "tests" / "published_reference.py", repository)
    names = {"AutoConfig": "ReferenceConfig", "AutoModel": "ReferenceModel"}
    set_config(repository, auto_map={key: f"published_reference.{value}" for key, value in names.items()})
    options = {"source": repository, "output": tmp_path / "model", "dtype": "float32"}
    status, printed = run(monkeypatch, capsys, **options)
    assert status == 0, printed
    assert "It was not compared with the published class" in printed
    assert ScaleDownModel.from_pretrained(tmp_path / "model").config.enable_reranking is False
    assert run(monkeypatch, capsys, **options)[0] == 2  # nothing is overwritten
    status, printed = run(monkeypatch, capsys, **options, verify=sys.executable)
    assert status == 0, printed
    assert "2 of 2 answers are the same" in printed
    path = tmp_path / "model" / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["compressor_max_length"] -= 9
    path.write_text(json.dumps(settings), encoding="utf-8")
    status, printed = run(monkeypatch, capsys, **options, verify=sys.executable)
    assert status == 2 and "The converted model is not the published one" in printed
    status, printed = run(monkeypatch, capsys, **options, verify=tmp_path / "no-python")
    assert status == 2 and "which is no Python that can be started" in printed
