"""Joint training: what is learned, how it is logged, how a run goes on after it was stopped."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import normalizers
from transformers import AutoModel, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from folders import ROOT, TRAINING_SETTINGS, train_with_two_processes, write_rows
from scaledown import ScaleDownModel, ScaleDownProcessor
from scaledown.data.records import write_records
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments, parse_arguments
from scaledown.training.build import build_model as build_model_for_training
from scaledown.training.collators import CompressionCollator, GenerationCollator, JointCollator
from scaledown.training.finish import recorded_settings
from scaledown.training.run import main, run, train
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    ANSWERS,
    DOCUMENTS,
    ENCODERS,
    GENERATORS,
    QUESTIONS,
    build_model,
    build_tokenizer,
    randomize_lora,
)

SCORES = [[2.0, -1.0], None, [0.5, 1.0, -3.0]]


def rows(repeat: int = 1) -> list[dict]:
    listed = zip(QUESTIONS, DOCUMENTS, ANSWERS, SCORES, strict=True)
    return [{"query": q, "documents": d, "answer": [a], "reranking_scores": s} for q, d, a, s in list(listed) * repeat]


@pytest.fixture
def train_file(tmp_path):
    return write_rows(tmp_path / "train.jsonl", rows(repeat=4))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GENERATORS["llama"]()).save_pretrained(folder / "generator")
    build_tokenizer().save_pretrained(folder / "generator")
    AutoModel.from_config(ENCODERS["modernbert"]()).save_pretrained(folder / "encoder")
    build_tokenizer(pair=True).save_pretrained(folder / "encoder")
    return folder


def training_arguments(output_dir, **settings) -> ScaleDownTrainingArguments:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "compressor_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ScaleDownTrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


def build_trainer(model, output_dir, data=None, **settings) -> ScaleDownTrainer:
    return ScaleDownTrainer(
        model=model,
        args=training_arguments(output_dir, **settings),
        train_dataset=rows() if data is None else data,
        data_collator=JointCollator(model.processor),
        processing_class=model.processor,
    )


def model_arguments(backbones, compressor_type="n_layers", **settings) -> ModelArguments:
    defaults = {
        "generator_name_or_path": str(backbones / "generator"),
        "compressor_name_or_path": None if compressor_type == "n_layers" else str(backbones / "encoder"),
        "compressor_type": compressor_type,
    }
    return ModelArguments(**{**TRAINING_SETTINGS, **defaults, **settings})


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_collator_builds_the_prompt_of_inference(model):
    batch = JointCollator(model.processor)(rows())
    inference = model.processor(QUESTIONS, DOCUMENTS)
    for i in range(len(QUESTIONS)):
        prompt = inference["input_ids"][i][inference["attention_mask"][i] == 1].tolist()
        learned = batch["labels"][i] != -100
        sequence = batch["input_ids"][i][(batch["attention_mask"][i] == 1) & ~learned].tolist()
        assert sequence == prompt
        answer = model.processor.tokenizer(ANSWERS[i], add_special_tokens=False)["input_ids"]
        assert batch["labels"][i][learned].tolist() == [*answer, model.processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("collator", [JointCollator, GenerationCollator])
def test_an_answer_that_is_plain_text_is_learned_whole(model, collator):
    # Rows of a user's own script need not have come through `load_records`; its first letter would be learned.
    listed = [{**row, "document_slots": []} for row in rows()]
    plain = [{**row, "answer": row["answer"][0]} for row in listed]
    labels = [collator(model.processor)(kind)["labels"] for kind in (listed, plain)]
    assert torch.equal(*labels)


def test_logits_are_computed_for_the_answers_only_and_the_loss_is_the_same(model):
    batch = JointCollator(model.processor)(rows())
    longest = int((batch["labels"] != -100).sum(dim=1).max())
    assert batch["logits_to_keep"] == longest + 1
    short = model(**batch)
    assert short.logits.shape[1] == longest + 1
    whole = model(**{**batch, "logits_to_keep": 0})
    torch.testing.assert_close(short.loss, whole.loss)


def test_both_sides_learn_and_the_generator_stays(any_model_kind, tmp_path):
    model = build_model(any_model_kind, lora=True)
    before = parameters(model)
    build_trainer(model, tmp_path).train()
    for name, after in model.named_parameters():
        frozen = name.startswith("generator.") and "lora_" not in name
        assert torch.equal(before[name], after) == frozen, name


@pytest.fixture(params=["n_layers", "modernbert", "llm"])
def any_model_kind(request):
    return request.param


def test_token_embeddings_learn_unless_they_are_to_be_kept(backbones, train_file, tmp_path):
    generator = str(backbones / "generator")
    original = AutoModelForCausalLM.from_pretrained(generator).get_input_embeddings().weight
    for learns in (True, False):
        settings = {key: value for key, value in TRAINING_SETTINGS.items() if key != "lora_target_modules"}
        model_args = ModelArguments(generator_name_or_path=generator, train_token_embeddings=learns, **settings)
        arguments = training_arguments(tmp_path / str(learns), compressor_learning_rate=1e-2)
        model, _ = train(model_args, DataArguments(train_file=str(train_file)), arguments)
        assert torch.equal(model.compressor.backbone.get_input_embeddings().weight, original) is not learns


def test_each_side_has_its_learning_rate_and_embeddings_do_not_decay(tmp_path):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, learning_rate=3e-4, compressor_learning_rate=7e-5, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert settings.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (learning_rate, decay) in settings.items():
        assert learning_rate == (3e-4 if "lora_" in name else 7e-5), name
        undecayed = any(part in name for part in ("norm", "bias", "memory_embeddings", "rerank_embedding"))
        assert decay == (0.0 if undecayed else 0.1), name


def test_accumulated_micro_batches_make_the_step_of_one_batch(tmp_path):
    results = []
    for micro, accumulation in ((3, 1), (1, 3)):
        model = build_model(lora=True)
        settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        # SGD shows the gradient itself; Adam's first step would hide its scale.
        trainer = build_trainer(model, tmp_path, optim="sgd", max_grad_norm=0.0, **settings)
        trainer.train()
        results.append((parameters(model), trainer.state.log_history[0]))
    (whole, whole_log), (parts, parts_log) = results
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], msg=name, rtol=1e-4, atol=1e-6)
    for name in ("loss", "generation_loss", "reranking_loss"):
        assert whole_log[name] == pytest.approx(parts_log[name], rel=1e-4), name


def test_log_shows_both_losses_and_their_weighted_sum(tmp_path):
    model = build_model(lora=True, reranking_loss_weight=0.5)
    rates = {"learning_rate": 3e-3, "compressor_learning_rate": 1e-3}
    trainer = build_trainer(model, tmp_path, logging_steps=2, lr_scheduler_type="constant", **rates)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 2
    for line in logs:
        assert {name: line[name] for name in rates} == rates
        assert line["reranking_loss"] > 0
        assert line["loss"] == pytest.approx(line["generation_loss"] + 0.5 * line["reranking_loss"], rel=1e-3)


def test_the_log_has_both_learning_rates_of_the_same_step(tmp_path):
    rates = {"learning_rate": 4e-3, "compressor_learning_rate": 1e-3, "warmup_steps": 0}
    trainer = build_trainer(build_model(lora=True), tmp_path, logging_steps=1, lr_scheduler_type="linear", **rates)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["learning_rate"] for line in logs] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [line["compressor_learning_rate"] for line in logs] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_head_that_is_tied_is_not_missing_from_a_checkpoint(tmp_path):
    model = build_model(lora=True)
    model.all_tied_weights_keys = {"generator.lm_head.weight": "generator.model.embed_tokens.weight"}
    result = SimpleNamespace(missing_keys=["generator.lm_head.weight", "x"], unexpected_keys=[])
    build_trainer(model, tmp_path)._issue_warnings_after_load(result)
    assert result.missing_keys == ["x"]


@pytest.mark.filterwarnings("error:.*gradient_checkpointing:FutureWarning")
def test_checkpointing_is_asked_for_by_the_name_of_the_installed_transformers(tmp_path):
    args = training_arguments(tmp_path, gradient_checkpointing=True)
    assert args.gradient_checkpointing and getattr(args, "activation_checkpointing", True)
    assert not training_arguments(tmp_path).gradient_checkpointing


def test_evaluation_reports_both_losses(tmp_path):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, per_device_eval_batch_size=1)
    metrics = trainer.evaluate(rows())
    batches = [model(**JointCollator(model.processor)([row])) for row in rows()]
    expected = sum(b.generation_loss for b in batches).item() / 3
    assert metrics["eval_generation_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_reranking_loss"] > 0


def test_fewer_examples_than_a_batch_still_learn(tmp_path):
    model = build_model(lora=True)
    before = parameters(model)
    trainer = build_trainer(
        model, tmp_path, data=rows()[:1], per_device_train_batch_size=8, max_steps=-1, num_train_epochs=1
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["learning_rate"] > 0
    assert not torch.equal(before["compressor.memory_embeddings"], model.compressor.memory_embeddings)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 0), (19, 0), (20, 1), (100, 5)])
def test_warm_up_never_takes_all_steps(tmp_path, steps, warmup):
    assert training_arguments(tmp_path, warmup_steps=0.05).get_warmup_steps(steps) == warmup
    assert training_arguments(tmp_path, warmup_steps=50).get_warmup_steps(steps) == min(50, steps - 1)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = build_trainer(build_model(lora=True), tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class StopAt(TrainerCallback):
    """Ends a run without notice, as a power cut would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "weights_format, sampling", [("full", "random"), ("delta", "random"), ("full", "group_by_length")]
)
def test_resumed_run_equals_an_uninterrupted_one(
    backbones, train_file, tmp_path, monkeypatch, weights_format, sampling, caplog
):
    model_args = model_arguments(backbones, weights_format=weights_format, merge_lora=False, lora_dropout=0.1)
    data_args = DataArguments(train_file=str(train_file))
    # Twelve questions in steps of four: the run stops in its second epoch.
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    settings["train_sampling_strategy"] = sampling
    whole, _ = train(model_args, data_args, training_arguments(tmp_path / "whole", **settings))

    stopped = training_arguments(tmp_path / "stopped", **settings)
    with monkeypatch.context() as patch:
        original = ScaleDownTrainer.__init__
        patch.setattr(ScaleDownTrainer, "__init__", lambda self, **kw: original(self, **kw, callbacks=[StopAt(5)]))
        with pytest.raises(KeyboardInterrupt):
            train(model_args, data_args, stopped)
    assert not (tmp_path / "stopped" / "config.json").exists()
    torch.manual_seed(99)
    resumed, _ = train(model_args, data_args, training_arguments(tmp_path / "stopped", **settings))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert "missing keys" not in caplog.text


def test_checkpoint_is_a_whole_model_without_pickled_weights(backbones, train_file, tmp_path):
    args = training_arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    trained, _ = train(model_arguments(backbones), DataArguments(train_file=str(train_file)), args)
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_scaledown.py", "processor_config.json"} <= names
    assert not names & {"training_args.bin", "pytorch_model.bin"}
    again = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert again.config.lora_config is None
    expected = trained.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4)
    assert again.answer(QUESTIONS, DOCUMENTS, max_new_tokens=4) == expected
    checkpoint = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-2", trust_remote_code=True)
    torch.testing.assert_close(
        checkpoint(**checkpoint.processor(QUESTIONS, DOCUMENTS)).logits,
        again(**again.processor(QUESTIONS, DOCUMENTS)).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_training_goes_on_from_a_trained_model(backbones, train_file, tmp_path):
    data_args = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones, "modernbert"), data_args, training_arguments(tmp_path / "first"))
    further = ModelArguments(model_name_or_path=str(tmp_path / "first"), lora_r=2)
    trained, metrics = train(further, data_args, training_arguments(tmp_path / "second"))
    assert metrics["train_loss"] > 0
    assert trained.config.compressor_type == "modernbert"
    assert (tmp_path / "second" / "model.safetensors").is_file()


def test_command_line_trains_from_recipe_and_overrides(backbones, train_file, tmp_path, capsys):
    argv = [str(ROOT / "recipes" / "cpu-smoke.yaml"), "--generator_name_or_path", str(backbones / "generator")]
    argv += ["--train_file", str(train_file), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    assert main([*argv, "--save_steps", "100", "--eval_file", str(train_file), "--disable_tqdm", "true"]) == 0
    printed = capsys.readouterr().out
    assert "train_loss" in printed and "eval_generation_loss" in printed
    assert main(argv) == 2
    assert "holds a finished model" in capsys.readouterr().err


def test_recipe_values_have_the_options_types(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "generator_name_or_path: g\ntrain_file: t.jsonl\nlearning_rate: 1e-3\nlora_r: 4\nenable_reranking: false\n"
        "use_cpu: true\n"
    )
    model_args, data_args, args = parse_arguments([str(recipe), "--lora_r", "8"])
    assert (model_args.lora_r, model_args.enable_reranking) == (8, False)
    assert (args.learning_rate, args.compressor_learning_rate) == (1e-3, None)
    assert data_args.train_file == "t.jsonl"


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1\n", "did you mean learning_rate"),
        ("- a\n", "not a recipe"),
        ("train_file: t.jsonl\n", "Name either model_name_or_path"),
        ("generator_name_or_path: g\n", "train_file is missing"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, capsys, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main([str(recipe)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--eval_strategy", "steps"], "set eval_file"),
        (["--resume_from_checkpoint", "nowhere"], "is not a folder"),
        (["--compressor_type", "llm"], "does not go with compressor_type"),
        (["--num_compressor_layers", "9"], "exceeds the generator's 4 layers"),
    ],
)
def test_wrong_options_are_named(backbones, train_file, tmp_path, capsys, options, message):
    argv = ["--generator_name_or_path", str(backbones / "generator"), "--train_file", str(train_file)]
    argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert main([*argv, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_malformed_data_names_file_and_line(backbones, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "q", "documents": ["d"], "answer": "a"}\n{"query": "q"}\n')
    argv = ["--generator_name_or_path", str(backbones / "generator"), "--train_file", str(path)]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]) == 2
    assert f"{path}, line 2" in capsys.readouterr().err


def test_help_from_another_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0
    assert "--compressor_learning_rate" in result.stdout


def test_evaluation_after_training_does_not_use_the_counts_of_training(tmp_path):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, learning_rate=0.0, compressor_learning_rate=0.0, weight_decay=0.0)
    before = trainer.evaluate(rows())
    trainer.train()
    after = trainer.evaluate(rows())
    for name in ("eval_loss", "eval_generation_loss", "eval_reranking_loss"):
        assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_parts_of_the_loss_add_up_after_a_resume(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    build_trainer(build_model(lora=True, reranking_loss_weight=0.5), tmp_path, **settings).train()
    trainer = build_trainer(build_model(lora=True, reranking_loss_weight=0.5), tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (line,) = [line for line in trainer.state.log_history if line["step"] == 4 and "loss" in line]
    assert line["loss"] == pytest.approx(line["generation_loss"] + 0.5 * line["reranking_loss"], rel=1e-3)


def test_trainer_alone_learns_in_32_bits_at_the_papers_rates(tmp_path):
    for kind, rate in (("n_layers", 5e-5), ("modernbert", 1e-4)):
        model = build_model(kind, lora=True).to(torch.bfloat16)
        trainer = ScaleDownTrainer(
            model=model,
            args=ScaleDownTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=rows(),
            data_collator=JointCollator(model.processor),
        )
        trainer.create_optimizer()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {rate, 1e-4}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_run_that_ended_while_saving_goes_on(backbones, train_file, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file)))
    train(*arguments, training_arguments(tmp_path / "out", **settings))
    (tmp_path / "out" / "all_results.json").unlink()
    train(*arguments, training_arguments(tmp_path / "out", **settings))
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(*arguments, training_arguments(tmp_path / "out", **settings))


def test_named_modules_get_lora(backbones, train_file, tmp_path):
    settings = model_arguments(backbones, lora_target_modules="q_proj, v_proj", merge_lora=False)
    model, _ = train(settings, DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out"))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_a_record_that_does_not_fit_is_named(model):
    long = {**rows()[0], "id": "the-long-one", "documents": ["word " * 5000]}
    with pytest.raises(ValueError, match=r"questions\[1\] .*ids first, the-long-one"):
        JointCollator(model.processor)([{**rows()[0], "id": "first"}, long])


def test_a_document_the_tokenizer_leaves_nothing_of_is_named():
    model = build_model("modernbert")
    model.processor.compressor_tokenizer.backend_tokenizer.normalizer = normalizers.Replace("🪿", "")
    records = [{**rows()[0], "id": "first"}, {**rows()[1], "id": "goose", "documents": ["🪿"]}]
    for collator in (JointCollator, CompressionCollator):
        with pytest.raises(ValueError, match=r"documents\[1\]\[0\] has no token .*ids first, goose"):
            collator(model.processor)(records)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"two_stage": True, "stage": "pretrain"}, "contradicts"),
        ({"stage": "pretrain", "train_sampling_strategy": "group_by_length"}, "passages are of one length"),
        ({"two_stage": True, "train_sampling_strategy": "batch_rebalance"}, "does not work on a cache"),
        ({"metric_for_best_model": "f1"}, "set predict_with_generate"),
        ({"metric_for_best_model": "eval_exact_match"}, "set predict_with_generate"),
        ({"early_stopping_patience": 2}, "set eval_strategy"),
    ],
)
def test_what_is_not_supported_is_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    "stage, scored, weight",
    [
        ("joint", 0, 0.05),
        pytest.param("joint", 1, 0.05, marks=pytest.mark.slow),
        pytest.param("joint", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("generate", 0, 0.05, marks=pytest.mark.slow),
        pytest.param("generate", 1, 0.05, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_with_partly_scored_data(backbones, tmp_path, stage, scored, weight):
    """One question at most has scores; one has no documents either, and is the only one of its micro-batch."""
    records = [
        {"query": row["query"], "documents": row["documents"], "answer": row["answer"]} for row in rows(repeat=2)
    ]
    records[0]["reranking_scores"] = [1.0, 0.0]
    records[1]["documents"] = []
    if not scored:
        del records[0]["reranking_scores"]
    path = write_rows(tmp_path / "train.jsonl", records)
    arguments = {
        "generator_name_or_path": backbones / "generator",
        "num_compressor_layers": 2,
        "max_query_length": 24,
        "train_file": path,
        "eval_file": path,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "two_stage": stage == "generate",
        "reranking_loss_weight": weight,
        "logging_steps": 1,
        "use_cpu": True,
        "output_dir": tmp_path / "out",
    }
    train_with_two_processes(arguments, tmp_path)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert ("eval_reranking_loss" in results) == bool(scored)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    logs = [line for line in state["log_history"] if "loss" in line]
    assert len(logs) == 3
    for line in logs:
        parts = line["generation_loss"] + weight * line.get("reranking_loss", 0)
        assert line["loss"] == pytest.approx(parts, rel=1e-3)


# -- going on from a trained model -------------------------------------------------------------------------------------


def trained(backbones, folder, **settings):
    model = build_model_for_training(model_arguments(backbones, **settings), training_arguments(folder))
    model.save_pretrained(folder / "trained")
    return {
        "generator_name_or_path": None,
        "compressor_name_or_path": None,
        "model_name_or_path": str(folder / "trained"),
    }


@pytest.mark.parametrize("weights_format", ["full", "delta"])
def test_settings_that_may_change_reach_model_processor_and_card(backbones, train_file, tmp_path, weights_format):
    source = trained(backbones, tmp_path, weights_format=weights_format)
    changes = {
        "reranking_loss_weight": 5.0,
        "compression_rate": 16,
        "system_prompt": "Hallo.",
        "weights_format": "delta",
    }
    arguments = ModelArguments(**source, **changes)
    train(arguments, DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out"))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    for name, value in changes.items():
        assert getattr(loaded.config, name) == value
    assert loaded.processor.compression_rate == 16 and loaded.processor.system_prompt == "Hallo."
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| reranking_loss_weight | 5 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_memory_tokens": 2}, "num_memory_tokens=2 cannot be changed in a trained model"),
        ({"compressor_type": "llm"}, "compressor_type=llm cannot be changed"),
        ({"lora_r": 64}, "LoRA has r=4, not 64"),
        ({"generator_revision": "abc"}, "generator_revision=abc says nothing about model_name_or_path"),
        ({"compressor_name_or_path": "x"}, "compressor_name_or_path=x says nothing about model_name_or_path"),
    ],
)
def test_settings_that_cannot_change_are_refused(backbones, train_file, tmp_path, change, message):
    source = trained(backbones, tmp_path)
    with pytest.raises(ValueError, match=message):
        train(
            ModelArguments(**{**source, **change}),
            DataArguments(train_file=str(train_file)),
            training_arguments(tmp_path),
        )


@pytest.mark.parametrize("unread", ["revision", "compressor_revision"])
def test_a_revision_of_nothing_is_refused(backbones, unread):
    with pytest.raises(ValueError, match=f"{unread}=abc says nothing about generator_name_or_path"):
        model_arguments(backbones, **{unread: "abc"})


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_a_delta_of_a_merged_generator_is_refused_before_it_is_trained(backbones, train_file, tmp_path, stage):
    data_args = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones), data_args, training_arguments(tmp_path / "merged"))
    further = ModelArguments(model_name_or_path=str(tmp_path / "merged"), weights_format="delta")
    with pytest.raises(ValueError, match="its LoRA was merged into it"):
        run(further, data_args, training_arguments(tmp_path / "out", two_stage=stage == "generate"))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_no_run_has_left_yet_is_not_looked_up(train_file, tmp_path, monkeypatch, capsys, dry_run):
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / "recipes" / "mistral-7b-modernbert.yaml"), "--train_file", str(train_file), "--use_cpu", "true"]
    assert main([*argv, "--dry_run", str(dry_run)]) == 2
    assert "runs/mistral-7b-modernbert-pretrain is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generator_name_or_path", "runs/nothere"], "generator_name_or_path=runs/nothere is not a folder"),
        (["--generator_name_or_path", "/no/such"], "generator_name_or_path=/no/such is not a folder"),
        (["--generator_name_or_path", "nobody/nothing"], "generator_name_or_path.* nobody/nothing.*cannot be loaded"),
    ],
)
def test_a_name_or_folder_that_is_not_there_is_named_with_its_option(
    train_file, tmp_path, monkeypatch, capsys, options, message, dry_run
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = ["--train_file", str(train_file), "--use_cpu", "true", "--report_to", "none", *options]
    assert main([*argv, "--dry_run", str(dry_run)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("generator_name_or_path=nobody", "generator_name_or_path nobody"))
    assert not dry_run or "configuration and tokenizer" in error


def test_the_branch_asked_for_is_pushed_to(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(ScaleDownModel, "push_to_hub", lambda self, name, **settings: pushed.append((name, settings)))
    trainer = build_trainer(build_model(lora=True), tmp_path, hub_model_id="me/model", hub_revision="dev")
    trainer.push_to_hub()
    trainer.push_to_hub(revision="other")
    assert [(name, settings["revision"]) for name, settings in pushed] == [("me/model", "dev"), ("me/model", "other")]


def test_lists_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "scaledown.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard", "wandb"]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text("report_to: [tensorboard, wandb]\nlora_target_modules: [q_proj, v_proj]\nlabel_names: [labels]\n")
    model_args, _, args = parse_arguments([str(path), "--generator_name_or_path", "x", "--train_file", "y"])
    assert (args.report_to, args.label_names) == (["tensorboard", "wandb"], ["labels"])
    assert model_args.lora_target_modules == "q_proj,v_proj"


@pytest.mark.parametrize(
    "line, message",
    [
        ("stage: pretraining", "sets stage to 'pretraining'; expected one of joint, pretrain"),
        ("stage: [", "is not YAML"),
        ("load_in_4bit: maybe", "sets load_in_4bit to 'maybe'; expected true or false"),
    ],
)
def test_mistakes_in_a_recipe_are_told(tmp_path, line, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path), "--generator_name_or_path", "x", "--train_file", "y"])


def test_a_bare_no_in_a_recipe_is_the_word(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("save_strategy: no\neval_strategy: no\nmerge_lora: no\n", encoding="utf-8")
    model_args, _, args = parse_arguments(
        [str(path), "--generator_name_or_path", "x", "--train_file", "y", "--output_dir", str(tmp_path)]
    )
    assert args.save_strategy == "no" and args.eval_strategy == "no" and model_args.merge_lora is False


@pytest.mark.parametrize("count", [0, -3])
def test_a_number_of_examples_below_one_is_refused(count):
    with pytest.raises(ValueError, match=f"max_train_examples is {count}, expected at least 1"):
        DataArguments(train_file="x", max_train_examples=count)


@pytest.mark.parametrize("damage", ["no state", "short weights"])
def test_a_checkpoint_that_was_not_finished_is_left_aside(backbones, train_file, tmp_path, damage, caplog):
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file)))
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    train(*arguments, training_arguments(tmp_path / "whole", **settings))
    for step in (1, 2):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    if damage == "no state":
        (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").unlink()
    else:
        weights = tmp_path / "cut" / "checkpoint-2" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    train(*arguments, training_arguments(tmp_path / "cut", **settings))
    assert "checkpoint-2 is not whole" in caplog.text
    expected = AutoModel.from_pretrained(tmp_path / "whole").state_dict()
    for name, value in AutoModel.from_pretrained(tmp_path / "cut").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_parts_of_the_evaluation_loss_add_up_when_batches_are_uneven(tmp_path):
    model = build_model(lora=True, reranking_loss_weight=0.5)
    trainer = build_trainer(model, tmp_path, per_device_eval_batch_size=2)
    scored = [row for row in rows(2) if row["reranking_scores"] is not None]
    metrics = trainer.evaluate(scored[:3])
    expected = metrics["eval_generation_loss"] + 0.5 * metrics["eval_reranking_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_plain_training_arguments_are_refused(tmp_path):
    model = build_model(lora=True)
    with pytest.raises(TypeError, match="must be ScaleDownTrainingArguments, got TrainingArguments"):
        ScaleDownTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


# -- reports to others -------------------------------------------------------------------------------------------------


def test_tensorboard_gets_what_the_log_has(tmp_path):
    trainer = build_trainer(build_model(lora=True), tmp_path, report_to="tensorboard")
    trainer.train()
    trainer.evaluate(rows())
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    for name in ("loss", "generation_loss", "reranking_loss", "data_wait", "learning_rate"):
        scalars = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert scalars == [(line["step"], pytest.approx(line[name])) for line in logs], name
    assert {"eval/loss", "eval/generation_loss", "eval/reranking_loss"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name):
    argv = ["--generator_name_or_path", "x", "--train_file", "y", "--output_dir", str(tmp_path), "--report_to", name]
    monkeypatch.setattr("scaledown.training.arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=f"report_to={name} needs {name}.*pip install {name}"):
        parse_arguments(argv)
    monkeypatch.setattr("scaledown.training.arguments.get_available_reporting_integrations", lambda: [name])
    assert parse_arguments(argv)[-1].report_to == [name]


# -- evaluation during training ----------------------------------------------------------------------------------------


def answer_by_heart(monkeypatch, answers):
    """The model answers as it is told, whatever it reads."""

    def decode_answers(self, sequences, prompt_length=0):
        taken = [answers[(decode_answers.count + i) % len(answers)] for i in range(len(sequences))]
        decode_answers.count += len(sequences)
        return taken

    decode_answers.count = 0
    monkeypatch.setattr(ScaleDownProcessor, "decode_answers", decode_answers)


@pytest.mark.parametrize("form", [list, "".join])  # as a list, and as plain text
def test_evaluation_answers_and_compares(tmp_path, monkeypatch, form):
    model = build_model(lora=True)
    trainer = build_trainer(model, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2)
    answer_by_heart(monkeypatch, ["walter scott.", "In the Cévennes", "no idea"])
    metrics = trainer.evaluate([{**row, "answer": form(row["answer"])} for row in rows()])
    assert metrics["eval_exact_match"] == pytest.approx(1 / 3)
    assert metrics["eval_match"] == pytest.approx(1 / 3)
    # "in cévennes" against "in cévennes 1006 kilometres": 2 of 2 and 2 of 4.
    assert metrics["eval_f1"] == pytest.approx((1 + 2 * 2 / 6) / 3)
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_answers_are_compared_with_the_gold_ones_not_with_the_teachers(backbones, tmp_path, monkeypatch, stage):
    path = tmp_path / "data.jsonl"
    gold = [["Walter Scott"], None, ["a bird", "x"]]
    write_records(path, [{**row, "gold_answers": right} for row, right in zip(rows(), gold, strict=True)])
    answer_by_heart(monkeypatch, ["walter scott.", "In the Cévennes; 1,006 kilometres", "a bird"])
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 2, "max_steps": 1}
    args = training_arguments(tmp_path / "out", two_stage=stage == "generate", **settings)
    data = DataArguments(train_file=str(path), eval_file=str(path))
    assert run(model_arguments(backbones), data, args)["eval_exact_match"] == 1.0


def test_compute_metrics_gets_the_logits_and_labels_of_the_answers(tmp_path):
    model = build_model(lora=True)
    seen = []

    def compute_metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        seen.append((logits, labels))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return {"cross_entropy": loss.item()}

    trainer = ScaleDownTrainer(
        model=model,
        args=training_arguments(tmp_path, per_device_eval_batch_size=2),
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        data_collator=JointCollator(model.processor),
        processing_class=model.processor,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_cross_entropy"] == pytest.approx(metrics["eval_generation_loss"], rel=1e-4)
    assert trainer.evaluate(rows())["eval_cross_entropy"] > 0  # batches of different lengths
    assert seen[1][0].shape[:2] == seen[1][1].shape and len(seen[1][0]) == 3


def test_answers_of_the_evaluation_are_those_of_inference(tmp_path, monkeypatch):
    model = randomize_lora(build_model(lora=True))
    given = []
    original = ScaleDownProcessor.decode_answers

    def decode_answers(self, *args):
        given.extend(original(self, *args))
        return given[-len(args[0]) :]

    monkeypatch.setattr(ScaleDownProcessor, "decode_answers", decode_answers)
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 2, "generation_max_new_tokens": 5}
    build_trainer(model, tmp_path, **settings).evaluate(rows())
    monkeypatch.undo()
    assert given == model.answer(QUESTIONS, DOCUMENTS, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_the_best_checkpoint_is_kept_and_training_stops_early(backbones, train_file, tmp_path, stage):
    settings = {
        "two_stage": stage == "generate",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 12,
        # So high that the loss grows at once; the first steps are the best.
        "learning_rate": 100.0,
        "compressor_learning_rate": 100.0,
        "warmup_steps": 0,
        "early_stopping_patience": 2,
        "metric_for_best_model": "generation_loss",
        "greater_is_better": False,
    }
    data = DataArguments(train_file=str(train_file), eval_file=str(train_file))
    arguments = model_arguments(backbones, "modernbert", merge_lora=False)
    args = training_arguments(tmp_path / "out", **settings)
    metrics = run(arguments, data, args)
    losses = {}
    for file in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        for line in json.loads(file.read_text(encoding="utf-8"))["log_history"]:
            if "eval_loss" in line:
                losses[line["step"]] = line["eval_generation_loss"]
    assert len(losses) < 12
    best = min(losses, key=losses.get)
    assert metrics["eval_generation_loss"] == pytest.approx(losses[best], rel=1e-4)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors").items():
        assert torch.equal(saved[name], value), name


def test_answers_are_not_asked_for_where_there_are_no_questions(tmp_path):
    with pytest.raises(ValueError, match="needs questions"):
        training_arguments(tmp_path, stage="pretrain", predict_with_generate=True)


@pytest.mark.parametrize("stage", ["joint", "generate"])
def test_questions_of_like_length_come_together(backbones, train_file, tmp_path, stage, monkeypatch):
    seen = []
    kind = JointCollator if stage == "joint" else GenerationCollator
    original = kind.__call__

    def call(self, records):
        seen.append([len(record["query"]) for record in records])
        return original(self, records)

    monkeypatch.setattr(kind, "__call__", call)
    settings = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "max_steps": -1}
    args = training_arguments(tmp_path / "out", two_stage=stage == "generate", **settings)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 4, 3
    run(model_arguments(backbones), DataArguments(train_file=str(train_file)), args)
    assert sorted(length for batch in seen for length in batch) == sorted(len(q) for q in QUESTIONS * 4)
    assert any(len(set(batch)) == 1 for batch in seen)


def test_patience_goes_on_where_it_was(backbones, train_file, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 8,
        "learning_rate": 100.0,
        "compressor_learning_rate": 100.0,
        "warmup_steps": 0,
        "early_stopping_patience": 3,
    }
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file), eval_file=str(train_file)))
    run(*arguments, training_arguments(tmp_path / "whole", **settings))
    last = len(list((tmp_path / "whole").glob("checkpoint-*")))
    assert last < 8
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [tmp_path / "cut" / "all_results.json", *(tmp_path / "cut").glob(f"checkpoint-{last}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The checkpoints name the best one by its path.
    for file in (tmp_path / "cut").glob("checkpoint-*/trainer_state.json"):
        file.write_text(file.read_text("utf-8").replace(str(tmp_path / "whole"), str(tmp_path / "cut")), "utf-8")
    shutil.copytree(tmp_path / "cut", tmp_path / "longer")
    run(*arguments, training_arguments(tmp_path / "cut", **settings))
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == last
    settings["early_stopping_patience"] = 5  # of the command that goes on, not of the one that was stopped
    run(*arguments, training_arguments(tmp_path / "longer", **settings))
    assert len(list((tmp_path / "longer").glob("checkpoint-*"))) == last + 2


def test_a_run_that_was_killed_while_it_saved_its_only_model_starts_anew(backbones, train_file, tmp_path):
    arguments = (model_arguments(backbones), DataArguments(train_file=str(train_file)))
    train(*arguments, training_arguments(tmp_path / "out"))
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "all_results.json").unlink()
    train(*arguments, training_arguments(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_somebody_elses_model_is_not_overwritten(backbones, train_file, tmp_path):
    build_model().save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train(
            model_arguments(backbones), DataArguments(train_file=str(train_file)), training_arguments(tmp_path / "out")
        )


@pytest.mark.parametrize("change", ["lora_r", "train_file", "learning_rate"])
def test_a_run_goes_on_with_its_own_settings_only(backbones, train_file, tmp_path, change):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    data = DataArguments(train_file=str(train_file))
    train(model_arguments(backbones), data, training_arguments(tmp_path / "out", **settings))
    (tmp_path / "out" / "all_results.json").unlink()
    model = model_arguments(backbones, **({"lora_r": 8} if change == "lora_r" else {}))
    if change == "train_file":
        train_file.write_text(train_file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    if change == "learning_rate":
        settings["learning_rate"] = 5.0
    name = {"train_file": "bytes of train_file"}.get(change, change)
    with pytest.raises(ValueError, match=f"unfinished run of other settings: {name} was"):
        train(model, data, training_arguments(tmp_path / "out", **settings))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
        ({"fp16": False}, torch.float32),
        ({"bf16": False, "fp16": False}, torch.float32),
        ({"fp16": True}, torch.float16),
    ],
)
def test_only_an_unset_precision_is_chosen_on_a_gpu(tmp_path, monkeypatch, settings, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    args = ScaleDownTrainingArguments(output_dir=str(tmp_path), report_to=[], **settings)
    assert args.generator_dtype == dtype
    assert isinstance(args.bf16, bool) and isinstance(args.fp16, bool)


def test_precision_is_read_from_the_command_line():
    argv = ["--generator_name_or_path", "x", "--train_file", "y", "--report_to", "none"]
    *_, args = parse_arguments([*argv, "--bf16", "false", "--fp16", "no"])
    assert args.precision_is_set and args.generator_dtype == torch.float32
    assert not parse_arguments(argv)[-1].precision_is_set


def test_the_card_lists_no_setting_that_the_trainer_fills_in(tmp_path):
    args = training_arguments(tmp_path, bf16=None, fp16=None)
    loader = {"dataloader_num_workers", "dataloader_pin_memory"}
    assert not {"disable_tqdm", "bf16", "fp16", "output_dir", *loader} & recorded_settings(args).keys()
    assert recorded_settings(args)["max_steps"] == args.max_steps
