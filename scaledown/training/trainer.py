"""The Hugging Face `Trainer` with what joint training of compressor and generator adds to it."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME

from embeddings_scaledown import compressor_embeddings_name
from errors_scaledown import ScaleDownError
from quantization_scaledown import is_quantized
from weights_scaledown import checkpoint_index, read_tensors

from ..common.devices import hold_learned_in_32_bits
from ..common.metrics import ANSWER_METRICS
from ..data.records import gold_answers_of
from .arguments import ScaleDownTrainingArguments
from .dropout import disable_dropout
from .sampling import SamplesByLength

PARTS_OF_LOSS = ("generation_loss", "reranking_loss", "pointer_loss")


class ScaleDownTrainer(SamplesByLength, Trainer):
    """A `Trainer` with two learning rates, both parts of the loss in its log, and ScaleDown's own checkpoints.

    Takes `scaledown.training.arguments.ScaleDownTrainingArguments`; everything else is the `Trainer`'s.

    Args:
        model: A `ScaleDownModel`.
        args: How to train it.
        load_backbone: For a model without its compressor's backbone: loads it, so that checkpoints are whole.
        kwargs: As in `Trainer`. `compute_metrics` gets logits `(questions, positions, vocabulary)` and labels
            `(questions, positions)` of the last positions of each prompt, where the answers are; as for any causal
            model the logits at one position are of the label at the next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ScaleDownTrainingArguments,
        load_backbone: Callable[[], nn.Module] | None = None,
        **kwargs,
    ):
        hold_learned_in_32_bits(model)
        if not isinstance(args, ScaleDownTrainingArguments):
            raise TypeError(f"args must be ScaleDownTrainingArguments, got {type(args).__name__}.")
        if args.compressor_learning_rate is None:  # OSCAR, table 7
            args.compressor_learning_rate = 5e-5 if model.config.compressor_type == "n_layers" else 1e-4
        model.card_fields = {}  # what was measured before is not true of what comes out
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(model=model, args=args, **kwargs)
        if self.is_sharded:
            if args.predict_with_generate:
                raise ScaleDownError(
                    "predict_with_generate does not work with FSDP or DeepSpeed, which bring a model together for its "
                    "forward pass only; evaluate the losses, and the answers afterwards."
                )
            self._check_every_record_has_documents()
        self._load_backbone = load_backbone
        self._counts: dict[str, int] = {}  # what the parts of a step's loss are averaged over
        self._rates_of_step: dict[str, float] = {}
        self._sides = []  # of the model, one for each group of the optimizer
        self._waited, self._logged_at = 0.0, time.perf_counter()
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def _check_every_record_has_documents(self) -> None:
        records = getattr(self.train_dataset, "records", self.train_dataset)  # those of a cache
        if not isinstance(records, datasets.Dataset) or "documents" not in records.column_names:
            return
        for i, documents in enumerate(records["documents"]):
            if not documents:
                raise ScaleDownError(
                    f"Record {i} has no documents. With FSDP or DeepSpeed every process must run the compressor in "
                    "every step; leave such records out, or use one whole model per device (accelerate/ddp.yaml)."
                )

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over four groups: compressor and generator, each with and without weight decay.

        Args:
            model: The model to optimize; the trainer's own by default.

        Returns:
            The optimizer. The first two groups run at `compressor_learning_rate`, the others at `learning_rate`.
        """
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        # Memory and rerank embeddings are inputs, as fixed in scale as the token embeddings they stand among.
        decayed -= {name for name in decayed if name.endswith(("memory_embeddings", "rerank_embedding"))}
        groups, self._sides = [], []
        for part, learning_rate in (
            ("compressor.", self.args.compressor_learning_rate),
            ("generator.", self.args.learning_rate),
        ):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and _part_of(n) == part]
            for decay in (True, False):
                parameters = [p for n, p in named if (n in decayed) == decay]
                weight_decay = self.args.weight_decay if decay else 0.0
                if parameters:
                    groups.append({"params": parameters, "lr": learning_rate, "weight_decay": weight_decay})
                    self._sides.append(part.removesuffix("."))
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of one step, and count what the parts of its loss are averaged over."""
        started = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - started
        counts = [sum(map(count, batches)) for count in COUNTED.values()]
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(torch.tensor([counts], device=device)).sum(dim=0).tolist()
        self._counts = dict(zip(COUNTED, counts, strict=True))
        if num_items is None and self.args.stage == "pointer":  # no answers, whose tokens the Trainer counts
            num_items = torch.tensor(sum(counts), device=device)
        # Also where another process saw them.
        if self._counts["num_scored_examples"] and self.model.config.reranking_loss_weight > 0:
            self.model.config.reranking_trained = True
        self._sums["train"]["count"] += 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a micro-batch as its share of the whole step's, and keep its parts for the log."""
        if not model.training:  # evaluation averages batches, whatever is computed elsewhere at the same time
            num_items_in_batch = None
        if model.training and num_items_in_batch is not None:
            inputs = {**inputs, **self._counts}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and self.args.world_size > 1:
            loss = loss + self._unused_as_zero(inputs, outputs)
        sums = self._sums["train" if model.training else "eval"]
        # The Trainer averages a loss over questions, so its parts are averaged so too.
        weight = 1 if model.training else _num_examples(inputs)
        for name in PARTS_OF_LOSS:
            if outputs.get(name) is not None:
                sums[name] += weight * outputs[name].detach().float()
        if not model.training:
            sums["count"] += weight
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log what the `Trainer` logs, and both parts of the loss, and the share of the time spent waiting for data."""
        if "loss" in logs:
            logs.update(self._drain("train"))
            if "compressor" in self._rates_of_step:
                logs["compressor_learning_rate"] = self._rates_of_step["compressor"]
            now = time.perf_counter()
            logs["data_wait"] = self._waited / (now - self._logged_at)
            self._waited, self._logged_at = 0.0, now
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Run the `Trainer`'s loop, and add both parts of the loss, and on request the answers' metrics, to its own."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = self._drain("eval")
        if self.args.predict_with_generate:
            parts.update(self._answer_metrics(dataloader.dataset))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict a batch: its loss and, where metrics want more, the logits of its answers and their labels."""
        if prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        logits = outputs["logits"].detach()  # (batch, logits_to_keep, vocabulary)
        return loss.detach().mean(), logits, inputs["labels"][:, -logits.shape[1] :]

    @torch.no_grad()
    def _answer_metrics(self, dataset: Dataset) -> dict[str, float]:
        """Answer every question of the data, greedily, and compare with its gold answers."""
        own = range(self.args.process_index, len(dataset), self.args.world_size)
        batches = [own[i : i + self.args.eval_batch_size] for i in range(0, len(own), self.args.eval_batch_size)]
        collator = replace(self.data_collator, with_answers=False)
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        sums = torch.zeros(len(ANSWER_METRICS) + 1)
        for batch in tqdm(
            batches, desc="Answering", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        ):
            rows = [dataset[i] for i in batch]
            inputs = self._prepare_inputs(collator(rows))
            sequences = model.generate(
                **inputs, max_new_tokens=self.args.generation_max_new_tokens, do_sample=False, use_cache=True
            )
            answers = collator.processor.decode_answers(sequences, inputs["input_ids"].shape[1])
            for answer, row in zip(answers, rows, strict=True):
                gold = gold_answers_of(row)
                sums += torch.tensor([*(metric(answer, gold) for metric in ANSWER_METRICS.values()), 1.0])
        sums = self.accelerator.gather(sums.to(self.args.device).unsqueeze(0)).sum(dim=0)  # (metrics + 1,)
        return dict(zip(ANSWER_METRICS, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def _get_learning_rate(self) -> float:
        # The Trainer's own takes that of the first group, which is the compressor's. It asks before the scheduler moves
        # on, and logs afterwards.
        self._rates_of_step = self._learning_rates()
        return self._rates_of_step.get("generator", super()._get_learning_rate())

    def _learning_rates(self) -> dict[str, float]:
        """The learning rate of each side, as it is now; of a side that learns nothing there is none."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        if len(groups) != len(self._sides):  # an optimizer that was handed in has its own
            return {}
        return {side: float(group["lr"]) for side, group in zip(self._sides, groups, strict=True)}

    def create_model_card(self, *args, **kwargs):
        """Leave the card to the model, which renders its own at every save."""

    def init_hf_repo(self, *args, **kwargs):
        """Leave the repository to the model's own push, at the end."""

    def push_to_hub(self, commit_message: str | None = "End of training", revision: str | None = None, **kwargs) -> str:
        """Push the model as it is now, whole, with its code and its card; checkpoints stay at home.

        Args:
            commit_message: Message of the commit.
            revision: Branch to push to; `hub_revision` of the arguments by default.
            kwargs: Arguments of `ScaleDownModel.push_to_hub`.

        Returns:
            The address of the commit.
        """
        return self.accelerator.unwrap_model(self.model).push_to_hub(
            self.args.hub_model_id or Path(self.args.output_dir).name,
            commit_message=commit_message,
            private=self.args.hub_private_repo,
            token=self.args.hub_token,
            revision=self.args.hub_revision if revision is None else revision,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass

    def _unused_as_zero(self, inputs: dict[str, Any], outputs: Any) -> torch.Tensor | float:
        """Nothing, but with a gradient for what this process's batch leaves unused: the other processes wait for it."""
        if outputs.get("memory_embeddings") is None:
            return 0.0 * sum(p.sum() for n, p in self.model.named_parameters() if _part_of(n) == "compressor.")
        unused = 0.0
        if outputs.get("logits") is None:  # nothing read the slots
            unused = 0.0 * outputs["memory_embeddings"].sum()
        weight = self.accelerator.unwrap_model(self.model).config.reranking_loss_weight
        scores_count = outputs.get("reranking_loss") is not None and weight > 0
        if outputs.get("reranking_scores") is not None and not scores_count:
            unused = unused + 0.0 * outputs["reranking_scores"].sum()
        return unused

    def _drain(self, phase: str) -> dict[str, float]:
        sums = self._sums[phase]
        # All processes gather the same, whatever their own batches held.
        present = [float(name in sums) for name in PARTS_OF_LOSS]
        row = [*(sums[name] for name in PARTS_OF_LOSS), *present, sums["count"]]
        row = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=self.args.device) for value in row])
        rows = self.accelerator.gather(row.unsqueeze(0))  # (processes, values)
        sums.clear()
        # In training each process holds its share of a step's loss, so shares add up; evaluation averages questions.
        shares = phase == "train" and self.args.average_tokens_across_devices
        count = rows[0, -1] if shares else rows[:, -1].sum()
        return {
            name: (rows[:, i].sum() / count.clamp(min=1)).item()
            for i, name in enumerate(PARTS_OF_LOSS)
            if rows[:, len(PARTS_OF_LOSS) + i].any()
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own would add the arguments as a pickle; the recipe and the card hold them as text.
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        if self._load_backbone is not None:
            backbone = self._load_backbone()
            model.compressor.backbone = backbone
            if state_dict is not None:
                state_dict |= backbone.state_dict(prefix="compressor.backbone.")
        model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)
        if self._load_backbone is not None:
            model.compressor.backbone = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's own would write all weights a second time, as a pickle.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            self._load_spread(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self._load_spread(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_spread(self, folder: str) -> None:
        """Each process takes its own parts of an ordinary checkpoint's weights."""
        weights = read_tensors(folder, checkpoint_index(folder), {})
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self.model.config.weights_format == "delta":
            missing = load_result.missing_keys
            missing[:] = [n for n in missing if not n.startswith("generator.") or "lora_" in n]
            if self.model.config.compressor_type == "n_layers":  # the generator's, where they have not learned
                embeddings = compressor_embeddings_name(self.model)
                missing[:] = [n for n in missing if n != embeddings]
        tied = getattr(self.model, "all_tied_weights_keys", {})  # saved once
        load_result.missing_keys[:] = [n for n in load_result.missing_keys if n not in tied]
        if self._load_backbone is not None:
            unexpected = load_result.unexpected_keys
            unexpected[:] = [n for n in unexpected if not n.startswith("compressor.backbone.")]
        if is_quantized(self.model.generator):
            # Quantized weights come with what they are read by, beside the parameter that holds them.
            unexpected = load_result.unexpected_keys
            unexpected[:] = [n for n in unexpected if not (n.startswith("generator.") and ".weight." in n)]
        super()._issue_warnings_after_load(load_result)


def _part_of(name: str) -> str:
    """Side of the model a parameter is on, whatever wraps the model."""
    return "compressor." if "compressor." in name.split("generator.")[0] else "generator."


def _count_scored_examples(batch: dict[str, Any]) -> int:
    if "reranking_labels" not in batch:
        return 0
    known = ~batch["reranking_labels"].isnan()
    return int(batch["document_to_example"][known].unique().numel())


def _count_pointed_chunks(batch: dict[str, Any]) -> int:
    return int(batch["pointer_labels"].any(dim=1).sum()) if "pointer_labels" in batch else 0


# Arguments of the model, and how one micro-batch adds to them.
COUNTED = {"num_scored_examples": _count_scored_examples, "num_pointed_chunks": _count_pointed_chunks}


def _num_examples(batch: dict[str, Any]) -> int:
    """Questions of a batch, which may have no prompts."""
    return len(batch["input_ids"]) if "input_ids" in batch else int(batch["document_to_example"].max()) + 1
