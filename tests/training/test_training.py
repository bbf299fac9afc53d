"""Joint training: what is learned, how it is logged, and how batches are made."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_training import build_trainer, model_arguments, parameters, rows, training_arguments
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM

from folders import TRAINING_SETTINGS, train_with_two_processes, write_rows
from scaledown import ScaleDownModel
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from scaledown.training.collators import CompressionCollator, GenerationCollator, JointCollator
from scaledown.training.dropout import disable_dropout
from scaledown.training.reader import ReaderTrainer
from scaledown.training.run import run, train
from scaledown.training.trainer import ScaleDownTrainer
from tiny import (
    ANSWERS,
    DOCUMENTS,
    QUESTIONS,
    SHAPE,
    build_model,
    randomize_lora,
)


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


@pytest.mark.parametrize("weight", [0.05, 0.0])
@pytest.mark.parametrize("lacking", [(), ("reranking_scores",), ("reranking_scores", "documents")])
def test_among_several_processes_every_batch_has_a_gradient_for_all_that_learns(tmp_path, monkeypatch, lacking, weight):
    """Also a batch without scores, or without documents: the other processes wait for its gradients."""
    trainer = build_trainer(build_model(lora=True, reranking_loss_weight=weight), tmp_path)
    monkeypatch.setattr(ScaleDownTrainingArguments, "world_size", 2)
    empty = {"reranking_scores": None, "documents": []}
    batch = trainer.data_collator([{**row, **{name: empty[name] for name in lacking}} for row in rows()])
    trainer.compute_loss(trainer.model.train(), batch).backward()
    without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, scored, weight",
    [("joint", 0, 0.05), ("joint", 1, 0.05), ("joint", 1, 0.0), ("generate", 0, 0.05), ("generate", 1, 0.05)],
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


def test_the_branch_asked_for_is_pushed_to(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(ScaleDownModel, "push_to_hub", lambda self, name, **settings: pushed.append((name, settings)))
    trainer = build_trainer(build_model(lora=True), tmp_path, hub_model_id="me/model", hub_revision="dev")
    trainer.push_to_hub()
    trainer.push_to_hub(revision="other")
    assert [(name, settings["revision"]) for name, settings in pushed] == [("me/model", "dev"), ("me/model", "other")]


def test_tensorboard_gets_what_the_log_has(tmp_path):
    # Imported by this test alone, as it takes long.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


@pytest.mark.parametrize("stage", ["joint", "generate", "reader"])
def test_runs_whose_questions_come_by_length_evaluate_too(backbones, train_file, tmp_path, stage):
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": 1, "stage": stage}
    if stage == "generate":
        settings |= {"stage": "joint", "two_stage": True}
    data = DataArguments(train_file=str(train_file), eval_file=str(train_file))
    metrics = run(model_arguments(backbones), data, training_arguments(tmp_path / "out", **settings))
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("compressor_type", ["modernbert", "n_layers"])
@pytest.mark.parametrize("disabled", [False, True])
def test_training_without_dropout_computes_the_same_twice(tmp_path, compressor_type, disabled):
    """Of the encoder and its attention, of the generator's attention, and of LoRA."""
    model = build_model(compressor_type)
    model.add_lora(r=4, lora_dropout=0.5)
    for module in [*model.compressor.backbone.modules(), *model.generator.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trainer = build_trainer(model, tmp_path, disable_dropout=disabled)
    randomize_lora(model).train()
    batch = trainer.data_collator(rows())
    first, second = (model(**batch).loss.item() for _ in range(2))
    assert (first == second) == disabled


def test_dropout_is_disabled_under_whatever_name_a_layer_has_it():
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    names = {"attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("starcoder2", pad_token_id=2, **shape, **names))
    disable_dropout(model.train())
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_reader_learns_without_dropout_too(backbones, train_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ReaderTrainer, "train", lambda self, **_: seen.append(self.model) or 1 / 0)
    settings = {"stage": "reader", "disable_dropout": True}
    with pytest.raises(ZeroDivisionError):
        arguments = training_arguments(tmp_path / "out", **settings)
        run(model_arguments(backbones, lora_dropout=0.5), DataArguments(train_file=str(train_file)), arguments)
    dropouts = [module.p for module in seen[0].modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and not any(dropouts)
