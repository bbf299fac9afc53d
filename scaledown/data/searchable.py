"""A corpus made searchable: its passages and their index in a folder, made as far as they are missing."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.loading import load_model
from .arguments import PreparationArguments
from .corpus import CorpusReader, build_passages
from .indexes.index import Index, open_index
from .journal import WorkFolder
from .splitting import PassageSplitter

logger = logging.getLogger(__name__)


def prepare_corpus(arguments: PreparationArguments) -> dict[str, Any]:
    """Make a corpus searchable, for the runs to come.

    Args:
        arguments: The corpus, its folder and the retriever.

    Returns:
        The settings, and the number of passages.
    """
    passages, _ = open_corpus(arguments, Path(arguments.corpus_dir))
    settings = {"corpus": arguments.corpus, "retriever": arguments.retriever}
    settings |= {"retriever_name_or_path": arguments.retriever_model, "passage_length": arguments.passage_length}
    return {"settings": settings, "counts": {"passages": len(passages)}}


def open_corpus(arguments: PreparationArguments, folder: Path) -> tuple[datasets.Dataset, Index]:
    """Open passages and index, made as far as they are missing.

    Args:
        arguments: The corpus and the retriever.
        folder: Where both are kept.

    Returns:
        Both.
    """
    remedy = f"Name another --corpus_dir, give the same options, or delete {folder} to build it anew."
    corpus = WorkFolder(folder, arguments.corpus_settings, remedy)
    if arguments.corpus_dir is None:
        logger.info("passages and index are kept for this run only; name a --corpus_dir to use them again")
    read = CorpusReader(
        arguments.corpus,
        arguments.corpus_config,
        arguments.corpus_split,
        arguments.corpus_revision,
        arguments.text_column,
        arguments.title_column,
        arguments.merge_lines,
    )
    with corpus.locked():
        splitter = PassageSplitter(load_tokenizer(arguments), arguments.passage_length, arguments.passage_overlap)
        passages = build_passages(folder, read, splitter)
        logger.info("the corpus has %d passages", len(passages))
        digest = hashlib.sha256(json.dumps(arguments.index_settings).encode()).hexdigest()[:8]
        index = WorkFolder(folder / f"{arguments.retriever}-{digest}", arguments.index_settings, remedy)
        settings = {}
        if arguments.retriever != "bm25":
            settings = {"revision": arguments.retriever_revision, "dtype": arguments.dtype}
            settings["batch_size"] = arguments.retriever_batch_size
        return passages, open_index(
            arguments.retriever, index.path / "data", passages, arguments.retriever_model, **settings
        )


def load_tokenizer(arguments: PreparationArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer by which passages are measured; None where none is named."""
    name = arguments.tokenizer_name_or_path
    if name is None:
        return None
    return load_model(lambda: AutoTokenizer.from_pretrained(name), name, "--tokenizer_name_or_path")
