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
"""Token embeddings that an `n_layers` compressor still shares with the generator: a delta leaves them out."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

try:
    from .errors_scaledown import ScaleDownError
    from .weights_scaledown import checkpoint_index, load_complete, read_tensors
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from weights_scaledown import checkpoint_index, load_complete, read_tensors


def embeddings_name(part: PreTrainedModel) -> str:
    """Name of the parameter that holds the token embeddings of a model."""
    embeddings = part.get_input_embeddings()
    return next(name for name, module in part.named_modules() if module is embeddings) + ".weight"


def compressor_embeddings_name(model: PreTrainedModel) -> str:
    """Name of the compressor's token embeddings among the weights of a `ScaleDownModel` with a backbone."""
    return f"compressor.backbone.{embeddings_name(model.compressor.backbone)}"


def shared_embeddings(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> str | None:
    """
    Finds the compressor's token embeddings, if they are still the generator's.

    Args:
        model (`ScaleDownModel`): With generator and backbone.
        state_dict (`dict[str, torch.Tensor]`): Its weights; those on several devices gathered.

    Returns:
        `str`: Their name among the weights; `None` where they have learned, or nothing can be compared.
    """
    if model.config.compressor_type != "n_layers":
        return None
    name = compressor_embeddings_name(model)
    own, generators = state_dict.get(name), state_dict.get(f"generator.{embeddings_name(model.generator)}")
    if own is None or generators is None or own.is_meta or generators.is_meta or own.shape != generators.shape:
        return None
    return name if torch.equal(own, generators.to(own.device, own.dtype)) else None


def read_embeddings(model: PreTrainedModel, source: dict) -> torch.Tensor:
    """
    Reads the token embeddings of a generator from its repository.

    Args:
        model (`ScaleDownModel`): With a backbone; its configuration names the generator.
        source (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`, and `gguf_file` for a GGUF model.

    Returns:
        `torch.Tensor` of shape `(vocab_size, hidden_size)`.

    Raises:
        ScaleDownError: the checkpoint holds no tensor of that name.
    """
    name_or_path, name = model.config.generator_name_or_path, embeddings_name(model.compressor.backbone)
    if source.get("gguf_file") is not None:  # which is read whole or not at all
        generator = load_complete(AutoModelForCausalLM, name_or_path, config=model.config.generator_config, **source)
        return generator.get_input_embeddings().weight
    hub = {name: value for name, value in source.items() if name != "gguf_file"}
    index = checkpoint_index(name_or_path, **hub)
    found = [key for key in index if f".{key}".endswith(f".{name}")]
    if len(found) != 1:
        raise ScaleDownError(
            f"{name_or_path!r} holds {len(found)} tensors named {name}, expected one: the compressor of this delta "
            "reads its token embeddings there. Name the checkpoint that the delta was made for."
        )
    return read_tensors(name_or_path, {found[0]: index[found[0]]}, hub)[found[0]]


@torch.no_grad()
def fill_embeddings(model: PreTrainedModel, values: torch.Tensor):
    """
    Gives the compressor the generator's token embeddings.

    Args:
        model (`ScaleDownModel`): A model whose checkpoint left them out.
        values (`torch.Tensor` of shape `(vocab_size, hidden_size)`): The generator's.
    """
    module: nn.Module = model.compressor.backbone.get_input_embeddings()
    if not module.weight.is_meta:
        module.weight.copy_(values)
        return
    # Offloaded: accelerate fetches a weight from this mapping whenever the module runs.
    hook = module._hf_hook
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None:
            weights.dataset.state_dict[f"{weights.prefix}weight"] = values.detach().to("cpu", module.weight.dtype)
