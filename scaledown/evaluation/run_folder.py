"""A run of an evaluation, in memory and as a folder.

<output_dir>/predictions.jsonl     one question per line: each system's answer, its metrics and what it took
<output_dir>/metrics.json          figures with intervals, settings, versions, commit, hardware
<output_dir>/report.md             the same for people, with plots beside it
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors_scaledown import ScaleDownError

from .data import Example
from .plots import plot_answers
from .report import write_report
from .results import Measurements

METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.jsonl"
# What reports read of metrics.json.
REQUIRED = ("model", "data", "systems", "against_full_text", "reranking", "groups", "settings", "hardware")
# What a line has besides the fields of the question's record.
ROW_KEYS = ("id", "query", "gold_answers", "num_documents", "positives", "reranking_scores", "systems")


@dataclass
class EvaluationRun:
    """What was asked, answered and measured.

    Args:
        examples: The questions.
        texts: Each system's answers.
        scores: The model's score of each document of each question; None where it does not rank.
        columns: Each system's values per question.
        metrics: What metrics.json holds.
        num_documents: Documents of each question.
        kept_in: Folder of the answers as they came, which is of no use once the run is written.
    """

    examples: list[Example]
    texts: dict[str, list[str]]
    scores: list[list[float] | None]
    columns: Measurements
    metrics: dict[str, Any]
    num_documents: list[int]
    kept_in: Path | None = None

    def write(self, folder: Path) -> None:
        """Write the folder; what an earlier call wrote is replaced.

        Args:
            folder: An existing folder.
        """
        # A record's own fields may hold what JSON or UTF-8 cannot, such as a date or half a surrogate pair.
        rows = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in self._rows())
        (folder / PREDICTIONS_NAME).write_bytes(rows.encode("utf-8", errors="backslashreplace"))
        text = json.dumps(self.metrics, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / METRICS_NAME).write_text(text + "\n", encoding="utf-8")
        write_report(folder, self.metrics, plot_answers(folder, self.metrics))

    @classmethod
    def read(cls, folder: str | Path) -> "EvaluationRun":
        """Read a folder.

        Args:
            folder: That of an earlier run.

        Returns:
            The run, without its documents.

        Raises:
            ValueError: It is no folder of a run, or of one that was not finished.
        """
        metrics = read_metrics(folder)
        rows = _read_rows(Path(folder) / PREDICTIONS_NAME, metrics["data"]["num_asked"])
        examples = [
            Example(
                id=row["id"],
                query=row["query"],
                documents=[],
                gold=row["gold_answers"],
                positives=row["positives"],
                fields={name: value for name, value in row.items() if name not in ROW_KEYS},
                index=index,
            )
            for index, row in enumerate(rows)
        ]
        systems = list(rows[0]["systems"])
        texts = {system: [row["systems"][system]["prediction"] for row in rows] for system in systems}
        names = {system: [name for name in rows[0]["systems"][system] if name != "prediction"] for system in systems}
        columns = {
            system: {name: [_number(row["systems"][system][name]) for row in rows] for name in names[system]}
            for system in systems
        }
        scores = [row["reranking_scores"] for row in rows]
        return cls(examples, texts, scores, columns, metrics, [row["num_documents"] for row in rows])

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for place, example in enumerate(self.examples):
            row: dict[str, Any] = {"id": example.id, "query": example.query, "gold_answers": example.gold}
            row |= {"num_documents": self.num_documents[place], "positives": example.positives}
            row |= {name: value for name, value in example.fields.items() if name not in ROW_KEYS}
            row |= {"reranking_scores": self.scores[place], "systems": {}}
            for system, values in self.columns.items():
                figures = {name: _json_number(column[place]) for name, column in values.items()}
                row["systems"][system] = {"prediction": self.texts[system][place], **figures}
            rows.append(row)
        return rows


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """Read metrics.json of a folder.

    Args:
        folder: That of an earlier run.

    Returns:
        What it holds.

    Raises:
        ValueError: It is no folder of a run, or of one that was not finished.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise ScaleDownError(
            f"{folder} has no {METRICS_NAME}, which evaluate.py writes last; name the folder of a finished run."
        )
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScaleDownError(f"{path} is no JSON ({error}); name the output folder of a finished run.") from error
    missing = [name for name in REQUIRED if not isinstance(metrics, dict) or name not in metrics]
    if missing:
        raise ScaleDownError(
            f"{path} was not written by evaluate.py: it has no {', '.join(missing)}; name the output folder of a run."
        )
    return metrics


def _read_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, as many as questions were asked."""
    if not path.is_file():
        raise ScaleDownError(f"{path} is missing, which has the answers to judge; name the whole folder of a run.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise ScaleDownError(f"{path} is damaged ({error}); copy it again, or evaluate the model again.") from error
    if len(rows) != count:
        raise ScaleDownError(
            f"{path} has {len(rows)} lines where {count} questions were asked; copy it again, or evaluate the model "
            "again."
        )
    return rows


def _json_number(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
