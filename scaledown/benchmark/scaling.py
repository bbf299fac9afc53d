"""How operations grow with the number and the length of documents, and the exponents that follow."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..common.tables import table
from ..common.tracing import build_on_meta
from .arguments import BenchmarkArguments
from .configurations import build_config, label
from .flops import TERA, Flops, count_compression, count_generation

DOCUMENTS = (1, 2, 5, 10, 20, 50, 100, 200)
LENGTHS = (32, 64, 128, 256, 512, 1024)
FULL_TEXT = "full text"


def count_scaling(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Count operations at 1 to 200 documents, and at documents of 32 to 1,024 tokens.

    Args:
        arguments: The models, and the workload everything else is taken from.

    Returns:
        A JSON object for each setting and contestant.

    Raises:
        ValueError: There is no such model, or it cannot read as much.
    """
    base = arguments.workload
    workloads = [("num_documents", replace(base, num_documents=count)) for count in DOCUMENTS]
    workloads += [("document_length", replace(base, document_length=length)) for length in LENGTHS]
    rows = []
    for place, name in enumerate(arguments.compressor_names):
        config = build_config(arguments.generator, name, base.chunk_length, base.query_length, base.compression_rate)
        model = build_on_meta(config).to(torch.bfloat16).eval()
        for swept, workload in workloads:
            setting = {
                "swept": swept,
                "num_documents": workload.num_documents,
                "document_length": workload.document_length,
            }
            if place == 0:
                length = workload.frame_length + workload.num_documents * workload.document_length
                text = count_generation(model.generator, length, workload.new_tokens)
                rows.append({**setting, "contestant": FULL_TEXT, **_parts(text, Flops())})
            generation = count_generation(model.generator, workload.frame_length + workload.slots, workload.new_tokens)
            parts = _parts(generation, count_compression(model, workload))
            rows.append({**setting, "contestant": name, **parts})
    return rows


def fit_exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit `TFLOP ~ size ** exponent` to the upper half of each sweep, where what does not grow matters little.

    Args:
        rows: What `count_scaling` returned.

    Returns:
        A JSON object for each sweep and contestant: the exponent, and the TFLOP at both ends.
    """
    found = []
    for swept, contestant in dict.fromkeys((row["swept"], row["contestant"]) for row in rows):
        own = [row for row in rows if (row["swept"], row["contestant"]) == (swept, contestant)]
        own.sort(key=lambda row: row[swept])
        upper = own[len(own) // 2 :]
        slope, _ = np.polyfit(np.log([row[swept] for row in upper]), np.log([row["tflop"] for row in upper]), 1)
        ends = {"smallest": own[0][swept], "largest": own[-1][swept]}
        costs = {"cost_smallest": own[0]["tflop"], "cost_largest": own[-1]["tflop"]}
        found.append({"swept": swept, "contestant": contestant, "exponent": float(slope), **ends, **costs})
    return found


def render_exponents(found: list[dict[str, Any]]) -> str:
    """Write exponents as a table in Markdown.

    Args:
        found: What `fit_exponents` returned.

    Returns:
        The table.
    """
    lines = [("against", "reads", "exponent", "TFLOP at the smallest", "TFLOP at the largest", "times fewer there")]
    for row in found:
        text = next(r for r in found if r["swept"] == row["swept"] and r["contestant"] == FULL_TEXT)
        costs = [f"{row[f'cost_{end}']:.3f} ({row[end]})" for end in ("smallest", "largest")]
        fewer = f"{text['cost_largest'] / row['cost_largest']:.2f}"
        name = label(row["contestant"])
        lines.append((row["swept"].replace("_", " "), name, f"{row['exponent']:.2f}", *costs, fewer))
    return table(lines, text_columns=2)


def _parts(generation: Flops, compression: Flops) -> dict[str, float]:
    parts = {"generation": generation.total / TERA, "compression": compression.total / TERA}
    return {**parts, "tflop": sum(parts.values())}
