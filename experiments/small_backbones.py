"""Train small backbones from scratch on a text: a tokenizer, a Llama-shaped generator, and an encoder or none.

    python experiments/small_backbones.py --text novels.txt --output runs/backbones

They are what the experiments of docs/ run on: large enough to learn to read and write, small enough for two cores.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from scaledown.common.command_line import parse_options, run_command
from scaledown.tools.slots_demo import train_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class BackboneArguments:
    """What to learn from, and how large."""

    text: str = field(metadata={"help": "A text with a paragraph per line, plain or compressed."})
    output: str = field(metadata={"help": "Folder for generator/ and encoder/."})
    vocab_size: int = field(default=2048, metadata={"help": "Tokens of the vocabulary."})
    hidden_size: int = field(default=128, metadata={"help": "Width, a multiple of 32."})
    num_layers: int = field(default=4, metadata={"help": "Layers of the generator."})
    steps: int = field(default=2000, metadata={"help": "Steps that train the generator."})
    encoder_steps: int = field(default=0, metadata={"help": "Steps that train an encoder; 0 leaves it random."})
    max_lines: int = field(default=60000, metadata={"help": "Paragraphs to learn from."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of both."})
    seed: int = field(default=0, metadata={"help": "Decides weights and order."})


def rows_of_tokens(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, length: int = 128) -> datasets.Dataset:
    """Join lines and cut them into rows of equal length.

    Args:
        texts: Rows of `text`.
        tokenizer: Whose tokens count.
        length: Tokens per row.

    Returns:
        Rows of `input_ids`.
    """

    def cut(batch):
        ids = tokenizer("\n".join(batch["text"]), verbose=False)["input_ids"]
        return {"input_ids": [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]}

    return texts.map(cut, batched=True, batch_size=256, remove_columns=texts.column_names)


def train(model, rows, tokenizer, folder: Path, steps: int, masked: bool, args: BackboneArguments) -> None:
    """Train a model on rows of tokens and save it with its tokenizer.

    Args:
        model: A causal or a masked language model.
        rows: Rows of `input_ids`.
        tokenizer: Its tokenizer.
        folder: Where both go.
        steps: Steps.
        masked: Whether it is a masked one.
        args: Learning rate and seed.
    """
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=0.3)
    if steps > 0:
        Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(BackboneArguments)
        set_seed(args.seed)
        texts = datasets.load_dataset("text", data_files=args.text, split="train").filter(
            lambda row: row["text"].strip()
        )
        texts = texts.shuffle(seed=args.seed).select(range(min(args.max_lines, len(texts))))
        tokenizer = train_tokenizer(texts[: min(len(texts), 20000)]["text"], args.vocab_size)
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        rows = rows_of_tokens(texts, tokenizer)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": args.hidden_size,
            "num_attention_heads": args.hidden_size // 32,
            "max_position_embeddings": 1024,
        }
        generator = LlamaConfig(
            **shape,
            **ids,
            intermediate_size=args.hidden_size * 8 // 3,
            num_hidden_layers=args.num_layers,
            tie_word_embeddings=True,
        )
        folder = Path(args.output)
        train(
            AutoModelForCausalLM.from_config(generator), rows, tokenizer, folder / "generator", args.steps, False, args
        )
        encoder = ModernBertConfig(
            **shape,
            **ids,
            cls_token_id=ids["bos_token_id"],
            sep_token_id=ids["eos_token_id"],
            intermediate_size=args.hidden_size * 2,
            num_hidden_layers=4,
        )
        train(
            AutoModelForMaskedLM.from_config(encoder),
            rows,
            tokenizer,
            folder / "encoder",
            args.encoder_steps,
            True,
            args,
        )
        return f"generator and encoder in {folder}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
