"""Measure what compression saves: operations, time and memory, beside the same generator on whole documents.

    python benchmark.py --mode flops
    python benchmark.py --mode speed --generator qwen2.5-0.5b --compressors 5,minilm-l6 --sweep batch_size=1,8
    python benchmark.py --mode scaling --generator qwen2.5-0.5b --compressors 5
    python benchmark.py --mode train --generator qwen2.5-0.5b --compressors 5
    python benchmark.py --mode serving --generator GENERATOR --text_url URL --service_url URL

Models have random weights in the shapes of published ones; mode serving asks servers that run already.
docs/performance.md and docs/serving.md explain what is measured, and `python benchmark.py --help` lists every option.
"""

import sys

if __name__ == "__main__":
    from scaledown.commands import benchmark

    sys.exit(benchmark())
