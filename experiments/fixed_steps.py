"""Training steps of a few fixed shapes, each recorded as one CUDA graph and replayed.

A model of 135 M parameters spends a step launching some ten thousand kernels, half a second whatever its size. A graph
launches all of them at once, but its shapes and addresses never change, and nothing in it may wait for a number from
the device. So batches are filled up to one of a few shapes, and where everything goes is worked out in advance, on
the CPU. `fixed_loss` computes what `ScaleDownModel.forward` does; `gpu_smollm2.py check` compares them.
"""

from dataclasses import dataclass

import torch
from torch import nn

from modeling_scaledown import ScaleDownModel
from prompt_scaledown import IGNORE_INDEX
from reranking_scaledown import document_scores

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch.

    Args:
        questions: Prompts.
        prompt: Tokens of a prompt and its answer.
        answer: Tokens of an answer that are learned.
        chunks: Chunks in all; 0 where the generator reads text.
        chunk: Tokens of a chunk with its question, and one for reranking.
        slots: Slots of a chunk.
    """

    questions: int
    prompt: int
    answer: int
    chunks: int = 0
    chunk: int = 0
    slots: int = 0


def to_shape(batch: Tensors, shape: Shape) -> Tensors:
    """Bring a batch of a collator to a shape.

    Args:
        batch: What `JointCollator` or `ReaderCollator` returned. Questions that do not fit are left out.
        shape: The shape.

    Returns:
        What `fixed_loss` takes.
    """
    kept = _fitting(batch, shape)
    lengths = batch["attention_mask"].sum(dim=1)
    # Padded at the right, so that neither attention nor positions need a mask: nothing real looks ahead.
    ids = torch.zeros(shape.questions, shape.prompt, dtype=torch.long)
    places = torch.arange(ids.numel()).view_as(ids).clone()
    at = torch.zeros(shape.questions * shape.answer, dtype=torch.long)
    targets = torch.full_like(at, IGNORE_INDEX)
    labels = batch["labels"]
    learned = 0
    for row, i in enumerate(kept):
        length = int(lengths[i])
        ids[row, :length] = batch["input_ids"][i, -length:]
        own = labels[i][labels[i] != IGNORE_INDEX]  # they end the row
        at[learned : learned + len(own)] = row * shape.prompt + torch.arange(length - len(own), length) - 1
        targets[learned : learned + len(own)] = own
        learned += len(own)
    fixed = {"ids": ids, "at": at, "targets": targets, "learned": torch.tensor(float(max(learned, 1)))}
    if not shape.chunks:
        return fixed
    return {**fixed, **_chunks_to_shape(batch, shape, kept, places)}


def smallest_shape(batch: Tensors, shape: Shape) -> Shape:
    """The shape that is filled by what fits of a batch.

    Args:
        batch: What `JointCollator` or `ReaderCollator` returned.
        shape: Sizes at most.

    Returns:
        Its sizes.
    """
    kept = _fitting(batch, shape)
    if not kept:
        return shape
    prompt = int(batch["attention_mask"][kept].sum(dim=1).max())
    answer = int((batch["labels"][kept] != IGNORE_INDEX).sum(dim=1).max())
    if not shape.chunks:
        return Shape(len(kept), prompt, answer)
    of_kept = torch.isin(batch["document_to_example"][batch["chunk_to_document"]], torch.tensor(kept))
    chunk = int(batch["compressor_attention_mask"][of_kept].sum(dim=1).max()) + 1
    return Shape(len(kept), prompt, answer, int(of_kept.sum()), chunk, int(batch["chunk_slots"][of_kept].max()))


def _fitting(batch: Tensors, shape: Shape) -> list[int]:
    """Numbers of the questions that fit."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    answers = (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist()
    chunks = [0] * len(lengths)
    widths = [0] * len(lengths)
    if shape.chunks:
        examples = batch["document_to_example"][batch["chunk_to_document"]].tolist()
        for example, width in zip(examples, batch["compressor_attention_mask"].sum(dim=1).tolist(), strict=True):
            chunks[example] += 1
            widths[example] = max(widths[example], width + 1)
    kept, left = [], shape.chunks
    for i, length in enumerate(lengths):
        fits = length <= shape.prompt and answers[i] <= shape.answer and widths[i] <= shape.chunk and chunks[i] <= left
        if fits and len(kept) < shape.questions:
            kept.append(i)
            left -= chunks[i]
    return kept


def _chunks_to_shape(batch: Tensors, shape: Shape, kept: list[int], places: torch.Tensor) -> Tensors:
    """The compressor's side of a batch, and where its slots go."""
    example = batch["document_to_example"][batch["chunk_to_document"]]
    chosen = torch.isin(example, torch.tensor(kept)).nonzero().flatten()
    count = len(chosen)
    chunk_ids = torch.zeros(shape.chunks, shape.chunk, dtype=torch.long)
    own = torch.zeros(shape.chunks, shape.chunk, dtype=torch.bool)
    width = min(batch["compressor_input_ids"].shape[1], shape.chunk)
    chunk_ids[:count, :width] = batch["compressor_input_ids"][chosen, :width]
    own[:count, :width] = batch["compressor_document_mask"][chosen, :width].bool()
    ends = torch.zeros(shape.chunks, dtype=torch.long)
    ends[:count] = batch["compressor_attention_mask"][chosen].sum(dim=1)
    slots = torch.ones(shape.chunks, dtype=torch.long)
    slots[:count] = batch["chunk_slots"][chosen]
    first = 0
    for row, i in enumerate(kept):
        length = int(batch["attention_mask"][i].sum())
        number = int((example == i).sum())
        filled = [
            places.numel() + chunk * shape.slots + slot
            for chunk in range(first, first + number)
            for slot in range(int(slots[chunk]))
        ]
        places[row, :length][batch["slot_mask"][i, -length:]] = torch.tensor(filled)
        first += number
    # One document more than can be, for the chunks that are not there.
    documents = torch.full((shape.chunks,), shape.chunks, dtype=torch.long)
    documents[:count] = batch["chunk_to_document"][chosen].unique_consecutive(return_inverse=True)[1]
    scores, scored = torch.full((shape.chunks + 1,), torch.nan), 0
    if "reranking_labels" in batch:
        labels = batch["reranking_labels"][batch["chunk_to_document"][chosen].unique_consecutive()]
        scores[: len(labels)] = labels
        known = ~batch["reranking_labels"].isnan() & torch.isin(batch["document_to_example"], torch.tensor(kept))
        scored = batch["document_to_example"][known].unique().numel()
    return {
        "chunk_ids": chunk_ids,
        "own": own,
        "ends": ends,
        "slots": slots,
        "places": places.flatten(),
        "documents": documents,
        "scores": scores,
        "scored": torch.tensor(float(max(scored, 1))),
    }


def fixed_loss(model: ScaleDownModel, batch: Tensors, slots: int) -> torch.Tensor:
    """Loss of a batch, without a shape that depends on a value.

    Args:
        model: With LoRA; its compressor is one of the generator's own layers, with slots over spans.
        batch: From `to_shape`, on the model's device.
        slots: Slots of a chunk, as in the batch's shape.

    Returns:
        What `ScaleDownModel.forward` returns as `loss`.
    """
    embeds = model.get_input_embeddings()(batch["ids"]).flatten(0, 1)  # (questions * prompt, hidden)
    reranking = 0.0
    if "places" in batch:
        memory, scores = _compress(model.compressor, batch, slots)
        embeds = torch.cat([embeds, memory.flatten(0, 1).to(embeds.dtype)])[batch["places"]]
        found = document_scores(scores, batch["documents"], len(batch["scores"]))
        unknown = batch["scores"].isnan()
        missed = (found - batch["scores"]).masked_fill(unknown, 0.0)
        reranking = model.config.reranking_loss_weight * missed.square().sum() / batch["scored"]
    embeds = embeds.view(*batch["ids"].shape, -1)
    states = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    states = states.flatten(0, 1)[batch["at"]]  # (questions * answer, hidden)
    logits = model.get_output_embeddings()(states).float()
    answers = nn.functional.cross_entropy(logits, batch["targets"], ignore_index=IGNORE_INDEX, reduction="sum")
    return answers / batch["learned"] + reranking


def _compress(compressor: nn.Module, batch: Tensors, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory embeddings `(chunks, slots, hidden)` and scores `(chunks,)`."""
    embeds = compressor.backbone.get_input_embeddings()(batch["chunk_ids"])  # (chunks, chunk, hidden)
    at_end = torch.arange(embeds.shape[1], device=embeds.device) == batch["ends"].unsqueeze(1)
    embeds = torch.where(at_end.unsqueeze(-1), compressor.rerank_embedding.to(embeds.dtype), embeds)
    states = compressor.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
    states = compressor.span_attention.normalize(states)
    memory = compressor.span_attention(states, embeds, batch["own"], batch["slots"], slots)
    last = batch["ends"].view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return compressor.projector(memory), compressor.reranking_head(states.gather(1, last).squeeze(1)).squeeze(-1)


class Step:
    """A training step; on a GPU it is recorded for each shape and replayed.

    Args:
        model: The model.
        optimizer: Its learning rates are tensors on a GPU, so that a replayed step reads them.
        bf16: Whether products are taken in 16 bits.
        limit: Longest gradient; one that is not finite counts as zero.
    """

    def __init__(self, model: ScaleDownModel, optimizer: torch.optim.Optimizer, bf16: bool, limit: float = 1.0):
        self.model, self.optimizer, self.bf16, self.limit = model, optimizer, bf16, limit
        self.device = next(model.parameters()).device
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensors, torch.Tensor]] = {}
        self.pool = None

    def __call__(self, batch: Tensors, shape: Shape) -> torch.Tensor:
        """Take a step.

        Args:
            batch: From `to_shape`.
            shape: Its shape.

        Returns:
            The loss, on the device.
        """
        if self.device.type != "cuda":
            return self._step(batch, shape)
        if shape not in self.graphs:
            self.graphs[shape] = self._record(batch, shape)
        graph, inputs, loss = self.graphs[shape]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _step(self, batch: Tensors, shape: Shape) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        # Weights are cast once per step anyway, and a cache of them would be recorded with the graph.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            loss = fixed_loss(self.model, batch, shape.slots)
        loss.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.limit / (length + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        return loss.detach()

    def _record(self, batch: Tensors, shape: Shape) -> tuple[torch.cuda.CUDAGraph, Tensors, torch.Tensor]:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up, and the optimizer its state
                self._step(inputs, shape)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy batches meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self._step(inputs, shape)
        self.pool = graph.pool()
        return graph, inputs, loss


def adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    """AdamW whose steps can be recorded on a GPU."""
    recorded = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device) if recorded else group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, capturable=recorded)


def scale_rates(optimizer: torch.optim.Optimizer, peaks: list[float], factor: float) -> None:
    """Set the learning rates to a share of their peaks."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(peak * factor)
        else:
            group["lr"] = peak * factor
