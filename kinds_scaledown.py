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
"""What kind of checkpoint a name stands for, and which call is meant where it is the wrong one."""

import json
from pathlib import Path

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, cached_file

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

ADAPTER_CONFIG_NAME = "adapter_config.json"


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
    kinds = {kind, config.get_text_config(decoder=True).model_type}  # a language model may be a part of the whole
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
