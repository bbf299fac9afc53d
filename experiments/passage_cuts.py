"""Records with fewer passages, and without passages that are too long."""

import random


def num_tokens(text: str) -> float:
    """About how many tokens a text has: one for four letters, one for each digit."""
    return (len(text) + 3 * sum(map(str.isdigit, text))) / 4


def without_long_distractors(record: dict, longest: int) -> dict | None:
    """A record without the distractors that are too long; None where a gold passage is."""
    kept = [i for i, text in enumerate(record["documents"]) if num_tokens(text) <= longest]
    gold = record.get("positives") or []
    return cut(record, kept) if kept and set(gold) <= set(kept) else None


def shortened(record: dict, count: int, generator: random.Random) -> dict:
    """A record cut to a number of passages, gold ones kept first, in their order."""
    gold = record.get("positives") or []
    others = [i for i in range(len(record["documents"])) if i not in gold]
    generator.shuffle(others)
    return cut(record, sorted([*gold, *others[: max(count - len(gold), 0)]]))


def cut(record: dict, kept: list[int]) -> dict:
    """A record with some of its passages."""
    columns = {name: [record[name][i] for i in kept] for name in ("documents", "reranking_scores")}
    return {**record, **columns, "positives": [kept.index(i) for i in record.get("positives") or []]}
