"""Turn questions into training records: with documents, a reranker's scores and a teacher's answers.

    python prepare_data.py --source train-v1.1.json --output squad.jsonl
    python prepare_data.py --source hotpotqa/hotpot_qa --config distractor --num_documents 10 --output hotpotqa.jsonl
    python prepare_data.py --source popqa.tsv --corpus wiki.jsonl --top_k 20 --reranker --keep_best 5 \\
        --teacher_url http://localhost:8000/v1 --teacher mistralai/Mistral-7B-Instruct-v0.2 --output popqa.jsonl

docs/data.md explains the steps; `python prepare_data.py --help` lists every option.
"""

import sys

if __name__ == "__main__":
    from scaledown.commands import prepare_data

    sys.exit(prepare_data())
