"""Read question-answering data sets as they are distributed into one intermediate form; `formats` lists them."""

import itertools
import logging

from .formats import FORMATS, OWN_DOCUMENTS, Columns, add_element, detect_format
from .questions import Question, QuestionCollector, Source, SourceError, Splitter
from .sources import open_elements
from .splitting import PassageSplitter

__all__ = ["FORMATS", "Columns", "Question", "Source", "SourceError", "detect_format", "read_source"]

logger = logging.getLogger(__name__)


def read_source(
    source: str,
    format: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Columns | None = None,
    splitter: Splitter | None = None,
    require_answer: bool = True,
    keep_pool: bool | None = True,
) -> Source:
    """Read a local file, or a data set by its name on the Hub.

    Args:
        source: A local JSON, JSON Lines, CSV or Parquet file (plain, gzip or xz), a local folder that
            `datasets.load_dataset` opens, or a name on the Hub.
        format: One of `FORMATS`; recognized from the content by default.
        config: The data set's configuration; not for files.
        split: The data set's split, by default `train`; not for files.
        revision: Branch, tag or commit of the data set; not for files.
        columns: Names of columns, for the format `columns`; naming one chooses it.
        splitter: Cuts whole pages, which TriviaQA brings, into passages; by words by default.
        require_answer: Whether a question without an answer is dropped.
        keep_pool: Whether passages that are no question's positive are kept in memory; None keeps them unless the
            source's records bring documents of their own.

    Returns:
        The questions, the pool of passages and what was dropped.

    Raises:
        FileNotFoundError: A path that does not exist.
        SourceError: The source cannot be loaded, its format is unknown, or an element does not fit the format.
        RecordError: A line is not JSON, or breaks the project's format.
    """
    if format is not None and format not in FORMATS:
        raise SourceError(f"format is {format!r}, expected one of {', '.join(FORMATS)}; correct it or leave it out.")
    columns = columns or Columns()
    if columns.named and format not in (None, "columns"):
        raise SourceError(f"format is {format!r}, which has columns of its own; leave --format out to name columns.")
    elements = open_elements(source, config, split, revision)
    try:
        first = next(elements)
    except StopIteration:
        raise SourceError(
            f"{source}: found no questions, expected at least one; check the file or the split."
        ) from None
    format = "columns" if columns.named else format or detect_format(*first)
    logger.info("reading %s as %s", source, format)
    if keep_pool is None:
        keep_pool = format not in OWN_DOCUMENTS
    collector = QuestionCollector(Source(format=format), splitter or PassageSplitter(), require_answer, keep_pool)
    for index, (location, element) in enumerate(itertools.chain([first], elements)):
        add_element(collector, element, location, str(index), columns)
    return collector.finish()
