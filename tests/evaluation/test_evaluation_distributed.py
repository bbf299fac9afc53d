"""Two processes measure what one does."""

import json
import subprocess
import sys

import pytest

from folders import ROOT, options
from tiny import ANSWERS, DOCUMENTS, QUESTIONS, build_model

# What a clock decides, and how the questions were spread.
OF_THIS_RUN = ("seconds", "batch")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    with open(tmp_path / "data.jsonl", "w", encoding="utf-8") as stream:
        for i in range(5):
            record = {"query": f"{QUESTIONS[i % 3]} ({i})", "documents": DOCUMENTS[i % 3], "answer": ANSWERS[i % 3]}
            stream.write(json.dumps({**record, "positives": [0]}) + "\n")
    baselines = "full_text,no_documents,truncated,random_memory,shuffled_documents"
    settings = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl", "baselines": baselines}
    settings |= {"max_new_tokens": 4, "device": "cpu", "batch_size": 2}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = {}
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, str(ROOT / "evaluate.py")]
        command += options({**settings, "output_dir": tmp_path / name})
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line) for line in lines], json.loads((tmp_path / name / "metrics.json").read_text())
    for one, two in zip(found["one"][0], found["two"][0], strict=True):
        for row in (one, two):
            row["reranking_scores"] = (
                pytest.approx(row["reranking_scores"], abs=1e-5) if row is one else row["reranking_scores"]
            )
            for system in row["systems"].values():
                for value in OF_THIS_RUN:
                    del system[value]
        assert two == one
    one, two = found["one"][1], found["two"][1]
    assert (one["hardware"]["processes"], two["hardware"]["processes"]) == (1, 2) and len(two["batch_sizes"]) == 2
    for system, values in one["systems"].items():
        for metric, value in values.items():
            if metric not in OF_THIS_RUN:
                assert two["systems"][system][metric] == value
