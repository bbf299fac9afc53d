"""Pretrained models are loaded, or the option that names one is said to be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from errors_scaledown import ScaleDownError

Model = TypeVar("Model")


def load_model(load: Callable[[], Model], name: str, option: str) -> Model:
    """Load a model, or say which option names one that cannot be loaded.

    Args:
        load: Loads it.
        name: Its name or folder.
        option: The option that named it.

    Returns:
        What `load` returns.

    Raises:
        ValueError: The model cannot be loaded.
    """
    # A name on the Hub is `name` or `owner/name`, which is asked for long where there is no connection.
    meant = str(name).startswith(("runs/", ".", "/", "~")) or str(name).count("/") > 1
    if meant and not Path(name).exists():
        raise ScaleDownError(
            f"{option} names {name}, which cannot be loaded: there is no such folder (looked from {Path.cwd()}). Name "
            f"another."
        )
    try:
        return load()
    except ScaleDownError as error:
        raise ScaleDownError(f"{option} names {name}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ScaleDownError(
            f"{option} names {name}, which cannot be loaded ({type(error).__name__}: {error}). Expected a folder or a "
            f"name on the Hub; check the name, its kind and the connection."
        ) from error


def check_head(model: torch.nn.Module, name: str, option: str, revision: str | None = None) -> None:
    """Check that a checkpoint holds every weight of the model that was made of it; the others would be random.

    Args:
        model: A model of sentence-transformers, which loads what is missing as random weights and only warns.
        name: Its name or folder.
        option: The option that named it.
        revision: Branch, tag or commit.

    Raises:
        ScaleDownError: The checkpoint lacks weights, such as those of the head that scores or encodes.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return
    try:  # on meta, where nothing is read but names
        _, info = type(inner).from_pretrained(
            name, revision=revision or "main", output_loading_info=True, device_map={"": "meta"}
        )
    except OSError:  # the model lies in a folder of its own within the repository
        return
    refuse_missing(info, name, option)


def refuse_missing(info: dict[str, Any], name: str, option: str) -> None:
    """Refuse a checkpoint that lacks weights.

    Args:
        info: The loading information that `from_pretrained(output_loading_info=True)` returns.
        name: Name or folder of the checkpoint.
        option: The option that named it.

    Raises:
        ScaleDownError: It lacks some, but for an encoder's pooler, which nothing reads.
    """
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ScaleDownError(
            f"{option} names {name}, which lacks {len(missing)} weights of the model it is loaded as "
            f"({missing[0]}, …); they would be random. It is another kind of model; a reranker must be a "
            f"cross-encoder, a SPLADE encoder a masked language model, a teacher or generator a causal one."
        )


def import_sentence_transformers() -> Any:
    """The package sentence_transformers, or an ImportError that says how to install it."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError(
            "sentence-transformers, which loads rerankers and retrieval encoders, is missing; install it with "
            '`pip install ".[data]"` in the checkout.'
        ) from error
    return sentence_transformers
