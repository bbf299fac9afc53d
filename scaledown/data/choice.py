"""Which documents a question gets: its own, some of its source's passages, or passages retrieved from a corpus.

A chooser turns questions into `{"record": record, "positives_retrieved": int?, "unmatched": bool?}`. A question gets
the same documents whichever other questions are selected.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Protocol

import datasets

from .indexes.index import Index
from .questions import Question

# Passages retrieved beyond those wanted, since some repeat a gold passage or one another.
SPARE = 10
# How many times as many are retrieved where copies left too few.
MORE = 4


class Chooser(Protocol):
    """Chooses documents for a block of questions."""

    # Questions that are best given at once.
    block_size: int

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Choose documents.

        Args:
            questions: Questions.

        Returns:
            For each `record`, `positives_retrieved` where that means something, and `unmatched` where the corpus had
            no answer to the search.
        """


class OwnDocuments:
    """Leaves the records as they are, with their scores and gold answers."""

    block_size = 256

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """See `Chooser.__call__`."""
        return [{"record": {key: v for key, v in q.record.items() if v is not None}} for q in questions]


class NoDocuments:
    """Questions alone, to be answered by heart."""

    block_size = 256

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """See `Chooser.__call__`."""
        return [{"record": _record(question, [])} for question in questions]


class PoolDocuments:
    """Gold passages and distractors from the source's own passages, in shuffled order.

    Passages the question itself brings come before those of the pool.

    Args:
        passages: The pool.
        num_documents: Documents per question.
        distractors: `bm25` (the nearest) or `random`.
        seed: Decides random distractors and the order.
    """

    block_size = 64

    def __init__(self, passages: list[str], num_documents: int, distractors: str, seed: int):
        self._passages = passages
        self._num_documents = num_documents
        self._seed = seed
        self._index = {passage: index for index, passage in enumerate(passages)}
        self._retriever = None
        if distractors == "bm25":
            from .indexes.pool import BM25Retriever  # needs bm25s, which random distractors and own documents do not

            self._retriever = BM25Retriever(passages)

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """See `Chooser.__call__`."""
        return [{"record": self._choose(question)} for question in questions]

    def _choose(self, question: Question) -> dict[str, Any]:
        generator = random.Random(stable_hash(self._seed, "documents", question.id))
        positives = [self._index[passage] for passage in question.positives or ()]
        candidates = [self._index[passage] for passage in question.candidates]
        own = [index for index in candidates if index not in positives]
        num_wanted = self._num_documents - len(positives)
        if self._retriever is not None:
            distractors = self._bm25_distractors(question.query, num_wanted, positives, own)
        else:
            distractors = self._random_distractors(generator, num_wanted, positives, own)
        # Shuffled, so that the position says nothing about the relevance.
        chosen = _shuffled(positives + distractors, generator)
        return _record(question, [self._passages[index] for index in chosen])

    def _bm25_distractors(self, query: str, num_wanted: int, positives: list[int], own: list[int]) -> list[int]:
        """The best of the question's own passages, then of the pool."""
        distractors = self._retriever.rank(query, own)[:num_wanted] if own else []
        num_missing = num_wanted - len(distractors)
        if num_missing:
            distractors += self._retriever.retrieve(query, num_missing, exclude=positives + own)
        return distractors

    def _random_distractors(
        self, generator: random.Random, num_wanted: int, positives: list[int], own: list[int]
    ) -> list[int]:
        """A random choice of the question's own passages, then of the pool."""
        distractors = _shuffled(own, generator)[:num_wanted]
        taken = {*positives, *distractors}
        while len(distractors) < num_wanted:
            index = int(generator.random() * len(self._passages))
            if index not in taken:
                taken.add(index)
                distractors.append(index)
        return distractors


class CorpusDocuments:
    """The passages of a corpus that a retriever finds, and the gold passages where the source names them.

    Args:
        passages: The corpus, with the column `text`.
        index: Searches it.
        top_k: Documents per question, gold ones included.
        order: `best_first`, `shuffled`, or `auto`: best first, but shuffled where gold passages are known, since a
            gold passage that was not retrieved has no rank, and any fixed place for it would give it away.
        seed: Decides the shuffled order.
    """

    def __init__(self, passages: datasets.Dataset, index: Index, top_k: int, order: str, seed: int):
        self.block_size = index.queries_per_block
        self._passages = passages
        self._index = index
        self._top_k = top_k
        self._order = order
        self._seed = seed

    def __call__(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """See `Chooser.__call__`."""
        found = self._find([question.query for question in questions], self._top_k + SPARE)
        return [self._choose(question, ranked) for question, ranked in zip(questions, found, strict=True)]

    def _find(self, queries: Sequence[str], k: int) -> list[dict[str, str]]:
        """Distinct passages by their words, best first: at least `top_k`, or all of the corpus."""
        found = [self._distinct(hits) for hits in self._index.search(queries, k)]
        few = [place for place, ranked in enumerate(found) if len(ranked) < self._top_k]
        if few and k < len(self._passages):
            again = self._find([queries[place] for place in few], k * MORE)
            for place, ranked in zip(few, again, strict=True):
                found[place] = ranked
        return found

    def _distinct(self, hits: Sequence[int]) -> dict[str, str]:
        ranked: dict[str, str] = {}
        for text in self._passages[[int(index) for index in hits]]["text"]:
            ranked.setdefault(_words(text), text)
        return ranked

    def _choose(self, question: Question, ranked: dict[str, str]) -> dict[str, Any]:
        positives = {_words(passage): passage for passage in question.positives or ()}
        wanted = self._top_k - len(positives)
        others = [words for words in ranked if words not in positives][:wanted]
        retrieved = [words for words in list(ranked)[: self._top_k] if words in positives]
        # Ranked as they were found, gold passages that were not found last.
        chosen = [words for words in ranked if words in positives or words in set(others)]
        chosen += [words for words in positives if words not in ranked]
        if self._order == "shuffled" or (self._order == "auto" and positives):
            generator = random.Random(stable_hash(self._seed, "documents", question.id))
            chosen = _shuffled(chosen, generator)
        record = _record(question, [positives.get(words) or ranked[words] for words in chosen])
        chosen_record = {"record": record}
        if positives:
            chosen_record["positives_retrieved"] = len(retrieved)
        if not self._index.matches(question.query):
            chosen_record["unmatched"] = True
        return chosen_record


def stable_hash(seed: int, purpose: str, identifier: str) -> int:
    """A number that is the same in every process, unlike Python's own hash of a string.

    Args:
        seed: The user's seed.
        purpose: What it is for, so that two uses are independent.
        identifier: The question's id.

    Returns:
        A number below 2**64.
    """
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{identifier}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def sample(questions: list[Question], num_examples: int | None, seed: int) -> list[Question]:
    """Sample by the hash of seed and id, in the source's order: a smaller sample is part of every larger one.

    Args:
        questions: All questions.
        num_examples: How many to take; None takes all.
        seed: The user's seed.

    Returns:
        The sample.
    """
    if num_examples is None:
        return questions
    order = sorted(range(len(questions)), key=lambda index: stable_hash(seed, "sample", questions[index].id))
    return [questions[index] for index in sorted(order[:num_examples])]


def keep_best(record: dict[str, Any], num_documents: int) -> dict[str, Any]:
    """Keep the documents with the highest scores, and the gold ones, in their order.

    Args:
        record: A record with `reranking_scores`.
        num_documents: Documents to keep; more only where there are more gold ones.

    Returns:
        A record with these documents, scores and positives.
    """
    scores = record["reranking_scores"]
    gold = record.get("positives") or []
    ranked = sorted((index for index in range(len(scores)) if index not in gold), key=lambda index: -scores[index])
    kept = sorted([*gold, *ranked[: max(num_documents - len(gold), 0)]])
    cut = {
        **record,
        "documents": [record["documents"][index] for index in kept],
        "reranking_scores": [scores[index] for index in kept],
    }
    if record.get("positives") is not None:
        cut["positives"] = [kept.index(index) for index in gold]
    return cut


def _record(question: Question, documents: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"id": question.id, "query": question.query, "documents": documents}
    if question.answers:
        record["answer"] = question.answers
    if question.record is not None and question.record.get("gold_answers") is not None:
        record["gold_answers"] = question.record["gold_answers"]
    if question.positives is not None:
        gold = {_words(passage) for passage in question.positives}
        record["positives"] = [place for place, text in enumerate(documents) if _words(text) in gold]
    return record


def _words(text: str) -> str:
    # Copies that differ only in white space are one passage.
    return " ".join(text.split())


def _shuffled(items: Sequence[Any], generator: random.Random) -> list[Any]:
    # Python promises the same numbers in every version for random() alone, not for shuffle() or sample().
    keys = [generator.random() for _ in items]
    return [item for _, item in sorted(zip(keys, items, strict=True))]
