"""Trains an encoder for the made-up world from scratch, as a compressor's backbone.

    python -m scaledown.world.encoder --output runs/embedded/encoder

The curriculum is the generator's, read in both directions: what is to be learned is masked. It sees one passage at a
time, after the questions, as the compressor of ScaleDown does.
"""

import random
import sys

import torch
from tokenizers import processors
from transformers import (
    AutoModelForMaskedLM,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..common.command_line import parse_options, run_command
from .curriculum import Curriculum, Lesson, Row, whole
from .teaching import BackboneArguments, teach
from .tokenizer import build_tokenizer

MASK = "<|system|>"  # not in what an encoder reads otherwise


class EncoderCurriculum(Curriculum):
    """The lessons of an encoder."""

    def lessons(self) -> list[Lesson]:
        """From the first to the last."""
        return [
            *self.echoes()[:4],
            self.reading("1 passage of 3 facts", 1, 96, 3, plain=True),
            self.reading("1 long passage", 1, 64, steps=1000),
        ]

    def echo(self, rng: random.Random, lengths: list[int]) -> Row:
        """As for the generator, but of what it learns half is masked, and the rest is there to see."""
        row = super().echo(rng, lengths)
        return row._replace(labels=[label if rng.random() < 0.5 else -100 for label in row.labels])

    def prompt(self, documents: list[str], asked: list[tuple[str, str]], gaps: list[int] | None = None) -> Row:
        """Questions with their answers, then the passage; without gaps."""
        ids, labels = [self.tokenizer.bos_token_id], [-100]
        for question, answer in asked[:4]:
            part, learned = self._ids(question), self._ids(answer)
            ids, labels = ids + part + learned, labels + [-100] * len(part) + learned
        behind = [*self.end, *(token for text in documents for token in self._ids(text)), *self.end]
        return whole(ids + behind, labels + [-100] * len(behind))


def read_masked(model: PreTrainedModel, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Have an encoder fill in what is learned.

    Args:
        model: The encoder with its head.
        row: A batch.

    Returns:
        Logits `(answer tokens, vocabulary)` and the ids they should give `(answer tokens,)`.
    """
    known = row.labels != -100
    masked = row.ids.masked_fill(known, model.config.mask_token_id)
    padded = (row.ids != model.config.pad_token_id).long()
    states = model.model(masked, attention_mask=padded).last_hidden_state[known]  # (answer tokens, hidden)
    return model.decoder(model.head(states)), row.labels[known]


def encoder_tokenizer() -> PreTrainedTokenizerBase:
    """The world's tokenizer, which frames a question and a passage as encoders do."""
    tokenizer = build_tokenizer()
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B {end}", special_tokens=ids
    )
    tokenizer.cls_token, tokenizer.sep_token = begin, end
    return tokenizer


def build_encoder(tokenizer: PreTrainedTokenizerBase, args: BackboneArguments) -> PreTrainedModel:
    """A fresh encoder of ModernBERT's kind."""
    torch.manual_seed(args.seed)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=512,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    config.mask_token_id = tokenizer.convert_tokens_to_ids(MASK)
    return AutoModelForMaskedLM.from_config(config)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(
            BackboneArguments,
            prog="python -m scaledown.world.encoder",
            description="Train an encoder for the invented world.",
        )
        tokenizer = encoder_tokenizer()
        model = build_encoder(tokenizer, args)
        tokenizer.save_pretrained(args.output)
        teach(model, EncoderCurriculum(tokenizer, args.seed).lessons()[: args.num_lessons], args, read_masked)
        return f"encoder in {args.output}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
