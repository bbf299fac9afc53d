"""Write a GGUF model as an ordinary folder: python experiments/gguf_to_safetensors.py MODEL.gguf FOLDER."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_scaledown import load_gguf


def main() -> None:
    """Convert, in bfloat16."""
    source, folder = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = load_gguf(AutoModelForCausalLM, str(source.parent), source.name)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
