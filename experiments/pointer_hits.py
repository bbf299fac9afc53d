"""How often a compressor points at an answer: a model with slot_pooling="pointer", in front of any generator.

    python experiments/pointer_hits.py --model runs/smollm2/pointer --data runs/smollm2/data/test5.jsonl --limit 300

Of each question with its gold passages known: does a window that weighs most in its chunk hold a gold answer, in a gold
passage and in the passage that is ranked first? Beside it, windows chosen at random. Answers longer than a window
cannot be held; they count as missed.
"""

import argparse
import json
import random

import torch
from tqdm import tqdm

from compression_scaledown import chunk_inputs
from modeling_scaledown import ScaleDownModel
from reranking_scaledown import document_scores
from scaledown.data.records import read_records
from scaledown.training.collators import PointerCollator


@torch.inference_mode()
def main() -> None:
    """Read the command line and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=300)
    options = parser.parse_args()
    model = ScaleDownModel.from_pretrained(options.model, dtype=torch.float32).eval()
    collate = PointerCollator(model.processor)
    records = [r for _, r in zip(range(options.limit), read_records(options.data), strict=False)]
    draw = random.Random(0)
    counts = dict.fromkeys(("gold passage first", "answer pointed at", "first passage's", "answer in random window"), 0)
    for record in tqdm(records):
        batch = collate([record])
        found = model.get_memory_embeddings(**chunk_inputs(batch))
        held = batch["pointer_labels"].unsqueeze(1).expand_as(found.pointer_weights)
        pointed = held.gather(2, found.pointer_weights.argmax(dim=-1, keepdim=True)).flatten(1).any(dim=1)
        own = [mask.nonzero().flatten().tolist() for mask in batch["compressor_document_mask"]]
        chance = torch.tensor([bool(row[draw.choice(places)]) for row, places in zip(held[:, 0], own, strict=True)])
        first = document_scores(found.reranking_scores, batch["chunk_to_document"], len(record["documents"])).argmax()
        of_first = batch["chunk_to_document"] == first
        counts["gold passage first"] += int(first) in record["positives"]
        counts["answer pointed at"] += bool(pointed.any())
        counts["first passage's"] += bool(pointed[of_first].any())
        counts["answer in random window"] += bool(chance.any())
    print(json.dumps({name: round(count / len(records), 3) for name, count in counts.items()}))


if __name__ == "__main__":
    main()
