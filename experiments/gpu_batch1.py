"""One question at a time on a GPU: compression with and without compiled layers and shared questions, and reading.

python experiments/gpu_batch1.py --generator mistral-7b --compressors 5,8,llama-3.2-1b,modernbert-base

Prints median milliseconds. Where a pass takes as long as launching its kernels, fewer kernels are what helps.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import compressor_scaledown
from scaledown.benchmark.arguments import BenchmarkArguments
from scaledown.benchmark.speed import TimedModels, draw_inputs
from scaledown.common.devices import wait_for


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a function, after three calls that do not count."""
    times = []
    for i in range(repeats + 3):
        wait_for(device)
        started = time.perf_counter()
        with torch.inference_mode():
            run()
        wait_for(device)
        if i >= 3:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def layers_of(backbone: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a decoder or an encoder."""
    return list(backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", required=True)
    parser.add_argument("--compressors", required=True)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    arguments = BenchmarkArguments(mode="speed", generator=options.generator, compressors=options.compressors)
    contestants = TimedModels(arguments)
    device = contestants.device
    for name, model in contestants.models.items():
        vocab = model.config.compressor_config.vocab_size
        inputs = draw_inputs(arguments.workload, options.batch_size, 32000, False, vocab, 0)

        def compress(model=model, inputs=inputs) -> object:
            return model.get_memory_embeddings(**inputs.chunks, batch_size=model.chunks_per_pass)

        row = {}
        for compiled in (False, True):
            if compiled:
                for layer in layers_of(model.compressor.backbone)[: -1 if model.compressor.prunes_last_layer else None]:
                    layer.compile(dynamic=True)
            for least in (0, 1e30):
                compressor_scaledown.MIN_SPARED_OPERATIONS_ELSEWHERE = least
                compressor_scaledown.MIN_SPARED_OPERATIONS = {"cpu": least}
                if least == 0 and not model.compressor.shares_prefixes:
                    continue
                started = time.perf_counter()
                found = median_ms(compress, device, options.repeats)
                row[f"{'compiled' if compiled else 'plain'}, {'shared' if least == 0 else 'apart'}"] = round(found, 2)
                print(name, row, f"after {time.perf_counter() - started:.0f} s", flush=True)
    ids = {"text": inputs.text.to(device), "slots": inputs.truncated.to(device)}
    for name, read in ids.items():
        print(name, round(median_ms(lambda read=read: contestants.generator.model(read), device, options.repeats), 2))


if __name__ == "__main__":
    main()
