"""Train a ScaleDown model.

    python train.py recipes/cpu-smoke.yaml --generator_name_or_path FOLDER --train_file train.jsonl
    python train.py --generator_name_or_path mistralai/Mistral-7B-Instruct-v0.2 --train_file train.jsonl

The first argument may be a recipe in YAML; options override it. `python train.py --help` lists every option.
"""

import sys

if __name__ == "__main__":
    from scaledown.commands import train

    sys.exit(train())
