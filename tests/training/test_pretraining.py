"""Pretraining on plain text: which rows come out of it, what is learned from them, and from which files."""

import gzip
import json

import pytest
import torch
from tiny_training import training_arguments

from folders import load_silently, save_backbones, train_with_two_processes
from scaledown import ScaleDownModel
from scaledown.training.arguments import DataArguments, ModelArguments
from scaledown.training.collators import INSTRUCTIONS, PretrainingCollator
from scaledown.training.pretraining import load_pretraining_data
from scaledown.training.run import main, run
from tiny import build_model, build_tokenizer

LINES = [f"Line {i} tells of the Loire, and of the heron that stands {i * 37 % 11} days in it." for i in range(40)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*LINES, "", "   "]) + "\n", encoding="utf-8")
    return path


def load(path, **settings):
    return load_pretraining_data(str(path), build_tokenizer(), 32, **settings)


def test_half_of_the_rows_are_repeated_and_half_are_continued(text):
    rows = list(load(text))
    assert [row["task"] for row in rows] == ["continuation", "autoencoding"] * (len(rows) // 2)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["text"] != first["target"]
        assert second["text"] == second["target"] == first["target"]
    whole = " ".join(" ".join([first["text"], first["target"]]) for first in rows[::2])
    assert "\n".join(LINES).split()[: len(whole.split())] == whole.split()  # nothing is lost or repeated
    lengths = [len(build_tokenizer()(row["text"], add_special_tokens=False)["input_ids"]) for row in rows]
    assert max(lengths) <= 32 and sum(lengths) / len(lengths) > 24  # passages are as long as they may be


def test_streamed_rows_are_the_same(text):
    assert list(load(text, streaming=True)) == list(load(text))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "gz"])
def test_files_of_other_kinds(text, kind, tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"body": LINES})
    path = tmp_path / ("text.txt.gz" if kind == "gz" else f"other.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"body": line}) + "\n" for line in LINES), encoding="utf-8")
    elif kind == "gz":
        path.write_bytes(gzip.compress(text.read_bytes()))
    else:
        getattr(table, f"to_{kind}")(str(path))
    column = {} if kind == "gz" else {"text_column": "body"}
    assert list(load(path, **column)) == list(load(text))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("text.txt", {"text_column": "body"}, "has the columns text, not 'body'; set text_column"),
        ("text.docx", {}, "none of the endings"),
        ("empty.txt", {}, "fewer than two passages"),
        ("missing.txt", {}, "does not exist"),
    ],
)
def test_what_is_no_text_is_told(text, name, settings, message):
    path = text.with_name(name)
    if name in ("text.docx", "empty.txt"):
        path.write_text("\n" if name == "empty.txt" else "x", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(path, **settings)


@pytest.mark.parametrize("kind", ["n_layers", "modernbert", "llm"])
def test_the_generator_sees_the_task_and_the_slots_and_the_compressor_the_passage(kind, text):
    model = build_model(kind)
    processor = model.processor
    rows = list(load(text))[:2]
    batch = PretrainingCollator(processor)(rows)
    assert len(batch["chunk_slots"]) == 2  # a passage is one chunk
    for i, row in enumerate(rows):
        own = batch["compressor_input_ids"][i][batch["compressor_document_mask"][i]]
        assert processor.compressor_tokenizer.decode(own).strip() == row["text"]
        learned = batch["labels"][i] != -100
        target = processor.tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        assert batch["labels"][i][learned].tolist() == ([*target, processor.tokenizer.eos_token_id])[:64]
        visible = (batch["attention_mask"][i] == 1) & ~learned & ~batch["slot_mask"][i]
        assert INSTRUCTIONS[row["task"]] in processor.tokenizer.decode(batch["input_ids"][i][visible])
    out = model(**batch)
    out.loss.backward()
    assert model.compressor.memory_embeddings.grad.abs().sum() > 0


def test_pretraining_goes_on_with_its_own_text_only(tmp_path):
    save_backbones(tmp_path / "backbones")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"a": line, "b": line[::-1]}) + "\n" for line in LINES), encoding="utf-8")
    model = ModelArguments(
        generator_name_or_path=str(tmp_path / "backbones" / "generator"), num_compressor_layers=2, chunk_length=32
    )
    args = training_arguments(tmp_path / "out", stage="pretrain", max_steps=2, save_strategy="steps", save_steps=1)
    run(model, DataArguments(train_file=str(path), text_column="a"), args)
    (tmp_path / "out" / "all_results.json").unlink()
    with pytest.raises(ValueError, match="unfinished run of other settings: text_column was a and is b"):
        run(model, DataArguments(train_file=str(path), text_column="b"), args)


def test_a_pretrained_model_is_trained_further(text, tmp_path):
    save_backbones(tmp_path / "backbones")
    arguments = ModelArguments(
        generator_name_or_path=str(tmp_path / "backbones" / "generator"),
        compressor_name_or_path=str(tmp_path / "backbones" / "encoder"),
        compressor_type="modernbert",
        num_memory_tokens=4,
        compression_rate=8,
        chunk_length=32,
        max_query_length=24,
        projector_hidden_size=40,
        lora_r=4,
        merge_lora=False,
    )
    data = DataArguments(train_file=str(text), eval_file=str(text), max_eval_examples=4)
    metrics = run(arguments, data, training_arguments(tmp_path / "pretrained", stage="pretrain"))
    assert metrics["eval_generation_loss"] > 0
    pretrained = load_silently(tmp_path / "pretrained")
    assert pretrained.config.slot_pooling == "memory_tokens"
    records = tmp_path / "train.jsonl"
    record = {"query": "Who?", "documents": LINES[:2], "answer": "A heron", "reranking_scores": [1, 0]}
    records.write_text(json.dumps(record) + "\n", encoding="utf-8")
    further = ModelArguments(model_name_or_path=str(tmp_path / "pretrained"))
    run(further, DataArguments(train_file=str(records)), training_arguments(tmp_path / "joint"))
    joint = ScaleDownModel.from_pretrained(tmp_path / "joint")
    assert not torch.equal(joint.compressor.memory_embeddings, pretrained.compressor.memory_embeddings)


def test_streaming_needs_a_number_of_steps(text, tmp_path, capsys):
    save_backbones(tmp_path / "backbones")
    generator = tmp_path / "backbones" / "generator"
    argv = ["--stage", "pretrain", "--streaming", "true", "--train_file", str(text), "--num_compressor_layers", "2"]
    argv += ["--generator_name_or_path", str(generator), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    argv += ["--chunk_length", "32", "--max_query_length", "24", "--num_memory_tokens", "4"]
    assert main(argv) == 2
    assert "max_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_read_one_stream(text, tmp_path):
    save_backbones(tmp_path / "backbones")
    arguments = {
        "stage": "pretrain",
        "streaming": True,
        "train_file": text,
        "generator_name_or_path": tmp_path / "backbones" / "generator",
        "num_compressor_layers": 2,
        "chunk_length": 32,
        "max_query_length": 24,
        "num_memory_tokens": 4,
        "compression_rate": 8,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": tmp_path / "out",
    }
    train_with_two_processes(arguments, tmp_path)
