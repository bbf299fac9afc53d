"""Evaluation of a tiny model: what the systems read and answer, what the run writes, and what it refuses."""

import copy
import datetime
import json
import math
import shutil
from dataclasses import fields, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, GenerationConfig

from folders import SETTINGS, save_generator
from scaledown import ScaleDownModel
from scaledown.common.choices import BASELINES
from scaledown.data.journal import Journal, WorkFolderError
from scaledown.evaluation.answering import answer_all
from scaledown.evaluation.arguments import EvaluationArguments
from scaledown.evaluation.contestants import build_systems, check_lengths, load_contestants
from scaledown.evaluation.data import Example
from scaledown.evaluation.evaluate import PRIVATE, _fitting, evaluate, main
from scaledown.evaluation.resuming import KeptAnswers
from scaledown.evaluation.run_folder import EvaluationRun
from scaledown.evaluation.systems import Answer, choose_donors, greedy
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_tokenizer, randomize_lora

NEW_TOKENS = 4
NUM_QUESTIONS = 7
CPU = torch.device("cpu")
EVERY = tuple(name for name in BASELINES if name != "selected_text")  # which needs a selection
NO_MODEL = {"model": None, "data": None, "max_new_tokens": 128, "device": "auto", "resamples": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator, a model on top of it with LoRA and with it merged, and records."""
    folder = tmp_path_factory.mktemp("evaluation")
    generator = save_generator(folder / "generator")
    model = ScaleDownModel.from_backbones(str(generator), **SETTINGS)
    model.add_lora(r=4, lora_alpha=8)
    randomize_lora(model).eval().save_pretrained(folder / "lora")
    model.merge_lora()
    model.save_pretrained(folder / "merged")
    with open(folder / "data.jsonl", "w", encoding="utf-8") as stream:
        for i in range(NUM_QUESTIONS):
            record = {
                "id": f"q{i}",
                "query": QUESTIONS[i % 3],
                "documents": [f"{document} Note {i}." for document in DOCUMENTS[i % 3]],
                "answer": ANSWERS[i % 3],
                "positives": [0],
                "answer_kind": ("name", "number")[i % 2],
                "hops": 1 + i % 2,
            }
            stream.write(json.dumps(record) + "\n")
    return folder


def settings(folder, **changes):
    """Arguments for the tiny model; `changes` override them."""
    defaults = {"model": str(folder / "lora"), "data": str(folder / "data.jsonl"), "max_new_tokens": NEW_TOKENS}
    return EvaluationArguments(**{**defaults, "device": "cpu", "resamples": 50, **changes})


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run with everything."""
    output = tmp_path_factory.mktemp("runs") / "all"
    changes = {"baselines": ",".join(EVERY), "group_by": "answer_kind,hops", "batch_size": "3"}
    assert evaluate(settings(folder, output_dir=str(output), **changes)) == output
    return output


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(run):
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def examples(count=NUM_QUESTIONS):
    return [
        Example(f"q{i}", QUESTIONS[i % 3], [f"{d} Note {i}." for d in DOCUMENTS[i % 3]], [ANSWERS[i % 3]], index=i)
        for i in range(count)
    ]


def systems_of(folder, *names, **changes):
    arguments = settings(folder, baselines=",".join(names) or "none", **changes)
    found = load_contestants(arguments, CPU)
    return {system.name: system for system in build_systems(found, arguments, examples())}, found


# -- what the systems answer -------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model(folder, rows):
    model = ScaleDownModel.from_pretrained(str(folder / "merged"))
    for row, example in zip(rows, examples(), strict=True):
        answer, scores = model.answer(
            example.query, example.documents, return_reranking_scores=True, max_new_tokens=NEW_TOKENS
        )
        assert row["systems"]["compressed"]["prediction"] == answer
        assert row["reranking_scores"] == pytest.approx(scores, abs=1e-4)


def test_a_selection_of_documents_is_the_models(folder):
    systems, found = systems_of(folder, max_documents=1, min_reranking_score=-1e9)
    model = ScaleDownModel.from_pretrained(str(folder / "merged"))
    everything = systems_of(folder)[0]["compressed"].answer(examples(3))
    for answer, whole, example in zip(systems["compressed"].answer(examples(3)), everything, examples(3), strict=True):
        expected = model.answer(example.query, example.documents, max_documents=1, max_new_tokens=NEW_TOKENS)
        assert answer.text == expected
        assert answer.scores == pytest.approx(whole.scores, abs=1e-5)  # of all documents
        assert answer.compressor_tokens == whole.compressor_tokens
        if answer.slots:
            assert 0.6 < (answer.document_tokens / answer.slots) / (whole.document_tokens / whole.slots) < 1.6
        fewer = len(example.documents) > 1
        assert (answer.slots < whole.slots) == (answer.tokens_in < whole.tokens_in) == fewer
    assert found.description["selection"] == {"min_reranking_score": -1e9, "max_documents": 1}
    assert any("max_documents=1" in note for note in found.notes)


def test_prompts_are_as_long_as_a_selection_lets_them_be(folder):
    every = systems_of(folder)[0]["compressed"].prompt_lengths(examples(3))
    for limits in ({"max_documents": 1}, {"max_slots": 3}, {"max_slots": 3, "max_documents": 1}):
        system = systems_of(folder, **limits)[0]["compressed"]
        lengths = system.prompt_lengths(examples(3))
        read = [answer.tokens_in for answer in system.answer(examples(3))]
        assert all(some <= bound <= all_of for some, bound, all_of in zip(read, lengths, every, strict=True))
        assert sum(lengths) < sum(every)


def test_text_of_selected_documents_is_what_full_text_reads_of_them(folder):
    systems = systems_of(folder, "full_text", "selected_text", max_documents=1)[0]
    for example, answer in zip(examples(), systems["selected_text"].answer(examples()), strict=True):
        (whole,) = systems["compressed"].answer([example])
        best = max(range(len(example.documents)), key=whole.scores.__getitem__)
        alone = replace(example, documents=[example.documents[best]])
        (expected,) = systems["full_text"].answer([alone])
        assert (answer.text, answer.tokens_in) == (expected.text, expected.tokens_in)
        assert answer.compressor_tokens == whole.compressor_tokens and answer.slots == 0
    bounds = systems["selected_text"].prompt_lengths(examples())
    read = [answer.tokens_in for answer in systems["selected_text"].answer(examples())]
    all_of = systems["full_text"].prompt_lengths(examples())
    assert all(some <= bound <= every for some, bound, every in zip(read, bounds, all_of, strict=True))
    assert sum(bounds) < sum(all_of)
    none = replace(examples(1)[0], documents=[])
    assert systems["selected_text"].answer([none])[0].text == systems["full_text"].answer([none])[0].text
    with pytest.raises(ValueError, match="neither the model nor an option says which; pass --max_documents"):
        systems_of(folder, "selected_text")


def test_a_model_says_how_many_documents_it_reads(folder, tmp_path):
    ScaleDownModel.from_pretrained(str(folder / "merged"), max_documents=1).save_pretrained(tmp_path / "one")
    systems, found = systems_of(folder, "selected_text", model=str(tmp_path / "one"), generator="own")
    asked = systems_of(folder, "selected_text", model=str(folder / "merged"), generator="own", max_documents=1)[0]
    for name, system in systems.items():
        told = [(a.text, a.tokens_in) for a in asked[name].answer(examples(3))]
        assert [(a.text, a.tokens_in) for a in system.answer(examples(3))] == told
    assert found.description["selection"] == {"max_documents": 1}
    every = systems_of(folder, model=str(tmp_path / "one"), max_documents=9)[0]["compressed"].answer(examples(3))
    assert [a.slots for a in every] == [a.slots for a in systems_of(folder)[0]["compressed"].answer(examples(3))]


def test_slots_that_hold_something_else_are_selected_too(folder):
    names = ("random_memory", "shuffled_documents")
    few = systems_of(folder, *names, max_documents=1)[0]
    every = systems_of(folder, *names)[0]
    for name in names:
        less = sum(answer.slots for answer in few[name].answer(examples()))
        assert 0 < less < sum(answer.slots for answer in every[name].answer(examples()))


def test_a_model_that_does_not_rank_selects_nothing(folder, tmp_path):
    model = ScaleDownModel.from_backbones(str(folder / "generator"), **{**SETTINGS, "enable_reranking": False})
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="without reranking and cannot select documents; leave out --max_slots"):
        systems_of(folder, model=str(tmp_path / "model"), max_slots=4)


def test_baselines_are_the_generator_without_lora(folder, rows):
    """Its prompts are those of its own chat template; whatever the model has learned stays out."""
    tokenizer = build_tokenizer()
    generator = AutoModelForCausalLM.from_pretrained(folder / "generator")
    differ = 0
    for row, example in zip(rows, examples(), strict=True):
        for system, user in (
            ("full_text", "Background:\n" + "\n".join(example.documents) + f"\n\nQuestion: {example.query}"),
            ("no_documents", f"Question: {example.query}"),
        ):
            messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": user}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = prompt["input_ids"].shape[1]
            assert row["systems"][system]["tokens_in"] == length
            output = generator.generate(
                input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=NEW_TOKENS
            )
            answer = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
            assert row["systems"][system]["prediction"] == answer
        differ += row["systems"]["full_text"]["prediction"] != row["systems"]["compressed"]["prediction"]
    assert differ > 0


def test_truncated_documents_cost_as_much_as_slots(rows):
    for row in rows:
        compressed, truncated = row["systems"]["compressed"], row["systems"]["truncated"]
        assert truncated["tokens_in"] == compressed["tokens_in"] < row["systems"]["full_text"]["tokens_in"]
        assert compressed["slots"] > 0 and truncated["slots"] == truncated["compressor_tokens"] == 0


def test_random_memory_is_as_long_as_the_models_own(folder, monkeypatch):
    systems, found = systems_of(folder, "random_memory")
    seen = {}

    def capture(system):
        def generate(**inputs):
            seen[system] = inputs["memory_embeddings"], inputs["memory_mask"]
            return torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)

        return generate

    for name, batch in (("compressed", examples(3)), ("random_memory", examples(3))):
        monkeypatch.setattr(found.model, "generate", capture(name))
        systems[name].answer(batch)
    (own, mask), (noise, _) = seen["compressed"], seen["random_memory"]
    torch.testing.assert_close(noise.norm(dim=-1), own.norm(dim=-1))
    assert torch.cosine_similarity(own[mask], noise[mask], dim=-1).abs().mean() < 0.5
    assert not noise[~mask].any()
    # A question's noise is its own, whatever else is in the batch.
    monkeypatch.setattr(found.model, "generate", capture("alone"))
    systems["random_memory"].answer(examples(3)[1:2])
    alone, alone_mask = seen["alone"]
    before = found.model.processor.encode_documents([QUESTIONS[0]], [examples()[0].documents])["chunk_slots"].sum()
    torch.testing.assert_close(alone[alone_mask], noise[mask][before : before + len(alone[alone_mask])])


def test_documents_are_shuffled_between_questions():
    donors = choose_donors(examples(), seed=0)
    assert donors.keys() == set(range(NUM_QUESTIONS))
    for example in examples():
        assert donors[example.index] and not set(donors[example.index]) & set(example.documents)
    assert donors != choose_donors(examples(), seed=1)
    with pytest.raises(ValueError, match="'q0' among 1"):
        choose_donors(examples(1), seed=0)


def test_a_question_without_documents_is_asked_alone(folder):
    systems, _ = systems_of(folder, "full_text", "truncated", "no_documents")
    asked = [Example("x", "What is a heron?", [], ["A bird"], index=0), examples()[1]]
    lengths = {name: system.prompt_lengths(asked)[0] for name, system in systems.items()}
    assert len(set(lengths.values())) == 1
    texts = {name: system.answer(asked)[0].text for name, system in systems.items() if name != "compressed"}
    assert len(set(texts.values())) == 1


def test_a_document_that_spells_a_special_token_is_text(folder):
    systems, _ = systems_of(folder, "full_text", "truncated")
    asked = [Example("x", "What is </s> this?", ["A <|assistant|> in </s> a document, and more of it."], ["a"])]
    for name in ("full_text", "truncated"):
        (prompt,) = systems[name].prompts(asked)
        tokenizer = systems[name].processor.tokenizer
        assert prompt.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1
        assert tokenizer.eos_token_id not in prompt


@pytest.mark.parametrize(
    ("changes", "lora", "note"),
    [
        ({"model": "lora"}, False, "without the model's LoRA"),
        ({"model": "merged"}, False, "read text with generator"),
        ({"model": "merged", "generator": "own"}, True, "may hold a merged LoRA (as --generator own asks)"),
        (
            {"model": "moved"},
            True,
            "may hold a merged LoRA (the original could not be used: --generator names /nothere",
        ),
        ({"model": "unnamed"}, True, "may hold a merged LoRA (it is not known where it came from)"),
        ({"model": "merged", "generator": "generator"}, False, "read text with generator"),
    ],
)
def test_which_generator_reads_the_text(folder, tmp_path, changes, lora, note):
    changes = {name: value if value == "own" else str(folder / value) for name, value in changes.items()}
    for name, generator in (("moved", "/nothere"), ("unnamed", None)):
        if changes["model"] == str(folder / name):
            changes["model"] = shutil.copytree(folder / "merged", tmp_path / name)
            config = json.loads((tmp_path / name / "config.json").read_text())
            (tmp_path / name / "config.json").write_text(json.dumps({**config, "generator_name_or_path": generator}))
            changes["model"] = str(tmp_path / name)
    found = load_contestants(settings(folder, **changes), CPU)
    original = AutoModelForCausalLM.from_pretrained(folder / "generator").state_dict()
    state = found.generator.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original) == (not lora)
    assert found.model.config.lora_config is None  # merged, for its time
    assert any(note in line for line in found.notes)


def test_another_vocabulary_is_refused(folder, tmp_path):
    save_generator(tmp_path)
    other = build_tokenizer(pair=True)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        load_contestants(settings(folder, generator=str(tmp_path)), CPU)


# -- batches -----------------------------------------------------------------------------------------------------------


class Small:
    """Answers at most so many questions at a time."""

    def __init__(self, name, limit):
        self.name, self.limit, self.sizes = name, limit, []

    def answer(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return [Answer(f"{self.name} {example.id}", 1, 1) for example in batch]


@pytest.fixture
def kept(tmp_path):
    return KeptAnswers(Journal(tmp_path / "answers.jsonl"))


def test_batches_are_halved_until_they_fit(kept, tmp_path):
    systems = [Small("a", 5), Small("b", 2)]
    answers, sizes = answer_all(systems, examples(), "auto", CPU, PartialState(cpu=True), kept)
    assert sizes == [1]
    for name in ("a", "b"):
        assert [answer.text for answer in answers[name]] == [f"{name} q{i}" for i in range(NUM_QUESTIONS)]
    # Every question is answered by both in the same batch.
    assert [answer.batch for answer in answers["a"]] == [answer.batch for answer in answers["b"]]
    systems = [Small("a", 4)]
    kept = KeptAnswers(Journal(tmp_path / "others.jsonl"))
    assert answer_all(systems, examples(), "auto", CPU, PartialState(cpu=True), kept)[1] == [3]
    assert systems[0].sizes == [7, 3, 3, 3, 1]  # the first that fits is answered twice


def test_a_batch_size_that_was_asked_for_is_kept(kept):
    with pytest.raises(ValueError, match=r"hold 3 questions .*lower --batch_size"):
        answer_all([Small("a", 2)], examples(), "3", CPU, PartialState(cpu=True), kept)
    with pytest.raises(ValueError, match=r"hold 1 questions .*num_documents"):
        answer_all([Small("a", 0)], examples(), "auto", CPU, PartialState(cpu=True), kept)


def test_other_errors_are_not_taken_for_a_lack_of_memory(kept):
    class Broken:
        name = "a"

        def answer(self, batch):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        answer_all([Broken()], examples(), "auto", CPU, PartialState(cpu=True), kept)


def test_a_score_that_is_no_number_stops_the_run(kept):
    class Overflowing:
        name = "a"

        def answer(self, batch):
            return [Answer("", 1, 1, scores=[1.0, math.nan]) for _ in batch]

    with pytest.raises(ValueError, match=r"scores a document with nan \(a\).*--dtype float32"):
        answer_all([Overflowing()], examples(), "auto", CPU, PartialState(cpu=True), kept)


# -- a run that was stopped --------------------------------------------------------------------------------------------


def stopped(folder, output, monkeypatch, after=2, **changes):
    """Begin a run that dies after some batches; how to go on with it."""
    count = 0

    def timed_until(system, batch, device):
        nonlocal count
        count += 1
        if count > 2 * after:  # two systems
            raise KeyboardInterrupt
        return [Answer(f"kept {example.id}", 1, 1, batch=0, scores=None) for example in batch]

    arguments = {"output_dir": output and str(output), "batch_size": "2", "baselines": "no_documents", **changes}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scaledown.evaluation.answering.timed", timed_until)
        evaluate(settings(folder, **arguments))
    return arguments


def test_a_stopped_run_goes_on_after_its_last_batch(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = stopped(folder, output, monkeypatch)
    assert not output.exists() and (tmp_path / "run.work").is_dir()
    evaluate(settings(folder, **arguments))
    assert not (tmp_path / "run.work").exists()
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row["id"] for row in rows if row["systems"]["compressed"]["prediction"] == f"kept {row['id']}"]
    assert len(rows) == NUM_QUESTIONS and len(kept) == 4
    assert sorted({row["systems"]["compressed"]["batch"] for row in rows}) == [0, 1, 2, 3]
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert any("stopped and resumed" in note for note in metrics["notes"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": NEW_TOKENS + 1}, "max_new_tokens"),
        ({"limit": 6}, "questions was"),
        ({"model": "trained on"}, "weights was"),
    ],
)
def test_answers_of_another_run_are_not_mixed_in(folder, tmp_path, monkeypatch, changes, named):
    arguments = stopped(folder, tmp_path / "run", monkeypatch)
    if "model" in changes:
        changes = {"model": str(tmp_path / "trained-on")}
        randomize_lora(ScaleDownModel.from_pretrained(folder / "lora")).save_pretrained(changes["model"])
    with pytest.raises(WorkFolderError, match=named):
        evaluate(settings(folder, **{**arguments, **changes}))
    evaluate(settings(folder, **arguments))  # what is kept has not suffered


def test_a_run_without_a_name_goes_on_too(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = stopped(folder, None, monkeypatch)
    (work,) = tmp_path.glob("runs/evaluation/*.work")
    output = evaluate(settings(folder, **{**arguments, "max_new_tokens": NEW_TOKENS + 1}))  # another run
    assert "stopped" not in (output / "report.md").read_text(encoding="utf-8") and work.exists()
    shutil.rmtree(output)  # may be called by the same second
    output = evaluate(settings(folder, **arguments))
    assert "stopped and resumed" in (output / "report.md").read_text(encoding="utf-8") and not work.exists()


def test_a_run_that_fails_at_once_leaves_nothing(folder, tmp_path, monkeypatch):
    stopped(folder, tmp_path / "run", monkeypatch, after=0)
    assert list(tmp_path.iterdir()) == []


# -- what is written ---------------------------------------------------------------------------------------------------


def test_metrics_are_the_means_of_the_predictions(metrics, rows):
    assert list(metrics["systems"]) == ["compressed", *EVERY]
    for system, values in metrics["systems"].items():
        for name, found in values.items():
            mean = sum(row["systems"][system][name] for row in rows) / len(rows)
            assert found["value"] == pytest.approx(mean)
            assert found["low"] <= found["value"] + 1e-12 and found["value"] <= found["high"] + 1e-12
    assert {"exact_match", "f1", "match", "rouge_l", "tokens_in", "seconds"} <= metrics["systems"]["compressed"].keys()
    seconds = {name: values["seconds"]["value"] for name, values in metrics["systems"].items()}
    speed_up = metrics["against_full_text"]["compressed"]["speed_up"]["value"]
    assert speed_up == pytest.approx(seconds["full_text"] / seconds["compressed"])
    ratio = metrics["against_full_text"]["compressed"]["tokens_in"]["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"] < 1
    assert metrics["reranking"]["given_order"]["ndcg@10"]["value"] == 1.0
    assert 0 < metrics["reranking"]["model"]["mrr"]["value"] <= 1


def test_fields_of_the_records_come_along_and_group_the_metrics(metrics, rows):
    assert [row["answer_kind"] for row in rows[:2]] == ["name", "number"] and rows[1]["hops"] == 2
    groups = metrics["groups"]["answer_kind"]
    assert {value: group["num_questions"] for value, group in groups.items()} == {"name": 4, "number": 3}
    parts = [g["systems"]["no_documents"]["f1"]["value"] * g["num_questions"] for g in groups.values()]
    assert sum(parts) / NUM_QUESTIONS == pytest.approx(metrics["systems"]["no_documents"]["f1"]["value"])
    assert set(metrics["groups"]["hops"]) == {"1", "2"}


def test_options_that_name_folders_stay_out_of_the_metrics():
    described = {f.name: f.metadata["help"].lower() for f in fields(EvaluationArguments) if f.type is not bool}
    named = {name for name, text in described.items() if "folder" in text}
    assert {"model", "reader"} <= named <= set(PRIVATE)


def test_a_seed_below_0_is_refused_before_the_work(folder):
    with pytest.raises(ValueError, match="seed is -1, expected at least 0"):
        settings(folder, seed=-1)


def test_a_run_can_be_repeated(metrics, folder):
    assert {"torch", "transformers", "evaluate", "python"} <= metrics["versions"].keys()
    assert metrics["hardware"]["device"] == "CPU" and metrics["hardware"]["cpu"]
    assert metrics["settings"]["seed"] == 0 and metrics["settings"]["max_new_tokens"] == NEW_TOKENS
    assert metrics["data"]["sha256"] and metrics["batch_sizes"] == [3]
    assert str(folder) not in json.dumps(metrics)  # places of this machine


def test_report_and_plots(run):
    report = (run / "report.md").read_text(encoding="utf-8")
    for text in ("| compressed |", "| shuffled_documents |", "## Reranking", "## By hops", "without the model's LoRA"):
        assert text in report
    plots = ["answers.png", "exact_match_by_answer_kind.png", "exact_match_by_hops.png"]
    for name in plots:
        assert f"]({name})" in report
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_read_as_it_was_written(run, tmp_path):
    found = EvaluationRun.read(run)
    found.write(tmp_path)
    for name in ("predictions.jsonl", "metrics.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_runs_are_compared(folder, run, tmp_path, capsys):
    common = {"baselines": "full_text,no_documents", "limit": 3}
    evaluate(settings(folder, model=str(folder / "merged"), output_dir=str(tmp_path / "other"), **common))
    arguments = ["--compare", str(run), str(tmp_path / "other"), "--output_dir", str(tmp_path / "both")]
    assert main(arguments) == 0
    report = (tmp_path / "both" / "comparison.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "| all | compressed |" in report and "| other | full_text |" in report
    assert "The runs differ in questions." in report
    assert (tmp_path / "both" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        settings(folder, output_dir=str(tmp_path / "out"))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": "full_txt"}, "no baseline 'full_txt'"),
        ({"limit": 0}, "limit is 0"),
        ({"min_reranking_score": -math.inf}, "expected a finite number"),  # which metrics.json could not hold
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"data": None}, "data is missing"),
        ({"model": None}, "model is missing"),
        ({"judge": "a"}, "judge_url"),
        ({"judge_against": "full_text"}, "needs a judge"),
        ({"judge": "a", "judge_url": "b", "judge_against": "truncated"}, "not among the baselines"),
        ({"judge": "a", "judge_url": "b", "judge_extra_body": "[]"}, "expected a JSON object"),
        ({"model": "someone/model", "update_card": True}, "local folder"),
        ({"rejudge": "x"}, "no model"),
        ({**NO_MODEL, "rejudge": "x", "judge": "a", "judge_url": "b", "limit": 2}, "leave --limit out"),
        ({**NO_MODEL, "compare": ["x"], "judge": "a", "judge_url": "b"}, "leave --judge out"),
        ({"output_dir": f"{__file__}/out"}, "cannot be made in"),
    ],
)
def test_wrong_arguments(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_by": "kind"}, "no record has; the records' own fields are answer_kind, hops"),
        ({"device": "cuda:77"}, "not here"),
        ({"model": "no-such-folder"}, "--model names no-such-folder"),
        ({"compare": ["no-such-run"]}, "has no metrics.json"),
        (
            {"judge": "a", "judge_url": "http://b", "judge_api_key_env": "NO_SUCH_KEY"},
            "--judge_api_key_env names NO_SUCH",
        ),
    ],
)
def test_wrong_arguments_are_told_before_the_work(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(settings(folder, output_dir=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_prompts_past_the_context(folder, tmp_path):
    """A question whose text does not fit, though its slots do."""
    long = {"id": "long", "query": QUESTIONS[0], "documents": [DOCUMENTS[1][0] * 9, *"bcde"], "answer": "a"}
    unanswered = {"query": "Why?", "documents": ["a"]}
    records = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "data.jsonl").write_text("\n".join([*records, *map(json.dumps, (long, unanswered))]), encoding="utf-8")
    changes = {"data": str(tmp_path / "data.jsonl"), "baselines": "no_documents,full_text"}
    with pytest.raises(
        ValueError, match=r"question 'long' has a prompt of \d+ tokens for full_text; .*--too_long skip"
    ):
        evaluate(settings(folder, output_dir=str(tmp_path / "a"), **changes))
    assert not (tmp_path / "a").exists()
    evaluate(settings(folder, output_dir=str(tmp_path / "b"), too_long="skip", **changes))
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["data"]["too_long"] == {"full_text": 1} and metrics["data"]["num_asked"] == 2
    assert metrics["data"]["documents_per_question"] == 1.5  # of those that were asked
    assert "left out: 1 for no_answer" in (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    assert "1 for full_text" in (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    # Without full text, it is asked like any other.
    evaluate(settings(folder, output_dir=str(tmp_path / "c"), **{**changes, "baselines": "none"}))


def test_questions_that_others_documents_make_too_long_are_left_out_too(folder):
    """Which documents a question is shuffled with is drawn anew when one is left out."""
    kept = examples(8)
    for i, example in enumerate(kept):
        example.documents = [f"{DOCUMENTS[1][0]} Note {i}."] * (1 + i % 4)
        example.query = "Who" + " now" * (9 * (7 - i))
    for seed in range(4):
        arguments = settings(folder, baselines="shuffled_documents", too_long="skip", seed=seed)
        found = load_contestants(arguments, CPU)
        questions = copy.deepcopy(kept)
        longest = max(build_systems(found, arguments, questions)[1].prompt_lengths(questions))
        limit = found.model.config.generator_config.max_position_embeddings = longest + NEW_TOKENS - 1
        fitting, systems, counts = _fitting(found, arguments, questions)
        assert counts and not check_lengths(systems, fitting, limit, NEW_TOKENS)


def test_fields_that_json_cannot_hold_cost_no_answers(folder, tmp_path):
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    day = datetime.date(2026, 1, 2)
    table = pa.Table.from_pylist([{**record, "day": day, "price": "5$%^^$"} for record in records])
    pq.write_table(table, tmp_path / "data.parquet")
    changes = {"data": str(tmp_path / "data.parquet"), "baselines": "none", "group_by": "price"}
    evaluate(settings(folder, output_dir=str(tmp_path / "out"), **changes))
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["day"] == "2026-01-02" and first["price"] == "5$%^^$"
    assert (tmp_path / "out" / "exact_match_by_price.png").stat().st_size > 0


def test_all_systems_write_without_penalties():
    found = greedy(GenerationConfig(repetition_penalty=1.3, no_repeat_ngram_size=2, temperature=0.7, do_sample=True), 5)
    assert (found.repetition_penalty, found.no_repeat_ngram_size, found.do_sample) == (1.0, 0, False)


def test_an_interval_needs_two_questions(folder, tmp_path):
    evaluate(settings(folder, output_dir=str(tmp_path / "one"), limit=1, baselines="none"))
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["systems"]["compressed"]["f1"]["low"] is None
    assert metrics["against_full_text"] == {} and not math.isnan(metrics["systems"]["compressed"]["f1"]["value"])
