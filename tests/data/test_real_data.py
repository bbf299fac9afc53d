"""The main job on real questions and passages: prepare, train, save, load elsewhere, answer, rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import set_seed

from scaledown.data.preparation import main as prepare
from scaledown.data.records import read_records
from scaledown.tools.slots_demo import SlotsDemoArguments, save_encoder, train_generator, train_tokenizer
from scaledown.training.run import main as train

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SOURCES = {"squad": DATA / "squad" / "squad-v1.1-part1.json", "hotpotqa": DATA / "hotpotqa" / "train.jsonl"}
SCRIPT = """
import json, sys
from transformers import AutoModel
folder, records = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
rows = [json.loads(line) for line in open(records, encoding="utf-8")][:6]
answers = model.answer([r["query"] for r in rows], [r["documents"] for r in rows], max_new_tokens=8)
ranking = model.rank(rows[0]["query"], rows[0]["documents"], return_documents=True)
json.dump({"answers": answers, "ranking": ranking, "documents": rows[0]["documents"]}, open("result.json", "w"))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(p.is_file() for p in SOURCES.values()), reason="no real data beside the checkout"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    args = SlotsDemoArguments(hidden_size=64, num_layers=5, generator_steps=5, batch_size=8)
    for name, source in SOURCES.items():
        options = ["--source", str(source), "--output", str(folder / f"{name}.jsonl"), "--num_examples", "60"]
        assert prepare([*options, "--num_documents", "10" if name == "hotpotqa" else "5"]) == 0
    texts = [text for name in SOURCES for r in read_records(folder / f"{name}.jsonl") for text in r["documents"]]
    set_seed(0)
    tokenizer = train_tokenizer(texts)
    train_generator(texts[:100], tokenizer, folder / "generator", args)
    save_encoder(tokenizer, folder / "encoder", args)
    return folder


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compressor_type", ["n_layers", "modernbert"])
def test_prepare_train_save_load_elsewhere_answer_and_rank(prepared, tmp_path, source, compressor_type):
    records, output = prepared / f"{source}.jsonl", tmp_path / "model"
    options = {
        "generator_name_or_path": prepared / "generator",
        "compressor_type": compressor_type,
        "num_compressor_layers": 3,
        "projector_hidden_size": 128,
        "train_file": records,
        "eval_file": records,
        "max_eval_examples": 8,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_query_length": 64,
        "output_dir": output,
    }
    if compressor_type != "n_layers":
        options["compressor_name_or_path"] = prepared / "encoder"
    assert train([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, str(output), str(records)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((elsewhere / "result.json").read_text())
    assert len(result["answers"]) == 6
    scores = [row["score"] for row in result["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(row["corpus_id"] for row in result["ranking"]) == list(range(len(result["documents"])))
    assert all(row["text"] == result["documents"][row["corpus_id"]] for row in result["ranking"])
