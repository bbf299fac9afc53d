"""The Hugging Face `Trainer` with what joint training of compressor and generator adds to it."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import Trainer

PARTS_OF_LOSS = ("generation_loss", "reranking_loss")


class ScaleDownTrainer(Trainer):
    """A `Trainer` with two learning rates, both parts of the loss in its log, and ScaleDown's own checkpoints.

    Takes `scaledown.arguments.ScaleDownTrainingArguments`; everything else is the `Trainer`'s.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._num_scored_examples = None
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._last_logged_step = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over four groups: compressor and generator, each with and without weight decay.

        Args:
            model: The model to optimise; the trainer's own by default.

        Returns:
            The optimizer. The first two groups run at `compressor_learning_rate`, the others at `learning_rate`.
        """
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        # Memory and rerank embeddings are inputs, as fixed in scale as the token embeddings they stand among.
        decayed -= {name for name in decayed if name.endswith(("memory_embeddings", "rerank_embedding"))}
        groups = []
        for part, learning_rate in (
            ("compressor.", self.args.compressor_learning_rate),
            ("generator.", self.args.learning_rate),
        ):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and _part_of(n) == part]
            for decay in (True, False):
                parameters = [p for n, p in named if (n in decayed) == decay]
                weight_decay = self.args.weight_decay if decay else 0.0
                groups.append({"params": parameters, "lr": learning_rate, "weight_decay": weight_decay})
        groups = [group for group in groups if group["params"]]
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of one step, and count the questions with teacher scores among them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(_count_scored_examples(batch) for batch in batches)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(torch.tensor([count], device=device)).sum().item()
        self._num_scored_examples = count
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a micro-batch as its share of the whole step's, and keep its two parts for the log."""
        if num_items_in_batch is not None and "reranking_labels" in inputs:
            inputs = {**inputs, "num_scored_examples": self._num_scored_examples}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        sums = self._sums["train" if model.training else "eval"]
        for name in PARTS_OF_LOSS:
            if outputs.get(name) is not None:
                sums[name] += outputs[name].detach().float()
        sums["count"] += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log what the `Trainer` logs, and the generation and the reranking loss beside their weighted sum."""
        steps = self.state.global_step - self._last_logged_step
        if "loss" in logs and steps > 0:
            logs.update(self._drain("train", divide_by=steps))
            self._last_logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Run the `Trainer`'s loop, and add both parts of the loss to its metrics."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = self._drain("eval", divide_by=max(self._sums["eval"]["count"], 1))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
        return output

    def create_model_card(self, *args, **kwargs):
        """Leave the card to the model, which renders its own at every save."""

    def _drain(self, phase: str, divide_by: float) -> dict[str, float]:
        sums, parts = self._sums[phase], {}
        for name in PARTS_OF_LOSS:
            if name in sums:
                value = self.accelerator.gather(sums[name].reshape(1))
                # Each process holds its share of the step's loss, so shares add up; evaluation averages.
                shares = phase == "train" and self.args.average_tokens_across_devices
                parts[name] = (value.sum() if shares else value.mean()).item() / divide_by
        sums.clear()
        return parts

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own would add the arguments as a pickle; the recipe and the card hold them as text.
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self.model.config.weights_format == "delta":
            missing = load_result.missing_keys
            missing[:] = [n for n in missing if not n.startswith("generator.") or "lora_" in n]
        super()._issue_warnings_after_load(load_result)


def _part_of(name: str) -> str:
    """Side of the model a parameter is on, whatever wraps the model."""
    return "compressor." if "compressor." in name.split("generator.")[0] else "generator."


def _count_scored_examples(batch: dict[str, Any]) -> int:
    if "reranking_labels" not in batch:
        return 0
    known = ~batch["reranking_labels"].isnan()
    return int(batch["document_to_example"][known].unique().numel())
