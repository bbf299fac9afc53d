"""Results in a model's card: a table for people, and the metadata `model-index` for the Hub."""

import re
from pathlib import Path
from typing import Any

import torch

from card_scaledown import CARD_NAME, HUB_NAME, is_rendered, render_card
from configuration_scaledown import ScaleDownConfig
from errors_scaledown import ScaleDownError
from modeling_scaledown import ScaleDownModel

from .report import TITLES, measured, with_interval
from .results import ANSWER_MODULES
from .systems import MODEL

TASKS = {"answers": "question-answering", "ranking": "text-ranking"}


def check_card(folder: str | Path) -> None:
    """Raise a ValueError unless the card of a folder may be rendered again, or is yet to be."""
    readme = Path(folder) / CARD_NAME
    if readme.is_file() and not is_rendered(readme):
        raise ScaleDownError(
            f"{readme} was not rendered by this project, so update_card leaves it alone; move it away, or leave the "
            "option out."
        )


def update_card(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Render a saved model's card again, with the results of a run.

    Results on other data stay; those on the same data are replaced.

    Args:
        folder: The model's, as `save_pretrained` wrote it.
        metrics: What metrics.json holds.

    Raises:
        ValueError: The card was written by somebody.
    """
    check_card(folder)
    config = ScaleDownConfig.from_pretrained(folder)
    with torch.device("meta"):  # the card reports the size, and needs no weights
        model = ScaleDownModel(config)
    model.name_or_path, model._card_fields = str(folder), None  # those of the card beside the weights
    model.card_fields = {**model.card_fields, **merge_results(model.card_fields, metrics)}
    render_card(model, Path(folder), config.weights_format)


def merge_results(fields: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Put the results of a run beside those on other data.

    Args:
        fields: The card's so far.
        metrics: What metrics.json holds.

    Returns:
        The fields `evaluation`, `evaluation_notes` and `eval_results`.
    """
    name = _data_name(metrics)
    rows = [row for row in fields.get("evaluation", []) if row.get("data") != name]
    results = [result for result in fields.get("eval_results", []) if result.get("dataset_name") != name]
    notes = fields.get("evaluation_notes", "").split("\n\n")
    notes = [line for line in notes if line and not line.startswith(f"{name}: ")]
    return {
        "evaluation": [*rows, *_table_rows(metrics)],
        "evaluation_notes": "\n\n".join([*notes, _note(metrics)]),
        "eval_results": [*results, *_eval_results(metrics)],
    }


def _data_name(metrics: dict[str, Any]) -> str:
    """Name of the data, with its configuration and split, which are other data."""
    data = metrics["data"]
    parts = [data[key] for key in ("config", "split") if data.get(key)]
    return f"{data['name']} ({', '.join(parts)})" if parts else data["name"]


def _table_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for system, values in metrics["systems"].items():
        speed_up = metrics["against_full_text"].get(system, {}).get("speed_up")
        reranking = metrics["reranking"].get("model", {}) if system == MODEL else {}
        rows.append(
            {
                "data": _data_name(metrics),
                "": system.replace("_", " "),
                **{TITLES[name]: with_interval(values.get(name)) for name in (*ANSWER_MODULES, "judge")},
                "nDCG@10": with_interval(reranking.get("ndcg@10")),
                "tokens in": f"{values['tokens_in']['value']:.1f}",
                "speed-up": with_interval(speed_up, ".2f"),
            }
        )
    return rows


def _note(metrics: dict[str, Any]) -> str:
    data, settings = metrics["data"], metrics["settings"]
    rate = metrics["model"]["measured_compression"]["value"]
    compressed = f", {rate:.3g} document tokens per slot" if rate is not None else ""
    judge = f" Judge: {metrics['judge']['model']}." if "judge" in metrics else ""
    commit = metrics["git"].get("commit", "")[:12] or "not recorded"
    return (
        f"{_data_name(metrics)}: {data['num_asked']} questions with {data['documents_per_question']:.3g} documents each"
        f"{compressed}, answered greedily with at most {settings['max_new_tokens']} tokens on "
        f"{metrics['hardware']['device']} ({metrics['model']['dtype']}) on {metrics['date'][:10]}, code at commit "
        f"{commit}; in brackets 95 % intervals.{judge} {' '.join(metrics['notes'])}"
    ).strip()


def _eval_results(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of `EvalResult` for the model itself."""
    data, systems = metrics["data"], metrics["systems"]
    name = data["name"]
    common = {
        "dataset_name": _data_name(metrics),
        "dataset_type": name if HUB_NAME.fullmatch(name) else re.sub(r"[^\w-]+", "-", name).lower(),
        "dataset_config": data.get("config"),
        "dataset_split": data.get("split"),
        "dataset_revision": data.get("revision"),
    }
    found = [("answers", metric, systems[MODEL][metric]) for metric in measured({MODEL: systems[MODEL]})]
    found += [("ranking", metric, value) for metric, value in metrics["reranking"].get("model", {}).items()]
    return [
        {
            **{key: value for key, value in common.items() if value is not None},
            "task_type": TASKS[task],
            "metric_type": metric,
            "metric_name": TITLES.get(metric, metric),
            "metric_value": round(value["value"], 6),
        }
        for task, metric, value in found
        if value["value"] is not None
    ]
