"""Results in a model's card."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from scaledown import ScaleDownModel
from scaledown.evaluation.arguments import EvaluationArguments
from scaledown.evaluation.card import update_card
from scaledown.evaluation.evaluate import evaluate
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_model, randomize_lora

TRAINING = {"training": {"data": "train.jsonl", "num_examples": 1234, "settings": {"note": "a --> b"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose card says how it was trained, and records."""
    folder = tmp_path_factory.mktemp("card")
    model = randomize_lora(build_model(lora=True))
    model.card_fields = dict(TRAINING)
    model.save_pretrained(folder / "model")
    with open(folder / "dev.jsonl", "w", encoding="utf-8") as stream:
        for query, documents, answer in zip(QUESTIONS, DOCUMENTS, ANSWERS, strict=True):
            record = {"query": query, "documents": documents, "answer": answer, "positives": [0]}
            stream.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def metrics(folder):
    """An evaluation that wrote its results into the card."""
    arguments = {"model": str(folder / "model"), "data": str(folder / "dev.jsonl"), "output_dir": str(folder / "run")}
    arguments |= {"max_new_tokens": 4, "resamples": 50, "device": "cpu", "update_card": True}
    evaluate(EvaluationArguments(**arguments))
    return json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))


def load_card(folder):
    return ModelCard.load(folder / "README.md")


def test_the_metadata_holds_the_results(folder, metrics):
    card = load_card(folder / "model")
    found = {(r.task_type, r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for metric in ("exact_match", "f1", "match", "rouge_l"):
        value = metrics["systems"]["compressed"][metric]["value"]
        assert found["question-answering", "dev.jsonl", metric] == pytest.approx(value, abs=1e-6)
    value = metrics["reranking"]["model"]["ndcg@10"]["value"]
    assert found["text-ranking", "dev.jsonl", "ndcg@10"] == pytest.approx(value, abs=1e-6)
    assert card.data.model_name == "model"


def test_the_table_shows_the_baselines_too(folder, metrics):
    text = load_card(folder / "model").text
    assert re.search(r"\| dev\.jsonl \| compressed \|", text) and re.search(r"\| dev\.jsonl \| full text \|", text)
    assert "3 questions with 2 documents each" in text and "No evaluation results" not in text
    assert str(folder) not in text


def test_what_the_card_said_before_is_still_there(folder, metrics):
    text = load_card(folder / "model").text
    assert "1,234 examples" in text and "a --> b" in text and "not merged" in text


def test_results_on_other_data_are_added_and_on_the_same_replaced(folder, metrics, tmp_path):
    model = ScaleDownModel.from_pretrained(str(folder / "model"))
    model.save_pretrained(tmp_path)
    other = json.loads(json.dumps(metrics))
    other["data"]["name"] = "someone/other-data"
    update_card(tmp_path, other)
    update_card(tmp_path, other)
    more = json.loads(json.dumps(metrics))
    more["data"]["name"] = "dev"  # as the other begins
    update_card(tmp_path, more)
    more["data"] |= {"name": "someone/other-data", "split": "test"}
    update_card(tmp_path, more)
    results = load_card(tmp_path).data.eval_results
    names = [result.dataset_name for result in results]
    expected = ["dev.jsonl", "someone/other-data", "dev", "someone/other-data (test)"]
    assert [names.count(name) for name in expected] == [len(names) / 4] * 4
    assert {r.dataset_type for r in results} == {"dev-jsonl", "dev", "someone/other-data"}
    text = load_card(tmp_path).text
    for name in expected:
        assert text.count(f"\n{name}: ") == 1
    assert text.count("| someone/other-data | compressed |") == 1


def test_a_model_that_is_loaded_and_saved_keeps_its_card(folder, metrics, tmp_path):
    model = ScaleDownModel.from_pretrained(str(folder / "model"))
    model.merge_lora()
    model.save_pretrained(tmp_path)
    card = load_card(tmp_path)
    assert len(card.data.eval_results) == len(load_card(folder / "model").data.eval_results)
    assert "1,234 examples" in card.text and "none, or merged" in card.text


def test_fields_that_are_assigned_replace_those_of_the_card(folder, metrics, tmp_path):
    model = ScaleDownModel.from_pretrained(str(folder / "model"))
    model.card_fields = {"license": "apache-2.0"}
    model.save_pretrained(tmp_path)
    card = load_card(tmp_path)
    assert card.data.eval_results is None and "1,234" not in card.text and card.data.license == "apache-2.0"


def test_a_card_somebody_wrote_is_left_alone(folder, metrics, tmp_path):
    ScaleDownModel.from_pretrained(str(folder / "model")).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="leaves it alone"):
        update_card(tmp_path, metrics)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_the_snippet_of_the_card_runs(folder, metrics, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", load_card(folder / "model").text, flags=re.DOTALL)
    code = snippet.replace("path/to/this/folder", str(folder / "model")).replace(
        "max_new_tokens=32", "max_new_tokens=4"
    )
    exec(compile(code, "README.md", "exec"), {})  # the card this project renders
    assert "corpus_id" in capsys.readouterr().out
