"""How often a compressor points at an answer: a model with slot_pooling="pointer", in front of any generator.

    python experiments/pointer_hits.py --model runs/smollm2/pointer --data runs/smollm2/data/test5.jsonl --limit 300

Of each question with its gold passages known: does one of the first 1, 2 or 4 windows of its chunks hold a gold answer,
in any passage and in the one that is ranked first? Beside it, one window of each chunk at random. Answers longer than a
window cannot be held; they count as missed.
"""

import argparse
import json
import random
from collections import Counter

import torch
from tqdm import tqdm

from compression_scaledown import chunk_inputs
from modeling_scaledown import ScaleDownModel
from pointer_scaledown import choose_windows
from reranking_scaledown import document_scores
from scaledown.data.records import read_records
from scaledown.training.collators import PointerCollator

WINDOWS = (1, 2, 4)


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
    counts: Counter = Counter()
    for record in tqdm(records):
        batch = collate([record])
        found = model.get_memory_embeddings(**chunk_inputs(batch))
        held, own = batch["pointer_labels"], batch["compressor_document_mask"]
        starts = choose_windows(found.pointer_weights, own, model.config.pointer_window, max(WINDOWS))
        pointed = held.gather(1, starts)  # (num_chunks, windows)
        first = document_scores(found.reranking_scores, batch["chunk_to_document"], len(record["documents"])).argmax()
        of_first = batch["chunk_to_document"] == first
        counts["gold passage first"] += int(first) in record["positives"]
        for number in WINDOWS:
            counts[f"answer in {number} windows a chunk"] += bool(pointed[:, :number].any())
            counts[f"answer in {number} windows of the first passage"] += bool(pointed[of_first, :number].any())
        chance = [row[draw.choice(mask.nonzero().flatten())] for row, mask in zip(held, own, strict=True)]
        counts["answer in a random window a chunk"] += any(chance)
    print(json.dumps({name: round(int(count) / len(records), 3) for name, count in counts.items()}, indent=1))


if __name__ == "__main__":
    main()
