"""What is counted of records while they are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.metrics import normalize_answer


class AnswerMatcher:
    """Tells whether a text holds an answer as whole words, after the normalization of SQuAD's evaluation."""

    CACHED = 20_000

    def __init__(self):
        self._texts: dict[str, str] = {}

    def contains(self, text: str, answers: Sequence[str]) -> bool:
        """Whether any of the answers is in the text; "yes" and "no" are no spans and never match."""
        if text not in self._texts:
            if len(self._texts) >= self.CACHED:
                self._texts.clear()
            self._texts[text] = f" {normalize_answer(text)} "
        normalized = (normalize_answer(answer) for answer in answers)
        return any(f" {answer} " in self._texts[text] for answer in normalized if answer not in ("", "yes", "no"))


@dataclass
class Statistics:
    """Counts taken while the records are written."""

    num_questions: int = 0
    num_documents: int = 0
    num_words: int = 0
    num_positives: int = 0
    num_positives_retrieved: int | None = None
    num_distractors: int = 0
    num_distractors_with_answer: int = 0
    num_questions_without_positives: int = 0
    num_questions_without_documents: int = 0
    num_questions_unmatched: int = 0
    num_scored: int = 0
    num_answers: int = 0
    num_answers_cut: int = 0
    num_answers_with_gold: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def count(self, record: dict[str, Any], gold: list[str], matcher: AnswerMatcher, chosen: dict[str, Any]) -> None:
        """Count a record that is written; `chosen` is what its chooser returned."""
        self.num_questions += 1
        self.num_documents += len(record["documents"])
        self.num_questions_without_documents += not record["documents"]
        self.num_words += sum(len(document.split()) for document in record["documents"])
        self.num_scored += len(record.get("reranking_scores") or ())
        self.num_questions_unmatched += chosen.get("unmatched", False)
        if "positives_retrieved" in chosen:
            self.num_positives_retrieved = (self.num_positives_retrieved or 0) + chosen["positives_retrieved"]
        if record.get("positives") is None:
            self.num_questions_without_positives += 1
            return
        self.num_positives += len(record["positives"])
        for index, document in enumerate(record["documents"]):
            if index not in record["positives"]:
                self.num_distractors += 1
                self.num_distractors_with_answer += matcher.contains(document, gold)

    def count_answer(self, result: dict[str, Any], gold: list[str], matcher: AnswerMatcher) -> None:
        """Count a teacher's answer."""
        self.num_answers += 1
        self.num_answers_cut += result["cut"]
        self.num_prompt_tokens += result["prompt_tokens"]
        self.num_completion_tokens += result["completion_tokens"]
        self.num_answers_with_gold += matcher.contains(result["answer"], gold)

    def counts(self) -> dict[str, Any]:
        """The counts of the steps that were taken."""
        counts = {
            "questions_without_positives": self.num_questions_without_positives,
            "questions_without_documents": self.num_questions_without_documents,
            "documents": self.num_documents,
            "positives": self.num_positives,
            "distractors": self.num_distractors,
            "distractors_with_answer": self.num_distractors_with_answer,
            "mean_document_words": round(self.num_words / max(self.num_documents, 1), 1),
        }
        if self.num_positives_retrieved is not None:
            counts["positives_retrieved"] = self.num_positives_retrieved
        if self.num_questions_unmatched:
            counts["questions_sharing_no_word_with_corpus"] = self.num_questions_unmatched
        if self.num_scored:
            counts["documents_scored"] = self.num_scored
        if self.num_answers:
            counts |= {
                "teacher_answers": self.num_answers,
                "teacher_answers_cut": self.num_answers_cut,
                "teacher_answers_with_gold": self.num_answers_with_gold,
                "teacher_prompt_tokens": self.num_prompt_tokens,
                "teacher_completion_tokens": self.num_completion_tokens,
            }
        return counts
