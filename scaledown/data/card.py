"""The data card: what a file of records holds and how it came to be, for readers and for the Hub."""

from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..common.tables import table

SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
FIELDS = {
    "query": "the question",
    "documents": "passages, the compressor's input",
    "answer": "answers; the first is learned",
    "gold_answers": "the data set's own answers, where a teacher wrote `answer`",
    "reranking_scores": "the reranking teacher's score of each document, higher is more relevant",
    "positives": "indices of the documents known to hold the answer",
    "id": "the question's id in its source",
}


def build_card(report: dict[str, Any], file_name: str) -> DatasetCard:
    """Write the card of a file of records.

    Args:
        report: What `prepare` returned.
        file_name: The name of the file.

    Returns:
        The card; its metadata are what the Hub reads.
    """
    counts, settings = report["counts"], report["settings"]
    size = next((name for limit, name in SIZES if counts["questions_written"] < limit), "n>1M")
    tags = ["scaledown", "retrieval-augmented-generation"]
    tags += [tag for tag, name in (("reranking", "reranker"), ("distillation", "teacher")) if settings.get(name)]
    data = DatasetCardData(
        task_categories=["question-answering"],
        size_categories=[size],
        tags=tags,
        configs=[{"config_name": "default", "data_files": file_name}],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {file_name}",
        f"Questions with passages and answers, made from `{report['source']}` by ScaleDown's `prepare_data.py`. "
        "Whoever shares the file states the licences of its sources.",
        "## Fields",
        table([("field", "what it is"), *FIELDS.items()]),
        "## Counts",
        table([("what", "count"), *((name.replace("_", " "), value) for name, value in counts.items())]),
        "## Left out",
        table(
            [
                ("reason", "count", "such as"),
                *((reason, row["count"], ", ".join(row["examples"])) for reason, row in report["dropped"].items()),
            ]
        )
        if report["dropped"]
        else "Nothing.",
        "## Settings",
        table(
            [
                ("setting", "value"),
                *(
                    (f"`{name}`", f"`{value}`")
                    for name, value in {**_source(report), **settings}.items()
                    if value is not None and value is not False
                ),
            ]
        ),
        "## Versions",
        table([("package", "version"), *report["versions"].items()]),
    ]
    return DatasetCard("\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def _source(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in ("source", "format", "config", "split")}
