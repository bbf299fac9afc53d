"""Trained weights in pieces below 16 MiB, in 16 bits, as they travel from a machine with a GPU."""

import re
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from modeling_scaledown import ScaleDownModel


def learned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that were trained, in 16 bits."""
    return {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_pieces(model: torch.nn.Module, folder: Path) -> None:
    """Write what was trained in pieces below 16 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(learned(model), folder, max_shard_size="15MB")


def load_pieces(model: torch.nn.Module, folder: Path, saved: str = "", own: str = "") -> None:
    """Read what `save_pieces` wrote; names that began with `saved` begin with `own` here."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {own + name.removeprefix(saved): tensor for name, tensor in load_file(file).items()}
    parameters = dict(model.named_parameters())
    missing = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in weights]
    if missing or weights.keys() - parameters.keys():
        raise ValueError(f"{folder} does not hold this model's learned weights: {missing[:1]} is missing.")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def load_lora(folder: Path, model: ScaleDownModel) -> None:
    """Start LoRA from a PEFT adapter."""
    own = dict(model.generator.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            name = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name.removeprefix("base_model.model."))
            own[name].copy_(tensor)
