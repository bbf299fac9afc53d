"""Minutes of a GPU for models/smollm2-135m-16x: a reader of whole passages, then the model, from the reader's LoRA.

    cd runs/smollm2
    python ../../experiments/gpu_smollm2.py train --base base --data data --output gpu --joint_seconds 200
    python ../../experiments/gpu_smollm2.py assemble --base base --pieces gpu --output 1

`train` stops after a given time, and learning rates follow the clock. It saves the trained weights in bfloat16, in
pieces below 16 MiB; `--start FOLDER` continues from such pieces. `assemble` turns them into a reader (a PEFT adapter)
and a ScaleDown model. One model serves 4, 8 and 16 tokens per slot: the rate is drawn for every batch.
"""

import argparse
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, set_seed

from lora_scaledown import LORA_DEFAULTS
from modeling_scaledown import ScaleDownModel
from scaledown.common.metrics import ANSWER_METRICS
from scaledown.data.records import read_records
from scaledown.evaluation.data import Example
from scaledown.evaluation.systems import CompressedSystem, TextSystem
from scaledown.training.arguments import ScaleDownTrainingArguments
from scaledown.training.collators import JointCollator
from scaledown.training.reader import ReaderCollator
from scaledown.training.trainer import ScaleDownTrainer

logger = logging.getLogger(__name__)

LAYERS, SLOTS = 6, 32  # 32 slots of 128 tokens are a rate of 4
LORA = {**LORA_DEFAULTS, "lora_dropout": 0.0}
FRAME = 120  # tokens of prompt and question
LAYER = re.compile(r"(?:^|\.)layers\.\d+$")
WARM_UP = 0.04
LOWEST = 0.03
TEST_RATES = (16, 8, 4)


class Records(Dataset):
    """Records in memory, asked for by their number and how many passages they are to have."""

    def __init__(self, *paths: Path, share: float = 1.0):
        self.records = [record for path in paths for record in read_records(path)]
        self.records = self.records[: int(share * len(self.records))]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        index, count = place
        return shortened(self.records[index], count, random.Random(int(torch.randint(2**31, ()).item())))


def num_tokens(text: str) -> float:
    """About how many tokens a text has: one for four letters, one for each digit."""
    return (len(text) + 3 * sum(map(str.isdigit, text))) / 4


def shortened(record: dict, count: int, generator: random.Random) -> dict:
    """A record cut to a number of passages, gold ones kept first, in their order."""
    gold = record.get("positives") or []
    others = [i for i in range(len(record["documents"])) if i not in gold]
    generator.shuffle(others)
    kept = sorted([*gold, *others[: max(count - len(gold), 0)]])
    cut = {name: [record[name][i] for i in kept] for name in ("documents", "reranking_scores")}
    return {**record, **cut, "positives": [kept.index(i) for i in gold]}


class TokenBatches(Sampler):
    """Batches of as many questions as fit a number of tokens, padding counted; one number of passages in each.

    Args:
        data: The records.
        num_documents: Numbers of passages to draw from, one for each batch.
        tokens: Tokens of a batch at most.
    """

    def __init__(self, data: Records, num_documents: tuple[int, ...], tokens: int):
        self.longest = [max(map(num_tokens, record["documents"])) for record in data.records]
        self.num_documents, self.tokens, self.questions = num_documents, tokens, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = random.Random(0)
        while True:
            order = list(range(len(self.longest)))
            generator.shuffle(order)
            # Questions of similar length together, in pools that are a small part of the data.
            for start in range(0, len(order), 2048):
                pool = sorted(order[start : start + 2048], key=self.longest.__getitem__)
                batches = []
                while pool:
                    count = generator.choice(self.num_documents)
                    batch = [pool.pop()]
                    size = count * self.longest[batch[0]] + FRAME
                    while pool and (len(batch) + 1) * size <= self.tokens:
                        batch.append(pool.pop())
                    batches.append([(index, count) for index in batch])
                generator.shuffle(batches)
                yield from batches


@dataclass
class AtSomeRate:
    """Draws for every batch how many tokens a slot stands for.

    Args:
        collator: Builds the batch.
        rates: Tokens per slot to draw from.
    """

    collator: JointCollator
    rates: tuple[int, ...]

    def __call__(self, records: list[dict]) -> dict:
        """Build one batch."""
        draw = int(torch.randint(len(self.rates), ()).item())
        self.collator.processor.compression_rate = self.rates[draw]
        return self.collator(records)


class Clock(TrainerCallback):
    """Stops training when its time is over; the learning rate follows it.

    Args:
        seconds: Time from the first step on.
    """

    def __init__(self, seconds: float):
        self.seconds, self.started, self.questions = seconds, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop when the time is over."""
        control.should_training_stop = self.share >= 1

    @property
    def share(self) -> float:
        """Share of the time that has passed."""
        return 0.0 if self.started is None else (time.perf_counter() - self.started) / self.seconds

    def factor(self, step: int) -> float:
        """Factor of the learning rate: rising in the first hundredths of the time, falling to almost 0 at its end."""
        return max(min((self.share + 1e-3) / WARM_UP, (1 - self.share) / (1 - WARM_UP)), LOWEST)


class TimedTrainer(ScaleDownTrainer):
    """`ScaleDownTrainer` by the clock, and with batches by tokens."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the sampler, tokenized in advance."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """A normal step that counts its questions."""
        self.clock.questions += len(inputs["input_ids"])
        return super().training_step(model, inputs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Learning rates of the clock."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.clock.factor)
        return self.lr_scheduler


class TimedReaderTrainer(Trainer):
    """`Trainer` by the clock, and with batches by tokens."""

    create_scheduler = TimedTrainer.create_scheduler
    get_train_dataloader = TimedTrainer.get_train_dataloader

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """A normal step that counts its questions."""
        self.clock.questions += len(inputs["input_ids"])
        return super().training_step(model, inputs, *args, **kwargs)


def train_by_clock(model, data: Records, collator, batches: TokenBatches, seconds: float, settings: dict) -> dict:
    """Train until the time is over.

    Returns:
        Steps, questions, seconds and the log.
    """
    clock, on_gpu = Clock(seconds), torch.cuda.is_available()
    arguments = ScaleDownTrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=10**6,
        gradient_accumulation_steps=1,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
        weight_decay=0.05,
        dataloader_num_workers=12 if on_gpu else 0,
        **settings,
    )
    kind = TimedTrainer if isinstance(model, ScaleDownModel) else TimedReaderTrainer
    trainer = kind(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[clock])
    trainer.clock, trainer.batches = clock, batches
    compile_layers(model, on_gpu)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"steps": trainer.state.global_step, "questions": clock.questions, "seconds": seconds, "log": log}


def compile_layers(model, on_gpu: bool) -> None:
    """Fuse kernels, layer by layer: with a model this small, launching them is slower than the card."""
    generator, compressor = (model.generator, model.compressor) if isinstance(model, ScaleDownModel) else (model, None)
    layers = [module for name, module in generator.named_modules() if LAYER.search(name)]
    if compressor is not None:
        layers += compressor.backbone.layers[:-1]  # a hook chooses what the last one computes
    for layer in layers if on_gpu else ():
        layer.compile(dynamic=True)


def build(base: Path) -> ScaleDownModel:
    """The untrained model, its token embeddings frozen: they stay the generator's."""
    set_seed(0)
    model = ScaleDownModel.from_backbones(
        str(base),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        num_compressor_layers=LAYERS,
        num_memory_tokens=SLOTS,
        compression_rate=16,
        max_query_length=64,
    )
    model.compressor.backbone.get_input_embeddings().requires_grad_(False)
    return model


def learned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that were trained, in 16 bits."""
    return {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_pieces(model: torch.nn.Module, folder: Path) -> None:
    """Write what was trained in pieces below 16 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(learned(model), folder, max_shard_size="15MB")


def load_pieces(model: torch.nn.Module, folder: Path) -> None:
    """Read what `save_pieces` wrote."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    own = dict(model.named_parameters())
    missing = [name for name, parameter in own.items() if parameter.requires_grad and name not in weights]
    if missing or weights.keys() - own.keys():
        raise ValueError(f"{folder} does not hold this model's learned weights: {missing[:1]} is missing.")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


@torch.no_grad()
def score(system, examples: list[Example]) -> dict[str, float]:
    """Metrics of a system's answers, and how often it ranks a gold passage first."""
    sums, first, ranked = dict.fromkeys(ANSWER_METRICS, 0.0), 0, 0
    for start in range(0, len(examples), 100):
        part = examples[start : start + 100]
        for example, answer in zip(part, system.answer(part), strict=True):
            for name, metric in ANSWER_METRICS.items():
                sums[name] += metric(answer.text, example.gold) / len(examples)
            if answer.scores is not None:
                ranked += 1
                first += max(range(len(answer.scores)), key=answer.scores.__getitem__) in example.positives
    return {**sums, **({"gold passage first": first / ranked} if ranked else {})}


def examples_of(path: Path, limit: int) -> list[Example]:
    """The first questions of a file."""
    records = list(read_records(path))[:limit]
    return [Example(r["id"], r["query"], r["documents"], r["answer"], r.get("positives")) for r in records]


def train(options: argparse.Namespace) -> None:
    """Train the reader, then the model; weights and measurements are in the output folder."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    report = {}
    started = time.perf_counter()
    paths = [options.data / f"{name}.jsonl.xz" for name in ("questions", "blanks")]
    questions, mixed = Records(paths[0]), Records(*paths)
    tests = examples_of(options.data / "test5.jsonl", options.num_tests)
    model = build(options.base).to("cuda" if torch.cuda.is_available() else "cpu")
    logger.info("loaded after %.0f s", time.perf_counter() - started)

    reader = get_peft_model(model.generator, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    reader.config.use_cache = False
    if options.start is not None:
        load_pieces(reader, options.start / "reader")
    many = (1, 2, 3, 5, 5, 5)
    if options.reader_seconds:
        batches = TokenBatches(questions, many, options.tokens // 4)  # which go through all layers of the generator
        settings = {"learning_rate": options.reader_learning_rate}
        collator = ReaderCollator(model.processor, 32)
        report["reader"] = train_by_clock(reader, questions, collator, batches, options.reader_seconds, settings)
    save_pieces(reader, options.output / "reader")
    lora = {name.removeprefix("base_model.model."): w for name, w in learned(reader).items()}
    reader.config.use_cache = True
    system = TextSystem("full_text", reader.eval(), model.processor, model.generation_config, None, 24)
    if tests:
        report["reader score"] = score(system, tests)
        logger.info("reader: %s", report["reader score"])

    model.generator = reader.unload()
    model.add_lora(**LORA)
    own = dict(model.generator.named_parameters())
    with torch.no_grad():
        for name, tensor in lora.items():
            own[name].copy_(tensor)
    if options.start is not None and (options.start / "joint").is_dir():
        load_pieces(model, options.start / "joint")
    stages = {
        "warm": (mixed, (1,), (4, 4, 8, 16), options.warm_seconds),
        "joint": (questions, many, (16, 16, 16, 8, 4), options.joint_seconds),
    }
    for name, (data, num_documents, rates, seconds) in stages.items():
        if not seconds:
            continue
        batches = TokenBatches(data, num_documents, options.tokens)
        collator = AtSomeRate(JointCollator(model.processor, 32), rates)
        settings = {
            "learning_rate": options.learning_rate,
            "compressor_learning_rate": options.compressor_learning_rate,
        }
        report[name] = train_by_clock(model, data, collator, batches, seconds, settings)
        save_pieces(model, options.output / "joint")
        write(options.output, report)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).eval()
    for rate in TEST_RATES if tests else ():
        report[f"score at {rate}"] = score(CompressedSystem(model, rate, 24), tests)
        logger.info("%d tokens per slot: %s", rate, report[f"score at {rate}"])
        write(options.output, report)


def write(output: Path, report: dict) -> None:
    """Write the results so far."""
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def assemble(options: argparse.Namespace) -> None:
    """Make models from pieces."""
    model = build(options.base)
    reader = get_peft_model(model.generator, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    load_pieces(reader, options.pieces / "reader")
    reader.save_pretrained(options.output / "reader")
    model.processor.tokenizer.save_pretrained(options.output / "reader")
    model.generator = reader.unload()
    model.add_lora(**LORA)
    load_pieces(model, options.pieces / "joint")
    model.save_pretrained(options.output / "model", weights_format="delta")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (train, assemble):
        options = commands.add_parser(command.__name__, help=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("--base", type=Path, required=True, help="the generator, as safetensors")
        options.add_argument("--output", type=Path, required=True)
    options.add_argument("--pieces", type=Path, required=True)
    options = commands.choices["train"]
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--start", type=Path, help="pieces to continue from")
    options.add_argument("--reader_seconds", type=float, default=120)
    options.add_argument("--warm_seconds", type=float, default=70)
    options.add_argument("--joint_seconds", type=float, default=200)
    options.add_argument("--reader_learning_rate", type=float, default=8e-4)
    options.add_argument("--learning_rate", type=float, default=4e-4)
    options.add_argument("--compressor_learning_rate", type=float, default=4e-4)
    options.add_argument("--tokens", type=int, default=60_000, help="passage tokens of a batch, padding counted")
    options.add_argument("--num_tests", type=int, default=300)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
