# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The card of a saved model: model_card.md rendered to README.md, with what the run knows."""

import json
import re
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

CARD_TEMPLATE_NAME = "model_card.md"
CARD_NAME = "README.md"
# A README.md without this line was written by somebody and is left alone.
CARD_MARK = "<!-- rendered from model_card.md -->"
# What the card was rendered from, for whoever renders it again.
CARD_FIELDS = re.compile(r"^<!-- card_fields: (\{.*\}) -->$", re.MULTILINE)
# Optional files: do not raise if missing.
QUIETLY = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_connection_errors": False}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub; a relative path with `.` or `..` in it is none."""
    # Some of the oldest, such as gpt2, have no owner.
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not {".", ".."} & set(name.split("/"))


def is_rendered(readme: str | Path) -> bool:
    """Whether a README.md was rendered from the template; others were written by somebody."""
    return CARD_MARK in _read(readme)


def read_card_fields(readme: str | Path) -> dict:
    """
    Reads what a card was rendered from, besides the model itself.

    Args:
        readme (`str` or `Path`): A README.md.

    Returns:
        `dict`: The fields; empty where it was not rendered from the template.
    """
    found = CARD_FIELDS.search(_read(readme)) if is_rendered(readme) else None
    try:
        return json.loads(found.group(1)) if found is not None else {}
    except ValueError as error:  # somebody has edited it, and a card is worth no model
        logger.warning(f"The comment card_fields of {readme} is no JSON ({error}): new cards go without what it says.")
        return {}


def _read(readme: str | Path) -> str:
    """Text of a card; what is no UTF-8 in one that somebody wrote is replaced."""
    return Path(readme).read_text(encoding="utf-8", errors="replace")


def render_card(model: PreTrainedModel, folder: Path, weights_format: str):
    """
    Renders model_card.md to README.md, beside a copy of the template.

    Args:
        model (`ScaleDownModel`): What the card describes.
        folder (`Path`): Where the model is saved.
        weights_format (`str`): In which form.
    """
    template = Path(__file__).with_name(CARD_TEMPLATE_NAME)
    if not template.is_file():  # an installed package has it inside
        template = template.parent / "scaledown" / CARD_TEMPLATE_NAME
    if not template.is_file():
        found = model._find_beside_weights(CARD_TEMPLATE_NAME, **QUIETLY) if model.name_or_path else None
        if found is None:
            logger.warning(f"No {CARD_TEMPLATE_NAME} found beside the code or the weights; no card is written.")
            return
        template = Path(found)
    generator = model.config.generator_name_or_path
    on_hub = generator is not None and is_hub_name(generator) and not Path(generator).exists()
    facts = {
        "config": _plain_config(model.config),
        # A path of this machine is of no use to a reader, and nobody's business.
        "generator_name": (generator if on_hub else Path(generator).name) if generator else None,
        "generator_on_hub": on_hub,
        "num_parameters": model.num_parameters(),
        "num_compressor_parameters": sum(p.numel() for p in model.compressor.parameters()),
        "weights_format": weights_format,
    }
    write_card(folder, template, facts, model.card_fields)


def write_card(folder: Path, template: Path, facts: dict, card_fields: dict):
    """
    Renders the card of a saved model, beside a copy of its template; a README.md somebody wrote is left as it is.

    Args:
        folder (`Path`): Where the model is saved.
        template (`Path`): The card with Jinja fields.
        facts (`dict`): What the model knows of itself.
        card_fields (`dict`): What training and evaluation add, such as `eval_results`; kept in the card.

    Raises:
        ImportError: jinja2 is not installed.
        jinja2.sandbox.SecurityError: the template reaches for more than its fields.
    """
    readme = folder / CARD_NAME
    if readme.is_file() and not is_rendered(readme):
        logger.warning(f"{readme} was not rendered from {CARD_TEMPLATE_NAME}; it is left as it is.")
        return
    fields = {**facts, **card_fields}
    results = _eval_results(fields.get("eval_results"), readme)
    data = ModelCardData(
        library_name="transformers",
        license=fields.get("license"),
        language=fields.get("language"),
        base_model=fields.get("base_model", fields["generator_name"] if fields["generator_on_hub"] else None),
        datasets=fields.get("datasets"),
        # No pipeline_tag: no pipeline of transformers gives a model documents.
        tags=["scaledown", "question-answering", "rag", "context-compression", "reranking"],
        model_name=fields.get("repo_id", folder.resolve().name).split("/")[-1] if results else None,
        eval_results=results or None,
    )
    ModelCard(_render(template, {**data.to_dict(), **fields, "card_data": data.to_yaml()})).save(readme)
    kept = {name: value for name, value in card_fields.items() if name not in ("repo_id", "revision")}
    if kept:
        text = json.dumps(kept, default=str).replace("--", r"\u002d\u002d")  # which would end the comment
        with open(readme, "a", encoding="utf-8") as stream:
            stream.write(f"\n<!-- card_fields: {text} -->\n")
    if template.resolve() != (folder / CARD_TEMPLATE_NAME).resolve():
        shutil.copyfile(template, folder / CARD_TEMPLATE_NAME)


def _eval_results(given: list[dict] | None, readme: Path) -> list[EvalResult]:
    """Results for the card's metadata; a warning names those that are none."""
    results = []
    for result in given if isinstance(given, list | tuple) else ():
        try:
            results.append(EvalResult(**result))
        except (TypeError, ValueError) as error:
            logger.warning(f"{readme} goes without {result!r} of eval_results: {error}")
    return results


def _plain_config(config: PreTrainedConfig) -> SimpleNamespace:
    """
    What a card may say of a configuration: its values alone, since a template could call methods of the object.

    Args:
        config (`ScaleDownConfig`): The model's.

    Returns:
        `SimpleNamespace`: Its fields; those of the two backbones' configurations in the same way.
    """
    fields = config.to_dict()
    for name in ("generator_config", "compressor_config"):
        backbone = getattr(config, name)
        common = {field: getattr(backbone, field, None) for field in ("model_type", "num_hidden_layers", "hidden_size")}
        fields[name] = SimpleNamespace(**{**backbone.to_dict(), **common})  # some name them otherwise, as GPT-2 does
    return SimpleNamespace(**fields)


def _render(template: Path, fields: dict) -> str:
    return _compile(template.read_text(encoding="utf-8")).render(fields)


@lru_cache(maxsize=4)  # compiling takes longer than saving a small model, and every checkpoint of a run has a card
def _compile(template: str):
    # A template may come with somebody's weights, and ModelCard.from_template lets it reach any Python object.
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("Rendering the model card needs Jinja: pip install jinja2.") from error
    return ImmutableSandboxedEnvironment().from_string(template)
