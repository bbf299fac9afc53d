"""Where models run: the device, the processes, and the type of the weights."""

import os

import torch

from errors_scaledown import ScaleDownError

from .choices import DTYPES


def pick_device() -> str:
    """The accelerator that is there, or the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def find_device(name: str) -> torch.device:
    """The device of a name; auto is what `pick_device` finds. Raises a ValueError for one that is not here."""
    try:
        device = torch.device(pick_device() if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise ScaleDownError(f"device is {name}, which is not here ({message}); correct --device.") from error
    return device


def num_processes_started() -> int:
    """How many processes a launcher such as torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def must_use_cpu() -> bool:
    """Whether several processes were started on a machine with only CPUs, which they must be told to use."""
    return num_processes_started() > 1 and not torch.accelerator.is_available()


def check_processes(number: int) -> None:
    """Check that the processes of this run have found one another.

    Args:
        number: How many there are in this one's group.

    Raises:
        ScaleDownError: Others were started, which would do the same work and write into the same folder.
    """
    started = num_processes_started()
    if number != started:
        raise ScaleDownError(
            f"{started} processes were started (WORLD_SIZE={started}), but this one is in a group of {number}: each "
            "would do all the work by itself. Start one process, or launch as many as there are devices with "
            "`accelerate launch` or `torchrun`."
        )


def wait_for(device: torch.device) -> None:
    """Return when an accelerator has done all it was given, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_dtype(name: str) -> torch.dtype:
    """The type of a model's weights.

    Args:
        name: One of `DTYPES`. auto is bfloat16 where the GPU computes in it, float16 on other GPUs, and float32 else.

    Returns:
        The type.

    Raises:
        ValueError: There is no such name.
    """
    if name not in DTYPES:
        raise ScaleDownError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}; correct --dtype.")
    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def hold_learned_in_32_bits(model: torch.nn.Module) -> None:
    """Hold what learns in 32 bits: AdamW's steps of some 1e-5 vanish in 16-bit weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
