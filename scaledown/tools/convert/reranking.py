"""The reranking head of a published checkpoint: its layout is not known, so it is read by shape, or asked for."""

from dataclasses import dataclass

import torch

from errors_scaledown import ScaleDownError

from .source import Source

ASK = "Say which: --reranking NAME --reranking_row ROW, or --reranking none to leave them out."


@dataclass
class Reranking:
    """A head that scores documents.

    Args:
        weight: `(1, hidden)`.
        bias: `(1,)`.
        embedding: Of the token whose state it reads, `(hidden,)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    embedding: torch.Tensor


def find_reranking(
    source: Source, table: torch.Tensor, explained: int, name: str | None, row: int | None
) -> Reranking | None:
    """Find the head among the tensors that have no place elsewhere, and its token among the compressor's rows.

    Args:
        source: What is left of a checkpoint once everything else was taken out.
        table: The compressor's embeddings.
        explained: Rows of known and memory tokens.
        name: Name of the head's weight; `"none"` to leave all of it out.
        row: Row of its token.

    Returns:
        The head; None where nothing is left, or none is wanted.

    Raises:
        ScaleDownError: What is left can be read in more than one way, or in none.
    """
    left, extra = source.tensors, list(range(explained, table.shape[0]))
    if name == "none" or (name is None and not left and not extra):
        return None
    listed = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in left.items()) or "no tensors"
    rows = f"{len(extra)} rows of its compressor's embeddings beyond those of memory tokens"
    seen = f"{source.name} has {listed} and {rows}, of which the layout says nothing."
    hidden = table.shape[1]
    weights = [key for key, tensor in left.items() if tuple(tensor.shape) == (1, hidden)]
    if name is not None:
        weights = [key for key in left if name in (key, key.partition(":")[2])]
        if len(weights) != 1 or tuple(left[weights[0]].shape) != (1, hidden):
            raise ScaleDownError(f"--reranking {name} is none of the tensors of shape (1, {hidden}). {seen}")
    if row is not None:
        if row >= table.shape[0]:
            raise ScaleDownError(f"--reranking_row {row} is none of {table.shape[0]} rows. {seen}")
        extra = [row]
    biases = [key for key, tensor in left.items() if tuple(tensor.shape) == (1,)]
    others = [key for key in left if key not in (*weights, *biases)]
    if len(weights) != 1 or len(biases) > 1 or len(extra) != 1 or (others and name is None):
        raise ScaleDownError(f"{seen} They may be a reranking head and its token. {ASK}")
    weight = left.pop(weights[0])
    bias = left.pop(biases[0]) if biases else torch.zeros(1, dtype=weight.dtype)
    return Reranking(weight, bias, table[extra[0]])
