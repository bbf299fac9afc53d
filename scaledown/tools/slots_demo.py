"""Shows that text flows through the slots: tiny backbones from scratch, real passages, a few minutes on a CPU.

    python -m scaledown.tools.slots_demo                      # Python's own language reference as text
    python -m scaledown.tools.slots_demo --data train.jsonl   # your records, as prepare_data.py writes them

The generator always reads one and the same prompt; only the embeddings in its slots differ. It learns to reproduce the
beginning of a passage, or, when the compressor is shown a question, the sentence that answers it. What it writes is
then compared with what it writes when the slots are swapped between passages, or zeroed, or made for the other
question. This says nothing about knowledge: a model of this size learned from a few hundred texts has none.
"""

import json
import logging
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor
from reranking_scaledown import slots_by_document

from ..common.command_line import parse_options, run_command
from ..data.records import read_records
from ..training.arguments import ScaleDownTrainingArguments
from ..training.collators import num_answer_positions
from ..training.trainer import ScaleDownTrainer

logger = logging.getLogger(__name__)

INSTRUCTION = "Write."
WHOLE = "How does the passage begin?"
TARGET_LENGTH = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class SlotsDemoArguments:
    """What to learn and how large; the defaults take a few minutes on two cores."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Records from prepare_data.py to take passages from; Python's language reference by default."
        },
    )
    output_dir: str = field(default="runs/demo", metadata={"help": "Where the models and report.json go; replaced."})
    compressor_type: Literal["n_layers", "modernbert", "llm"] = field(
        default="n_layers", metadata={"help": "n_layers, modernbert (an encoder) or llm (a second language model)."}
    )
    num_passages: int = field(default=32, metadata={"help": "Passages to train on."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the backbones, a multiple of 32."})
    num_layers: int = field(default=4, metadata={"help": "Layers of the generator."})
    generator_steps: int = field(default=200, metadata={"help": "Steps that train the generator."})
    steps: int = field(default=250, metadata={"help": "Steps that train ScaleDown."})
    batch_size: int = field(default=32, metadata={"help": "Texts per step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of both trainings."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the generator's LoRA."})
    seed: int = field(default=0, metadata={"help": "Seed of passages and weights."})


@dataclass
class DemoExample:
    """A passage, what the compressor is asked about it, and the text the generator is to write."""

    passage: str
    query: str
    target: str


class DemoCollator:
    """The compressor sees an example's own query; the generator always reads the same instruction.

    Args:
        processor: The model's processor.
    """

    def __init__(self, processor: ScaleDownProcessor):
        self.processor = processor

    def __call__(self, examples: Sequence[DemoExample]) -> dict:
        """Build a training batch of examples."""
        chunks, prompts = self.encode(examples, [example.target for example in examples])
        batch = {**prompts, **chunks}
        return {**batch, "logits_to_keep": num_answer_positions(batch["labels"])}

    def encode(self, examples: Sequence[DemoExample], targets: Sequence[str] | None = None) -> tuple[dict, dict]:
        """Build the compressor's and the generator's side of a batch, with labels where there are targets."""
        documents = [[example.passage] for example in examples]
        chunks = self.processor.encode_documents([example.query for example in examples], documents)
        prompts = self.processor.build_prompts(
            [INSTRUCTION] * len(examples),
            slots_by_document(chunks, documents),
            targets,
            max_answer_length=TARGET_LENGTH,
        )
        return chunks, dict(prompts)


def read_passages(data: str | None, count: int, seed: int) -> list[dict]:
    """Read passages, each with two sentences and a question about either.

    Args:
        data: Records whose questions have their answer in one sentence of a positive document; Python's own language
            reference by default, where a question asks for a word that stands in one sentence only.
        count: Passages wanted.
        seed: Decides which.

    Returns:
        `{"passage": str, "questions": [(query, sentence), (query, sentence)]}` for each passage.

    Raises:
        ValueError: The data holds fewer passages of this kind.
    """
    found = _from_records(data) if data else _from_language_reference()
    if len(found) < count:
        raise ScaleDownError(
            f"{data or 'the language reference'} holds {len(found)} passages with questions on two of their sentences, "
            f"{count} were asked for; lower --num_passages or pass more data."
        )
    return random.Random(seed).sample(found, count)


def _from_records(path: str) -> list[dict]:
    by_passage: dict[str, dict[str, str]] = {}
    for record in read_records(path):
        gold = [record["documents"][i] for i in record["positives"] or range(len(record["documents"]))]
        for passage in gold:
            for sentence in _sentences(passage):
                if record["answer"][0] in sentence:
                    by_passage.setdefault(passage, {}).setdefault(sentence, record["query"])
                    break
    return [
        {"passage": passage, "questions": [(query, sentence) for sentence, query in list(sentences.items())[:2]]}
        for passage, sentences in by_passage.items()
        if len(sentences) > 1
    ]


def _from_language_reference() -> list[dict]:
    paragraphs = [" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)]
    passages = []
    for paragraph in dict.fromkeys(paragraphs):
        sentences = _sentences(paragraph)
        if not 60 <= len(paragraph.split()) <= 110 or len(sentences) < 2:
            continue
        questions = []
        for sentence, other in ((sentences[0], sentences[1]), (sentences[1], sentences[0])):
            own = set(re.findall(r"[a-z]{5,}", sentence)) - set(re.findall(r"[a-z]{5,}", other))
            if own:
                questions.append((f"What is said about “{max(sorted(own), key=len)}”?", sentence))
        if len(questions) == 2:
            passages.append({"passage": paragraph, "questions": questions})
    return passages


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", text) if len(part.split()) >= 5]


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the special tokens of a chat model and of an encoder.

    Args:
        texts: What to learn it from.
        vocab_size: Size of the vocabulary.

    Returns:
        The tokenizer, with a chat template.
    """
    special = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_generator(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, folder: Path, args: SlotsDemoArguments
) -> None:
    """Train a small Llama-shaped language model from scratch on the passages, and save it like any other.

    Args:
        texts: What to learn from.
        tokenizer: Its tokenizer.
        folder: Where to save both.
        args: Sizes and steps.
    """
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 8 // 3,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = [{"input_ids": ids[:96]} for ids in tokenizer(texts)["input_ids"]]
    Trainer(
        model=model,
        args=_training_arguments(TrainingArguments, folder / "trainer", args, max_steps=args.generator_steps),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_encoder(tokenizer: PreTrainedTokenizerFast, folder: Path, args: SlotsDemoArguments) -> None:
    """Save a small ModernBERT with random weights.

    Args:
        tokenizer: Its tokenizer.
        folder: Where to save both.
        args: Sizes and steps.
    """
    ModernBertModel(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 2,
            num_hidden_layers=4,
            num_attention_heads=args.hidden_size // 32,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            cls_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            sep_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_scaledown(
    examples: list[DemoExample], generator: Path, compressor: Path | None, output: Path, args: SlotsDemoArguments
) -> None:
    """Train compressor, heads and LoRA on the examples, and save the model.

    Args:
        examples: What to learn.
        generator: Folder of the language model.
        compressor: Folder of the compressor's backbone; `None` for `n_layers`.
        output: Where to save.
        args: Sizes and steps.
    """
    model = ScaleDownModel.from_backbones(
        str(generator),
        str(compressor) if compressor else None,
        config=ScaleDownConfig(
            compressor_type=args.compressor_type,
            num_compressor_layers=max(args.num_layers // 2, 1),
            num_memory_tokens=8,
            compression_rate=16,
            chunk_length=128,
            max_query_length=48,
            projector_hidden_size=4 * args.hidden_size,
            system_prompt="Read.",
        ),
    )
    model.add_lora(r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0.0)
    training = _training_arguments(
        ScaleDownTrainingArguments,
        output / "trainer",
        args,
        max_steps=args.steps,
        compressor_learning_rate=args.learning_rate,
    )
    ScaleDownTrainer(
        model=model,
        args=training,
        train_dataset=examples,
        data_collator=DemoCollator(model.processor),
        processing_class=model.processor,
    ).train()
    model.merge_lora()
    model.eval().save_pretrained(output)


def _training_arguments(arguments_class, output_dir: Path, args, **settings):
    defaults = {
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "seed": args.seed,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return arguments_class(output_dir=str(output_dir), **{**defaults, **settings})


@torch.no_grad()
def measure(model, processor: ScaleDownProcessor, examples: list[DemoExample], others: list[int] | None = None) -> dict:
    """Measure how many of the targets' tokens the model writes, and how many when the slots lie.

    Args:
        model: The trained model.
        processor: Its processor.
        examples: What it should write.
        others: For each example the one whose slots it gets in the swap; the next example by default.

    Returns:
        Shares of target tokens written at their place: from an example's own slots, from another's, from zeros.
    """
    targets = [processor.tokenizer(e.target, add_special_tokens=False)["input_ids"][:TARGET_LENGTH] for e in examples]
    swap = others or [(i + 1) % len(examples) for i in range(len(examples))]
    result = {}
    for name, order in (("own slots", range(len(examples))), ("slots swapped", swap), ("slots zeroed", None)):
        shown = examples if order is None else [examples[i] for i in order]
        right = total = 0
        for start in range(0, len(examples), 32):
            chunks, prompts = DemoCollator(processor).encode(shown[start : start + 32])
            memory = model.get_memory_embeddings(
                chunks["compressor_input_ids"], chunks["compressor_attention_mask"], chunks["chunk_slots"]
            )
            embeddings = memory.memory_embeddings if order is not None else torch.zeros_like(memory.memory_embeddings)
            written = model.generate(
                **prompts,
                memory_embeddings=embeddings,
                memory_mask=memory.memory_mask,
                max_new_tokens=TARGET_LENGTH,
                do_sample=False,
            )[:, prompts["input_ids"].shape[1] :]
            for row, target in zip(written.tolist(), targets[start : start + 32], strict=True):
                right += sum(a == b for a, b in zip(row, target, strict=False))
                total += len(target)
        result[name] = right / total
    return result


def run(args: SlotsDemoArguments) -> dict[str, Any]:
    """Train tokenizer, generator and ScaleDown, load the model as a user would, and measure.

    Args:
        args: What to learn and how large.

    Returns:
        The report, which also lies in `report.json`.

    Raises:
        ValueError: The data holds too few passages.
    """
    started, output = time.perf_counter(), Path(args.output_dir)
    passages = read_passages(args.data, args.num_passages, args.seed)
    set_seed(args.seed)
    whole = [DemoExample(item["passage"], WHOLE, item["passage"]) for item in passages]
    asked = [DemoExample(item["passage"], query, text) for item in passages for query, text in item["questions"]]
    targets = [example.target for example in whole + asked]
    tokenizer = train_tokenizer([*targets, *(example.query for example in asked), WHOLE, INSTRUCTION])
    logger.info("Training a generator of %d layers on %d passages", args.num_layers, len(passages))
    train_generator(targets, tokenizer, output / "generator", args)
    compressor = {"n_layers": None, "llm": output / "generator", "modernbert": output / "encoder"}[args.compressor_type]
    if args.compressor_type == "modernbert":
        save_encoder(tokenizer, compressor, args)
    logger.info("Training ScaleDown to write them from their slots")
    train_scaledown(whole + asked, output / "generator", compressor, output / "scaledown", args)

    model = AutoModel.from_pretrained(output / "scaledown", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output / "scaledown", trust_remote_code=True)
    # The two questions of a passage follow each other: in the swap, each gets the slots made for the other.
    other_question = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(asked))]
    report = {
        "begin a passage": measure(model, processor, whole),
        "answer with a sentence": measure(model, processor, asked, other_question),
        "settings": asdict(args),
        "parameters": {"generator": model.generator.num_parameters(), "all": model.num_parameters()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def format_report(report: dict[str, Any]) -> str:
    """Render the report as a table.

    Args:
        report: As `run` returns it.

    Returns:
        Lines of text.
    """
    tasks = ("begin a passage", "answer with a sentence")
    lines = [f"{'tokens written right':<26}" + "".join(f"{task:>26}" for task in tasks)]
    for condition in report[tasks[0]]:
        lines.append(f"{condition:<26}" + "".join(f"{report[task][condition]:>26.3f}" for task in tasks))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Args:
        argv: Its arguments; the command line by default.

    Returns:
        The exit status: 0, or 2 after an error the user can mend.
    """

    def command() -> str:
        args = parse_options(SlotsDemoArguments, argv, prog="python -m scaledown.tools.slots_demo")
        report = run(args)
        return (
            f"\n{args.num_passages} passages, one and the same prompt for all; {args.compressor_type}\n"
            f"{format_report(report)}\n\n{report['seconds']:.0f} s; model and report in {args.output_dir}"
        )

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
