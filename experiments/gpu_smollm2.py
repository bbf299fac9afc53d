"""Minutes of a GPU for models/smollm2-135m-16x: a reader of whole passages, and the model, in separate processes.

    cd runs/smollm2
    python ../../experiments/gpu_smollm2.py reader --base base --data data --output gpu --seconds 200
    python ../../experiments/gpu_smollm2.py joint --base base --data data --output gpu --seconds 400 --lora reader-cpu
    python ../../experiments/gpu_smollm2.py assemble --base base --pieces gpu --output 1

Rehearse both on a CPU before (`--seconds 60 --work 10000 --bf16 --compile`), in an environment that has what the
machine with the GPU has and no more. Training stops after a given time, and lessons and learning rates follow the
clock. The trained weights are saved in bfloat16, in pieces below 16 MiB; `--start FOLDER` continues from such pieces.
`assemble` turns them into a reader (a PEFT adapter) and a ScaleDown model. One model serves 4, 8 and 16 tokens per
slot: the rate is drawn for every batch.
"""

import argparse
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
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

LAYERS, GENERATOR_LAYERS = 6, 30
SLOTS = 32  # 32 slots of 128 tokens are a rate of 4
LORA = {**LORA_DEFAULTS, "lora_dropout": 0.0}
SYSTEM_PROMPT, USER_PROMPT = "Answer briefly.", "{documents}\nQuestion: {question}"
FRAME = 60  # tokens of prompt and question
LAYER = re.compile(r"(?:^|\.)layers\.\d+$")
WARM_UP = 0.03
COOL_DOWN = 0.4
LOWEST = 0.03
TEST_RATES = (16, 8, 4)
POOL = 2048
REPEAT = "Repeat the background word for word."
SAVE_EVERY = 90  # seconds


@dataclass
class Lesson:
    """What is learned from a share of the time on.

    Args:
        until: Share of the time at which the next lesson begins.
        repeats: Share of the batches that ask for the passage itself.
        rates: Tokens per slot to draw from, for each batch.
        num_documents: Numbers of passages to draw from, for each batch.
        with_blanks: Whether blanks in text are asked for too.
    """

    until: float
    repeats: float
    rates: tuple[int, ...]
    num_documents: tuple[int, ...]
    with_blanks: bool = False


LESSONS = (
    Lesson(0.05, 0.4, (1,), (1,), True),
    Lesson(0.13, 0.5, (1, 2, 2), (1,), True),
    Lesson(0.26, 0.5, (2, 4, 4), (1,), True),
    Lesson(0.42, 0.4, (4, 8, 8), (1, 1, 2), True),
    Lesson(0.60, 0.2, (4, 8, 16, 16), (1, 2, 3, 5)),
    Lesson(99.0, 0.05, (16, 16, 16, 8, 4), (1, 2, 3, 5, 5, 5)),
)
READING = (Lesson(99.0, 0.0, (1,), (1, 2, 3, 5, 5, 5)),)


class Records(Dataset):
    """Records in memory, asked for by number, passages, whether to repeat the passage, and tokens per slot.

    Args:
        longest: Tokens of a passage; records with a longer one are left out.
        repeated_letters: Letters of a passage that are repeated.
        paths: Files of records.
    """

    def __init__(self, longest: int, repeated_letters: int, *paths: Path):
        self.repeated_letters = repeated_letters
        records = (record for path in paths for record in read_records(path))
        self.records = [record for record in records if max(map(num_tokens, record["documents"])) <= longest]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: tuple[int, int, bool, int]) -> dict:
        index, count, repeats, rate = place
        record = shortened(self.records[index], count, random.Random(int(torch.randint(2**31, ()).item())))
        if repeats:
            passage = beginning(record["documents"][(record["positives"] or [0])[0]], self.repeated_letters)
            record = {**record, "query": REPEAT, "documents": [passage], "answer": [passage]}
            record |= {"positives": [0]}
        if len(record["documents"]) == 1:  # nothing to rank: a head that learned to say yes would have to forget it
            record["reranking_scores"] = None
        return {**record, "rate": rate}


def num_tokens(text: str) -> float:
    """About how many tokens a text has: one for four letters, one for each digit."""
    return (len(text) + 3 * sum(map(str.isdigit, text))) / 4


def beginning(text: str, letters: int) -> str:
    """The first words of a passage, as many as repeating it is learned from."""
    return " ".join(text[:letters].split(" ")[: -1 if len(text) > letters else None])


def shortened(record: dict, count: int, generator: random.Random) -> dict:
    """A record cut to a number of passages, gold ones kept first, in their order."""
    gold = record.get("positives") or []
    others = [i for i in range(len(record["documents"])) if i not in gold]
    generator.shuffle(others)
    kept = sorted([*gold, *others[: max(count - len(gold), 0)]])
    cut = {name: [record[name][i] for i in kept] for name in ("documents", "reranking_scores")}
    return {**record, **cut, "positives": [kept.index(i) for i in gold]}


class TokenBatches(Sampler):
    """Batches of as many questions as fit an amount of work; passages, task and rate are the same in each.

    Args:
        data: The records.
        lessons: What is learned when.
        work: Tokens times layers of a batch at most, padding counted.
        share: Returns the share of the time that has passed.
    """

    def __init__(self, data: Records, lessons: tuple[Lesson, ...], work: int, share: Callable[[], float]):
        self.longest = [max(map(num_tokens, record["documents"])) for record in data.records]
        self.num_questions = sum(not record["id"].startswith("blank-") for record in data.records)
        self.lessons, self.work, self.share = lessons, work, share
        self.repeated_letters = data.repeated_letters

    def __iter__(self) -> Iterator[list[tuple[int, int, bool, int]]]:
        generator = random.Random(0)
        orders = {True: [], False: []}
        while True:
            lesson = self._lesson()
            order = orders[lesson.with_blanks]
            if len(order) < POOL:
                order += (
                    generator.sample(range(len(self.longest)), len(self.longest))
                    if lesson.with_blanks
                    else (generator.sample(range(self.num_questions), self.num_questions))
                )
            # Questions of similar length together, in pools that are a small part of the data.
            pool = sorted(order[:POOL], key=self.longest.__getitem__)
            del order[:POOL]
            while pool and lesson is self._lesson():
                repeats = generator.random() < lesson.repeats
                count = 1 if repeats else generator.choice(lesson.num_documents)
                rate = generator.choice(lesson.rates)
                last = generator.randrange(len(pool))
                first = max(last + 1 - self._fitting(self.longest[pool[last]], count, repeats, rate), 0)
                chosen = pool[first : last + 1]
                del pool[first : last + 1]
                yield [(index, count, repeats, rate) for index in chosen]

    def _lesson(self) -> Lesson:
        return next(lesson for lesson in self.lessons if self.share() < lesson.until)

    def _fitting(self, length: float, count: int, repeats: bool, rate: int) -> int:
        """How many questions about passages of a length fit."""
        length = min(length, self.repeated_letters / 4) if repeats else length
        read = count * length
        if self.lessons is READING:
            return max(int(self.work / (GENERATOR_LAYERS * (read + FRAME))), 1)
        work = LAYERS * (read + FRAME / 2) + GENERATOR_LAYERS * (read / rate + FRAME + length * repeats)
        return max(int(self.work / work), 1)


@dataclass
class AtSomeRate:
    """Builds batches at the rate that their records ask for.

    Args:
        collator: Builds the batch.
    """

    collator: JointCollator

    def __call__(self, records: list[dict]) -> dict:
        """Build one batch."""
        self.collator.processor.compression_rate = records[0]["rate"]
        return self.collator(records)


class Clock(TrainerCallback):
    """Stops training when its time is over, and saves now and then; the learning rate follows it.

    Args:
        seconds: Time from the first step on.
        save: Saves what was learned.
    """

    def __init__(self, seconds: float, save: Callable[[], None]):
        self.seconds, self.save, self.started, self.saved, self.questions = seconds, save, None, 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.started = self.saved = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Skip a step without finite gradients: it would leave no weight finite."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            logger.warning("step %d has no finite gradients", state.global_step)
            model.zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop when the time is over."""
        control.should_training_stop = self.share >= 1
        if time.perf_counter() - self.saved > SAVE_EVERY:
            self.save()
            self.saved = time.perf_counter()

    @property
    def share(self) -> float:
        """Share of the time that has passed."""
        return 0.0 if self.started is None else (time.perf_counter() - self.started) / self.seconds

    def factor(self, step: int) -> float:
        """Factor of the learning rate: rising at the beginning, falling in the last part of the time."""
        return max(min((self.share + 1e-3) / WARM_UP, 1.0, (1 - self.share) / COOL_DOWN), LOWEST)


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


def train_by_clock(
    model, data: Records, collator, lessons: tuple[Lesson, ...], options: argparse.Namespace, save: Callable[[], None]
) -> dict:
    """Train until the time is over.

    Returns:
        Steps, questions, seconds and the log.
    """
    clock = Clock(options.seconds, save)
    rates = {"compressor_learning_rate": options.compressor_learning_rate} if isinstance(model, ScaleDownModel) else {}
    arguments = ScaleDownTrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=10**6,
        gradient_accumulation_steps=1,
        learning_rate=options.learning_rate,
        save_strategy="no",
        bf16=options.bf16 or torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # which waits for the GPU in every step
        report_to="none",
        disable_tqdm=True,
        weight_decay=0.05,
        adam_beta2=0.98,
        dataloader_num_workers=options.workers,
        dataloader_prefetch_factor=4 if options.workers else None,
        **rates,
    )
    kind = TimedTrainer if isinstance(model, ScaleDownModel) else TimedReaderTrainer
    trainer = kind(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[clock])
    trainer.clock = clock
    trainer.batches = TokenBatches(data, lessons, options.work, lambda: clock.share)
    layers = compiled_layers(model) if options.compile else []
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(dynamic=True)
    trainer.train()
    for layer in layers:
        layer._compiled_call_impl = None  # generation would compile each of them again
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"steps": trainer.state.global_step, "questions": clock.questions, "seconds": options.seconds, "log": log}


def compiled_layers(model) -> list[torch.nn.Module]:
    """Layers whose kernels are fused: with a model this small, launching them takes longer than computing."""
    generator, compressor = (model.generator, model.compressor) if isinstance(model, ScaleDownModel) else (model, None)
    layers = [module for name, module in generator.named_modules() if LAYER.search(name)]
    if compressor is not None:
        layers += compressor.backbone.layers[: -1 if compressor.shares_prefixes else None]
    return layers


def build(base: Path, pooling: str, slots: int = 128) -> ScaleDownModel:
    """The untrained model, its token embeddings frozen: they stay the generator's."""
    set_seed(0)
    model = ScaleDownModel.from_backbones(
        str(base),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        num_compressor_layers=LAYERS,
        num_memory_tokens=slots,
        slot_pooling=pooling,
        compression_rate=16,
        max_query_length=64,
        system_prompt=SYSTEM_PROMPT,
        user_prompt=USER_PROMPT,
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


def load_lora(folder: Path | None, generator: torch.nn.Module) -> None:
    """Start LoRA from a PEFT adapter."""
    if folder is None:
        return
    own = dict(generator.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            name = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name.removeprefix("base_model.model."))
            own[name].copy_(tensor)


def device() -> str:
    """Where to train."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def reader(options: argparse.Namespace) -> None:
    """Train LoRA on whole passages."""
    data = Records(options.longest, options.repeated_letters, options.data / "questions.jsonl.xz")
    model = build(options.base, options.pooling).to(device())
    generator = get_peft_model(model.generator, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    load_lora(options.lora, generator.base_model.model)
    generator.config.use_cache = False
    if options.start is not None:
        load_pieces(generator, options.start / "reader")

    def save() -> None:
        save_pieces(generator, options.output / "reader")

    report = train_by_clock(generator, data, ReaderCollator(model.processor, 32), READING, options, save)
    save()
    write(options.output, "reader", report)
    generator.config.use_cache = True
    system = TextSystem("full_text", generator.eval(), model.processor, model.generation_config, None, 24)
    report["score"] = score(system, examples_of(options.data / "test5.jsonl", options.num_tests))
    logger.info("reader: %s", report["score"])
    write(options.output, "reader", report)


def joint(options: argparse.Namespace) -> None:
    """Train compressor and LoRA."""
    started = time.perf_counter()
    data = Records(
        options.longest, options.repeated_letters, options.data / "questions.jsonl.xz", options.data / "blanks.jsonl.xz"
    )
    model = build(options.base, options.pooling).to(device())
    model.add_lora(**LORA)
    load_lora(options.lora, model.generator)
    logger.info("loaded after %.0f s", time.perf_counter() - started)
    if options.start is not None:
        load_pieces(model, options.start / "joint")

    def save() -> None:
        save_pieces(model, options.output / "joint")

    lessons = LESSONS[options.first_lesson :]
    if options.lessons:
        lessons = tuple(Lesson(**lesson) for lesson in json.loads(options.lessons))
    report = train_by_clock(model, data, AtSomeRate(JointCollator(model.processor, 160)), lessons, options, save)
    save()
    write(options.output, "joint", report)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).eval()
    for rate in TEST_RATES:
        system = CompressedSystem(model, rate, 24)
        report[f"score at {rate}"] = score(system, examples_of(options.data / "test5.jsonl", options.num_tests))
        logger.info("%d tokens per slot: %s", rate, report[f"score at {rate}"])
        write(options.output, "joint", report)


def write(output: Path, name: str, report: dict) -> None:
    """Write the results so far."""
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def assemble(options: argparse.Namespace) -> None:
    """Make models from pieces."""
    model = build(options.base, options.pooling, SLOTS)
    if (options.pieces / "reader").is_dir():
        generator = get_peft_model(model.generator, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        load_pieces(generator, options.pieces / "reader")
        generator.save_pretrained(options.output / "reader")
        model.processor.tokenizer.save_pretrained(options.output / "reader")
        model.generator = generator.unload()
    model.add_lora(**LORA)
    load_pieces(model, options.pieces / "joint")
    model.save_pretrained(options.output / "model", weights_format="delta")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (reader, joint, assemble):
        options = commands.add_parser(command.__name__, help=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("--base", type=Path, required=True, help="the generator, as safetensors")
        options.add_argument("--output", type=Path, required=True)
        options.add_argument("--pooling", default="span_attention", help="the model's slot_pooling")
        if command is assemble:
            options.add_argument("--pieces", type=Path, required=True)
            continue
        options.add_argument("--data", type=Path, required=True)
        options.add_argument("--start", type=Path, help="pieces to continue from")
        options.add_argument("--lora", type=Path, help="a PEFT adapter to start LoRA from")
        options.add_argument("--seconds", type=float, required=True)
        options.add_argument("--learning_rate", type=float, default=8e-4)
        options.add_argument("--work", type=int, default=600_000, help="tokens times layers of a batch")
        options.add_argument(
            "--longest", type=int, default=1000, help="tokens of a passage; records beyond are left out"
        )
        options.add_argument("--repeated_letters", type=int, default=300)
        options.add_argument("--workers", type=int, default=0)
        options.add_argument("--logging_steps", type=int, default=25)
        options.add_argument("--num_tests", type=int, default=200)
        options.add_argument("--compile", action="store_true")
        options.add_argument(
            "--bf16", action="store_true", help="mixed precision on a CPU, to rehearse what a GPU does"
        )
    options = commands.choices["joint"]
    options.add_argument("--compressor_learning_rate", type=float, default=5e-4)
    options.add_argument("--first_lesson", type=int, default=0)
    options.add_argument("--lessons", help="other lessons, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("processing_scaledown").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
