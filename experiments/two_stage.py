"""Compare joint and two-stage training on one data set: quality, time and memory.

    python experiments/fact_world.py --output runs/facts
    python experiments/two_stage.py --facts runs/facts --output runs/two_stage

| method                | what learns                                                                           |
| --------------------- | ------------------------------------------------------------------------------------- |
| joint                 | all of the compressor, LoRA                                                           |
| two stages            | projector, reranking head, LoRA, from a backbone as it was pretrained                |
| two stages, pretrained | the same, from a compressor that was pretrained on plain text with `--stage pretrain` |
| two stages, naive     | LoRA alone, from random memory embeddings and a random projector                     |
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModel, ModernBertConfig, PreTrainedTokenizerFast

from errors_scaledown import ScaleDownError
from scaledown import ScaleDownModel
from scaledown.common.command_line import parse_options, run_command
from scaledown.common.metrics import exact_match
from scaledown.data.records import read_records

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("joint", "two stages", "two stages, pretrained", "two stages, naive")


@dataclass
class ComparisonArguments:
    """What to compare, and for how long."""

    facts: str = field(metadata={"help": "Folder that fact_world.py wrote."})
    output: str = field(metadata={"help": "Folder for the runs and results.json."})
    compressors: str = field(default="n_layers,modernbert", metadata={"help": "Kinds of compressor."})
    seeds: str = field(default="0,1,2", metadata={"help": "Seeds of the runs."})
    steps: int = field(default=600, metadata={"help": "Steps of joint training and of stage 2."})
    pretraining_steps: int = field(default=600, metadata={"help": "Steps of pretraining."})
    compression_rate: int = field(default=4, metadata={"help": "Tokens per slot."})


def save_encoder(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a small encoder with random weights, and the generator's tokenizer."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        cls_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        sep_token_id=tokenizer.eos_token_id,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def commands(args: ComparisonArguments, kind: str, method: str, seed: int, folder: Path) -> Iterator[list[str]]:
    """The commands of a run, one after the other; the model is in the last one's output_dir."""
    facts, generator = Path(args.facts), ["--generator_name_or_path", str(Path(args.facts) / "generator")]
    shape = {
        "num_compressor_layers": 2,
        "num_memory_tokens": 8,
        "compression_rate": args.compression_rate,
        "chunk_length": 32,
        "max_query_length": 8,
        "projector_hidden_size": 512,
        "system_prompt": "Read .",
    }
    backbones = [*generator, "--compressor_type", kind, *options(shape)]
    if kind == "modernbert":
        backbones += ["--compressor_name_or_path", str(Path(args.output) / "encoder")]
    training = {
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0,
        "learning_rate": 2e-3,
        "compressor_learning_rate": 1e-3,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
    }
    # One epoch, so that stage 1 compresses no more than joint training does.
    needed = ["--max_train_examples", str(32 * args.steps)]
    questions = [
        "--train_file",
        str(facts / "train.jsonl"),
        *needed,
        "--max_steps",
        str(args.steps),
        *options(training),
    ]
    train = [sys.executable, str(ROOT / "train.py")]
    last = ["--output_dir", str(folder / "model")]
    if method == "joint":
        yield [*train, *backbones, *questions, *last]
        return
    if method == "two stages, naive":
        train = [sys.executable, str(ROOT / "experiments" / "naive_two_stage.py")]
    if method == "two stages, pretrained":
        text = [
            "--stage",
            "pretrain",
            "--train_file",
            str(facts / "text.txt"),
            "--max_steps",
            str(args.pretraining_steps),
        ]
        settings = options({**training, "merge_lora": False})
        yield [*train, *backbones, *text, *settings, "--output_dir", str(folder / "pretrained")]
        backbones = ["--model_name_or_path", str(folder / "pretrained")]
    cache = ["--cache_dir", str(folder / "cache")]
    yield [*train, *backbones, *questions, *cache, "--stage", "compress", *last]
    yield [*train, *backbones, *questions, *cache, "--stage", "generate", *last]


def options(settings: dict) -> list[str]:
    """Settings as command-line options."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def measure(folder: Path, records: list[dict]) -> dict[str, float]:
    """Answer and rank unseen records.

    Args:
        folder: A trained model.
        records: Records with `positives`.

    Returns:
        Share of exact answers, and of questions whose document is ranked first.
    """
    model = ScaleDownModel.from_pretrained(folder).eval()
    queries, documents = [record["query"] for record in records], [record["documents"] for record in records]
    answers, scores = model.answer(
        queries, documents, return_reranking_scores=True, batch_size=50, max_new_tokens=2, do_sample=False
    )
    right = [exact_match(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    first = [max(range(len(row)), key=row.__getitem__) for row in scores]
    ranked = [index in record["positives"] for index, record in zip(first, records, strict=True)]
    return {"exact_match": mean(right), "ranked_first": mean(ranked)}


def run(args: ComparisonArguments, kind: str, method: str, seed: int, records: list[dict]) -> dict:
    """Train and measure once; a finished run is not repeated."""
    folder = Path(args.output) / f"{kind}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
    result = folder / "result.json"
    settings = {name: value for name, value in asdict(args).items() if name not in ("output", "seeds", "compressors")}
    if result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise ScaleDownError(f"{result} is of other settings, {found['settings']}; name another --output.")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    seconds, peak = [], []
    for command in commands(args, kind, method, seed, folder):
        started = time.perf_counter()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise RuntimeError(f"{' '.join(command)} failed; see {folder / 'log.txt'}.")
        seconds.append(time.perf_counter() - started)
        peak.append(usage.ru_maxrss / 1024)
    measured = measure(folder / "model", records)
    found = {"compressor": kind, "method": method, "seed": seed, **measured, "seconds": seconds, "peak_mib": peak}
    found["settings"] = settings
    result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def table(results: list[dict]) -> str:
    """Mean and range over the seeds, in Markdown."""
    lines = ["| compressor | method | exact match | ranked first | seconds | peak MiB |", "| --- " * 6 + "|"]
    for kind, method in dict.fromkeys((r["compressor"], r["method"]) for r in results):
        rows = [r for r in results if (r["compressor"], r["method"]) == (kind, method)]
        cells = [
            f"{mean(r[name] for r in rows):.3f} ({min(r[name] for r in rows):.3f}–{max(r[name] for r in rows):.3f})"
            for name in ("exact_match", "ranked_first")
        ]
        seconds = " + ".join(f"{mean(column):.0f}" for column in zip(*(r["seconds"] for r in rows), strict=True))
        memory = " / ".join(f"{mean(column):.0f}" for column in zip(*(r["peak_mib"] for r in rows), strict=True))
        lines.append(f"| `{kind}` | {method} | {' | '.join(cells)} | {seconds} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit status."""

    def command() -> str:
        args = parse_options(ComparisonArguments)
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        save_encoder(PreTrainedTokenizerFast.from_pretrained(Path(args.facts) / "generator"), output / "encoder")
        records = list(read_records(Path(args.facts) / "dev.jsonl"))
        results = []
        for seed in map(int, args.seeds.split(",")):
            for kind in args.compressors.split(","):
                for method in METHODS:
                    results.append(run(args, kind, method, seed, records))
                    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return table(results)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
