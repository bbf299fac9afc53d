"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(rows: Iterable[Sequence[Any]], text_columns: int | None = None) -> str:
    """Lay out a table.

    Args:
        rows: Cells, the header first; what would end a cell is escaped.
        text_columns: Columns aligned to the left, the rest to the right; all by default.

    Returns:
        Markdown.
    """
    head, *body = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    left = len(head) if text_columns is None else text_columns
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
