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
"""Building a model from pretrained backbones, and which checkpoints can be one."""

import difflib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .errors_scaledown import ScaleDownError
    from .families_scaledown import language_model_config, warn_of_short_sight
    from .generation_scaledown import greedy_settings
    from .gguf_scaledown import first_layers_of, read_config, split_gguf
    from .processing_scaledown import ScaleDownProcessor
    from .quantization_scaledown import bitsandbytes_config, share_quantizer, spare_compressor_if_possible
    from .weights_scaledown import (
        absolute_name,
        execution_device,
        load_complete,
        load_first_layers,
        pin_revision,
        weights_fingerprint,
    )
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from families_scaledown import language_model_config, warn_of_short_sight
    from generation_scaledown import greedy_settings
    from gguf_scaledown import first_layers_of, read_config, split_gguf
    from processing_scaledown import ScaleDownProcessor
    from quantization_scaledown import bitsandbytes_config, share_quantizer, spare_compressor_if_possible
    from weights_scaledown import (
        absolute_name,
        execution_device,
        load_complete,
        load_first_layers,
        pin_revision,
        weights_fingerprint,
    )

ADAPTER_CONFIG_NAME = "adapter_config.json"


class BackbonesMixin:
    """Building a `ScaleDownModel` from pretrained backbones."""

    @classmethod
    def from_backbones(
        cls,
        generator: str,
        compressor: str | None = None,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        compressor_revision: str | None = None,
        gguf_file: str | None = None,
        compressor_gguf_file: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        dtype: torch.dtype | str = "auto",
        torch_dtype: torch.dtype | str | None = None,
        quantization_config: QuantizationConfigMixin | dict | None = None,
        device_map: str | dict | None = None,
        max_memory: dict | None = None,
        offload_folder: str | None = None,
        offload_buffers: bool | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        with_generator: bool = True,
        with_backbone: bool = True,
        **config_kwargs,
    ) -> "BackbonesMixin":
        r"""
        Builds a model from pretrained backbones.

        Args:
            generator (`str`):
                Hub name or folder of a causal language model with safetensors weights, or the path of a GGUF file.
            compressor (`str`, *optional*):
                Hub name or folder of the compressor's backbone; left out for `compressor_type="n_layers"`, which
                reads the generator's first layers, and only the shards that hold them. Or the path of a GGUF file.
            config (`ScaleDownConfig`, *optional*): Settings; its backbone configurations are filled in.
            revision, compressor_revision (`str`, *optional*): Branch, tag or commit of either repository.
            gguf_file, compressor_gguf_file (`str`, *optional*):
                GGUF file to read in either folder or repository; its weights are unpacked.
            load_in_4bit, load_in_8bit (`bool`, defaults to `False`): Quantize the generator with bitsandbytes.
            dtype (`torch.dtype` or `str`, defaults to `"auto"`): Of the weights; `"auto"` keeps the checkpoint's.
            torch_dtype: Older name of `dtype`.
            quantization_config: As in `from_pretrained`, for the generator.
            device_map, max_memory, offload_folder, offload_buffers: As in `from_pretrained`, for the generator.
            attn_implementation, token, cache_dir, local_files_only: As in `from_pretrained`.
            trust_remote_code (`bool`, defaults to `False`):
                Let tokenizers run code of their repositories. Models are those of transformers.
            with_generator, with_backbone (`bool`, defaults to `True`):
                `False` loads only the other side, as either stage of two-stage training does.
            config_kwargs: Fields of `ScaleDownConfig`, when no `config` is given.

        Returns:
            `ScaleDownModel` in evaluation mode, with its processor, the generator frozen.

        Raises:
            ValueError: settings that contradict each other, or a repository without safetensors.
            ImportError: quantization without bitsandbytes.

        Example:

        ```python
        >>> model = ScaleDownModel.from_backbones(
        ...     "mistralai/Mistral-7B-Instruct-v0.2",
        ...     revision="63a8b081895390a26e140280378bc85ec8bce07a",
        ...     num_compressor_layers=8,
        ... )  # doctest: +SKIP

        ```
        """
        generator, gguf_file = split_gguf(generator, gguf_file)
        if compressor is not None:
            compressor, compressor_gguf_file = split_gguf(compressor, compressor_gguf_file)
        if torch_dtype is not None and dtype != "auto":
            raise ScaleDownError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one thing; pass dtype.")
        dtype = dtype if torch_dtype is None else torch_dtype
        quantization = bitsandbytes_config(load_in_4bit, load_in_8bit, dtype)
        if quantization_config is not None and quantization is not None:
            raise ScaleDownError("quantization_config and load_in_4bit or load_in_8bit exclude each other; choose one.")
        if quantization_config is not None:
            quantization = spare_compressor_if_possible(quantization_config)
        placing = {"max_memory": max_memory, "offload_folder": offload_folder, "offload_buffers": offload_buffers}
        placing = {name: value for name, value in placing.items() if value is not None}
        generator, compressor = absolute_name(generator), absolute_name(compressor)
        settings = _settings_for_backbones(cls.config_class, compressor, config, config_kwargs)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        generator_hub = pin_revision(generator, {**hub, "revision": revision, "gguf_file": gguf_file})
        compressor_hub = {}
        if compressor is not None:
            compressor_hub = {**hub, "revision": compressor_revision, "gguf_file": compressor_gguf_file}
            compressor_hub = pin_revision(compressor, compressor_hub)
        for name, where in ((generator, generator_hub), (compressor, compressor_hub)):
            if name is not None and where["gguf_file"] is None:
                place = {key: value for key, value in where.items() if key != "gguf_file"}
                refuse_adapter(name, place)
                refuse_unknown(name, place)
        config = _config_of_backbones(cls.config_class, settings, generator, compressor, generator_hub, compressor_hub)
        config.reranking_trained = False

        loading = {"attn_implementation": attn_implementation} if attn_implementation is not None else {}
        language_model, backbone = None, None
        if with_generator:
            language_model = load_complete(
                AutoModelForCausalLM,
                generator,
                config=config.generator_config,
                device_map=device_map,
                quantization_config=quantization,
                dtype=dtype,
                **placing,
                **loading,
                **generator_hub,
            )
        # A checkpoint has one type, and "auto" gives every part of the model the one it will be loaded in.
        loading["dtype"] = language_model.dtype if dtype == "auto" and with_generator else dtype
        if with_backbone and compressor is None and gguf_file is not None:
            whole = language_model
            if whole is None:  # a GGUF file is read whole or not at all
                whole = load_complete(AutoModelForCausalLM, generator, **loading, **generator_hub)
            backbone = first_layers_of(whole, config.compressor_config)
        elif with_backbone and compressor is None:
            backbone = load_first_layers(generator, config, loading, hub=generator_hub)
        elif with_backbone:
            backbone = load_complete(
                AutoModel, compressor, config=config.compressor_config, **loading, **compressor_hub
            )
        model = cls(
            config,
            generator=language_model,
            backbone=backbone,
            with_generator=with_generator,
            with_backbone=with_backbone,
        )
        share_quantizer(model)
        model.remember_generator()
        _fit_compressor(model, language_model, backbone)
        # Where mistral-common is installed, Mistral's models come with a tokenizer of its own, which knows neither
        # these arguments nor texts without special tokens.
        code = {"trust_remote_code": trust_remote_code, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(generator, **code, **generator_hub)
        if with_generator:
            model.generation_config = greedy_settings(language_model.generation_config, tokenizer)
        model.processor = ScaleDownProcessor.from_config(
            config,
            tokenizer,
            AutoTokenizer.from_pretrained(compressor, **code, **compressor_hub) if compressor is not None else None,
        )
        return model.eval()


def _settings_for_backbones(
    config_class: type, compressor: str | None, config: PreTrainedConfig | None, config_kwargs: dict
) -> dict:
    """Fields of the configuration to build, without those the backbones decide."""
    if config is not None and config_kwargs:
        raise ScaleDownError(f"Pass either config or its fields, not both: got {', '.join(sorted(config_kwargs))}.")
    unknown = sorted(config_kwargs.keys() - config_class.__annotations__.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], config_class.__annotations__, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ScaleDownError(f"from_backbones has no argument {unknown[0]}{hint}")
    settings = config.to_dict() if config is not None else config_kwargs
    own = ("generator_config", "compressor_config", "auto_map", "_name_or_path", "quantization_config")
    settings = {name: value for name, value in settings.items() if name not in own}
    compressor_type = settings.get("compressor_type", "n_layers")
    if (compressor is None) != (compressor_type == "n_layers"):
        raise ScaleDownError(
            f"compressor={compressor!r} does not go with compressor_type={compressor_type!r}: n_layers copies the "
            "generator's own layers and takes no compressor, the other types need one."
        )
    return settings


def _config_of_backbones(
    config_class: type,
    settings: dict,
    generator: str,
    compressor: str | None,
    generator_hub: dict,
    compressor_hub: dict,
) -> PreTrainedConfig:
    """The configuration with those of the backbones, and where the generator comes from."""
    generator_config = read_config(generator, generator_hub)
    check_generator(generator, generator_config)
    generator_config = language_model_config(generator_config)
    compressor_config = None
    if compressor is not None:
        compressor_config = read_config(compressor, compressor_hub)
        check_compressor(compressor, compressor_config)
        compressor_config = language_model_config(compressor_config)
    config = config_class(**{**settings, "generator_config": generator_config, "compressor_config": compressor_config})
    if compressor is None and getattr(generator_config, "quantization_config", None) is not None:
        raise ScaleDownError(
            f'{generator!r} is quantized; compressor_type="n_layers" trains a copy of its first layers and needs '
            "them unquantized. Name the original checkpoint, and quantize it with load_in_4bit or load_in_8bit."
        )
    warn_of_short_sight(
        config.compressor_config, config.max_query_length + config.chunk_length + config.num_memory_tokens
    )
    config.generator_name_or_path = generator
    config.generator_revision = generator_hub["revision"]
    config.generator_gguf_file = generator_hub["gguf_file"]
    config.generator_fingerprint = weights_fingerprint(generator, **generator_hub)
    return config


def _fit_compressor(model: PreTrainedModel, generator: PreTrainedModel | None, backbone: PreTrainedModel | None):
    """Gives the compressor's own weights the generator's device and the backbone's type, and a start."""
    if generator is not None:
        model.compressor.to(device=execution_device(generator))
    loaded = backbone if backbone is not None else generator
    for name, parameter in model.compressor.named_parameters():
        if loaded is not None and not name.startswith("backbone."):  # whose buffers stay in 32 bits
            parameter.data = parameter.data.to(loaded.dtype)
    if backbone is not None:
        model.compressor.initialize_from_vocabulary()


def refuse_adapter(name_or_path: str, hub: dict):
    """
    Refuses a LoRA adapter where a whole model belongs.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ScaleDownError: there is an adapter and no model.
    """
    missing = {"_raise_exceptions_for_missing_entries": False, **hub}
    if cached_file(name_or_path, CONFIG_NAME, **missing) is not None:
        return
    adapter = cached_file(name_or_path, ADAPTER_CONFIG_NAME, **missing)
    if adapter is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ScaleDownError(
            f"{name_or_path!r} holds an adapter for {base!r} and no model. Name {base!r} as the generator, or merge "
            "the adapter into it (peft: merge_and_unload), save the result and name that."
        )


def refuse_unknown(name_or_path: str, hub: dict):
    """
    Refuses a model that is no model of transformers, but of code in its repository.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub (`dict`): As in `refuse_adapter`.

    Raises:
        ScaleDownError: transformers has no such model.
    """
    kind = PreTrainedConfig.get_config_dict(name_or_path, **hub)[0].get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        raise ScaleDownError(
            f"{name_or_path!r} has model_type={kind!r}, which transformers {transformers.__version__} has no model "
            "for. Code of the repository is not run for backbones, since a saved ScaleDown model could not bring it; "
            "upgrade transformers, or choose a model it has."
        )


def check_generator(name_or_path: str, config: PreTrainedConfig):
    """
    Checks that a checkpoint holds a causal language model.

    Args:
        name_or_path (`str`): Its name, for the error.
        config (`PreTrainedConfig`): Its configuration.

    Raises:
        ScaleDownError: it is a ScaleDown model, an encoder, or a model with encoder and decoder.
    """
    _refuse_scaledown(name_or_path, config, "generator")
    kind = config.model_type
    kinds = {kind, language_model_config(config).model_type}  # a language model may be a part of the whole
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_known = is_remote or not kinds.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if is_encoder or getattr(config, "is_encoder_decoder", False) or not is_known:
        raise ScaleDownError(
            f"{name_or_path!r} is a {kind} model, and the generator must be a causal language model. An encoder can be "
            'the compressor: from_backbones(generator, compressor, compressor_type="modernbert").'
        )


def check_compressor(name_or_path: str, config: PreTrainedConfig):
    """
    Checks that a checkpoint can be a compressor's backbone.

    Args:
        name_or_path (`str`): Its name, for the error.
        config (`PreTrainedConfig`): Its configuration.

    Raises:
        ScaleDownError: it is a ScaleDown model.
    """
    _refuse_scaledown(name_or_path, config, "compressor")


def _refuse_scaledown(name_or_path: str, config: PreTrainedConfig, role: str):
    if config.model_type == "scaledown":
        raise ScaleDownError(
            f"{name_or_path!r} is a ScaleDown model, not a {role}: load it with ScaleDownModel.from_pretrained "
            "(train.py --model_name_or_path), or extract its generator: python -m scaledown.tools.extract_generator."
        )
