"""LoRA and the generator: adapters that are started from or merged into it, and the generator without them."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from errors_scaledown import ScaleDownError
from lora_scaledown import remove_lora
from modeling_scaledown import ScaleDownModel
from weights_scaledown import without_wrappers

ADAPTER_CONFIG = "adapter_config.json"


def start_lora_from(model: ScaleDownModel, folder: str) -> None:
    """Give a model's generator the LoRA layers of an adapter, to go on training them.

    Args:
        model: A ScaleDown model without LoRA, or with LoRA of the adapter's rank and modules.
        folder: Folder of a PEFT adapter, such as the stage `reader` saves.

    Raises:
        ScaleDownError: The folder holds no LoRA adapter, or one of another generator or with other settings.
    """
    settings = adapter_settings(folder)
    if model.config.lora_config is None:
        model.add_lora(**settings)
    own = {name: parameter for name, parameter in model.generator.named_parameters() if "lora_" in name}
    found = {}
    for name, tensor in load_peft_weights(folder, device="cpu").items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight")
        found[f"{name}.default.weight"] = tensor
    wrong = [name for name in own.keys() | found.keys() if name not in own or name not in found]
    wrong += [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    if wrong:
        raise ScaleDownError(
            f"The adapter in {folder} does not fit the model's LoRA: {len(wrong)} of its weights are missing, left "
            f"over or of another shape ({sorted(wrong)[0]}, …). Use the generator it was trained on, and its lora_r "
            f"({settings['r']}) and lora_target_modules."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def adapter_settings(folder: str) -> dict[str, Any]:
    """Read the settings of an adapter's LoRA.

    Args:
        folder: Folder of a PEFT adapter.

    Returns:
        Arguments of `peft.LoraConfig`.

    Raises:
        ScaleDownError: The folder holds no LoRA adapter.
    """
    _check_is_adapter(folder)
    saved = LoraConfig.from_pretrained(folder)
    return {
        "r": saved.r,
        "lora_alpha": saved.lora_alpha,
        "lora_dropout": saved.lora_dropout,
        "target_modules": sorted(saved.target_modules),
    }


def merge_adapter(generator: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Merge a reader's LoRA into its generator.

    Args:
        generator: The generator the reader was trained on; it is changed.
        folder: What the stage `reader` saved.

    Returns:
        The generator, which reads whole documents as it was taught.

    Raises:
        ScaleDownError: The folder holds no LoRA adapter, or one of another generator.
    """
    _check_is_adapter(folder)
    try:
        with without_known_warnings():
            return PeftModel.from_pretrained(generator, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:  # of another shape, or none of its modules is there
        raise ScaleDownError(
            f"The adapter in {folder} does not fit the generator ({str(error).splitlines()[0]}). Name the reader that "
            "was trained on this generator."
        ) from error


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Let PEFT ask for checkpointing by the name that transformers 5.23 replaces, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check_is_adapter(folder: str) -> None:
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise ScaleDownError(
            f"{folder} holds no {ADAPTER_CONFIG}; name the folder of a PEFT adapter, such as train.py --stage reader "
            "saves."
        )


def without_lora(generator: PreTrainedModel) -> PreTrainedModel:
    """Copy a generator without its LoRA layers.

    Args:
        generator: A generator with LoRA layers, not merged.

    Returns:
        The generator as it was before training.
    """
    twin = copy.deepcopy(generator)
    remove_lora(twin)
    return twin


@contextmanager
def adapters_off(generator: PreTrainedModel) -> Iterator[None]:
    """Let a generator compute without its LoRA layers for the time of a block.

    Args:
        generator: A generator with LoRA layers, not merged.
    """
    layers = [module for module in generator.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def generator_weights(model: ScaleDownModel) -> dict[str, torch.Tensor]:
    """The generator's own weights under the names they have without LoRA.

    Args:
        model: A model whose LoRA stands beside its generator's weights.

    Returns:
        The tensors by name; they are the model's, not copies.

    Raises:
        ValueError: The model has no LoRA: it was merged into the weights.
    """
    if model.config.lora_config is None:
        raise ScaleDownError(
            "the model has no LoRA apart from its generator: it was merged; train with merge_lora=false."
        )
    return {
        without_wrappers(name): tensor for name, tensor in model.generator.state_dict().items() if ".lora_" not in name
    }
