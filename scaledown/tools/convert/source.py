"""The files of a published checkpoint: found in a folder or on the Hub, and read without running anything of theirs."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from errors_scaledown import ScaleDownError

CONFIG_NAME = "config.json"
# What the layout consists of, and no code.
PATTERNS = ("config.json", "*.pth", "*.bin", "*.safetensors", "*.index.json")
# What a process that reads an untrusted file needs of ours.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP")


@dataclass
class Source:
    """A published checkpoint.

    Args:
        name: Its name or folder, as it was given.
        folder: Where its files are.
        commit: The commit they are of; None for a folder.
        config: What its config.json holds.
        tensors: Its weights by file and name, `adapters.pth:decoder_adapter/…`; what has found its place is taken out.
    """

    name: str
    folder: Path
    commit: str | None
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, file: str) -> dict[str, torch.Tensor]:
        """Take the tensors of a file, by their names in it."""
        start = f"{file}:"
        names = [name for name in self.tensors if name.startswith(start)]
        return {name.removeprefix(start): self.tensors.pop(name) for name in names}


def open_source(name: str, revision: str | None) -> Source:
    """Find a checkpoint and read its configuration.

    Args:
        name: Folder, or name on the Hub.
        revision: Branch, tag or commit.

    Raises:
        ScaleDownError: There is no config.json.
    """
    folder, commit = Path(name), None
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
        match = re.search(r"/snapshots/([0-9a-f]{40})", folder.as_posix())
        commit = match.group(1) if match else None
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ScaleDownError(f"{name} has no {CONFIG_NAME}; name the folder of a published checkpoint.")
    return Source(name, folder, commit, json.loads(path.read_text(encoding="utf-8")))


def read_weights(source: Source) -> None:
    """Read all weights of a checkpoint.

    Raises:
        ScaleDownError: There are none, or a file holds something else than tensors.
    """
    paths = sorted(path for path in source.folder.rglob("*") if path.suffix in (".pth", ".bin", ".safetensors"))
    if not paths:
        raise ScaleDownError(f"{source.name} holds no weights: neither .pth nor .bin nor .safetensors files.")
    pickles = [path for path in paths if path.suffix != ".safetensors"]
    read = read_pickles(pickles) if pickles else {}
    for path in paths:
        tensors = read[path] if path in read else read_safetensors(path)
        file = path.relative_to(source.folder).as_posix()
        source.tensors.update({f"{file}:{name}": tensor for name, tensor in tensors.items()})


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_pickles(paths: list[Path]) -> dict[Path, dict[str, torch.Tensor]]:
    """Read the tensors of pickles, in a process of its own that loads nothing but tensors.

    Args:
        paths: The files.

    Returns:
        The tensors of each; names of dictionaries in dictionaries have slashes in between.

    Raises:
        ScaleDownError: A file holds something else.
    """
    script = Path(__file__).with_name("read_pickle.py")
    with tempfile.TemporaryDirectory() as folder:
        targets = {path: Path(folder) / f"{number}.safetensors" for number, path in enumerate(paths)}
        names = [str(name) for path, target in targets.items() for name in (path.absolute(), target)]
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        command = [sys.executable, "-I", str(script), *names]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            failed = next((line for line in reversed(lines) if line in names), "A file")
            reason = next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), "no reason given")
            raise ScaleDownError(
                f"{failed} is no pickle of tensors alone, and nothing in it was run ({reason[:300]}). Ask its "
                "publisher for safetensors, or name another revision."
            )
        return {path: read_safetensors(target) for path, target in targets.items()}
