"""Time a generator with weights in 32 and 16 bits, and quantized, on the text and on the slots of one question.

    pip install torchao==0.18.0 bitsandbytes==0.50.2
    python experiments/weight_precision.py --generator qwen2.5-0.5b --threads 2
    python experiments/weight_precision.py --generator qwen2.5-0.5b --threads 2 \
        --kinds "float32,float32 with LoRA"

LoRA, if a kind has it, is unmerged, as in training. Weights and token ids are random,
shapes are real. Slots are read as embeddings, as many as ten documents of 128 tokens become at 16x. Kinds of weights
alternate, and gains are medians over rounds of the ratio within a round.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig, set_seed

from errors_scaledown import ScaleDownError
from lora_scaledown import LORA_DEFAULTS
from scaledown.benchmark.configurations import load_shape
from scaledown.benchmark.speed import draw_inputs, spread
from scaledown.benchmark.workload import Workload
from scaledown.common.command_line import parse_options, run_command, split_names
from scaledown.common.tables import table
from shortcuts_scaledown import CACHE_NAME

WITH_LORA = " with LoRA"


@dataclass
class PrecisionArguments:
    """What to time."""

    generator: str = field(default="qwen2.5-0.5b", metadata={"help": "As in benchmark.py."})
    kinds: str | None = field(
        default=None, metadata={"help": "Kinds of weights, separated by commas; all by default. Gains are the first's."}
    )
    new_tokens: int = field(default=32, metadata={"help": "Tokens per answer."})
    repeats: int = field(default=3, metadata={"help": "Measurements of each figure, after one warm-up run."})
    threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; torch's choice by default."})
    seed: int = field(default=0, metadata={"help": "Decides weights and ids."})
    output: str | None = field(default=None, metadata={"help": "Where to write the results as JSON."})


def kinds_of_weights(names: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `from_pretrained` by kind of weights; only linear layers are quantized.

    Args:
        names: Kinds to time; all if empty.

    Returns:
        Keyword arguments by kind.

    Raises:
        ValueError: There is no such kind.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    half = {"dtype": torch.bfloat16}
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    kinds = {
        "float32": {"dtype": torch.float32},
        f"float32{WITH_LORA}": {"dtype": torch.float32},
        "bfloat16": half,
        f"bfloat16{WITH_LORA}": half,
        "int8 weights (torchao)": {**half, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
        "int8 weights and activations (torchao)": {
            **half,
            "quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
        },
        "8 bits (bitsandbytes)": {**half, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "4 bits (bitsandbytes)": {**half, "quantization_config": four_bits},
    }
    for name in names:
        if name not in kinds:
            raise ScaleDownError(f"{name!r} is no kind of weights; name some of: {', '.join(kinds)}.")
    return {name: kinds[name] for name in names or kinds}


@torch.inference_mode()
def answer(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the first token and for each later one; the prompt is read as embeddings."""
    started = time.perf_counter()
    read = model.get_input_embeddings()(ids)  # (1, length, hidden)
    output = model(inputs_embeds=read, use_cache=True, logits_to_keep=1)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, use_cache=True, **{CACHE_NAME: output[CACHE_NAME]})
    return first - started, (time.perf_counter() - first) / (new_tokens - 1)


def measure(args: PrecisionArguments) -> list[dict[str, Any]]:
    """Time every kind of weights.

    Args:
        args: What to time.

    Returns:
        A JSON object for each kind and prompt.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    config = load_shape(args.generator)
    models = {}
    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name, settings in kinds_of_weights(split_names(args.kinds)).items():
            models[name] = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
            if name.endswith(WITH_LORA):
                inject_adapter_in_model(LoraConfig(**LORA_DEFAULTS), models[name])
                models[name].eval().to(settings["dtype"])
    reference = next(iter(models))
    inputs = draw_inputs(Workload(), 1, config.vocab_size, False, config.vocab_size, args.seed)
    prompts = {"text": inputs.text, "slots": inputs.truncated}
    runs = {(name, read): [] for read in prompts for name in models}
    for turn in tqdm(range(args.repeats + 1), desc="Rounds", disable=None):
        for (name, read), found in runs.items():
            seconds = answer(models[name], prompts[read], args.new_tokens)
            if turn:  # the first is a warm-up
                found.append(seconds)
    rows = []
    for (name, read), found in runs.items():
        row = {"weights": name, "reads": read, "tokens": prompts[read].shape[1]}
        for place, figure in enumerate(("first_token", "next_token")):
            values = [seconds[place] for seconds in found]
            whole = [seconds[place] for seconds in runs[reference, read]]
            row[figure] = spread(values)
            row[f"{figure}_gain"] = median(a / b for a, b in zip(whole, values, strict=True))
        rows.append(row)
    return rows


def main() -> int:
    """Timing the command; returns its exit status."""

    def command() -> str:
        args = parse_options(PrecisionArguments)
        rows = measure(args)
        if args.output:
            Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        lines = [("weights", "reads", "first token, s", "gain", "each further one, s", "gain")]
        for row in rows:
            cells = [row["weights"], f"{row['reads']}, {row['tokens']} tokens"]
            for figure in ("first_token", "next_token"):
                value = row[figure]
                cells.append(f"{value['median']:.3f} ({value['low']:.3f}–{value['high']:.3f})")
                cells.append(f"{row[f'{figure}_gain']:.2f}×")
            lines.append(cells)
        return table(lines, text_columns=2)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
