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
"""Weights of the backbones: finding them, checking that they are the right ones, and reading them."""

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

try:
    from .card_scaledown import is_hub_name
    from .compressor_scaledown import FINAL_NORM_NAMES
    from .errors_scaledown import ScaleDownError
    from .families_scaledown import language_model_config
    from .gguf_scaledown import gguf_fingerprint, load_gguf
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from card_scaledown import is_hub_name
    from compressor_scaledown import FINAL_NORM_NAMES
    from errors_scaledown import ScaleDownError
    from families_scaledown import language_model_config
    from gguf_scaledown import gguf_fingerprint, load_gguf

# Where a model of several kinds of input keeps its language model: before transformers 4.52, and since.
LANGUAGE_MODEL_PREFIXES = ("language_model.model.", "model.language_model.")
FINGERPRINT_SAMPLES = 64
# Arguments of loading that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Values summed at once, in a copy in 64 bits that stays in a processor's cache.
CHECKSUM_BLOCK = 1 << 18
# Odd and without pattern, so that products tell places apart and lose nothing in 64 bits.
CHECKSUM_FACTOR = 0x1E3779B97F4A7C15


def absolute_name(name_or_path: str | None) -> str | None:
    """A folder by its whole path, which stays right when the working directory changes; a name as it is."""
    if name_or_path is None or not Path(name_or_path).is_dir():
        return None if name_or_path is None else str(name_or_path)
    return str(Path(name_or_path).resolve())


def pin_revision(name_or_path: str, hub: dict) -> dict:
    """
    Makes a revision the commit it stands for now, so that all that is read goes together.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub (`dict`):
            `revision`, `token`, `cache_dir`, `local_files_only` and the like, and `gguf_file` for a GGUF model.

    Returns:
        `dict`: The same with the commit; as they were for a folder.
    """
    hub = {"revision": None, **hub}
    where = {name: value for name, value in hub.items() if name != "gguf_file"}
    lies_there = hub.get("gguf_file") or CONFIG_NAME
    file = cached_file(name_or_path, lies_there, _raise_exceptions_for_missing_entries=False, **where)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(file).as_posix()) if file is not None else None
    return {**hub, "revision": commit.group(1)} if commit else hub


def weights_fingerprint(name_or_path: str, **hub) -> str:
    """
    Identifies a checkpoint by names, shapes, types and samples of all its tensors, whatever way they are sharded.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, and `gguf_file` for a GGUF model.

    Returns:
        `str`: A SHA-256 in hexadecimal.

    Raises:
        ValueError: there are no safetensors weights.
    """
    gguf_file = hub.pop("gguf_file", None)
    if gguf_file is not None:
        return gguf_fingerprint(name_or_path, gguf_file, hub)
    weight_map = checkpoint_index(name_or_path, **hub)
    digest = hashlib.sha256()
    shard, opened = None, None
    entries = {}
    for name, file in sorted(weight_map.items(), key=lambda item: (item[1], item[0])):
        if file != shard:
            shard, opened = file, _open_weights(cached_file(name_or_path, file, **hub))
        entries[name] = fingerprint_entry(name, opened.get_tensor(name))
    for name in sorted(entries):
        digest.update(entries[name])
    return digest.hexdigest()


def fingerprint_entry(name: str, tensor: torch.Tensor) -> bytes:
    """
    What a fingerprint says of one tensor.

    Args:
        name (`str`): Its name.
        tensor (`torch.Tensor`): The tensor.

    Returns:
        `bytes`: Its name, shape and type, and a sample of its values.
    """
    step = max(1, tensor.numel() // FINGERPRINT_SAMPLES)
    sample = tensor.reshape(-1)[::step].contiguous().view(torch.uint8).cpu()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + sample.numpy().tobytes()


@dataclass
class WeightSample:
    """
    What is kept of a weight, to see later whether it has changed.

    Args:
        shape (`torch.Size`): Its shape.
        values (`torch.Tensor`): Some of its values, in its type.
        checksum (`torch.Tensor` of shape `()`): Of all its bits, in their order.
    """

    shape: torch.Size
    values: torch.Tensor
    checksum: torch.Tensor

    def is_same(self, now: "WeightSample") -> bool:
        """Bit for bit where the type is the same; otherwise as far as the type of now can tell."""
        if self.shape != now.shape:
            return False
        if self.values.dtype == now.values.dtype:
            return torch.equal(self.checksum, now.checksum) and torch.equal(_bits(self.values), _bits(now.values))
        return torch.equal(self.values.to(now.values.dtype), now.values)


def without_wrappers(name: str) -> str:
    """The name of a weight as it is without LoRA layers around it; around experts there are several."""
    return name.replace(".base_layer", "")


def weight_samples(model: nn.Module) -> dict[str, WeightSample]:
    """
    Takes samples of a model's weights, to see later whether they have changed.

    Args:
        model (`nn.Module`): A generator, with LoRA layers or without.

    Returns:
        `dict[str, WeightSample]`: One for each weight, but those of LoRA, quantized, or offloaded.
    """
    samples = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or not parameter.is_floating_point() or parameter.is_meta:  # offloaded ones are meta
            continue
        values = parameter.detach().reshape(-1)
        some = values[:: max(1, values.numel() // FINGERPRINT_SAMPLES)].clone().cpu()  # no view of what may change
        samples[without_wrappers(name)] = WeightSample(parameter.shape, some, _checksum(values))
    return samples


def changed_weights(then: dict[str, WeightSample], model: nn.Module) -> list[str]:
    """
    Compares a model's weights with samples of them.

    Args:
        then (`dict[str, WeightSample]`): What `weight_samples` returned.
        model (`nn.Module`): The model now.

    Returns:
        `list[str]`: Names of the weights that are others, new or gone; none where weights are spread over devices, of
        which no process has all.
    """
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()):
        return []
    now = weight_samples(model)
    away = {without_wrappers(name) for name, p in model.named_parameters() if p.is_meta}
    names = (now.keys() | then.keys()) - away
    return sorted(n for n in names if n not in now or (n not in then or not then[n].is_same(now[n])))


def _checksum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a vector's bits, read as whole numbers, each times a factor of its place; it wraps around at 64 bits."""
    places = torch.arange(min(CHECKSUM_BLOCK, values.numel()), device=values.device) * CHECKSUM_FACTOR
    factors = (places ^ (places >> 29)) | 1
    checksum = torch.zeros((), dtype=torch.int64, device=values.device)
    for block in _bits(values).split(CHECKSUM_BLOCK):
        checksum = checksum * CHECKSUM_FACTOR + (block * factors[: len(block)]).sum()
    return checksum.cpu()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _open_weights(path: str):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ScaleDownError(f"{path} is damaged ({error}); copy or download it again.") from error


def checkpoint_index(name_or_path: str, **hub) -> dict[str, str]:
    """
    Lists the tensors of a safetensors checkpoint, sharded or not; where both are, transformers reads the one file.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `dict[str, str]`: File of each tensor.

    Raises:
        ValueError: there are no safetensors weights.
    """
    single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if single is not None:
        with _open_weights(single) as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        _check_downloaded(name_or_path, hub)
        raise ScaleDownError(
            f"{name_or_path!r} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. ScaleDown reads "
            "safetensors only; convert the checkpoint, or choose a revision that has it."
        )
    return json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]


def _check_downloaded(name_or_path: str, hub: dict):
    """Tells weights that could not be fetched from those a repository does not have, which the cache knows."""
    name = "/".join(filter(None, (hub.get("subfolder"), SAFE_WEIGHTS_INDEX_NAME)))
    if Path(name_or_path).is_dir():
        return
    where = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    if try_to_load_from_cache(name_or_path, name, **where) is not _CACHED_NO_EXIST:
        raise ScaleDownError(
            f"The weights of {name_or_path!r} are not in the cache, and cannot be downloaded: HF_HUB_OFFLINE or "
            "local_files_only is set, or there is no connection to the Hub. Load it once with a connection, or name a "
            "folder that holds it."
        )


def remove_stale_weights(folder: Path):
    """Takes away what an earlier save into the same folder left, sharded otherwise: it would be loaded instead."""
    is_sharded = any(folder.glob("model-*-of-*.safetensors"))
    (folder / (SAFE_WEIGHTS_NAME if is_sharded else SAFE_WEIGHTS_INDEX_NAME)).unlink(missing_ok=True)


def read_tensors(name_or_path: str, weight_map: dict[str, str], hub: dict) -> dict[str, torch.Tensor]:
    """
    Reads some tensors of a checkpoint, and opens no other shards.

    Args:
        name_or_path (`str`): Hub name or folder.
        weight_map (`dict[str, str]`): The tensors wanted, and the file of each.
        hub (`dict`): As in `pin_revision`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by name.
    """
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        with _open_weights(cached_file(name_or_path, shard, **hub)) as file:
            tensors.update({name: file.get_tensor(name) for name, where in weight_map.items() if where == shard})
    return tensors


def _check_complete(name_or_path: str, info: dict):
    """Weights a checkpoint lacks would be random; transformers only warns."""
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))  # never read
    if missing:
        raise ScaleDownError(
            f"{name_or_path!r} lacks {len(missing)} weights of the model its config.json describes ({missing[0]}, …). "
            "Name a checkpoint that holds this model alone and whole."
        )


def check_generator_folder(name_or_path: str, config: PreTrainedConfig):
    """
    Checks that a delta on top of a generator in a folder finds that folder.

    Args:
        name_or_path (`str`): The delta, for the error.
        config (`ScaleDownConfig`): Its configuration, which names the generator.

    Raises:
        ScaleDownError: there is no such folder, or not the GGUF file in it.
    """
    generator = str(config.generator_name_or_path)
    is_folder = Path(generator).is_dir()
    missing = not is_folder and not is_hub_name(generator)
    what = f"folder {generator}"
    if is_folder and config.generator_gguf_file is not None:
        file = Path(generator) / config.generator_gguf_file
        missing, what = not file.is_file(), f"file {file}"
    if missing:
        raise ScaleDownError(
            f"{name_or_path} is a delta: it holds no generator, and reads that from the {what}, which is "
            "not there. Say where the generator is now: from_pretrained(…, generator_name_or_path=folder or name on "
            'the Hub), or ask for the model saved with weights_format="full".'
        )


def check_fingerprint(name_or_path: str, config: PreTrainedConfig, source: dict):
    """
    Checks that a delta finds the generator it was made for.

    Args:
        name_or_path (`str`): The delta, for the error.
        config (`ScaleDownConfig`): Its configuration, which names the generator and its fingerprint.
        source (`dict`): The generator's `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: the generator has other weights by now.
    """
    generator = config.generator_name_or_path
    check_generator_folder(name_or_path, config)
    found = weights_fingerprint(generator, **source)
    if found != config.generator_fingerprint:
        raise ScaleDownError(
            f"{name_or_path} is a delta on top of {generator!r} (revision {config.generator_revision}), but the "
            f"weights found there are others (fingerprint {found[:12]}…, expected "
            f"{str(config.generator_fingerprint)[:12]}…). Restore that generator, or ask for the model saved with "
            'weights_format="full".'
        )


def load_complete(auto_class: type, name_or_path: str, **kwargs) -> PreTrainedModel:
    """
    Loads a pretrained model, or the language model of one that reads images too, and makes sure that no weight is
    missing.

    Args:
        auto_class (`type`): `AutoModel` or `AutoModelForCausalLM`.
        name_or_path (`str`): Hub name or folder.
        kwargs: As in `from_pretrained`, `gguf_file` included.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        ValueError: the checkpoint lacks weights, which would be random.
    """
    if kwargs.get("gguf_file") is not None:
        return load_gguf(auto_class, name_or_path, **kwargs)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    if kwargs.get("config") is None:
        kwargs["config"] = language_model_config(AutoConfig.from_pretrained(name_or_path, **hub))
    index = checkpoint_index(name_or_path, **hub)
    prefix = language_model_prefix(index)
    if prefix is not None:
        # Whether the head is a weight of its own may be a setting of the whole model.
        kwargs["config"].tie_word_embeddings = not {"lm_head.weight", "language_model.lm_head.weight"} & index.keys()
        kwargs["key_mapping"] = {rf"^{re.escape(prefix)}": "model.", r"^language_model\.lm_head\.": "lm_head."}
    model, info = auto_class.from_pretrained(name_or_path, use_safetensors=True, output_loading_info=True, **kwargs)
    _check_complete(name_or_path, info)
    return model


def language_model_prefix(names: Iterable[str]) -> str | None:
    """
    Finds the language model in a checkpoint of a model that reads images too.

    Args:
        names (`Iterable[str]`): Names of the checkpoint's tensors.

    Returns:
        `str` or `None`: What the names of its tensors begin with, but for its head's; `None` where it is all there is.
    """
    return next((prefix for prefix in LANGUAGE_MODEL_PREFIXES if any(n.startswith(prefix) for n in names)), None)


def load_first_layers(name_or_path: str, config: PreTrainedConfig, loading: dict, hub: dict) -> PreTrainedModel:
    """
    Loads a generator's first layers as a model of their own, from the shards that hold them.

    Args:
        name_or_path (`str`): Hub name or folder of the generator.
        config (`ScaleDownConfig`): With `compressor_config` and `num_compressor_layers`.
        loading (`dict`): `dtype`, `attn_implementation`.
        hub (`dict`): As in `pin_revision`.

    Returns:
        `PreTrainedModel`: Embeddings and first layers.

    Raises:
        ValueError: the checkpoint lacks some of them.
    """
    layer = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
    head = re.compile(r"lm_head\.|decoder\.(?:weight|bias)$")
    wanted, cut_off = {}, {}
    index = checkpoint_index(name_or_path, **hub)
    prefix = language_model_prefix(index)
    own = {
        name: shard
        for name, shard in index.items()
        if not head.match(name) and (prefix is None or name.startswith(prefix))
    }
    final_norm = set() if config.keep_final_norm else _final_norm(name for name in own if not layer.search(name))
    for name, shard in own.items():
        match = layer.search(name)
        if name in final_norm:
            # Lies in the last shard, and the compressor takes it off: not worth reading.
            cut_off[name] = torch.ones(config.compressor_config.hidden_size)
        elif match is None or int(match.group(1)) < config.num_compressor_layers:
            wanted[name] = shard
    tensors = {**read_tensors(name_or_path, wanted, hub), **cut_off}
    tensors = {name.removeprefix(prefix or ""): tensor for name, tensor in tensors.items()}
    # AutoModel itself wants a name; the class it stands for takes tensors.
    backbone_class = AutoModel._model_mapping[type(config.compressor_config)]
    backbone, info = backbone_class.from_pretrained(
        None, config=config.compressor_config, state_dict=tensors, output_loading_info=True, **loading
    )
    _check_complete(name_or_path, info)
    return backbone


def _final_norm(names: Iterable[str]) -> set[str]:
    """Weights of the norm that `remove_final_norm` takes off: norms deeper inside, as after embeddings, stay."""
    kind = re.compile(rf"(?:^|\.)({'|'.join(FINAL_NORM_NAMES)})\.(?:weight|bias)$")
    norms = {name: match.group(1) for name in names if (match := kind.search(name)) is not None}
    depth = min((name.count(".") for name in norms), default=0)
    outermost = {name: norm for name, norm in norms.items() if name.count(".") == depth}
    first = min(outermost.values(), key=FINAL_NORM_NAMES.index, default=None)
    return {name for name, norm in outermost.items() if norm == first}


def execution_device(model: nn.Module) -> torch.device:
    """
    Finds the device a model computes on.

    Args:
        model (`nn.Module`): A model, offloaded or not; parameters that are offloaded are on no device between calls.

    Returns:
        `torch.device`: That of the first parameter, or the one it is moved to when it is needed.
    """
    first = next(model.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook holds several
            device = getattr(part, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    return torch.device("cpu") if first is None else first.device


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for a type of 16 bits, and computes it several times more slowly than 32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    asked = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    names = [name for name in asked.get(dtype, ()) if hasattr(torch.cpu, name)]
    return bool(names) and not any(getattr(torch.cpu, name)() for name in names)


def is_offloaded(model: nn.Module) -> bool:
    """Whether parameters of a model are fetched by accelerate when they are needed."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(parameter.is_meta for parameter in model.parameters())


def split_device_map(device_map: dict) -> tuple[dict, dict]:
    """
    Splits a device map of the whole model into the generator's own and that of the rest.

    Args:
        device_map (`dict`): Device of each part by its name; `""` stands for all of it.

    Returns:
        `tuple[dict, dict]`: Of the generator, by names of its own, and of the rest.
    """
    generator, rest = {}, {}
    for name, place in device_map.items():
        part, _, inner = name.partition(".")
        if part in ("", "generator"):
            generator[inner] = place
        if part != "generator":
            rest[name] = place
    return generator, rest
