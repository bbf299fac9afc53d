"""The dry run: what it tells is what training then does, and no weights are needed for it."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from combinations import combinations
from peak_memory import ENVIRONMENT
from tiny_training import rows, training_arguments
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
)

from folders import ROOT, TRAINING_SETTINGS, from_backbones, save_backbones, write_rows
from scaledown.common.tracing import MemoryTracker, storage_bytes, training_peak
from scaledown.training.arguments import DataArguments, ModelArguments, parse_arguments
from scaledown.training.build import build_model, lora_settings
from scaledown.training.collators import JointCollator
from scaledown.training.dry_run.estimate import Memory, estimate_stage
from scaledown.training.dry_run.report import dry_run
from scaledown.training.dry_run.skeleton import build_skeleton
from scaledown.training.reader import add_reader_lora
from scaledown.training.run import main, run
from scaledown.training.trainer import ScaleDownTrainer
from tiny import DOCUMENTS, SHAPE, build_tokenizer

KINDS = ("n_layers", "modernbert", "llm")
STAGES = ("joint", "pretrain", "compress", "generate")
SETTINGS = {**TRAINING_SETTINGS, "max_query_length": 40}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def without_weights(backbones, tmp_path_factory):
    """The same backbones as a dry run may read them: configuration and tokenizer."""
    folders = {}
    for kind, pair in backbones.items():
        folders[kind] = []
        for path in pair:
            target = tmp_path_factory.mktemp("bare") / path.name if path is not None else None
            if target is not None:
                AutoConfig.from_pretrained(path).save_pretrained(target)
                AutoTokenizer.from_pretrained(path).save_pretrained(target)
            folders[kind].append(target)
    return folders


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(repeat=5))


def model_arguments(folders, kind, **settings) -> ModelArguments:
    generator, compressor = folders[kind]
    compressor = str(compressor) if compressor is not None else None
    names = {"generator_name_or_path": str(generator), "compressor_name_or_path": compressor, "compressor_type": kind}
    return ModelArguments(**{**SETTINGS, **names, **settings})


@pytest.fixture
def untraced(monkeypatch):
    """Tracing the memory of a step takes seconds; the tests of what is estimated do it."""
    for name in ("training_peak", "inference_peak"):
        monkeypatch.setattr(f"scaledown.training.dry_run.estimate.{name}", lambda *args: 0)


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stage"),
    combinations(
        KINDS,
        STAGES,
        fast=[*(("n_layers", stage) for stage in STAGES), ("modernbert", "joint"), ("llm", "compress")],
    ),
)
def test_the_model_is_the_one_that_would_be_trained(backbones, without_weights, kind, stage, tmp_path, untraced):
    args = training_arguments(tmp_path, stage=stage)
    found = estimate_stage(model_arguments(without_weights, kind), DataArguments(train_file="nowhere"), args)
    sides = {"with_generator": stage != "compress", "with_backbone": stage != "generate"}
    model = build_model(model_arguments(backbones, kind), args, **sides)
    on_meta = build_skeleton(model_arguments(without_weights, kind), args, torch.float32, **sides)
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in on_meta.named_parameters()} == shapes
    assert all(p.is_meta for p in on_meta.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad) * (stage != "compress")
    assert sum(trained for trained, _ in found.parameters.values()) == learned
    assert sum(map(sum, found.parameters.values())) == sum(p.numel() for p in model.parameters())
    assert found.needed.weights == storage_bytes(model)
    assert (found.needed.gradients, found.needed.optimizer) == (4 * learned, 8 * learned)


@pytest.mark.parametrize("kind", ["n_layers", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_trained_model_is_looked_at_without_its_weights(backbones, kind, train_file, tmp_path, untraced):
    from_backbones(backbones[kind], max_query_length=40).save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "model.safetensors").unlink()
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "trained"), lora_r=4, compression_rate=16)
    for stage in STAGES[:1] + STAGES[2:]:
        args = training_arguments(tmp_path, stage=stage)
        found = estimate_stage(arguments, DataArguments(train_file=str(train_file)), args)
        assert found.kind == kind and found.reading.num_examples == 15
    arguments.chunk_length = 16
    with pytest.raises(ValueError, match="chunk_length=16 cannot be changed in a trained model"):
        estimate_stage(arguments, DataArguments(train_file=str(train_file)), args)


def test_both_stages_of_two_are_reported_and_nothing_is_written(without_weights, train_file, tmp_path, capsys):
    generator, encoder = without_weights["modernbert"]
    argv = ["--generator_name_or_path", str(generator), "--compressor_name_or_path", str(encoder), "--use_cpu", "true"]
    argv += ["--compressor_type", "modernbert", "--chunk_length", "32", "--max_query_length", "24", "--dry_run", "true"]
    argv += ["--num_memory_tokens", "4", "--train_file", str(train_file), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--two_stage", "true", "--gradient_checkpointing", "true"]) == 0
    printed = capsys.readouterr().out
    for text in ("Stage compress", "Stage generate", "The cache takes 15 examples", "compressor backbone", "LoRA"):
        assert text in printed
    assert "with checkpointing" in printed and "gradient_checkpointing=true" in printed
    assert "16 GB: yes" in printed or "It fits this" in printed
    assert "Steps in the run: 1." in printed
    assert not (tmp_path / "out").exists()


def test_without_data_the_paper_stands_in_for_it(without_weights, tmp_path, untraced):
    found = estimate_stage(
        model_arguments(without_weights, "n_layers"),
        DataArguments(train_file="nowhere.jsonl", max_answer_length=32),
        training_arguments(tmp_path, per_device_train_batch_size=3, max_steps=-1),
    )
    assert "nowhere.jsonl is no file here" in found.reading.source and found.steps is None
    batch = found.reading.largest
    assert batch["input_ids"].shape[0] == 3
    assert len(batch["chunk_slots"]) == 15 and batch["chunk_slots"].tolist() == [4] * 15
    assert ((batch["labels"] != -100).sum(dim=1) == 32).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 2.5},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"per_device_train_batch_size": 4}, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_the_trainer_makes(backbones, train_file, tmp_path, settings, monkeypatch, untraced):
    args = training_arguments(tmp_path, **{"max_steps": -1, "num_train_epochs": 1, **settings})
    arguments, data = model_arguments(backbones, "n_layers"), DataArguments(train_file=str(train_file))
    expected = estimate_stage(arguments, data, args).steps
    build, trainers = ScaleDownTrainer.__init__, []

    def spy(self, *positional, **named):
        trainers.append(self)
        build(self, *positional, **named)

    monkeypatch.setattr(ScaleDownTrainer, "__init__", spy)
    run(arguments, data, args)
    assert trainers[0].state.global_step == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"compressor_type": "llm"}, "does not go with compressor_type=llm"),
        ({"num_compressor_layers": 9}, "exceeds the generator's 2 layers"),
        ({"generator_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_told(without_weights, tmp_path, change, message):
    arguments = model_arguments(without_weights, "n_layers", **change)
    with pytest.raises((ValueError, OSError), match=message):
        dry_run(arguments, DataArguments(train_file="nowhere"), training_arguments(tmp_path))


def test_a_pointer_stage_is_that_of_a_compressor_alone(backbones, without_weights, tmp_path, untraced):
    args = training_arguments(tmp_path, stage="pointer", train_sampling_strategy="group_by_length")
    settings = {"slot_pooling": "pointer"}
    found = estimate_stage(
        model_arguments(without_weights, "modernbert", **settings), DataArguments(train_file="nowhere"), args
    )
    model = build_model(model_arguments(backbones, "modernbert", **settings), args)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(trained for trained, _ in found.parameters.values()) == learned and "LoRA" not in found.parameters
    assert found.needed.weights == storage_bytes(model)
    assert found.reading.generator_tokens == 0 and found.reading.compressor_tokens > 0
    with pytest.raises(ValueError, match="stage=pointer teaches where to point"):
        dry_run(model_arguments(without_weights, "modernbert"), DataArguments(train_file="nowhere"), args)


def test_a_reader_has_no_compressor_and_reads_whole_documents(
    backbones, without_weights, train_file, tmp_path, untraced
):
    args = training_arguments(tmp_path, stage="reader")
    data = DataArguments(train_file=str(train_file))
    found = estimate_stage(model_arguments(without_weights, "n_layers"), data, args)
    reader = add_reader_lora(
        build_model(model_arguments(backbones, "n_layers"), args), lora_settings(model_arguments(backbones, "n_layers"))
    )
    learned = sum(p.numel() for p in reader.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in reader.parameters()) - learned
    assert found.parameters == {"generator": (0, frozen), "LoRA": (learned, 0)} and found.kind is None
    assert found.needed.weights == storage_bytes(reader)
    assert found.reading.compressor_tokens == 0
    assert found.reading.generator_tokens > 5 * found.reading.largest["logits_to_keep"]
    reader.save_pretrained(tmp_path / "adapter")
    going_on = model_arguments(without_weights, "n_layers", lora_name_or_path=str(tmp_path / "adapter"), lora_r=None)
    assert estimate_stage(going_on, data, args).parameters == found.parameters


def test_a_model_too_large_is_said_to_be(monkeypatch, without_weights, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "scaledown.training.dry_run.estimate._training_memory",
        lambda *args: Memory(20 * 10**9, 10**9, 2 * 10**9, 3 * 10**9),
    )
    arguments = model_arguments(without_weights, "n_layers")
    report = dry_run(arguments, DataArguments(train_file="nowhere"), training_arguments(tmp_path))
    assert "16 GB: NO, 24 GB: NO, 40 GB: yes, 80 GB: yes" in report and "26.0 GB" in report


# -- what is estimated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    combinations(KINDS, (False, True), fast=[("n_layers", True), ("modernbert", False)]),
)
def test_a_trace_on_meta_sees_what_the_real_step_allocates(backbones, without_weights, kind, checkpointing, tmp_path):
    args = training_arguments(tmp_path)
    model = build_model(model_arguments(backbones, kind), args).train()
    on_meta = build_skeleton(model_arguments(without_weights, kind), args, torch.float32)
    batch = JointCollator(model.processor)(rows(repeat=4))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tracker = MemoryTracker([*model.parameters(), *model.buffers()])
    with tracker:
        for _ in range(2):
            tracker.reset_peak()
            model(**batch).loss.backward()
    traced = training_peak(on_meta, batch, None, checkpointing)
    assert traced == pytest.approx(tracker.peak, rel=0.05)


def test_mixed_precision_is_traced_as_autocast_does_it(backbones, without_weights, tmp_path):
    args = training_arguments(tmp_path)
    model = build_model(model_arguments(backbones, "n_layers"), args).train()
    on_meta = build_skeleton(model_arguments(without_weights, "n_layers"), args, torch.float32)
    batch = JointCollator(model.processor)(rows(repeat=4))
    tracker = MemoryTracker([*model.parameters(), *model.buffers()])
    with tracker:
        for _ in range(2):
            tracker.reset_peak()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
    assert training_peak(on_meta, batch, torch.bfloat16) == pytest.approx(tracker.peak, rel=0.1)


def test_a_generator_in_4_bits_weighs_what_bitsandbytes_makes_of_it(backbones, without_weights, tmp_path):
    args, settings = training_arguments(tmp_path), {"load_in_4bit": True}
    model = build_model(model_arguments(backbones, "n_layers", **settings), args)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as ScaleDownTrainer holds it
            parameter.data = parameter.data.float()
    scales = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    size = storage_bytes(model) + sum(state.absmax.nbytes for state in scales if state is not None)
    on_meta = build_skeleton(model_arguments(without_weights, "n_layers", **settings), args, torch.float32)
    assert len(scales) == 14 and storage_bytes(on_meta) == pytest.approx(size, rel=0.02)
    batch = JointCollator(model.processor)(rows())
    assert training_peak(on_meta, batch) > 0


# -- against measured runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """Backbones of 56 and 22 million parameters, and questions with documents of many lengths."""
    folder = tmp_path_factory.mktemp("middling")
    ids = {name: SHAPE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generator = LlamaConfig(
        vocab_size=8000,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=5,
        **ids,
    )
    AutoModelForCausalLM.from_config(generator).save_pretrained(folder / "generator")
    build_tokenizer().save_pretrained(folder / "generator")
    encoder = ModernBertConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
        cls_token_id=0,
        sep_token_id=1,
        **ids,
    )
    AutoModel.from_config(encoder).save_pretrained(folder / "encoder")
    build_tokenizer(pair=True).save_pretrained(folder / "encoder")
    draw = random.Random(0)
    words = sorted({word for listed in DOCUMENTS for text in listed for word in text.split()})

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    records = [
        {
            "query": text(8, 8),
            "documents": [text(15, 24) for _ in range(3)],
            "answer": text(5, 25),
            "reranking_scores": [0.5] * 3,
        }
        for _ in range(24)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the memory figures of Linux")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["n_layers", "modernbert", "generate", "reader", "pointer"])
def test_the_estimate_is_within_15_percent_of_a_run(middling, case, checkpointing, tmp_path):
    argv = ["--generator_name_or_path", str(middling / "generator"), "--train_file", str(middling / "train.jsonl")]
    argv += ["--num_compressor_layers", "4", "--projector_hidden_size", "2048", "--chunk_length", "64"]
    argv += ["--num_memory_tokens", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    argv += ["--max_steps", "2", "--gradient_checkpointing", str(checkpointing), "--cache_dtype", "float32"]
    argv += ["--use_cpu", "true", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(tmp_path)]
    if case in ("modernbert", "generate", "pointer"):
        argv += ["--compressor_type", "modernbert", "--compressor_name_or_path", str(middling / "encoder")]
    if case in ("reader", "pointer"):
        argv += ["--stage", case]
    if case == "pointer":
        argv += ["--slot_pooling", "pointer", "--pointer_window", "4"]
    if case == "generate":
        argv += ["--two_stage", "true"]
    if case in ("generate", "reader"):
        argv += ["--per_device_train_batch_size", "4"]
    command = [sys.executable, str(ROOT / "tests" / "peak_memory.py"), *argv]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("PEAKS "))
    peaks = json.loads(line.removeprefix("PEAKS "))
    model_args, data_args, args = parse_arguments(argv)
    args.stage = "generate" if args.two_stage else args.stage
    needed = estimate_stage(model_args, data_args, args).needed
    measured = peaks["train"] - peaks["before"]
    print(
        f"{case}, checkpointing {checkpointing}: {measured / 1e6:.0f} MB measured, {needed.total / 1e6:.0f} estimated"
    )
    assert needed.total == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("t4-modernbert-two-stage", 16), ("a100-40gb", 40)])
def test_recipes_for_a_card_fit_it(name, size, monkeypatch, tmp_path):
    ids = {key: SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    mistral = MistralConfig(vocab_size=32000, max_position_embeddings=32768, sliding_window=None, **ids)
    mistral.save_pretrained(tmp_path / "generator")
    build_tokenizer().save_pretrained(tmp_path / "generator")
    ModernBertConfig(cls_token_id=0, sep_token_id=1, **ids).save_pretrained(tmp_path / "encoder")
    build_tokenizer(pair=True).save_pretrained(tmp_path / "encoder")
    argv = [str(ROOT / "recipes" / f"{name}.yaml"), "--generator_name_or_path", str(tmp_path / "generator")]
    if "modernbert" in name:
        argv += ["--compressor_name_or_path", str(tmp_path / "encoder")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = dry_run(*parse_arguments([*argv, "--train_file", "nowhere", "--output_dir", str(tmp_path / "out")]))
    assert f"{size} GB: NO" not in report and report.count(f"{size} GB: yes") == report.count("Stage ")
