"""What a run was made with: versions, commit and hardware, for whoever repeats it."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe_environment(packages: Sequence[str], device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """Describe where and with what a run computes.

    Args:
        packages: Names of packages whose versions matter.
        device: Where it computes.
        num_processes: Processes it is spread over.

    Returns:
        `versions`, `git` and `hardware`, as JSON values.
    """
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "git": _git(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": num_processes,
        },
    }


def _git() -> dict[str, Any]:
    """Commit of this checkout, and whether files differ from it; nothing where there is no checkout."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not (ROOT / ".git").exists():
            return {}
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "changed_files": bool(ask("status", "--porcelain"))} if commit else {}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
