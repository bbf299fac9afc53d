"""Reads pickles of tensors and writes them as safetensors. Run as a script, in a process of its own; never imported.

torch refuses whatever is no tensor or container before anything of the file is executed.
"""

import sys
import zipfile

import torch
from safetensors.torch import save_file


def flattened(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Tensors in dictionaries of dictionaries, by their keys with slashes in between."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, dict):
        raise TypeError(f"{name or 'the file'} is {type(value).__name__}, expected tensors by name")
    tensors = {}
    for key, inner in value.items():
        tensors.update(flattened(inner, f"{name}/{key}" if name else str(key)))
    return tensors


def read(source: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, none of which shares its memory with another: safetensors holds nothing twice."""
    # This is the one place where a pickle is opened.
    value = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    tensors, seen = {}, set()
    for name, tensor in flattened(value).items():
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        if place in seen or not tensor.is_contiguous():
            tensor = tensor.contiguous().clone()
        seen.add(place)
        tensors[name] = tensor
    return tensors


def main() -> int:
    """Read the files named first, third and so on, and write those named after each."""
    names = iter(sys.argv[1:])
    for source, target in zip(names, names, strict=True):
        print(source, file=sys.stderr)  # where it ends, if it fails
        save_file(read(source), target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
