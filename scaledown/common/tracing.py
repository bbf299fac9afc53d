"""Peak memory of a training step without computing it: the model's own code runs on tensors that have no data.

What decides shapes and branches (token ids, masks, labels) is real and small, everything else lies on the device
`meta`. Three modes stand in for a device:

- `MemoryTracker` sees every operation, forward and backward, and adds up the storages that are alive;
- `MixedPrecision` casts what autocast casts, since there is no autocast for `meta`;
- `FusedKernels` replaces attention, and layers whose weights are quantized, by what their kernels keep.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from modeling_scaledown import ScaleDownModel

aten = torch.ops.aten
META = torch.device("meta")
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# The marks of a weight that is held in fewer bits than its type on `meta` has.
QUANTIZED_BYTES = "_quantized_bytes"
# Inputs of the model that are values of a network and no labels.
STATES = ("memory_states", "rerank_states", "memory_embeddings")

# The lists of torch.amp for CUDA, as far as language models reach them.
LOW_PRECISION = {
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.matmul,
    torch.mm,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
}
FULL_PRECISION = {
    functional.cross_entropy,
    functional.layer_norm,
    functional.log_softmax,
    functional.nll_loss,
    functional.rms_norm,
    functional.softmax,
    functional.softplus,
    torch.exp,
    torch.log,
    torch.log_softmax,
    torch.pow,
    torch.rsqrt,
    torch.softmax,
    torch.sum,
    torch.Tensor.__pow__,
    torch.Tensor.exp,
    torch.Tensor.log,
    torch.Tensor.log_softmax,
    torch.Tensor.pow,
    torch.Tensor.rsqrt,
    torch.Tensor.softmax,
    torch.Tensor.sum,
}


class MemoryTracker(TorchDispatchMode):
    """Adds up the storages that are made while it is active, for as long as they are alive.

    Integers, booleans and what is made of them alone are computed, so that masks can be read; floating-point tensors
    stay on `meta`. Storages that were there before are not counted.

    Args:
        existing: Tensors that are there already.
    """

    def __init__(self, existing: Any = ()):
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = self._run(func, args, kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.current

    def _run(self, func, args, kwargs):
        if kwargs.get("device") == META:
            values = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if not any(value.is_meta for value in values) and not func(*args, **kwargs).is_floating_point():
                return func(*args, **{**kwargs, "device": torch.device("cpu")})
        if not any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in INDEXING:
            args = (args[0], _as_positions(args[1]), *args[2:])
        elif func is aten.masked_select.default:
            return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
        elif func is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor) and func in _FILLED and not output.is_floating_point():
            return _FILLED[func](output.shape, dtype=output.dtype)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)

        def release(_: Any, key: int = key, size: int = size) -> None:
            self.current -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, release)


class MixedPrecision(TorchFunctionMode):
    """Casts the inputs of operations as `torch.autocast` does on CUDA, copies of weights cached.

    Args:
        dtype: The 16-bit type; `None` casts nothing.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype is not None and func in LOW_PRECISION:
            args, kwargs = tree_map_only(torch.Tensor, self._lower, (args, kwargs))
        elif self.dtype is not None and func in FULL_PRECISION:
            args, kwargs = tree_map_only(torch.Tensor, self._raise, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]

    def _raise(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class FusedKernels(TorchFunctionMode):
    """Replaces what has a kernel of its own on a device and would be taken apart on `meta`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            query, key, value, mask = [*args[:4], *(kwargs.get(name) for name in names[len(args) :])]
            if query.is_meta:
                return _Attention.apply(query, key, value, mask)
        if func is functional.linear and hasattr(args[1], QUANTIZED_BYTES):
            output = _QuantizedLinear.apply(args[0], args[1])
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return output if bias is None else output + bias
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Fused attention keeps its inputs, its output and a number per query; never the matrix of weights."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        if mask is not None and mask.dtype == torch.bool:  # of which it makes what is added to the weights
            mask = query.new_empty(mask.shape)
        output = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _QuantizedLinear(torch.autograd.Function):
    """A frozen layer whose weight is unpacked for each use, forward and backward, and then dropped."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(weight)
        unpacked = torch.empty_like(weight, dtype=inputs.dtype)
        return functional.linear(inputs, unpacked)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        unpacked = torch.empty_like(weight, dtype=grad.dtype)
        return grad @ unpacked, None


_FILLED: dict[Callable, Callable] = {
    aten.zeros_like.default: torch.zeros,
    aten.ones_like.default: torch.ones,
    aten.new_zeros.default: torch.zeros,
    aten.new_ones.default: torch.ones,
}


def build_on_meta(config: Any, attention: str = "sdpa", **parts: bool) -> ScaleDownModel:
    """Build a ScaleDown model without weights.

    Args:
        config: Its configuration, which is given the kind of attention.
        attention: Kind of attention of both backbones.
        **parts: `with_generator` and `with_backbone` of `ScaleDownModel`.

    Returns:
        The model on `meta`.
    """
    for part in (config.generator_config, config.compressor_config):
        part._attn_implementation = attention
    with torch.device(META):
        return ScaleDownModel(config, **parts)


def training_peak(
    model: PreTrainedModel,
    batch: dict[str, Any],
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    micro_batches: int = 2,
) -> int:
    """Trace a step of training and find the most memory that lives beside weights and optimizer state.

    Args:
        model: A model on `meta`, in training mode.
        batch: What the collator made.
        dtype: Type of mixed precision, if any.
        checkpointing: Whether activations are computed again in the backward pass (gradient checkpointing).
        micro_batches: Micro-batches of a step; from the second on, gradients are there when it begins.

    Returns:
        Bytes, gradients included.
    """
    batch = {name: _to_meta(value) if name in STATES else value for name, value in batch.items()}
    if checkpointing:
        # What is computed again is computed outside the modes of the forward pass.
        _switch(model, "enable", {"use_reentrant": False, "context_fn": partial(_checkpoint_contexts, dtype)})
    else:
        _switch(model, "disable")
    tracker = MemoryTracker([*model.parameters(), *model.buffers()])
    with tracker:
        for _ in range(min(micro_batches, 2)):
            tracker.reset_peak()
            _forward_backward(model, batch, dtype)
    model.zero_grad(set_to_none=True)
    return tracker.peak


def inference_peak(run: Callable[[], Any], model: nn.Module) -> int:
    """Trace a computation without gradients.

    Args:
        run: Computes something with the model.
        model: A model on `meta`; its weights are not counted.

    Returns:
        Bytes.
    """
    tracker = MemoryTracker([*model.parameters(), *model.buffers()])
    with tracker, FusedKernels(), torch.no_grad():
        run()
    return tracker.peak


def storage_bytes(model: nn.Module) -> int:
    """Count the bytes that weights and buffers take, tied ones once and quantized ones as they are packed.

    Args:
        model: A model, on `meta` or not.

    Returns:
        Bytes.
    """
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = getattr(tensor, QUANTIZED_BYTES, storage.nbytes())
    return sum(sizes.values())


def _forward_backward(model: PreTrainedModel, batch: dict[str, Any], dtype: torch.dtype | None) -> None:
    with _modes(dtype):
        outputs = model(**batch, num_items_in_batch=torch.tensor(1))
        loss = outputs["loss"]
        # accelerate hands the outputs of mixed precision out in 32 bits.
        outputs = {name: v.float() if torch.is_tensor(v) and v.is_meta else v for name, v in outputs.items()}
    del outputs
    loss.backward()


def _switch(model: PreTrainedModel, how: str, *settings: dict[str, Any]) -> None:
    """transformers 5.23 renamed the methods."""
    name = f"activation_checkpointing_{how}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{how}")(*settings)


def _checkpoint_contexts(dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Contexts of a layer's first and second computation."""
    return contextlib.nullcontext(), _modes(dtype)


@contextlib.contextmanager
def _modes(dtype: torch.dtype | None) -> Iterator[None]:
    with FusedKernels(), MixedPrecision(dtype):
        yield


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device=META)


def _as_positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks as positions: how many a mask selects, only its values say."""
    listed = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            listed += index.nonzero(as_tuple=True)
        else:
            listed.append(index)
    return listed
