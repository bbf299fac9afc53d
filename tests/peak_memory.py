"""Run `train.py`'s own code and print what the process held at the peak of training, beside what it held before.

    python tests/peak_memory.py [recipe.yaml] [--option value ...]

The operating system counts: resident memory before the model is built, and the most of it between the beginning and the
end of training. Freed memory must go back at once to be missed, which the allocator is told by the environment
(`ENVIRONMENT`).
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# glibc otherwise keeps what was freed, and what it keeps would be counted.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident(name: str) -> int:
    """Bytes the kernel counts under a name: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Measure one run."""
    sys.path.insert(0, str(ROOT))
    import peft  # noqa: F401  what training imports later would be counted
    import torch
    import torch._dynamo
    from transformers import TrainerCallback

    from scaledown.training import run as training
    from scaledown.training.arguments import parse_arguments
    from scaledown.training.reader import ReaderTrainer
    from scaledown.training.trainer import ScaleDownTrainer

    class Meter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            forget_peak()

        def on_train_end(self, args, state, control, **kwargs):
            peaks["train"] = resident("VmHWM")

    for kind in (ScaleDownTrainer, ReaderTrainer):
        build = kind.__init__
        kind.__init__ = lambda self, *a, build=build, **k: build(self, *a, **{**k, "callbacks": [Meter()]})
    compress = training.compress

    def measured(*arguments):
        forget_peak()
        metrics = compress(*arguments)
        peaks["compress"] = resident("VmHWM")
        return metrics

    training.compress = measured
    arguments = parse_arguments()
    layer = torch.nn.Linear(1024, 1024)  # the libraries' own work spaces
    layer(torch.ones(256, 1024)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
    del layer
    peaks = {"before": resident("VmRSS")}
    training.run(*arguments)
    print("PEAKS " + json.dumps(peaks))


if __name__ == "__main__":
    main()
