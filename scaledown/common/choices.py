"""What options may be, apart from the modules that do the work: those take seconds to import, and help does not."""

from dataclasses import dataclass

# Types of weights.
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Formats of questions; see `data/formats.py`.
FORMATS = (
    "squad",
    "hotpotqa",
    "nq",
    "triviaqa",
    "msmarco",
    "popqa",
    "bioasq",
    "musique",
    "boolq",
    "pubmedqa",
    "dpr",
    "columns",
    "records",
)
# What an evaluation sets beside the model; see `evaluation/systems.py`.
SELECTED_TEXT = "selected_text"
TEXT_BASELINES = ("full_text", SELECTED_TEXT, "no_documents", "truncated")
MEMORY_BASELINES = ("random_memory", "shuffled_documents")
BASELINES = (*TEXT_BASELINES, *MEMORY_BASELINES)
# What searches a corpus; see `data/indexes/index.py`.
RETRIEVERS = ("bm25", "splade", "dense")
DEFAULT_MODELS = {"splade": "naver/splade-v3", "dense": "sentence-transformers/multi-qa-mpnet-base-dot-v1"}
DEFAULT_RERANKER = "naver/trecdl22-crossencoder-debertav3"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of the format `columns`; None stands for the usual names, where they are there."""

    question: str | None = None
    answer: str | None = None
    documents: str | None = None
    id: str | None = None

    @property
    def named(self) -> bool:
        """Whether any name is given."""
        return any((self.question, self.answer, self.documents, self.id))
