"""Plain text for pretraining: passages to be written again, and passages to be continued."""

from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from errors_scaledown import ScaleDownError

from ..data.splitting import PassageSplitter

FILE_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
AUTOENCODING, CONTINUATION = "autoencoding", "continuation"


def load_pretraining_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    passage_length: int,
    text_column: str = "text",
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load text as rows for `PretrainingCollator`: half to be written again, half to be continued.

    Texts of a batch of rows are joined line by line, so that short lines fill passages too.

    Args:
        source: A file (text with a paragraph per line, JSON Lines, CSV or Parquet; plain or compressed) or the name
            of a data set.
        tokenizer: The compressor's; a passage to compress has at most `passage_length` of its tokens.
        passage_length: The model's `chunk_length`, so that a passage is one chunk.
        text_column: Column that holds the text; text files have `text`.
        config: Configuration of a data set.
        split: Split of a data set.
        streaming: Read the source as training goes on; nothing is stored, and the number of rows is unknown.

    Returns:
        Rows of `task` (`autoencoding` or `continuation`, in turn), `text` (to compress) and `target` (to write).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source cannot be read, or has no such column.
    """
    texts = _load_texts(source, text_column, config, split, streaming)
    # 256 paragraphs fill some hundred passages, so that little is lost at the end of a batch.
    rows = texts.map(
        _to_rows,
        batched=True,
        batch_size=256,
        remove_columns=texts.column_names,
        fn_kwargs={"tokenizer": tokenizer, "passage_length": passage_length, "text_column": text_column},
        **({} if streaming else {"desc": "Cutting passages"}),
    )
    if not streaming and len(rows) == 0:
        raise ScaleDownError(
            f"{source} holds fewer than two passages of {passage_length} tokens in its column {text_column!r}; name "
            "another file or column."
        )
    return rows


def _load_texts(source, text_column, config, split, streaming):
    path = Path(source)
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if path.is_file():
        if not suffixes or suffixes[-1] not in FILE_FORMATS:
            raise ScaleDownError(f"{source} has none of the endings {', '.join(FILE_FORMATS)}; rename or convert it.")
        arguments = {"path": FILE_FORMATS[suffixes[-1]], "data_files": {split: str(path)}, "split": split}
    elif not path.exists() and (path.suffix or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{source} does not exist (looked from {Path.cwd()}); check the path.")
    else:
        arguments = {"path": source, "name": config, "split": split}
    try:
        texts = datasets.load_dataset(**arguments, streaming=streaming)
        columns = texts.column_names or list(next(iter(texts)))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ScaleDownError(
            f"{source} (configuration {config}, split {split}) could not be read: {type(error).__name__}: {error}. "
            "Name a file, or a data set with its configuration and split."
        ) from error
    if text_column not in columns:
        raise ScaleDownError(f"{source} has the columns {', '.join(columns)}, not {text_column!r}; set text_column.")
    return texts.select_columns([text_column])


def _to_rows(batch: dict, tokenizer: PreTrainedTokenizerBase, passage_length: int, text_column: str) -> dict:
    text = "\n".join(text.strip() for text in batch[text_column] if isinstance(text, str) and text.strip())
    passages = PassageSplitter(tokenizer, passage_length)("", text)
    rows = {"task": [], "text": [], "target": []}
    # Two passages that follow each other serve both tasks: the first is continued by the second, the second repeated.
    for first, second in zip(passages[::2], passages[1::2], strict=False):
        rows["task"] += [CONTINUATION, AUTOENCODING]
        rows["text"] += [first, second]
        rows["target"] += [second, second]
    return rows
