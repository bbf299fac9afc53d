"""A language model judges answers, with the prompt of OSCAR (arXiv 2504.07109), and compares them in pairs.

Judgements are kept in a file per judge, by what was asked: nothing is asked twice, in this run or any other, and a run
that was interrupted asks for the rest.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.prompts import defused
from ..common.reading import RecordError
from ..data.teachers.endpoint import EndpointTeacher
from .data import Example

SYSTEM_PROMPT = "You are an evaluation tool. Answer with one of 1: Correct, 0.5: Partially correct, 0: wrong."
USER_PROMPT = (
    "Here is a question, a golden answer, and an AI-generated answer. Can you judge whether the AI-generated answer is "
    "correct according to the question and golden answer? Simply answer with one of 1: correct, 0.5: partially "
    "correct, 0: wrong. Question: {question}. Golden answer: {answer}. Generated answer: {prediction}."
)
PAIR_SYSTEM_PROMPT = "You are an evaluation tool. Answer with one of A, B or tie."
PAIR_USER_PROMPT = (
    "Here is a question, a golden answer, and two AI-generated answers, A and B. Which of the two answers the question "
    "better, according to the golden answer? Simply answer with one of A, B, or tie where they are equally good or "
    "bad. Question: {question}. Golden answer: {answer}. Answer A: {first}. Answer B: {second}."
)
_NUMBER = r"(?<![\d.,])(0[.,]50?|[01](?:\.0+)?)(?![\d]|[.,]\d)"
# A number is a grade where it begins the reply or ends it, is given a meaning, or is called one.
GRADES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"^\W*{_NUMBER}(?=\W*$|\s*\n|\s*[^\w\s]|\s+\(?(?:correct|partial|incorrect|wrong))",
        rf"{_NUMBER}\W*$",
        rf"{_NUMBER}\W{{0,4}}:",
        rf"\b(?:grade|score|rating|rate|give|judge)\w*\b[^.\d]{{0,20}}{_NUMBER}",
    )
)
# In this order, since one holds the next: what was found is taken out.
GRADE_WORDS = (
    (re.compile(r"\bpartial(?:ly)?\b(?:\W+correct\b)?", re.IGNORECASE), 0.5),
    (re.compile(r"(?:\bnot|n't)\s+(?:\w+\s+)?correct\b|(?<!not )(?<!n't )\b(?:incorrect|wrong)\b", re.IGNORECASE), 0.0),
    (re.compile(r"\bcorrect\b(?!\s+(?:\w+\s+)?answer\b)", re.IGNORECASE), 1.0),
)
CHOICE = re.compile(r"\b[AB]\b(?! tie\b)")
TIE = re.compile(r"\b(?:tie|equal|equally)\b", re.IGNORECASE)
# Gold answers of a question that are all right, as the prompt has room for one.
BETWEEN_ANSWERS = " / "


class Judge(EndpointTeacher):
    """An endpoint that judges in place of answering; see `EndpointTeacher` for how it is asked."""

    option = "--judge"
    doing = "Judging"

    def messages(self, record: dict[str, Any]) -> list[dict[str, str]]:
        """See `EndpointTeacher.messages`."""
        return record["messages"]


class JudgementCache:
    """What judges said, by what they were asked; stands in for a `Journal` of requests.

    What a judge refused is known to this run only: the next one asks again.

    Args:
        path: The file; created where it is missing. A half-written last line is dropped.
        keys: What this run asks for.

    Raises:
        RecordError: A line other than the last is damaged.
    """

    def __init__(self, path: Path, keys: Sequence[str]):
        self.path = path
        self._keys = list(keys)
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(path, len(whole))
            for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
                try:
                    entry = json.loads(line)
                    self._values[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RecordError(
                        f"{path}, line {number}: found a damaged line, expected one JSON object with key and value. "
                        "Delete the line to have the judge asked again."
                    ) from error

    def __len__(self) -> int:
        return sum(key in self._values for key in self._keys)

    def __contains__(self, index: int) -> bool:
        return self._keys[index] in self._values

    def __getitem__(self, index: int) -> Any:
        return self._values[self._keys[index]]

    def append(self, results: Iterable[tuple[int, Any]], sync: bool = True) -> None:
        """See `Journal.append`."""
        new = {self._keys[index]: value for index, value in results if index not in self}
        said = {key: value for key, value in new.items() if "answer" in value}
        lines = [json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n" for key, value in said.items()]
        with open(self.path, "ab") as stream:
            stream.write("".join(lines).encode("utf-8"))
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        self._values.update(new)

    def sync(self) -> None:
        """See `Journal.sync`."""
        with open(self.path, "ab") as stream:
            os.fsync(stream.fileno())

    def missing(self, count: int) -> Iterator[int]:
        """See `Journal.missing`."""
        return (index for index in range(count) if index not in self)


def grade_answers(judge: Judge, folder: Path, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
    """Have answers judged against the gold answers.

    Args:
        judge: Judges.
        folder: Where judgements are kept.
        examples: The questions.
        texts: One answer each.

    Returns:
        1, 0.5 or 0 for each; NaN where the judge refused or said something else. An empty answer is 0 unasked.

    Raises:
        TeacherError: Judgements are missing; those there are are kept.
    """
    asked = [
        _messages(SYSTEM_PROMPT, USER_PROMPT, question=e.query, answer=_gold(e), prediction=text)
        for e, text in zip(examples, texts, strict=True)
        if text.strip()
    ]
    replies = iter(_ask(judge, folder, asked))
    return [_grade(next(replies)) if text.strip() else 0.0 for text in texts]


def compare_answers(
    judge: Judge, folder: Path, examples: Sequence[Example], texts: Sequence[str], others: Sequence[str]
) -> list[float]:
    """Have answers compared with other ones, each pair in both orders, since judges favour a place.

    Args:
        judge: Judges.
        folder: Where judgements are kept.
        examples: The questions.
        texts: One answer each.
        others: Another answer each.

    Returns:
        1 where the first answer wins in both orders, 0 where the other does, values between where the orders disagree
        or it is a tie; NaN where the judge said neither in one of them. Equal answers are 0.5 unasked.

    Raises:
        TeacherError: Judgements are missing; those there are are kept.
    """
    pairs = [(e, a or "-", b or "-") for e, a, b in zip(examples, texts, others, strict=True) if a != b]
    asked = [
        _messages(PAIR_SYSTEM_PROMPT, PAIR_USER_PROMPT, question=e.query, answer=_gold(e), first=first, second=second)
        for e, a, b in pairs
        for first, second in ((a, b), (b, a))
    ]
    replies = _ask(judge, folder, asked)
    results = iter(
        (_choice(forward) + 1 - _choice(backward)) / 2
        for forward, backward in zip(replies[::2], replies[1::2], strict=True)
    )
    return [next(results) if a != b else 0.5 for a, b in zip(texts, others, strict=True)]


def agreement(grades: Sequence[float], exact: Sequence[float]) -> dict[str, Any]:
    """Compare a judge with exact match.

    Args:
        grades: The judge's, NaN where it gave none.
        exact: Exact match of the same answers.

    Returns:
        `num_judged`, `num_unjudged`, how often each grade goes with each value of exact match (`counts`), and with a
        grade of 1 taken as right, the share of answers on which both say the same (`agreement`) and Cohen's `kappa`.
    """
    pairs = [(grade, float(match)) for grade, match in zip(grades, exact, strict=True) if not math.isnan(grade)]
    counts = {
        f"judge {grade:g}, exact match {match:g}": pairs.count((grade, match))
        for grade in (1.0, 0.5, 0.0)
        for match in (1.0, 0.0)
    }
    result = {"num_judged": len(pairs), "num_unjudged": len(grades) - len(pairs), "counts": counts}
    if not pairs:
        return {**result, "agreement": None, "kappa": None}
    right = [(grade == 1.0, match == 1.0) for grade, match in pairs]
    observed = sum(a == b for a, b in right) / len(right)
    judged, matched = (sum(pair[i] for pair in right) / len(right) for i in (0, 1))
    expected = judged * matched + (1 - judged) * (1 - matched)
    kappa = None if expected == 1 else (observed - expected) / (1 - expected)
    return {**result, "agreement": observed, "kappa": kappa}


def _ask(judge: Judge, folder: Path, messages: list[list[dict[str, str]]]) -> list[str | None]:
    """Replies to all requests, equal ones asked once; None where the judge refused."""
    keys = [hashlib.sha256(json.dumps(asked).encode("utf-8")).hexdigest() for asked in messages]
    unique = dict(zip(keys, messages, strict=True))
    identity = json.dumps([judge.model, judge.request, judge.max_tokens], sort_keys=True)
    name = "".join(letter if letter.isalnum() else "_" for letter in judge.model)
    path = folder / f"{name}-{hashlib.sha256(identity.encode('utf-8')).hexdigest()[:12]}.jsonl"
    cache = JudgementCache(path, list(unique))
    records = [{"messages": asked} for asked in unique.values()]
    if len(cache) < len(records):
        judge.answer(lambda index: records[index], len(records), cache)
    replies = {key: cache[index].get("answer") for index, key in enumerate(unique)}
    return [replies[key] for key in keys]


def _messages(system: str, user: str, **parts: str) -> list[dict[str, str]]:
    # One pass: an answer that spells "{question}" gets none.
    text = re.sub(r"\{(\w+)\}", lambda match: defused(parts[match.group(1)]), user)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _gold(example: Example) -> str:
    return BETWEEN_ANSWERS.join(dict.fromkeys(example.gold))


def _grade(reply: str | None) -> float:
    """The grade a reply gives, by its number, or without one by its words."""
    if reply is None:
        return math.nan
    found = {float(number.replace(",", ".")) for pattern in GRADES for number in pattern.findall(reply)}
    if not found:
        for word, grade in GRADE_WORDS:
            reply, count = word.subn("", reply)
            if count:
                found.add(grade)
    return found.pop() if len(found) == 1 else math.nan  # a reply that says several things has not decided


def _choice(reply: str | None) -> float:
    """1 for A, 0 for B, 0.5 for a tie."""
    reply = "" if reply is None else reply.strip()
    word = reply.strip(".:*()\"' ").upper()
    if word in ("A", "B"):
        return float(word == "A")
    found = CHOICE.findall(reply)
    if TIE.search(reply) and not found:
        return 0.5
    return float(found[-1] == "A") if len(set(found)) == 1 else math.nan
