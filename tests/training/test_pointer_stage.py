"""The stage `pointer`: the compressor alone learns where answers stand; joint training goes on from it."""

import json

import pytest
import torch

from compression_scaledown import chunk_inputs
from folders import TRAINING_SETTINGS, save_backbones, write_rows
from scaledown import ScaleDownModel
from scaledown.training.arguments import DataArguments, ModelArguments, ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.run import run
from scaledown.training.stages import prepare_stage
from tiny import DOCUMENTS, QUESTIONS, build_model

STEPS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "compressor_learning_rate": 3e-3,
    "logging_steps": 1,
}
POINTED = ["Walter Scott", "Cévennes", "birds"]


def rows() -> list[dict]:
    listed = zip(QUESTIONS, DOCUMENTS, POINTED, strict=True)
    return [
        {"id": str(i), "query": q, "documents": d, "answer": [a], "positives": [0]}
        for i, (q, d, a) in enumerate(listed)
    ]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    return save_backbones(tmp_path_factory.mktemp("backbones"))["modernbert"]


def run_stage(backbones, folder, stage, steps, model_settings=None, records=None, **settings):
    data = write_rows(folder / "train.jsonl", records or rows())
    generator, compressor = backbones
    start = {"generator_name_or_path": str(generator), "compressor_name_or_path": str(compressor)}
    start |= {**TRAINING_SETTINGS, "slot_pooling": "pointer", "compressor_type": "modernbert"}
    arguments = ScaleDownTrainingArguments(
        output_dir=str(folder / "out"),
        stage=stage,
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        save_steps=steps,
        **{**STEPS, **settings},
    )
    files = DataArguments(train_file=str(data), eval_file=str(data))
    run(ModelArguments(**(model_settings or start)), files, arguments)
    return ScaleDownModel.from_pretrained(folder / "out").eval()


def log_of(folder) -> list[dict]:
    (state,) = (folder / "out").glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def test_the_compressor_learns_to_point_at_answers_and_the_generator_stays_as_it_is(backbones, tmp_path):
    model = run_stage(backbones, tmp_path, "pointer", 60, eval_strategy="steps", eval_steps=60)
    log = [entry for entry in log_of(tmp_path) if "pointer_loss" in entry]
    assert log[-1]["pointer_loss"] < 0.3 * log[0]["pointer_loss"]
    assert log[-1]["reranking_loss"] < log[0]["reranking_loss"]
    assert not any("generation_loss" in entry for entry in log)
    assert any("eval_pointer_loss" in entry for entry in log_of(tmp_path))
    fresh = ScaleDownModel.from_backbones(str(backbones[0]), str(backbones[1]), compressor_type="modernbert")
    expected = fresh.generator.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.generator.state_dict().items())
    assert model.config.lora_config is None and model.config.reranking_trained
    batch = JointCollator(model.processor)(rows())
    with torch.no_grad():
        weights = model.get_memory_embeddings(**chunk_inputs(batch)).pointer_weights
    held = (weights * batch["pointer_labels"]).sum(dim=-1)[batch["pointer_labels"].any(dim=1)]
    assert held.min() > 0.5
    # Joint training goes on from there, and teaches the generator to read.
    (tmp_path / "joint").mkdir()
    start = {"model_name_or_path": str(tmp_path / "out"), "lora_r": 4, "merge_lora": False}
    joint = run_stage(backbones, tmp_path / "joint", "joint", 2, start)
    assert joint.config.lora_config is not None
    assert log_of(tmp_path / "joint")[0]["pointer_loss"] == pytest.approx(log[-1]["pointer_loss"], abs=0.2)


def test_accumulated_micro_batches_weigh_every_labelled_chunk_alike(backbones, tmp_path):
    """One batch of three and three of one, with one, one and no labelled chunk, take the same step."""
    losses = []
    for size in (3, 1):
        model = build_model("modernbert", slot_pooling="pointer")
        records = rows()
        records[2]["answer"] = ["nowhere"]
        collate = JointCollator(model.processor)
        batches = [collate(records[i : i + size]) for i in range(0, 3, size)]
        count = sum(int(batch["pointer_labels"].any(dim=1).sum()) for batch in batches)
        losses.append(sum(model(**batch, num_pointed_chunks=count).pointer_loss.item() for batch in batches))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_a_step_of_accumulated_micro_batches_is_that_of_the_whole_batch(backbones, tmp_path):
    """With one, two and no labelled chunk of one, two and three: an average of averages would weigh them otherwise."""
    learned = []
    for size in (3, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 3 // size}
        model = run_stage(backbones, folder, "pointer", 1, optim="sgd", disable_dropout=True, **sizes)
        learned.append(model.compressor.state_dict())
    start = ScaleDownModel.from_backbones(*map(str, backbones), compressor_type="modernbert", slot_pooling="pointer")
    begun = start.compressor.backbone.state_dict()
    moved = max((learned[0][f"backbone.{name}"] - value).abs().max() for name, value in begun.items())
    assert moved > 1e-4
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, rtol=0, atol=float(moved) / 1000)


def test_batches_are_of_like_longest_documents(backbones, tmp_path):
    """All chunks of a batch are padded to the longest, however many a question has."""
    data = write_rows(
        tmp_path / "train.jsonl",
        [{**row, "documents": [*row["documents"], *["tiny"] * i]} for i, row in enumerate(rows())],
    )
    generator, compressor = map(str, backbones)
    start = {"generator_name_or_path": generator, "compressor_name_or_path": compressor}
    start |= {**TRAINING_SETTINGS, "slot_pooling": "pointer", "compressor_type": "modernbert"}
    settings = {"use_cpu": True, "report_to": "none", "train_sampling_strategy": "group_by_length"}
    args = ScaleDownTrainingArguments(output_dir=str(tmp_path), stage="pointer", **settings)
    train_data, *_ = prepare_stage(ModelArguments(**start), DataArguments(train_file=str(data)), args)
    expected = [len(q) + max(map(len, d)) for q, d in zip(QUESTIONS, DOCUMENTS, strict=True)]
    assert list(train_data["length"]) == expected


def test_questions_without_documents_are_left_out_of_the_stage(backbones, tmp_path, caplog):
    """Any batch of them alone would have nothing for the compressor."""
    records = [{**rows()[0], "documents": [], "positives": None}] * 4 + rows()[1:]
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
    run_stage(backbones, tmp_path, "pointer", 4, records=records, eval_strategy="steps", eval_steps=2, **sizes)
    assert "4 of 6 records of train_file" in caplog.text and "left out of stage=pointer" in caplog.text
    assert all(entry["pointer_loss"] > 0 for entry in log_of(tmp_path) if "pointer_loss" in entry)


def test_a_run_that_would_learn_nothing_is_refused(backbones, tmp_path, caplog):
    start = {"generator_name_or_path": str(backbones[0]), "compressor_name_or_path": str(backbones[1])}
    start |= {**TRAINING_SETTINGS, "compressor_type": "modernbert", "slot_pooling": "pointer"}
    nowhere = [{**row, "answer": ["a long answer in other words"]} for row in rows()]
    without = {**start, "enable_reranking": False}
    with pytest.raises(
        ValueError, match=r"train.jsonl has 3 records, and in none .*word for word.*no reranking scores"
    ):
        run_stage(backbones, tmp_path, "pointer", 1, without, records=nowhere)
    assert "word for word" not in caplog.text
    run_stage(backbones, tmp_path, "pointer", 1, start, records=nowhere)  # positives are scores to learn
    assert "does not learn where to point" in caplog.text
    with pytest.raises(ValueError, match=r"not one document, and stage=pointer"):
        prepare_stage(
            ModelArguments(**start),
            DataArguments(
                train_file=str(write_rows(tmp_path / "e.jsonl", [{"query": "Who?", "documents": [], "answer": "a"}])),
                closed_book=True,
            ),
            ScaleDownTrainingArguments(output_dir=str(tmp_path), stage="pointer", use_cpu=True, report_to="none"),
        )


def test_yes_and_no_are_not_pointed_at():
    model = build_model("n_layers", slot_pooling="pointer")
    record = {"id": "1", "query": "Is it?", "documents": ["No bird is yes or no."], "answer": ["no"], "positives": None}
    assert not JointCollator(model.processor)([record])["pointer_labels"].any()
    record["answer"] = ["bird"]
    assert JointCollator(model.processor)([record])["pointer_labels"].any()


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("pointer", {"slot_pooling": "memory_tokens"}, r"stage=pointer teaches where to point.*slot_pooling=pointer"),
        ("compress", {"slot_pooling": "pointer"}, r"slot_pooling=pointer in two-stage training"),
    ],
)
def test_stages_that_cannot_train_this_are_refused(backbones, tmp_path, stage, settings, message):
    start = {"generator_name_or_path": str(backbones[0]), "compressor_name_or_path": str(backbones[1])}
    start |= {**TRAINING_SETTINGS, "compressor_type": "modernbert", **settings}
    with pytest.raises(ValueError, match=message):
        run_stage(backbones, tmp_path, stage, 1, start)


def test_a_prompt_is_needed_to_evaluate_answers(tmp_path):
    with pytest.raises(ValueError, match="predict_with_generate needs answers, and the stage pointer has none"):
        ScaleDownTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", stage="pointer", predict_with_generate=True
        )
