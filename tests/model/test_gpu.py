"""What only a GPU shows: mixed precision, quantization, kernels, placement, compiled decoding.

    python -m pytest -m gpu tests/model/test_gpu.py

They are skipped where there is no GPU. `GPU_TESTS_ON=cpu` runs those that can on a CPU, to try the tests themselves.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel, GenerationConfig, TextIteratorStreamer

from folders import ROOT, SETTINGS, TRAINING_SETTINGS, from_backbones, options, outputs, save_backbones, write_rows
from scaledown import ScaleDownModel
from scaledown.training.arguments import ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.trainer import ScaleDownTrainer
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_model, randomize_lora

ON_CPU = os.environ.get("GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda" and not ON_CPU, reason="needs a GPU"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
WRITING = {"max_new_tokens": 12, "do_sample": False}
KINDS = ("n_layers", "modernbert", "llm")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(params=KINDS)
def pair(request):
    """The same model on the CPU and on the GPU, LoRA as after some training."""
    model = randomize_lora(build_model(request.param, lora=True))
    twin = copy.deepcopy(model).to(DEVICE)
    twin.processor = model.processor
    return model, twin


def rows() -> list[dict]:
    listed = zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True)
    return [{"query": q, "documents": d, "answer": [a], "reranking_scores": [1.0] * len(d)} for q, d, a in listed]


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float):
    actual, expected = (
        {name: value[:, -1] if name == "logits" else value for name, value in found.items()}  # no padding is there
        for found in (actual, expected)
    )
    for name, value in expected.items():
        difference = (actual[name].float().cpu() - value.float().cpu()).norm() / value.float().norm().cpu()
        assert difference < tolerance, f"{name}: {difference}"


# -- inference ---------------------------------------------------------------------------------------------------------


def test_what_the_gpu_computes_is_what_the_cpu_computes(pair):
    on_cpu, on_gpu = pair
    assert_near(outputs(on_gpu), outputs(on_cpu), 1e-4)
    assert on_gpu.answer(QUESTIONS, DOCUMENTS, **WRITING) == on_cpu.answer(QUESTIONS, DOCUMENTS, **WRITING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_near_32(pair, dtype):
    on_cpu, on_gpu = pair
    on_gpu.to(dtype)
    assert_near(outputs(on_gpu), outputs(on_cpu), 0.05)


def test_passes_by_length_and_shared_prefixes_change_nothing(pair):
    _, model = pair
    documents = [[text * n for text in listed for n in (1, 2, 5)] for listed in DOCUMENTS]
    batch = model.processor.encode_documents(QUESTIONS, documents)
    chunks = {n: v for n, v in batch.items() if n not in ("chunk_to_document", "document_to_example")}
    with torch.no_grad():
        expected = model.get_memory_embeddings(**{name: part.to(DEVICE) for name, part in chunks.items()})
        for size in (2, 16, 64):
            found = model.get_memory_embeddings(**chunks, batch_size=size)
            assert_near(
                {"memory": found.memory_embeddings, "scores": found.reranking_scores},
                {"memory": expected.memory_embeddings, "scores": expected.reranking_scores},
                1e-4,
            )


def test_every_way_to_write_works(pair):
    _, model = pair
    greedy = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    for settings in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert model.answer(QUESTIONS, DOCUMENTS, **WRITING, **settings) == greedy
    for settings in ({"num_beams": 3}, {"do_sample": True, "temperature": 0.7}, {"repetition_penalty": 1.2}):
        found = model.answer(QUESTIONS, DOCUMENTS, **{**WRITING, **settings})
        assert len(found) == 3
        assert all(isinstance(answer, str) for answer in found)
    batch = model.processor(QUESTIONS[:1], DOCUMENTS[:1]).to(DEVICE)
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**batch, **WRITING, streamer=streamer)
    assert "".join(streamer).strip() == model.answer(QUESTIONS[0], DOCUMENTS[0], **WRITING)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_every_attention_kernel_gives_the_same(attention, backbones):
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash-attn")

    def build(**settings) -> ScaleDownModel:
        torch.manual_seed(0)  # memory embeddings are drawn alike
        return from_backbones(backbones["n_layers"], **settings)

    expected = outputs(build(dtype=torch.float32))
    in_16_bits = attention == "flash_attention_2"  # which knows no 32
    dtype = torch.bfloat16 if in_16_bits else torch.float32
    model = build(dtype=dtype, attn_implementation=attention).to(DEVICE)
    assert_near(outputs(model), expected, 0.2 if in_16_bits else 1e-4)


@needs_cuda
def test_compiled_decoding_writes_the_same_answers():
    model = randomize_lora(build_model("n_layers", lora=True)).to(DEVICE)
    plain = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    model.optimize_for_inference(compile=True)
    assert model.compiles_decoding
    assert model.answer(QUESTIONS, DOCUMENTS, **WRITING) == plain
    assert model.answer(QUESTIONS[1:], DOCUMENTS[1:], **WRITING) == plain[1:]


# -- placement ---------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_device_map_auto_places_the_model(kind, weights_format, backbones, tmp_path):
    model = from_backbones(backbones[kind], dtype=torch.float32)
    model.save_pretrained(tmp_path, weights_format=weights_format)
    expected, answers = outputs(model), model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    placed = ScaleDownModel.from_pretrained(str(tmp_path), device_map="auto")
    assert placed.device.type == "cuda"
    assert_near(outputs(placed), expected, 1e-4)
    assert placed.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers


@needs_cuda
@pytest.mark.parametrize("offloaded", ["generator", "compressor"])
def test_parts_may_lie_on_the_cpu_and_be_computed_on_the_gpu(offloaded, backbones, tmp_path):
    model = from_backbones(backbones["n_layers"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ranking = model.rank(QUESTIONS[2], DOCUMENTS[2])
    answers = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    places = {"generator": 0, "compressor": 0, offloaded: "cpu"}
    placed = ScaleDownModel.from_pretrained(str(tmp_path), device_map=places)
    assert placed.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers
    found = placed.rank(QUESTIONS[2], DOCUMENTS[2])
    assert [row["corpus_id"] for row in found] == [row["corpus_id"] for row in ranking]


def test_an_offloaded_model_answers(backbones):
    model = from_backbones(backbones["n_layers"], dtype=torch.float32)
    answers = model.answer(QUESTIONS, DOCUMENTS, **WRITING)
    scores = [row["score"] for row in model.rank(QUESTIONS[2], DOCUMENTS[2])]
    cpu_offload(model, execution_device=DEVICE)
    assert model.answer(QUESTIONS, DOCUMENTS, **WRITING) == answers
    found = [row["score"] for row in model.rank(QUESTIONS[2], DOCUMENTS[2])]
    assert found == pytest.approx(scores, rel=1e-3, abs=1e-4)


def test_a_saved_model_loads_by_automodel_onto_the_device(backbones, tmp_path):
    model = from_backbones(backbones["modernbert"], dtype=torch.bfloat16).to(DEVICE)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True, dtype="auto").to(DEVICE)
    assert loaded.answer(QUESTIONS, DOCUMENTS, **WRITING) == model.answer(QUESTIONS, DOCUMENTS, **WRITING)


# -- quantization ------------------------------------------------------------------------------------------------------


@needs_cuda
@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_generator_answers_saves_and_loads(bits, backbones, tmp_path):
    quantized = {"device_map": {"": 0}, f"load_in_{bits}bit": True}
    model = from_backbones(backbones["n_layers"], dtype=torch.bfloat16, **quantized)
    model.add_lora(r=4)
    expected = outputs(model)
    model.save_pretrained(tmp_path, weights_format="delta")
    loaded = ScaleDownModel.from_pretrained(str(tmp_path), **quantized)
    assert_near(outputs(loaded), expected, 0.02)
    assert len(loaded.answer(QUESTIONS, DOCUMENTS, **WRITING)) == 3


# -- training ----------------------------------------------------------------------------------------------------------


def train_some_steps(model, folder, **settings):
    arguments = ScaleDownTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-3,
        compressor_learning_rate=1e-3,
        dataloader_num_workers=0,
        use_cpu=DEVICE.type == "cpu",
        **settings,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = ScaleDownTrainer(model, arguments, train_dataset=rows() * 3, data_collator=JointCollator(model.processor))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(0 < float(loss) < 50 for loss in losses), losses
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter.cpu(), before[name].cpu())
    }
    assert any("lora_" in name for name in changed)
    assert any(name.startswith("compressor.backbone") for name in changed)
    assert not any(name.startswith("generator.") and "lora_" not in name for name in changed)
    return arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_both_sides_in_mixed_precision(kind, checkpointing, tmp_path):
    model = build_model(kind, lora=True)
    arguments = train_some_steps(model, tmp_path, gradient_checkpointing=checkpointing)
    assert arguments.bf16 == (DEVICE.type == "cuda")


@needs_cuda
def test_fp16_trains(tmp_path):
    train_some_steps(build_model(lora=True), tmp_path, fp16=True)


def test_32_bits_are_had_for_the_asking(tmp_path):
    arguments = train_some_steps(build_model(lora=True), tmp_path, bf16=False, fp16=False)
    assert arguments.generator_dtype == torch.float32


@needs_cuda
@needs_bitsandbytes
def test_lora_trains_on_a_4_bit_generator(backbones, tmp_path):
    model = from_backbones(backbones["n_layers"], dtype=torch.bfloat16, device_map={"": 0}, load_in_4bit=True)
    model.add_lora(r=4)
    train_some_steps(model, tmp_path)


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]])
def test_train_py_runs_on_the_device_and_its_model_is_evaluated(launcher, backbones, tmp_path):
    generator, _ = backbones["n_layers"]
    data = write_rows(tmp_path / "train.jsonl", rows() * 4)
    settings = {
        **TRAINING_SETTINGS,
        "generator_name_or_path": generator,
        "train_file": data,
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": str(DEVICE.type == "cpu").lower(),
    }
    commands = [[*launcher, str(ROOT / "train.py"), *options(settings)]]
    if importlib.util.find_spec("ir_measures") is not None:
        evaluation = {
            "model": tmp_path / "run",
            "data": data,
            "num_documents": 2,
            "baselines": "full_text,no_documents",
            "max_new_tokens": 4,
            "output_dir": tmp_path / "results",
        }
        commands.append([str(ROOT / "evaluate.py"), *options(evaluation)])
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-3000:]


def test_generation_settings_of_the_model_hold(pair):
    _, model = pair
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2)
    batch = model.processor(QUESTIONS, DOCUMENTS).to(DEVICE)
    sequences = model.generate(**batch, generation_config=settings)
    assert sequences.shape == (3, batch["input_ids"].shape[1] + 3)
    assert SETTINGS["num_memory_tokens"] == model.config.num_memory_tokens
