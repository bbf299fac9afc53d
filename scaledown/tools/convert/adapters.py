"""LoRA adapters of published checkpoints: their keys, and merging them."""

import re

import torch

from errors_scaledown import ScaleDownError

# Published adapters have alpha = 2 r whatever r is.
LORA_SCALE = 2.0
LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight$")
ENDS = ("embed_tokens.weight", "lm_head.weight")

Adapter = dict[str, dict[str, torch.Tensor]]


def read_adapter(
    state: dict[str, torch.Tensor], rank: int, name: str, ends: dict[str, torch.Tensor] | None = None
) -> Adapter:
    """Sort the tensors of an adapter by the layers they belong to.

    Args:
        state: The tensors by PEFT's names.
        rank: What the configuration says of them.
        name: What to call it in errors.
        ends: Embeddings and head of the model. PEFT puts them into an adapter too where the vocabulary was widened.

    Returns:
        For each layer's name, its matrices `A` and `B`.

    Raises:
        ScaleDownError: A tensor that is no LoRA matrix, a layer without its pair, or another rank.
    """
    adapter: Adapter = {}
    for key, other in state.items():
        match = LORA_KEY.match(key)
        copied = next((end for end in ENDS if key.replace(".base_layer", "").endswith(end)), None)
        if match is None and copied is not None:
            known = [tensor for end, tensor in (ends or {}).items() if end.endswith(copied)]
            if len(known) == 1 and not torch.equal(known[0], other):
                raise ScaleDownError(
                    f"{name} holds {key}, which differs from the model's own; which of them is right is not known."
                )
            continue
        if match is None:
            raise ScaleDownError(f"{name} holds {key} {tuple(other.shape)}, which is no LoRA matrix of a linear layer.")
        adapter.setdefault(match[1], {})[match[2]] = other
    for layer, pair in adapter.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
            raise ScaleDownError(f"{name} has {shapes} for {layer}, expected A and B of rank {rank}.")
    return adapter


@torch.no_grad()
def merge_adapter(weights: dict[str, torch.Tensor], adapter: Adapter, prefix: str, name: str) -> None:
    """Add an adapter to the weights it was trained on, in 32 bits.

    Args:
        weights: A model's weights by name; changed.
        adapter: The adapter.
        prefix: What names in the adapter begin with and those of the weights do not.
        name: What to call it in errors.

    Raises:
        ScaleDownError: The adapter belongs to layers the model does not have.
    """
    for layer, pair in adapter.items():
        key = f"{layer.removeprefix(prefix)}.weight"
        if key not in weights or weights[key].shape != (pair["B"].shape[0], pair["A"].shape[1]):
            found = tuple(weights[key].shape) if key in weights else "no such layer"
            raise ScaleDownError(f"{name} belongs to {layer}, where the model has {found}; name the right base model.")
        change = pair["B"].float() @ pair["A"].float() * LORA_SCALE
        weights[key] = (weights[key].float() + change).to(weights[key].dtype)


@torch.no_grad()
def fill_lora(generator: torch.nn.Module, adapter: Adapter) -> None:
    """Fill the LoRA layers of a generator.

    Raises:
        ScaleDownError: The adapter has other layers than the generator.
    """
    empty = {}
    for name, parameter in generator.named_parameters():
        match = LORA_KEY.match(name)
        if match is not None:
            empty[match[1], match[2]] = parameter
    given = {(layer, side): tensor for layer, pair in adapter.items() for side, tensor in pair.items()}
    if empty.keys() != given.keys():
        layer, side = sorted(empty.keys() ^ given.keys())[0]
        raise ScaleDownError(
            f"decoder_adapter has {len(given)} matrices and the decoder {len(empty)} places for them; "
            f"{layer}.lora_{side} is in one of them only. Name the right base model: --decoder."
        )
    for key, parameter in empty.items():
        parameter.copy_(given[key])
