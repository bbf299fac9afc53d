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
"""LoRA layers in the generator: adding, merging and loading them, and what learns besides."""

import json

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

try:
    from .errors_scaledown import WITHOUT_GENERATOR, ScaleDownError
    from .families_scaledown import WITHOUT_LORA
    from .quantization_scaledown import is_quantized
    from .weights_scaledown import checkpoint_index, execution_device, is_offloaded, read_tensors
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import WITHOUT_GENERATOR, ScaleDownError
    from families_scaledown import WITHOUT_LORA
    from quantization_scaledown import is_quantized
    from weights_scaledown import checkpoint_index, execution_device, is_offloaded, read_tensors

logger = logging.get_logger(__name__)

LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}


class LoraMixin:
    """LoRA layers in the generator of a `ScaleDownModel`."""

    def add_lora(self, **lora_kwargs):
        """
        Adds trainable LoRA layers to the generator.

        Args:
            lora_kwargs: Arguments of `peft.LoraConfig` over the defaults r=16, lora_alpha=32, lora_dropout=0.1, all
                linear layers (OSCAR, table 7).

        Raises:
            ImportError: peft is not installed.
            ValueError: the generator has LoRA layers already, its own weights would be trained, it is offloaded, or
                there is none; or a setting cannot be saved.
        """
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        if self.config.lora_config is not None:
            raise ScaleDownError("The generator has LoRA layers already; call merge_lora() before adding new ones.")
        if is_offloaded(self.generator):
            raise ScaleDownError(
                "The generator is offloaded, and layers that learn must not be. Load it without offloading, quantized "
                "if it is too large: load_in_4bit=True."
            )
        own = lora_kwargs.get("modules_to_save") or lora_kwargs.get("trainable_token_indices")
        if own or lora_kwargs.get("bias", "none") != "none":
            raise ScaleDownError(
                "modules_to_save, trainable_token_indices and bias would train the generator's own weights, which stay "
                "frozen here; leave them out and name linear layers in target_modules."
            )
        settings = {**LORA_DEFAULTS, **lora_kwargs}
        settings = {name: _as_saved(name, value) for name, value in settings.items()}
        settings = fit_to_experts(self.generator, settings)
        inject_lora(self.generator, settings)
        self.generator.train(self.generator.training)  # the new layers start in training mode
        self.config.lora_config = settings
        freeze(self)

    @torch.no_grad()
    def merge_lora(self):
        """
        Adds the LoRA weights into the generator's own, for inference at full speed; nothing is left of LoRA.

        Raises:
            ValueError: the generator is quantized, so that most of what LoRA learned would be rounded away, it is
                offloaded, or there is none.
        """
        if self.config.lora_config is None:
            return
        if self.generator is None:
            raise ScaleDownError(WITHOUT_GENERATOR)
        if is_quantized(self.generator):
            raise ScaleDownError(
                "LoRA cannot be merged into a quantized generator without rounding away what it learned. Save the "
                'model with weights_format="delta", load that without load_in_4bit or load_in_8bit, and merge there.'
            )
        if is_offloaded(self.generator):
            raise ScaleDownError(
                "LoRA cannot be merged into a generator whose weights are offloaded: they are on no device between "
                "calls. Load the model without offloading, merge and save it, and load that with offloading."
            )
        for module in self.generator.modules():
            if hasattr(module, "lora_A") and hasattr(module, "merge"):
                module.merge(safe_merge=True)
        remove_lora(self.generator)
        self.config.lora_config = None
        # From here on the generator is no longer the one of its repository.
        self.config.weights_format = "full"
        self.config.generator_fingerprint = None


def _as_saved(name: str, value):
    """A setting of LoRA as a configuration holds it; what JSON has no form for would be told after training."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    elif isinstance(value, range | tuple):
        value = list(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ScaleDownError(
            f"The LoRA setting {name}={value!r} cannot be saved ({error}); pass numbers, texts, or lists and "
            "dictionaries of them."
        ) from None
    return value


def fit_to_experts(generator: PreTrainedModel, settings: dict) -> dict:
    """
    Makes LoRA on all linear layers possible in a mixture of experts.

    Args:
        generator (`PreTrainedModel`): A causal language model.
        settings (`dict`): Arguments of `peft.LoraConfig`.

    Returns:
        `dict`: The same, without dropout where experts keep their weights in one tensor, which PEFT wraps only so, and
        without routers that return more than a product.
    """
    if settings["target_modules"] != "all-linear":
        return settings
    has_experts = any("experts" in name and p.dim() == 3 for name, p in generator.named_parameters())
    if has_experts and settings["lora_dropout"]:
        logger.warning(
            f"The experts of {type(generator).__name__} keep their weights in one tensor, where LoRA has no dropout: "
            f"lora_dropout={settings['lora_dropout']} becomes 0."
        )
        settings = {**settings, "lora_dropout": 0.0}
    routers = {
        name.rpartition(".")[2]
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and "rout" in name
    }
    if routers and not settings.get("exclude_modules"):
        settings = {**settings, "exclude_modules": sorted(routers)}
    return settings


def inject_lora(generator: PreTrainedModel, settings: dict):
    """
    Puts LoRA layers into a generator, which start as 0.

    Args:
        generator (`PreTrainedModel`): A causal language model.
        settings (`dict`): Arguments of `peft.LoraConfig`.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "LoRA layers in the generator need peft: pip install peft. (A model saved after merge_lora() does not.)"
        ) from error
    if generator.config.model_type in WITHOUT_LORA:
        raise ScaleDownError(
            f"{generator.config.model_type} shares weights between layers, where LoRA is not saved as it was trained; "
            "train the compressor alone (lora_r=0), or choose another generator."
        )
    inject_adapter_in_model(LoraConfig(**settings), generator)
    for name, parameter in generator.named_parameters():
        if "lora_" in name:
            # PEFT initialized them; transformers' own initialization would undo that the new layers start as 0.
            parameter._is_hf_initialized = True


def remove_lora(generator: PreTrainedModel):
    """
    Takes LoRA layers off a generator; what they learned is lost unless it was merged.

    Args:
        generator (`PreTrainedModel`): A causal language model with LoRA layers.
    """
    for name, module in list(generator.named_modules()):
        # Around experts there are several, one in the other.
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer") and not name.endswith(".base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(generator.get_submodule(parent), child, module.get_base_layer())
    if hasattr(generator, "peft_config"):
        del generator.peft_config


def freeze(model: PreTrainedModel):
    """
    Lets learn what may: LoRA and the compressor, but not what only a backbone that was left out would read.

    Args:
        model (`ScaleDownModel`): The model.
    """
    if model.generator is not None:
        for name, parameter in model.generator.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_("lora_" in name)
    if model.compressor.backbone is None:  # what the backbone read is in the cached states already
        for parameter in (model.compressor.memory_embeddings, model.compressor.rerank_embedding):
            if parameter is not None:
                parameter.requires_grad_(False)


def refuse_other_lora(model: PreTrainedModel):
    """
    Refuses to save layers that would not be found again: the weights they are around would come back random.

    Args:
        model (`ScaleDownModel`): The model.

    Raises:
        ScaleDownError: PEFT has put layers into the model that `add_lora` did not make.
    """
    if model._hf_peft_config_loaded:  # transformers saves such an adapter alone, and `load_adapter` finds it again
        return
    for name, _ in model.named_parameters():
        own = model.config.lora_config is not None and name.startswith("generator.")
        is_other = ("lora_" in name and ".default" not in name) if own else ("lora_" in name or ".base_layer." in name)
        if is_other:
            raise ScaleDownError(
                f"{name} is of a layer that add_lora() did not make, and a saved model would not find it again. Merge "
                "it first (peft: merge_and_unload), or use add_lora() in its place."
            )


def load_lora(model: PreTrainedModel, name_or_path: str, hub: dict):
    """
    Adds LoRA layers to a generator that was loaded without, and fills them.

    Args:
        model (`ScaleDownModel`): The model; its configuration says which layers.
        name_or_path (`str`): Hub name or folder of the checkpoint.
        hub (`dict`): As in `pin_revision`.

    Raises:
        ScaleDownError: as in `check_lora`.
    """
    inject_lora(model.generator, model.config.lora_config)
    for name, tensor in read_tensors(name_or_path, check_lora(model, name_or_path, hub), hub).items():
        # Beside quantized layers PEFT makes 16-bit ones, which would round what was trained in 32.
        layer, _, own = name.rpartition(".")
        device = execution_device(model.get_submodule(name.split(".lora_")[0]))  # which may fetch its own weights
        setattr(model.get_submodule(layer), own, nn.Parameter(tensor.to(device, model.dtype)))


def check_lora(model: PreTrainedModel, name_or_path: str, hub: dict) -> dict[str, str]:
    """
    Finds the LoRA weights of a checkpoint; transformers does not report it when they are missing.

    Args:
        model, name_or_path, hub: As in `load_lora`.

    Returns:
        `dict[str, str]`: File of each tensor; empty where the model has no LoRA.

    Raises:
        ScaleDownError: the checkpoint does not hold the tensors that the configuration asks for.
    """
    if model.config.lora_config is None or model.generator is None:
        return {}
    found = {name: file for name, file in checkpoint_index(name_or_path, **hub).items() if "lora_" in name}
    expected = {f"generator.{name}" for name, _ in model.generator.named_parameters() if "lora_" in name}
    if set(found) != expected:
        raise ScaleDownError(
            f"{name_or_path} holds {len(found)} LoRA tensors, lora_config asks for {len(expected)}. Restore the "
            "checkpoint's own lora_config; where it has none, call add_lora() after loading."
        )
    return found
