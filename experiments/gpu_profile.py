"""Which kernels a GPU spends its time on: compression, and the generator's reading and writing, 32 questions at a time.

python experiments/gpu_profile.py --generator mistral-7b --compressor 5 --output runs/profile.txt
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scaledown.benchmark.arguments import BenchmarkArguments
from scaledown.benchmark.speed import TimedModels, draw_inputs
from scaledown.common.devices import wait_for


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", required=True)
    parser.add_argument("--compressor", default="5")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    arguments = BenchmarkArguments(
        mode="speed",
        generator=options.generator,
        compressors=options.compressor,
        batch_size=options.batch_size,
        new_tokens=options.new_tokens,
    )
    contestants = TimedModels(arguments)
    model, device = contestants.models[options.compressor], contestants.device
    sizes = (model.config.generator_config.vocab_size, False, model.config.compressor_config.vocab_size, 0)
    inputs = draw_inputs(arguments.workload, options.batch_size, *sizes)
    prompt = {
        "input_ids": inputs.truncated.to(device),
        "attention_mask": torch.ones_like(inputs.truncated, device=device),
        "slot_mask": inputs.slot_mask.to(device),
    }

    def answer() -> None:
        with record_function("compression"):
            found = model.get_memory_embeddings(**inputs.chunks, batch_size=model.chunks_per_pass)
        memory = {"memory_embeddings": found.memory_embeddings, "memory_mask": found.memory_mask}
        with record_function("generation"):
            model.generate(**prompt, **memory, max_new_tokens=options.new_tokens)
        wait_for(device)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    sort_by = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    with torch.inference_mode():
        answer()
        with profile(activities=activities) as measured:
            answer()
    events = measured.key_averages()
    tables = [events.table(sort_by=order, row_limit=25) for order in dict.fromkeys((sort_by, "cpu_time_total"))]
    synchronizations = [event for event in events if "Synchronize" in event.key or event.key == "aten::item"]
    counts = "\n".join(f"{event.key}: {event.count} calls" for event in synchronizations)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n\n".join([*tables, counts]) + "\n", encoding="utf-8")
    print(tables[0])
    print(counts)


if __name__ == "__main__":
    main()
