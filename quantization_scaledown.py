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
"""Quantization of the generator; the compressor, the head and LoRA keep their precision."""

import copy

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_bitsandbytes_available, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

logger = logging.get_logger(__name__)

NEVER_QUANTIZED = ("compressor", "lm_head", r".*\.lora_[AB]")


def bitsandbytes_config(
    load_in_4bit: bool, load_in_8bit: bool, dtype: torch.dtype | str | None
) -> BitsAndBytesConfig | None:
    """
    Settings that quantize the generator's linear layers and nothing of the compressor.

    Args:
        load_in_4bit, load_in_8bit (`bool`): One of them, or neither.
        dtype (`torch.dtype` or `str`, *optional*): Of the other weights; multiplications are in 16 bits of this kind.

    Returns:
        `BitsAndBytesConfig`, or `None` when nothing is to be quantized.

    Raises:
        ValueError: both are asked for.
        ImportError: bitsandbytes is not installed.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise ScaleDownError("load_in_4bit and load_in_8bit exclude each other; choose one.")
    if not is_bitsandbytes_available():
        raise ImportError(
            f"load_in_{4 if load_in_4bit else 8}bit needs bitsandbytes: pip install bitsandbytes, or load in 16 bits "
            "with dtype=torch.bfloat16."
        )
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16 if dtype in (torch.float16, "float16") else torch.bfloat16,
        llm_int8_skip_modules=list(NEVER_QUANTIZED),
    )


def spare_compressor_if_possible(settings: QuantizationConfigMixin | dict) -> QuantizationConfigMixin | dict:
    """Settings for a generator that is loaded by itself: those that can name the compressor do, for a later load."""
    try:
        return spare_compressor(settings)
    except ScaleDownError:
        if not isinstance(settings, dict | QuantizationConfigMixin):
            raise
        return settings


def spare_compressor(settings: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """
    Restricts a quantization to the generator's linear layers.

    Args:
        settings (`QuantizationConfigMixin` or `dict`): Settings of the quantization.

    Returns:
        `QuantizationConfigMixin`: The same, with the compressor, the head and LoRA left out.

    Raises:
        ValueError: this kind of quantization cannot leave modules out.
    """
    if not isinstance(settings, dict | QuantizationConfigMixin):
        raise ScaleDownError(
            f"quantization_config={settings!r} must be settings of a quantization, such as "
            "BitsAndBytesConfig(load_in_4bit=True)."
        )
    settings = AutoQuantizationConfig.from_dict(settings) if isinstance(settings, dict) else copy.deepcopy(settings)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if hasattr(settings, name):
            setattr(settings, name, sorted({*(getattr(settings, name) or ()), *NEVER_QUANTIZED}))
            return settings
    raise ScaleDownError(
        f"{type(settings).__name__} cannot leave the compressor out, which has to keep its precision. Quantize with "
        'BitsAndBytesConfig or TorchAoConfig, or load a model saved with weights_format="delta".'
    )


def is_quantized(generator: PreTrainedModel | None) -> bool:
    """Whether a generator's weights are quantized."""
    return getattr(generator, "hf_quantizer", None) is not None


def share_quantizer(model: PreTrainedModel):
    """
    Makes a quantization known to the whole model, which is saved, and to the generator, which PEFT extends.

    Args:
        model (`ScaleDownModel`): The model; nothing changes when no part of it is quantized.
    """
    source = model if getattr(model, "hf_quantizer", None) is not None else model.generator
    if model.generator is None or getattr(source, "hf_quantizer", None) is None:
        return
    for part in (model, model.generator):
        for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(source, name):
                setattr(part, name, getattr(source, name))
    for module in model.generator.modules():
        # bitsandbytes' kernel for these CPUs repacks weights at their first use and mixes up their scales at the
        # next save; without it they are slower and right.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # Trainer refuses to train a model that is quantized all through; this one trains compressor and LoRA.
    model.is_quantized, model.generator.is_quantized = False, True
    settings = source.config.quantization_config
    if isinstance(settings, BitsAndBytesConfig):
        _warn_of_experts(model.generator)
        model.config.quantization_config = spare_compressor(settings)
    else:
        model.config.quantization_config = copy.deepcopy(settings)


def _warn_of_experts(generator: PreTrainedModel):
    """Says where most of a generator's weights stay as they are: experts, which are no linear layers."""
    weights = [parameter for parameter in generator.parameters() if not hasattr(parameter, "quant_state")]
    experts = sum(weight.numel() for weight in weights if weight.dim() == 3)
    if 2 * experts > generator.num_parameters():
        logger.warning_once(
            f"bitsandbytes quantizes linear layers, and the experts of {generator.config.model_type}, most of its "
            "weights, are none: they keep their size."
        )
