"""How often BM25 ranks a gold passage first among those of a question: what a model's ranking is compared with.

    python experiments/bm25_first.py --squad squad-v1.1-part1.json --num_documents 5 --limit 1000 --seed 1

The questions and passages are those of `evaluate.py` with the same options. Words weigh what they do in all passages of
the file, as in a search engine.
"""

import argparse
import json

from scaledown.data.indexes.pool import BM25Retriever
from scaledown.data.readers import read_source
from scaledown.evaluation.data import load_data


def main() -> None:
    """Read the command line and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--squad", required=True)
    parser.add_argument("--num_documents", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pool = read_source(options.squad, "squad", keep_pool=None).passages
    places, retriever = {text: i for i, text in enumerate(pool)}, BM25Retriever(pool)
    data = load_data(options.squad, num_documents=options.num_documents, limit=options.limit, seed=options.seed)
    right = 0
    for example in data.examples:
        candidates = [places[text] for text in example.documents]
        right += candidates.index(retriever.rank(example.query, candidates)[0]) in example.positives
    print(json.dumps({"questions": len(data.examples), "gold passage first": right / len(data.examples)}))


if __name__ == "__main__":
    main()
