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
"""Backbones in GGUF files: finding them, identifying them, and reading them as ordinary models."""

import hashlib
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, is_gguf_available

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

ENDING = ".gguf"
FINGERPRINT_BYTES = 256


def split_gguf(name_or_path: str, gguf_file: str | None) -> tuple[str, str | None]:
    """
    Splits the path of a GGUF file into a folder or repository and a file in it.

    Args:
        name_or_path (`str`):
            Hub name or folder, or a path that ends in `.gguf`; in a repository that is `org/name/file.gguf`.
        gguf_file (`str`, *optional*): The file's name, where `name_or_path` is a folder or a repository.

    Returns:
        `tuple[str, str | None]`: Folder or repository, and file; no file for a model that is not GGUF.

    Raises:
        ScaleDownError: there is no such file, it is named twice, or a folder holds nothing but GGUF files and none of
            them is named.
    """
    path = Path(name_or_path)
    if not str(name_or_path).endswith(ENDING):
        found = gguf_files(name_or_path)
        if gguf_file is None and found and not (path / CONFIG_NAME).is_file():
            raise ScaleDownError(
                f"{name_or_path!r} holds GGUF files and no {CONFIG_NAME}. Say which file to read, such as "
                f"gguf_file={found[0]!r}."
            )
        if gguf_file is not None and path.is_dir() and gguf_file not in found:
            raise ScaleDownError(
                f"{name_or_path!r} has no file {gguf_file!r}; its GGUF files are {', '.join(found) or 'none'}."
            )
        return str(name_or_path), gguf_file
    if gguf_file is not None:
        raise ScaleDownError(f"{name_or_path!r} names a GGUF file already; leave out gguf_file={gguf_file!r}.")
    if path.is_file():
        # In a cache of the Hub the file is a link to one of another name and folder.
        return str(path.parent.resolve()), path.name
    if path.is_absolute() or len(path.parts) < 3 or path.parts[0] in (".", ".."):
        raise ScaleDownError(f"There is no GGUF file {name_or_path!r} (looked from {Path.cwd()}).")
    return "/".join(path.parts[:2]), "/".join(path.parts[2:])


def gguf_files(folder: str) -> list[str]:
    """Names of the GGUF files in a folder; none where there is no such folder."""
    return sorted(file.name for file in Path(folder).glob(f"*{ENDING}"))


def _find(name_or_path: str, gguf_file: str, hub: dict) -> str:
    if not is_gguf_available():
        raise ImportError(f"Reading {gguf_file} needs the package gguf: pip install gguf.")
    return cached_file(name_or_path, gguf_file, **hub)


def read_config(name_or_path: str, hub: dict) -> PreTrainedConfig:
    """
    Reads a backbone's configuration, from its config.json or from its GGUF file.

    Args:
        name_or_path (`str`): Hub name or folder.
        hub (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`, and `gguf_file` for a GGUF model.

    Returns:
        `PreTrainedConfig`: The configuration.

    Raises:
        ScaleDownError: transformers does not know the architecture of a GGUF file.
        ImportError: the package gguf is missing.
    """
    gguf_file = hub.get("gguf_file")
    if gguf_file is None:
        return AutoConfig.from_pretrained(name_or_path, **hub)
    _find(name_or_path, gguf_file, {name: value for name, value in hub.items() if name != "gguf_file"})
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub)
    except ValueError as error:
        raise ScaleDownError(
            f"transformers {transformers.__version__} cannot read {gguf_file} of {name_or_path!r} ({error}). Name the "
            "original checkpoint in safetensors, or a GGUF file of another architecture."
        ) from error
    return _unquantized(config)


def _unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without the note of how the weights were packed, which are ordinary numbers once they are read."""
    for name in ("quantization_config", "_is_quantized"):
        config.__dict__.pop(name, None)
    return config


def load_gguf(
    auto_class: type, name_or_path: str, gguf_file: str, dtype: torch.dtype | str = "auto", **loading
) -> PreTrainedModel:
    """
    Reads a GGUF file as an ordinary model: its weights unpacked, so that it can be trained and saved as safetensors.

    Args:
        auto_class (`type`): `AutoModel` or `AutoModelForCausalLM`.
        name_or_path (`str`): Hub name or folder.
        gguf_file (`str`): The file's name.
        dtype (`torch.dtype` or `str`, defaults to `"auto"`):
            Of the weights; `"auto"` is 32 bits, which loses nothing of the file.
        loading: Further arguments of `from_pretrained`, those of the hub included.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        ScaleDownError: the file lacks weights, or is to be quantized anew.
        ImportError: the package gguf is missing.
    """
    if loading.get("quantization_config") is not None:
        raise ScaleDownError(
            f"{gguf_file} is unpacked when it is read and cannot be quantized on the way. Load it without "
            "load_in_4bit, load_in_8bit and quantization_config, save the model, and load that with them."
        )
    # Its configuration names the file it was read from; the one that was read here is an ordinary model's.
    loading.pop("config", None)
    if hasattr(transformers, "GgufConfig"):  # newer ones keep the weights packed
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = auto_class.from_pretrained(
        name_or_path,
        gguf_file=gguf_file,
        dtype=torch.float32 if dtype == "auto" else dtype,
        output_loading_info=True,
        **loading,
    )
    if info["missing_keys"]:
        raise ScaleDownError(
            f"{gguf_file} of {name_or_path!r} lacks {len(info['missing_keys'])} weights of its model "
            f"({min(info['missing_keys'])}, …). Name a file that holds the model whole."
        )
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    _unquantized(model.config)
    return model


def first_layers_of(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """
    Copies a language model's embeddings and first layers into a model of their own.

    Args:
        model (`PreTrainedModel`): The language model.
        config (`PreTrainedConfig`): Of the copy, with as many layers as it is to have.

    Returns:
        `PreTrainedModel`: The copy, without the language model's head.
    """
    with torch.device("meta"):
        names = AutoModel.from_config(config).state_dict().keys()
    source = model.base_model.state_dict()
    # AutoModel itself wants a name; the class it stands for takes tensors.
    backbone = AutoModel._model_mapping[type(config)].from_pretrained(
        None, config=config, state_dict={name: source[name].clone() for name in names}, dtype=model.dtype
    )
    return backbone.to(model.device)


def gguf_fingerprint(name_or_path: str, gguf_file: str, hub: dict) -> str:
    """
    Identifies a GGUF file by names, shapes, types and samples of all its tensors.

    Args:
        name_or_path (`str`): Hub name or folder.
        gguf_file (`str`): The file's name.
        hub (`dict`): `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `str`: A SHA-256 in hexadecimal.

    Raises:
        ImportError: the package gguf is missing.
    """
    path = _find(name_or_path, gguf_file, hub)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"Reading {gguf_file} needs the package gguf: pip install gguf.") from error
    digest = hashlib.sha256()
    for tensor in sorted(GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        data = tensor.data.reshape(-1).view("uint8")
        sample = data[:: max(1, len(data) // FINGERPRINT_BYTES)]
        digest.update(f"{tensor.name} {tensor.shape.tolist()} {tensor.tensor_type.name} ".encode() + sample.tobytes())
    return digest.hexdigest()


__all__ = ["first_layers_of", "gguf_files", "gguf_fingerprint", "load_gguf", "read_config", "split_gguf"]
