"""Where the teachers and encoders run, and in which precision."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from errors_scaledown import ScaleDownError

from .choices import DTYPES

Model = TypeVar("Model")


def pick_device() -> str:
    """The accelerator that is there, or the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def find_device(name: str) -> torch.device:
    """The device of a name; auto is what `pick_device` finds. Raises a ValueError for one that is not here."""
    try:
        device = torch.device(pick_device() if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ScaleDownError(f"device is {name}, which is not here ({message}); correct --device.") from error
    return device


def num_processes_started() -> int:
    """How many processes a launcher such as torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def must_use_cpu() -> bool:
    """Whether several processes were started where there are only CPUs, on which they meet when they are told so."""
    return num_processes_started() > 1 and not torch.accelerator.is_available()


def check_processes(number: int) -> None:
    """Check that the processes of this run have found one another.

    Args:
        number: How many there are in this one's group.

    Raises:
        ScaleDownError: Others were started, which would do the same work and write into the same folder.
    """
    started = num_processes_started()
    if number != started:
        raise ScaleDownError(
            f"{started} processes were started (WORLD_SIZE={started}), but this one is in a group of {number}: each "
            "would do all the work by itself. Start one process, or launch as many as there are devices with "
            "`accelerate launch` or `torchrun`."
        )


def wait_for(device: torch.device) -> None:
    """Return when an accelerator has done all it was given, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_dtype(name: str) -> torch.dtype:
    """The type of a model's weights.

    Args:
        name: One of `DTYPES`. auto is bfloat16 where the GPU computes in it, float16 on other GPUs, and float32 else.

    Returns:
        The type.

    Raises:
        ValueError: There is no such name.
    """
    if name not in DTYPES:
        raise ScaleDownError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}; correct --dtype.")
    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def hold_learned_in_32_bits(model: torch.nn.Module) -> None:
    """Hold what learns in 32 bits: AdamW's steps of some 1e-5 vanish in 16-bit weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def is_quantized(model: Any) -> bool:
    """Whether a ScaleDown model's generator is held in few bits: because it was asked for, or was stored so."""
    return getattr(model.generator, "hf_quantizer", None) is not None


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
        info: What `from_pretrained(output_loading_info=True)` tells.
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
            "sentence-transformers is missing, which loads rerankers and retrieval encoders; install it with "
            "`pip install sentence-transformers`."
        ) from error
    return sentence_transformers
