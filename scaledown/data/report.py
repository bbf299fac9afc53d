"""The report of a preparation: its versions, and its results as a table."""

import importlib.metadata
import platform
from typing import Any

from .arguments import PreparationArguments


def format_report(report: dict[str, Any]) -> str:
    """Render a report of `prepare` as a small table.

    Args:
        report: What `prepare` returned.

    Returns:
        Lines of a name and a value each.
    """
    rows = [(name, report[name]) for name in ("source", "format", "config", "split") if name in report]
    rows = [(n, value) for n, value in [*rows, *report["settings"].items()] if value is not None and value is not False]
    if report.get("columns"):
        rows.append(("columns", "; ".join(f"{meaning}: {names}" for meaning, names in report["columns"].items())))
    rows += report["counts"].items()
    for reason, dropped in report.get("dropped", {}).items():
        examples = ", ".join(dropped["examples"])
        rows.append((f"dropped: {reason}", f"{dropped['count']}  (such as {examples})"))
    rows += report.get("estimate", {}).items()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def library_versions(arguments: PreparationArguments) -> dict[str, str]:
    """Versions of Python and of the libraries of the steps that were taken."""
    names = ["bm25s", "PyStemmer", "numpy", "datasets"]
    if arguments.reranker is not None or (arguments.corpus is not None and arguments.retriever != "bm25"):
        names += ["sentence-transformers"]
    if arguments.teacher_url is not None:
        names += ["openai"]
    if len(names) > 4 or arguments.teacher is not None:
        names += ["torch", "transformers"]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in dict.fromkeys(names)},
    }
