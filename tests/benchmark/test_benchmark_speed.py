"""benchmark.py: time, memory, training and scaling, on shapes too small to say anything about speed."""

import json

import pytest
import torch
from transformers import GenerationMixin

from scaledown import ScaleDownModel
from scaledown.benchmark.arguments import BenchmarkArguments
from scaledown.benchmark.configurations import SHAPES
from scaledown.benchmark.rivals import CACHED_PREFIX, OWN_DECODER, RIVALS, RivalModels
from scaledown.benchmark.run import main
from scaledown.benchmark.scaling import DOCUMENTS, LENGTHS, count_scaling, fit_exponents
from scaledown.benchmark.speed import TimedModels, draw_inputs, measure
from scaledown.benchmark.training import measure_training
from scaledown.benchmark.workload import Workload
from tiny import ENCODER_SHAPE, SHAPE


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", {"model_type": "llama", **SHAPE})
    for name in ("tiny-encoder", *(rival.shape for rival in RIVALS if rival.shape not in (None, OWN_DECODER))):
        monkeypatch.setitem(SHAPES, name, {"model_type": "bert", **ENCODER_SHAPE})


def arguments(**kwargs) -> BenchmarkArguments:
    settings = {
        "mode": "speed",
        "generator": "tiny",
        "compressors": "2,tiny-encoder",
        "prompt_length": 16,
        "num_documents": 3,
        "document_length": 24,
        "query_length": 5,
        "new_tokens": 3,
        "compression_rate": 8,
        "repeats": 2,
    }
    return BenchmarkArguments(**{**settings, **kwargs})


def test_speed_of_every_contestant_at_every_setting():
    rows = measure(arguments(sweep=["batch_size=1,2", "num_documents=5"]))
    settings = [(row["batch_size"], row["num_documents"]) for row in rows[::4]]
    assert settings == [(1, 3), (2, 3), (1, 5)]
    assert [row["contestant"] for row in rows[:4]] == ["full text", "truncated text", "2", "tiny-encoder"]
    for row in rows:
        assert 0 <= row["compression"]["low"] <= row["compression"]["median"] <= row["first_token"]["median"]
        assert row["first_token"]["median"] < row["total"]["median"]
        assert row["total"]["low"] <= row["total"]["median"] <= row["total"]["high"]
        assert row["questions_per_second"] == pytest.approx(row["batch_size"] / row["total"]["median"])
        assert row["peak_bytes"] > 0
        assert ("compression_gain" in row) and (row["compression_gain"]["median"] is None) == (
            row["contestant"] in ("full text", "truncated text")
        )
    text, _, layers, _ = rows[:4]
    assert text["first_token_gain"]["median"] == 1
    assert layers["peak_bytes"] < rows[6]["peak_bytes"]  # two questions take more than one


def test_tokens_read_are_those_of_the_lengths_that_were_drawn():
    args = arguments(mixed_lengths=True, repeats=1, compressors="2", sweep=["num_documents=5"])
    rows = measure(args)
    drawn = [draw_inputs(workload, size, 400, True, 400, args.seed) for workload, size in args.settings]
    assert [row["tokens_read"] for row in rows[::3]] == [inputs.text.shape[1] for inputs in drawn]
    assert [row["tokens_read"] for row in rows[2::3]] == [inputs.truncated.shape[1] for inputs in drawn]
    assert drawn[0].text.shape[1] < args.workload.text_length


def test_rivals_are_timed_in_the_same_run_and_leave_what_they_say():
    rows = measure(arguments(rivals=True, repeats=1, num_documents=4), (RivalModels,))
    rows = {row["contestant"]: row for row in rows}
    # A prompt of 16 tokens and 3 separators around 4 documents of 24 tokens, 3 slots each.
    expected = {
        "full text": 19 + 96,
        "2": 19 + 12,
        CACHED_PREFIX: 19 + 96 - 8,
        "LLMLingua-2 (mBERT base) 3×": 19 + 32,
        "LLMLingua-2 (mBERT base) 6×": 19 + 16,
        "OpenProvence (30M), keeps 20%": 19 + 19,
        "reranker (DeBERTa-v3 large), best 3": 18 + 72,
        "RECOMP, extractive": 19 + 6,
        "PISCO, compressed now": 19 + 12,
    }
    assert {name: rows[name]["tokens_read"] for name in expected} == expected
    assert len(rows) == 4 + 1 + len(RIVALS)
    before = rows["PISCO, compressed before"]
    assert before["compression"]["median"] < rows["PISCO, compressed now"]["compression"]["median"]
    assert all(row["first_token_gain"]["median"] for row in rows.values())
    assert rows["full text"]["peak_bytes"] > before["peak_bytes"]


def test_a_cached_prefix_gives_the_same_tokens(monkeypatch):
    models = TimedModels(arguments())
    answers = []
    generate = type(models.generator).generate

    def watched(*args, **kwargs):
        answers.append(generate(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(type(models.generator), "generate", watched)
    workload = models.arguments.workload
    rivals = RivalModels(models)
    run = rivals.runs(workload, 2)[CACHED_PREFIX]
    run(), run()
    ids = answers[0][:, : workload.text_length]
    models.text_run(ids, workload.new_tokens)()
    assert answers[0].tolist() == answers[1].tolist() == answers[2].tolist()


def test_without_compiling_both_sides_decode_alike(monkeypatch):
    """On a CPU nothing is compiled; a static cache on one side alone would make its times those of another thing."""
    models, caches = TimedModels(arguments(compile=True, compressors="2")), []
    generate = GenerationMixin.generate

    def watched(self, *args, **settings):
        caches.append(settings.get("cache_implementation"))
        return generate(self, *args, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    for run in models.runs(models.arguments.workload, 1).values():
        run()
    assert caches == [None] * 3


def test_what_a_rival_reads():
    workload = Workload(num_documents=10, document_length=128, query_length=16)
    rows = {rival.name: rival.rows_read(workload) for rival in RIVALS}
    assert rows["LLMLingua-2 (XLM-R large) 3×"] == (10, 132)
    assert rows["OpenProvence (150M), keeps 50%"] == (10, 148)
    assert rows["RECOMP, extractive"] == (61, 25)
    assert rows["PISCO, compressed now"] == (10, 140)


def test_documents_of_mixed_length_fill_their_slots():
    contestants = TimedModels(arguments(mixed_lengths=True))
    inputs = draw_inputs(contestants.arguments.workload, 2, 400, True, 400, seed=0)
    lengths = inputs.chunks["compressor_attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    assert inputs.chunks["chunk_slots"].sum() == inputs.slot_mask.sum()
    assert inputs.truncated.shape == inputs.slot_mask.shape
    questions = inputs.chunks["compressor_input_ids"][:, :5].reshape(2, 3, 5)
    assert (questions == questions[:, :1]).all() and not torch.equal(questions[0], questions[1])
    for run in contestants.runs(contestants.arguments.workload, 2).values():
        assert run().total > 0


def test_long_documents_are_cut_as_the_processor_cuts_them():
    workload = Workload(document_length=300, chunk_length=128)
    assert workload.chunks(300) == [100, 100, 100]
    inputs = draw_inputs(workload, 1, 400, False, 400, seed=0)
    assert inputs.chunks["compressor_input_ids"].shape == (30, 100)
    assert int(inputs.slot_mask.sum()) == workload.slots == 10 * 3 * 7


def test_files_of_a_speed_run(tmp_path, capsys):
    folder = tmp_path / "speed"
    options = ["--mode", "speed", "--generator", "tiny", "--compressors", "2", "--num_documents", "3"]
    options += ["--document_length", "16", "--new_tokens", "2", "--repeats", "1", "--sweep", "num_documents=1,4"]
    assert main([*options, "--output_dir", str(folder)]) == 0
    assert "| 4 | 16 |" not in capsys.readouterr().out  # what never changes has no column
    assert {file.name for file in folder.iterdir()} == {
        "speed.json",
        "speed.md",
        "speed.png",
        "speed_num_documents.png",
    }
    results = json.loads((folder / "speed.json").read_text())
    assert len(results["results"]) == 9
    assert {"versions", "git", "hardware"} <= results["environment"].keys()


@pytest.mark.slow
def test_scaling_of_text_and_slots():
    rows = count_scaling(arguments(mode="scaling", compressors="2", repeats=5))
    assert len(rows) == 2 * (len(DOCUMENTS) + len(LENGTHS))
    exponents = {(row["swept"], row["contestant"]): row["exponent"] for row in fit_exponents(rows)}
    # Attention is most of what a model as narrow computes on a text as long, and none of it crosses documents here.
    assert exponents["num_documents", "full text"] > 1.5
    assert 0.9 < exponents["num_documents", "2"] < exponents["num_documents", "full text"]


def test_exponents_are_those_of_a_power_law():
    rows = [
        {"swept": "num_documents", "contestant": "full text", "num_documents": n, "tflop": 3.0 * n**1.5}
        for n in (1, 2, 4, 8)
    ]
    assert fit_exponents(rows)[0]["exponent"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:77"}, "device is cuda:77, which is not here"),
        ({"rivals": True, "document_length": 400, "query_length": 120, "num_documents": 1}, "reads 512 tokens at once"),
        ({"num_documents": 500}, "has 512 positions, and the longest setting needs 125"),
    ],
)
def test_what_cannot_be_measured_is_told(settings, message):
    with pytest.raises(ValueError, match=message):
        measure(arguments(**settings), (RivalModels,) if "rivals" in settings else ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_holds_what_learns_in_32_bits_and_counts_no_optimizer(dtype, monkeypatch):
    pytest.importorskip("peft")
    kept = []
    original = ScaleDownModel.add_lora
    monkeypatch.setattr(ScaleDownModel, "add_lora", lambda self, **kw: (original(self, **kw), kept.append(self))[0])
    settings = {"compressors": "2", "num_documents": 1, "document_length": 8, "prompt_length": 4, "repeats": 1}
    joint, *_ = measure_training(arguments(mode="train", dtype=dtype, **settings))
    learned = [p for p in kept[0].parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    assert {p.dtype for p in kept[0].generator.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    size = sum(p.nbytes for p in learned)
    assert size < joint["peak_bytes"] < 3 * size  # gradients, but not AdamW's two states


def test_training_steps_of_every_stage():
    pytest.importorskip("peft")
    rows = measure_training(arguments(mode="train", batch_size=2))
    assert [(row["compressor"], row["stage"]) for row in rows[:3]] == [
        ("2", "joint"),
        ("2", "compress"),
        ("2", "generate"),
    ]
    for row in rows:
        assert row["step"]["median"] > 0 and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
    joint, compress, generate = rows[:3]
    assert joint["tokens"] == compress["tokens"] + generate["tokens"]
    assert compress["peak_bytes"] < joint["peak_bytes"]


@pytest.mark.parametrize("mode", ["flops", pytest.param("scaling", marks=pytest.mark.slow), "train"])
def test_every_mode_writes_a_table(mode, tmp_path, capsys):
    folder = tmp_path / mode
    options = ["--mode", mode, "--generator", "tiny", "--compressors", "2", "--num_documents", "2"]
    options += ["--repeats", "1"] if mode == "train" else []
    assert main([*options, "--document_length", "16", "--output_dir", str(folder)]) == 0
    assert capsys.readouterr().out == (folder / f"{mode}.md").read_text()
    assert json.loads((folder / f"{mode}.json").read_text())["results"]
