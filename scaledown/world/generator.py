"""Trains the generator of the embedded default from scratch, by a curriculum.

python -m scaledown.world.generator --output runs/embedded/generator
"""

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..common.command_line import parse_options, run_command
from .curriculum import Curriculum, Row
from .teaching import BackboneArguments, teach
from .tokenizer import build_tokenizer


def build_generator(tokenizer: PreTrainedTokenizerBase, args: BackboneArguments) -> PreTrainedModel:
    """A fresh Llama-shaped generator."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=4096,
        # With the usual 0.02 a model of this width takes long to learn to copy anything.
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def read_causally(model: PreTrainedModel, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Have a causal model predict what is learned.

    Args:
        model: The model.
        row: A batch.

    Returns:
        Logits `(answer tokens, vocabulary)` and the ids they should give `(answer tokens,)`.
    """
    known = row.labels[:, 1:] != -100
    seen = None
    if row.groups.any():
        seen = (row.groups[:, None] == row.groups[:, :, None]) | (row.groups[:, None] == 0)  # (batch, length, length)
        seen = seen.tril()[:, None]  # (batch, 1, length, length)
    states = model.model(row.ids, attention_mask=seen, position_ids=row.positions).last_hidden_state
    return model.lm_head(states[:, :-1][known]), row.labels[:, 1:][known]


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            BackboneArguments,
            prog="python -m scaledown.world.generator",
            description="Train the embedded model's generator.",
        )
        tokenizer = build_tokenizer()
        model = build_generator(tokenizer, args)
        tokenizer.save_pretrained(args.output)
        teach(model, Curriculum(tokenizer, args.seed).lessons()[: args.num_lessons], args, read_causally)
        return f"generator in {args.output}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
