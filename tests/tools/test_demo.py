"""`make demo`: the same questions from whole passages and from slots, one as long as the other is short."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from folders import write_rows
from scaledown import ScaleDownModel
from scaledown.evaluation.systems import Answer
from scaledown.tools.demo import DemoArguments, ask, draw_examples, main, show
from tiny import DOCUMENTS, build_model


def test_questions_are_of_the_test_split_and_every_third_needs_two_passages():
    examples = draw_examples(DemoArguments(num_questions=6, num_documents=7))
    assert [len(example.positives) for example in examples] == [1, 1, 2, 1, 1, 2]
    assert all(len(example.documents) == 7 for example in examples)
    assert all(example.id.startswith("test-") for example in examples)


@pytest.mark.parametrize(("name", "value", "least"), [("num_questions", 0, 1), ("num_documents", 1, 2)])
def test_too_few_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least {least}"):
        DemoArguments(**{name: value})


def test_answers_stand_side_by_side():
    examples = draw_examples(DemoArguments(num_questions=2, num_documents=2))
    gold = [example.gold[0] for example in examples]
    answers = {
        "full_text": [Answer(gold[0], 300, 3, seconds=0.2), Answer("no", 320, 3, seconds=0.4)],
        "compressed": [
            Answer(gold[0], 40, 3, seconds=0.1, scores=[0.25, -1.0]),
            Answer(gold[1], 42, 3, seconds=0.1, scores=[-1.0, 0.5]),
        ],
    }
    text = show(examples, answers)
    assert "| whole passages | 1 of 2 | 310 | 300 |" in text
    assert "| compressed | 2 of 2 | 41 | 100 |" in text
    assert "✗ no" in text and text.count("✓") == 3
    assert examples[0].query in text


def test_the_first_call_is_not_timed():
    class Counting:
        name, calls = "compressed", 0

        def answer(self, examples):
            self.calls += 1
            return [Answer("x", 1, 1) for _ in examples]

    system = Counting()
    answers = ask(system, draw_examples(DemoArguments(num_questions=3, num_documents=2)))
    assert system.calls == 4 and len(answers) == 3
    assert all(answer.seconds > 0 for answer in answers)


def test_runs_on_any_model(tmp_path, capsys, monkeypatch):
    model = build_model("n_layers")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(tmp_path), "--num_questions", "1", "--num_documents", "2"])
    assert main() == 0
    assert "| compressed |" in capsys.readouterr().out


def test_questions_of_a_file_are_asked_of_a_reader_too(tmp_path, capsys, monkeypatch):
    model = build_model("n_layers")
    model.generator.save_pretrained(tmp_path / "generator")
    model.processor.tokenizer.save_pretrained(tmp_path / "generator")
    model = ScaleDownModel.from_backbones(str(tmp_path / "generator"), num_compressor_layers=2)
    model.save_pretrained(tmp_path / "model", weights_format="delta")
    (tmp_path / "generator").rename(tmp_path / "elsewhere")
    torch.manual_seed(0)
    reader = get_peft_model(copy.deepcopy(model.generator), LoraConfig(r=2, init_lora_weights=False))
    reader.save_pretrained(tmp_path / "reader")
    rows = [{"query": "Which country is the man from?", "documents": DOCUMENTS[0], "answer": "Poland"}]
    write_rows(tmp_path / "data.jsonl", rows)
    options = {"model": "model", "data": "data.jsonl", "generator_name_or_path": "elsewhere"}
    printed = []
    for given in (options, options | {"reader": "reader"}):
        argv = [part for name, value in given.items() for part in (f"--{name}", str(tmp_path / value))]
        monkeypatch.setattr("sys.argv", ["demo", *argv])
        assert main() == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")])
    (whole, slots, _, best), (read, same, *_) = printed
    assert same.split(" ms ")[1] == slots.split(" ms ")[1]  # the same slots, and so the same answer
    assert whole.split(" ms ")[1] != read.split(" ms ")[1]
    assert "*" not in best  # no passage is known to be right


def test_a_folder_without_a_model_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(tmp_path)])
    assert main() == 2
    assert "--model names" in capsys.readouterr().err
