"""Minutes of a GPU for models/smollm2-135m-16x: a reader of whole passages, and the model, in separate processes.

    cd runs/smollm2
    python ../../experiments/gpu_smollm2.py check --base base --data data --output gpu
    python ../../experiments/gpu_smollm2.py joint --base base --data data --output gpu --seconds 400 --lora reader-cpu
    python ../../experiments/gpu_smollm2.py reader --base base --data data --output gpu --seconds 200
    python ../../experiments/gpu_smollm2.py assemble --base base --pieces gpu --output 1

Rehearse on a CPU before (`--seconds 60 --work 10000 --bf16`), in an environment that has what the machine with the GPU
has and no more. Training stops after a given time, and lessons and learning rates follow the clock. Steps have few
shapes, each recorded as a CUDA graph (`fixed_steps.py`). The trained weights are saved in bfloat16, in pieces below
16 MiB; `--start FOLDER` continues from such pieces. `assemble` turns them into a reader (a PEFT adapter) and a
ScaleDown model. One model serves 4, 8 and 16 tokens per slot: the rate is drawn for every batch.
"""

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from fixed_steps import Shape, Step, Tensors, adamw, fixed_loss, scale_rates, smallest_shape, to_shape
from passage_cuts import shortened, without_long_distractors
from peft import LoraConfig, get_peft_model
from pieces import load_lora, load_pieces, save_pieces
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import set_seed

from lora_scaledown import LORA_DEFAULTS
from modeling_scaledown import ScaleDownModel
from scaledown.common.metrics import ANSWER_METRICS
from scaledown.data.records import read_records
from scaledown.evaluation.data import Example
from scaledown.evaluation.systems import CompressedSystem, TextSystem
from scaledown.training.collators import JointCollator
from scaledown.training.reader import ReaderCollator

logger = logging.getLogger(__name__)

LAYERS, GENERATOR_LAYERS = 6, 30
SLOTS = 32  # 32 slots of 128 tokens are a rate of 4
LORA = {**LORA_DEFAULTS, "lora_dropout": 0.0}
SYSTEM_PROMPT, USER_PROMPT = "Answer briefly.", "{documents}\nQuestion: {question}"
# Tokens of a chunk, of its question, of the prompt without documents, of an answer, of a passage that is repeated.
CHUNK, QUERY, FRAME, ANSWER, REPEATED = 128, 64, 80, 24, 100
CHUNKS_OF_PASSAGE = 1.7  # on average, at most; a passage has one chunk or two
WARM_UP = 0.03
COOL_DOWN = 0.4
LOWEST = 0.03
TEST_RATES = (16, 8, 4)
REPEAT = "Repeat the background word for word."
SAVE_EVERY = 90  # seconds
WINDOW = 64  # questions among which those of about the same length are neighbours

# A batch: passages per question, whether the passage is repeated, and tokens per slot (0: the passages' text).
Kind = tuple[int, bool, int]


@dataclass
class Lesson:
    """What is learned from a share of the time on.

    Args:
        until: Share of the time at which the next lesson begins.
        repeats: Share of the batches that ask for the passage itself.
        rates: Tokens per slot to draw from, for each batch; 0 for text.
        num_documents: Numbers of passages to draw from, for each batch.
        with_blanks: Whether blanks in text are asked for too.
    """

    until: float
    repeats: float
    rates: tuple[int, ...]
    num_documents: tuple[int, ...]
    with_blanks: bool = False


LESSONS = (
    Lesson(0.04, 0.4, (1,), (1,), True),
    Lesson(0.13, 0.5, (1, 2, 2), (1,), True),
    Lesson(0.32, 0.5, (2, 4, 4), (1,), True),
    Lesson(0.48, 0.4, (4, 8, 8), (1, 1, 2), True),
    Lesson(0.64, 0.2, (4, 8, 16, 16), (1, 2, 3, 5)),
    Lesson(99.0, 0.05, (16, 16, 16, 8, 4), (1, 2, 3, 5, 5, 5)),
)
READING = (Lesson(99.0, 0.0, (0,), (1, 2, 3, 5, 5, 5)),)


class Records(Dataset):
    """Records in memory, asked for by number and kind.

    Args:
        longest: Tokens of a passage; longer distractors are left out, and records with a longer gold passage.
        repeated_letters: Letters of a passage that are repeated.
        paths: Files of records.
    """

    def __init__(self, longest: int, repeated_letters: int, *paths: Path):
        self.repeated_letters = repeated_letters
        records = (record for path in paths for record in read_records(path))
        fitting = (without_long_distractors(record, longest) for record in records)
        self.records = [record for record in fitting if record is not None]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: tuple[int, Kind]) -> tuple[dict, Kind]:
        index, kind = place
        count, repeats, _ = kind
        record = shortened(self.records[index], count, random.Random(int(torch.randint(2**31, ()).item())))
        if repeats:
            passage = beginning(record["documents"][(record["positives"] or [0])[0]], self.repeated_letters)
            record = {**record, "query": REPEAT, "documents": [passage], "answer": [passage]}
            record |= {"positives": [0]}
        if len(record["documents"]) == 1:  # nothing to rank: a head that learned to say yes would have to forget it
            record["reranking_scores"] = None
        return record, kind


def beginning(text: str, letters: int) -> str:
    """The first words of a passage, as many as repeating it is learned from."""
    return " ".join(text[:letters].split(" ")[: -1 if len(text) > letters else None])


def shape_of(kind: Kind, work: int, longest: int) -> Shape:
    """Shape of the batches of a kind.

    Args:
        kind: The kind.
        work: Tokens times layers of a batch.
        longest: Tokens of a passage.

    Returns:
        The shape.
    """
    count, repeats, rate = kind
    answer = REPEATED if repeats else ANSWER
    if not rate:
        prompt = FRAME + count * longest + answer
        return Shape(max(work // (GENERATOR_LAYERS * prompt), 1), prompt, answer)
    length, chunks = (REPEATED, 1.0) if repeats else (CHUNK, count * CHUNKS_OF_PASSAGE)
    slots = math.ceil(length / rate)
    chunk = length + QUERY + 4
    prompt = FRAME + math.ceil(chunks * slots) + count + answer
    questions = max(int(work / (LAYERS * chunks * chunk + GENERATOR_LAYERS * prompt)), 1)
    return Shape(questions, prompt, answer, max(math.ceil(questions * chunks), 2 * count), chunk, slots)


class KindBatches(Sampler):
    """Numbers of the questions of each batch; the kind is the same in each, as the lesson has it.

    Args:
        data: The records.
        lessons: What is learned when.
        share: Returns the share of the time that has passed.
        size: Returns how many questions a batch of a kind has.
        seed: Of the order.
    """

    def __init__(
        self,
        data: Records,
        lessons: tuple[Lesson, ...],
        share: Callable[[], float],
        size: Callable[[Kind], int],
        seed: int,
    ):
        blanks = [record["id"].startswith("blank-") for record in data.records]
        self.places = {
            True: list(range(len(blanks))),
            False: [i for i, is_blank in enumerate(blanks) if not is_blank],
        }
        self.lessons, self.share, self.size, self.seed = lessons, share, size, seed
        self.length = lambda i: len(data.records[i]["documents"][(data.records[i]["positives"] or [0])[0]])

    def __iter__(self) -> Iterator[list[tuple[int, Kind]]]:
        generator = random.Random(self.seed)
        left: dict[bool, list[int]] = {True: [], False: []}
        while True:
            lesson = next(lesson for lesson in self.lessons if self.share() < lesson.until)
            repeats = generator.random() < lesson.repeats
            count = 1 if repeats else generator.choice(lesson.num_documents)
            kind = count, repeats, generator.choice(lesson.rates)
            order = left[lesson.with_blanks]
            if len(order) < self.size(kind):
                order += self._shuffled(lesson.with_blanks, generator)
            yield [(order.pop(), kind) for _ in range(self.size(kind))]

    def _shuffled(self, with_blanks: bool, generator: random.Random) -> list[int]:
        """Numbers of the questions in random order, with neighbours of about the same length."""
        order = generator.sample(places := self.places[with_blanks], len(places))
        windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
        return [i for window in windows for i in sorted(window, key=self.length)]


@dataclass
class FixedCollator:
    """Builds batches of fixed shapes.

    Args:
        collators: For slots and for text.
        shape: Shape of a kind.
        recorded: Whether a step is recorded for each shape; elsewhere nothing is filled up.
    """

    collators: dict[bool, JointCollator | ReaderCollator]
    shape: Callable[[Kind], Shape]
    recorded: bool

    def __call__(self, items: list[tuple[dict, Kind]]) -> tuple[Shape, Tensors]:
        """Build one batch."""
        records, kinds = zip(*items, strict=True)
        kind = kinds[0]
        collator, shape = self.collators[bool(kind[2])], self.shape(kind)
        collator.processor.compression_rate = kind[2] or collator.processor.compression_rate
        batch = collator(records)
        if not self.recorded:
            shape = smallest_shape(batch, shape)
        return shape, to_shape(batch, shape)


class Clock:
    """Time of a run, from its first step on.

    Args:
        seconds: Its length.
    """

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, time.perf_counter()

    @property
    def share(self) -> float:
        """Share of the time that has passed."""
        return (time.perf_counter() - self.started) / self.seconds

    def factor(self) -> float:
        """Factor of the learning rate: rising at the beginning, falling in the last part of the time."""
        return max(min((self.share + 1e-3) / WARM_UP, 1.0, (1 - self.share) / COOL_DOWN), LOWEST)


def groups_of(model: ScaleDownModel, options: argparse.Namespace) -> list[dict]:
    """What is trained, by learning rate and whether it decays; in 32 bits."""
    rates = {"compressor": options.compressor_learning_rate, "generator": options.learning_rate}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            part, decays = name.split(".")[0], parameter.dim() > 1
            settings = {"lr": rates[part], "weight_decay": 0.05 if decays else 0.0}
            groups.setdefault((part, decays), {**settings, "params": []})["params"].append(parameter)
    for module in model.generator.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # autocast does it, and keeps 16 bits for the way back
            module.cast_input_dtype_enabled = False
    return list(groups.values())


def train_by_clock(
    model: ScaleDownModel,
    data: Records,
    lessons: tuple[Lesson, ...],
    options: argparse.Namespace,
    save: Callable[[], None],
) -> dict:
    """Train until the time is over.

    Returns:
        Steps, questions, seconds and the log.
    """
    groups = groups_of(model, options)
    peaks = [group["lr"] for group in groups]
    on_gpu = torch.cuda.is_available()
    optimizer = adamw(groups, model.device)
    step = Step(model.eval(), optimizer, bf16=options.bf16 or on_gpu)
    clock = Clock(options.seconds)
    shape = lambda kind: shape_of(kind, options.work, options.longest)  # noqa: E731
    collators = {True: JointCollator(model.processor, 160), False: ReaderCollator(model.processor, 32)}
    batches = DataLoader(
        data,
        batch_sampler=KindBatches(data, lessons, lambda: clock.share, lambda kind: shape(kind).questions, options.seed),
        collate_fn=FixedCollator(collators, shape, on_gpu),
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=on_gpu,
    )
    steps, questions, losses, log, saved = 0, 0, [], [], time.perf_counter()
    for of_batch, tensors in batches:
        scale_rates(optimizer, peaks, clock.factor())
        losses.append(step(tensors, of_batch))
        steps += 1
        questions += of_batch.questions
        if steps % options.logging_steps == 0:
            loss = torch.stack(losses).float().mean().item()
            losses = []
            log.append({"step": steps, "questions": questions, "seconds": clock.share * clock.seconds, "loss": loss})
            logger.info("%(seconds)4.0f s, step %(step)d, %(questions)d questions: loss %(loss).3f", log[-1])
            if not math.isfinite(loss):
                raise ValueError(f"The loss is {loss} at step {steps}; the pieces hold what was learned before.")
            if time.perf_counter() - saved > SAVE_EVERY:
                save()
                saved = time.perf_counter()
        if clock.share >= 1:
            break
    return {"steps": steps, "questions": questions, "seconds": options.seconds, "log": log}


def build(base: Path, slots: int = CHUNK) -> ScaleDownModel:
    """The untrained model, its token embeddings frozen: they stay the generator's."""
    set_seed(0)
    model = ScaleDownModel.from_backbones(
        str(base),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        num_compressor_layers=LAYERS,
        num_memory_tokens=slots,
        slot_pooling="span_attention",
        compression_rate=16,
        max_query_length=QUERY,
        system_prompt=SYSTEM_PROMPT,
        user_prompt=USER_PROMPT,
    )
    model.compressor.backbone.get_input_embeddings().requires_grad_(False)
    return model


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


def start(options: argparse.Namespace, part: str) -> ScaleDownModel:
    """The model as training finds it, with what was learned before."""
    model = build(options.base).to("cuda" if torch.cuda.is_available() else "cpu")
    model.add_lora(**LORA)
    if part == "reader":
        model.compressor.requires_grad_(False)
    if options.lora is not None:
        load_lora(options.lora, model)
    if options.start is not None and (options.start / part).is_dir():
        load_pieces(model, options.start / part)
    return model


def train(options: argparse.Namespace, part: str, lessons: tuple[Lesson, ...], *files: str) -> tuple:
    """Train the reader or the model, and save it.

    Returns:
        The model and the report of its training.
    """
    started = time.perf_counter()
    data = Records(options.longest, options.repeated_letters, *(options.data / file for file in files))
    model = start(options, part)
    logger.info("loaded after %.0f s: %d records", time.perf_counter() - started, len(data))
    report = train_by_clock(model, data, lessons, options, lambda: save_pieces(model, options.output / part))
    save_pieces(model, options.output / part)
    write(options.output, part, report)
    return model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).eval(), report


def reader(options: argparse.Namespace) -> None:
    """Train LoRA on whole passages."""
    model, report = train(options, "reader", READING, "questions.jsonl.xz")
    system = TextSystem("full_text", model.generator, model.processor, model.generation_config, None, 24)
    report["score"] = score(system, examples_of(options.data / "test5.jsonl", options.num_tests))
    logger.info("reader: %s", report["score"])
    write(options.output, "reader", report)


def joint(options: argparse.Namespace) -> None:
    """Train compressor and LoRA."""
    lessons = LESSONS[options.first_lesson :]
    if options.lessons:
        lessons = tuple(Lesson(**lesson) for lesson in json.loads(options.lessons))
    model, report = train(options, "joint", lessons, "questions.jsonl.xz", "blanks.jsonl.xz")
    for rate in TEST_RATES:
        system = CompressedSystem(model, rate, 24)
        report[f"score at {rate}"] = score(system, examples_of(options.data / "test5.jsonl", options.num_tests))
        logger.info("%d tokens per slot: %s", rate, report[f"score at {rate}"])
        write(options.output, "joint", report)


def check(options: argparse.Namespace) -> None:
    """Compare the loss of fixed shapes and its gradients with those of the model itself, in 32 bits."""
    data = Records(options.longest, options.repeated_letters, options.data / "questions.jsonl.xz")
    for kind in ((1, True, 2), (1, False, 4), (3, False, 16)):
        options.start = options.lora = None
        model = start(options, "joint").float().eval()
        torch.nn.init.normal_(model.compressor.span_attention.query, std=0.02)
        records = [data[i, kind][0] for i in range(2)]
        model.processor.compression_rate = kind[2]
        batch = JointCollator(model.processor, 160)(records)
        shape = shape_of(kind, 25_000, options.longest)
        fixed = {name: tensor.to(model.device) for name, tensor in to_shape(batch, shape).items()}
        batch = {n: x.to(model.device) if isinstance(x, torch.Tensor) else x for n, x in batch.items()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses = model(**batch).loss, fixed_loss(model, fixed, shape.slots)
        gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
        worst = max(
            ((a if a is not None else torch.zeros_like(p)) - (b if b is not None else torch.zeros_like(p))).abs().max()
            / (1e-6 + (0 if a is None else a.abs().max()))
            for a, b, p in zip(*gradients, parameters, strict=True)
        )
        kept = int((fixed["targets"] >= 0).sum()), int((batch["labels"] >= 0).sum())
        logger.info("%s: losses %s, worst gradient %.1e, labels %s", kind, [x.item() for x in losses], worst, kept)


def write(output: Path, name: str, report: dict) -> None:
    """Write the results so far."""
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def assemble(options: argparse.Namespace) -> None:
    """Make models from pieces."""
    model = build(options.base, SLOTS)
    if (options.pieces / "reader").is_dir():
        generator = get_peft_model(model.generator, LoraConfig(**LORA, task_type="CAUSAL_LM"))
        load_pieces(generator, options.pieces / "reader", "generator.", "base_model.model.")
        generator.save_pretrained(options.output / "reader")
        model.processor.tokenizer.save_pretrained(options.output / "reader")
        model.generator = generator.unload()
    model.add_lora(**LORA)
    load_pieces(model, options.pieces / "joint")
    model.config.reranking_trained = True
    model.save_pretrained(options.output / "model", weights_format="delta")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (check, joint, reader, assemble):
        options = commands.add_parser(command.__name__, help=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("--base", type=Path, required=True, help="the generator, as safetensors")
        options.add_argument("--output", type=Path, required=True)
        if command is assemble:
            options.add_argument("--pieces", type=Path, required=True)
            continue
        options.add_argument("--data", type=Path, required=True)
        options.add_argument("--start", type=Path, help="pieces to continue from")
        options.add_argument("--lora", type=Path, help="a PEFT adapter to start LoRA from")
        options.add_argument("--seconds", type=float, default=60)
        options.add_argument("--learning_rate", type=float, default=8e-4)
        options.add_argument("--work", type=int, default=600_000, help="tokens times layers of a batch")
        options.add_argument("--longest", type=int, default=240, help="tokens of a passage; longer ones are left out")
        options.add_argument("--repeated_letters", type=int, default=300)
        options.add_argument("--seed", type=int, default=0, help="of the order of the questions")
        options.add_argument("--workers", type=int, default=0)
        options.add_argument("--logging_steps", type=int, default=50, help="each time, the GPU's queue runs dry")
        options.add_argument("--num_tests", type=int, default=200)
        options.add_argument("--bf16", action="store_true", help="as on a GPU, to rehearse it")
        options.add_argument("--compressor_learning_rate", type=float, default=5e-4)
    options = commands.choices["joint"]
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
