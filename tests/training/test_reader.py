"""The stage `reader`: LoRA on whole documents, saved as a PEFT adapter, and joint training that starts from it."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from errors_scaledown import ScaleDownError
from folders import SETTINGS, write_rows
from scaledown import ScaleDownModel
from scaledown.common.adapters import start_lora_from
from scaledown.evaluation.arguments import EvaluationArguments
from scaledown.evaluation.contestants import load_contestants
from scaledown.evaluation.data import Example
from scaledown.evaluation.systems import TextSystem
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from scaledown.training.reader import ReaderCollator
from scaledown.training.run import run, train
from tiny import ANSWERS, DOCUMENTS, GENERATORS, QUESTIONS, build_model, build_tokenizer, randomize_lora


def rows() -> list[dict]:
    documents = [*DOCUMENTS[:2], []]
    listed = zip(QUESTIONS, documents, ANSWERS, strict=True)
    return [{"id": str(i), "query": q, "documents": d, "answer": [a]} for i, (q, d, a) in enumerate(listed)]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GENERATORS["llama"]()).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def arguments(folder, **settings):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "save_steps": 2}
    return ScaleDownTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", **{**defaults, **settings}
    )


@pytest.fixture(scope="module")
def reader(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    data = DataArguments(train_file=str(write_rows(folder / "train.jsonl", rows() * 2)))
    settings = ModelArguments(generator_name_or_path=str(generator), lora_r=4, lora_alpha=8, lora_dropout=0.0)
    train(settings, data, arguments(folder / "adapter", stage="reader", learning_rate=1e-2))
    return folder / "adapter"


def test_the_reader_learns_from_the_prompt_that_the_full_text_baseline_reads(model):
    batch = ReaderCollator(model.processor)(rows())
    system = TextSystem("full_text", model.generator, model.processor, model.generation_config, None, 8)
    examples = [Example(row["id"], row["query"], row["documents"], row["answer"]) for row in rows()]
    for ids, mask, prompt, answer in zip(
        batch["input_ids"], batch["attention_mask"], system.prompts(examples), ANSWERS, strict=True
    ):
        read = ids[mask.bool()].tolist()
        assert read[: len(prompt)] == prompt
        assert model.processor.tokenizer.decode(read[len(prompt) :]) == f"{answer}</s>"


def test_the_loss_counts_each_answer_token_once_and_nothing_else(model):
    batch = ReaderCollator(model.processor)(rows())
    with torch.no_grad():
        loss = model.generator(**batch).loss
        logits = model.generator(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        ).logits.log_softmax(dim=-1)
    expected = []
    for i, answer in enumerate(ANSWERS):
        learned = model.processor.encode_answers([answer], 128)[0]
        expected += [-logits[i, -len(learned) - 1 + j, token] for j, token in enumerate(learned)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_a_prompt_past_the_context_names_its_record(model):
    long = {"id": "17", "query": "Who?", "documents": ["word " * 600], "answer": ["a"]}
    with pytest.raises(ScaleDownError, match=r"record 17 needs \d+ tokens .* reads 512"):
        ReaderCollator(model.processor)([long])


def test_what_is_saved_is_an_adapter_that_peft_loads_and_that_has_learned(reader, generator):
    plain = AutoModelForCausalLM.from_pretrained(generator)
    ids = torch.arange(20).unsqueeze(0)
    before = plain(ids).logits
    loaded = PeftModel.from_pretrained(plain, reader)
    assert not torch.allclose(loaded(ids).logits, before)
    assert loaded.peft_config["default"].r == 4
    assert not list(reader.rglob("training_args.bin"))  # a pickle


def test_a_run_that_is_started_again_goes_on_from_its_last_checkpoint(generator, tmp_path):
    data = DataArguments(train_file=str(write_rows(tmp_path / "train.jsonl", rows() * 4)))
    settings = ModelArguments(generator_name_or_path=str(generator), lora_r=4, lora_dropout=0.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings, data, arguments(whole, stage="reader", max_steps=4))
    schedule = {"stage": "reader", "max_steps": 4, "lr_scheduler_type": "linear"}
    train(settings, data, arguments(parts, **schedule))
    (parts / "all_results.json").unlink()  # as if it had been killed after the checkpoint of step 2
    for file in (parts / "checkpoint-4").iterdir():
        file.unlink()
    (parts / "checkpoint-4").rmdir()
    train(settings, data, arguments(parts, **schedule))
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    for name in left:
        torch.testing.assert_close(left[name], right[name])


def test_joint_training_starts_from_the_readers_lora(reader, generator, tmp_path):
    data = DataArguments(train_file=str(write_rows(tmp_path / "train.jsonl", rows())))
    settings = ModelArguments(
        generator_name_or_path=str(generator), lora_name_or_path=str(reader), num_compressor_layers=2, merge_lora=False
    )
    model, _ = train(settings, data, arguments(tmp_path / "joint", learning_rate=0.0, compressor_learning_rate=0.0))
    saved = load_file(reader / "adapter_model.safetensors")
    assert model.config.lora_config["r"] == 4
    own = {n: p for n, p in model.generator.named_parameters() if "lora_" in n}
    assert len(own) == len(saved)
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.data, saved[f"base_model.model.{name.replace('.default', '')}"])


def test_an_adapter_that_does_not_fit_is_refused(reader, tmp_path):
    with pytest.raises(ScaleDownError, match=r"holds no adapter_config\.json"):
        start_lora_from(build_model(), str(tmp_path))
    other = build_model()
    other.add_lora(r=8)
    with pytest.raises(ScaleDownError, match=r"does not fit the model's LoRA.*lora_r \(4\)"):
        start_lora_from(other, str(reader))


def test_a_reader_writes_no_answers_while_it_learns(tmp_path):
    with pytest.raises(ScaleDownError, match="stage reader"):
        arguments(tmp_path, stage="reader", predict_with_generate=True)
    with pytest.raises(ScaleDownError, match="two_stage"):
        run(
            ModelArguments(generator_name_or_path="x"),
            DataArguments(train_file="y"),
            arguments(tmp_path, stage="reader", two_stage=True),
        )


def test_evaluation_lets_the_reader_read_the_text(reader, generator, tmp_path):
    torch.manual_seed(0)
    model = ScaleDownModel.from_backbones(str(generator), **SETTINGS)
    model.add_lora(r=4)
    randomize_lora(model)
    data = write_rows(tmp_path / "data.jsonl", rows()[:2])
    settings = {"data": str(data), "baselines": "full_text", "reader": str(reader), "device": "cpu"}
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(generator), reader).merge_and_unload()
    ids = torch.arange(20).unsqueeze(0)
    for weights_format in ("delta", "full"):
        model.save_pretrained(tmp_path / weights_format, weights_format=weights_format)
        arguments = EvaluationArguments(model=str(tmp_path / weights_format), **settings)
        found = load_contestants(arguments, torch.device("cpu"))
        torch.testing.assert_close(found.generator(ids).logits, expected(ids).logits)
        assert not torch.allclose(found.model.generator(ids).logits, expected(ids).logits, atol=1e-3)
        assert any("reader adapter" in note for note in found.notes)
    with pytest.raises(ScaleDownError, match=r"holds no adapter_config\.json"):
        arguments.reader = str(tmp_path)
        load_contestants(arguments, torch.device("cpu"))
