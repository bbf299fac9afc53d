"""One question at a time on a CPU: `answer` as loaded and with LoRA merged, beside the same generator reading text.

    python experiments/cpu_batch1.py --repeats 5

The embedded model, questions of its test split with five passages. Prints milliseconds per question, the median over
rounds of a mean over all questions, with the smallest and the largest.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from modeling_scaledown import ScaleDownModel
from scaledown.evaluation.systems import CompressedSystem, TextSystem
from scaledown.tools.demo import DemoArguments, draw_examples

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 8


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    examples = draw_examples(DemoArguments(num_questions=options.questions, num_documents=options.passages))
    loaded = ScaleDownModel.from_pretrained(ROOT)
    merged = ScaleDownModel.from_pretrained(ROOT).optimize_for_inference()
    rest = merged.processor, merged.generation_config, None, NEW_TOKENS
    systems = {
        "slots": CompressedSystem(loaded, None, NEW_TOKENS),
        "slots, LoRA merged": CompressedSystem(merged, None, NEW_TOKENS),
        "text, LoRA merged": TextSystem("full_text", merged.generator, *rest),
    }
    times = {name: [] for name in systems}
    for _ in range(options.repeats + 1):
        for name, system in systems.items():
            started = time.perf_counter()
            for example in examples:
                system.answer([example])
            times[name].append(1000 * (time.perf_counter() - started) / len(examples))
    for name, (_, *found) in times.items():
        print(f"{name:<20} {statistics.median(found):6.1f} ms ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
