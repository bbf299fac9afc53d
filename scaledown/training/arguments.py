"""Arguments of `train.py`: dataclasses over a YAML recipe and the command line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from errors_scaledown import ScaleDownError

from ..common.command_line import check_least, parse_with, split_names
from ..common.devices import check_processes, must_use_cpu, num_processes_started
from ..common.metrics import ANSWER_METRICS
from .options import HELP_ALL, DataArguments, ModelArguments, OwnTrainingOptions

__all__ = ["DataArguments", "ModelArguments", "ScaleDownTrainingArguments", "parse_arguments"]

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class ScaleDownTrainingArguments(OwnTrainingOptions, TrainingArguments):
    """`TrainingArguments` with the defaults of OSCAR's table 7 and a learning rate for each side.

    Where neither bf16 nor fp16 is set, precision is mixed on a GPU, bf16 where the hardware computes in it and fp16
    elsewhere, and 32 bits on a CPU. `bf16=False` is 32 bits everywhere.
    """

    def __post_init__(self):
        for kind in ("", "_kwargs"):  # under the name that newer releases of transformers have for it
            old, new = f"gradient_checkpointing{kind}", f"activation_checkpointing{kind}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        self.use_cpu = self.use_cpu or must_use_cpu()
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        self.precision_is_set = self.bf16 is not None or self.fp16 is not None
        if on_gpu and not self.precision_is_set:
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = not self.bf16
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if on_gpu else 0
        if self.stage == "pointer":  # which has no other
            self.label_names = ["pointer_labels"]
        self._check_numbers()
        if isinstance(self.report_to, str):
            self.report_to = split_names(self.report_to)
        if self.label_smoothing_factor != 0:
            raise ScaleDownError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the loss is the model's own, "
                "with the reranking loss in it. Leave it at 0."
            )
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric in ANSWER_METRICS and not self.predict_with_generate:
            raise ScaleDownError(
                f"metric_for_best_model={metric} is measured on answers, and evaluation writes none; set "
                "predict_with_generate=true."
            )
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise ScaleDownError(
                    f"early_stopping_patience={self.early_stopping_patience} counts evaluations, and there are none; "
                    "set eval_strategy=steps, eval_steps and eval_file."
                )
            self.load_best_model_at_end = True  # restore the best checkpoint
            self.restore_callback_states_from_checkpoint = True  # patience goes on where it was
        if self.accelerator_config is None:
            # Streamed rows of several processes differ in length, and one process could not deal them out.
            self.accelerator_config = {"dispatch_batches": False}
        if self.two_stage and self.stage in ("pretrain", "pointer", "reader"):
            raise ScaleDownError(
                f"two_stage runs the stages compress and generate, so stage={self.stage} contradicts it."
            )
        learns_from_cache = self.two_stage or self.stage == "generate"
        if self.train_sampling_strategy != "random" and self.stage == "pretrain":
            raise ScaleDownError(f"train_sampling_strategy={self.train_sampling_strategy}: passages are of one length.")
        if self.train_sampling_strategy == "batch_rebalance" and learns_from_cache:
            raise ScaleDownError(
                "train_sampling_strategy=batch_rebalance does not work on a cache; use group_by_length."
            )
        super().__post_init__()
        if num_processes_started() > 1:
            check_processes(self.world_size)
        for name in set(self.report_to).intersection(TRACKERS).difference(get_available_reporting_integrations()):
            raise ScaleDownError(f"report_to={name} needs {name}, which is not installed: pip install {name}.")
        if self.predict_with_generate and self.stage == "reader":
            raise ScaleDownError(
                "predict_with_generate does not go with the stage reader; evaluate its answers afterwards, with "
                "evaluate.py --reader."
            )
        if self.predict_with_generate and self.stage in ("pretrain", "pointer"):
            raise ScaleDownError(
                f"predict_with_generate needs answers, and the stage {self.stage} has none; leave it out."
            )

    def _check_numbers(self) -> None:
        least = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "generation_max_new_tokens": 1,
            "early_stopping_patience": 1,
            "learning_rate": 0,
            "compressor_learning_rate": 0,
            "weight_decay": 0,
            "warmup_steps": 0,
            "seed": 0,
            "data_seed": 0,
        }
        check_least(self, least)
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) >= 2**32:  # numpy's limit
                raise ScaleDownError(f"{name} is {getattr(self, name)}, expected less than 2**32; correct --{name}.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ScaleDownError(f"num_train_epochs={self.num_train_epochs} is no training; set a positive number.")

    @property
    def n_gpu(self) -> int:
        """One device per process: chunks outnumber questions, so a batch cannot be split by rows. Use accelerate."""
        return min(super().n_gpu, 1)

    @property
    def generator_dtype(self) -> torch.dtype:
        """Type of the frozen generator's weights; what is trained is held in 32 bits."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Count the warm-up steps, rounding down: a run of a few steps must not spend them at learning rate 0.

        Args:
            num_training_steps: Steps of the whole run.

        Returns:
            Steps, fewer than the run has.
        """
        steps = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * num_training_steps
        return min(int(steps), max(num_training_steps - 1, 0))


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ScaleDownTrainingArguments]:
    """Parse a recipe and the options that override it.

    Args:
        argv: `[recipe.yaml] [--option value …]`; the command line by default.

    Returns:
        Model, data and training arguments.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The recipe is not a mapping, or names an option there is not.
    """
    argv = ["--help" if option == HELP_ALL else option for option in (sys.argv[1:] if argv is None else argv)]
    classes = (ModelArguments, DataArguments, ScaleDownTrainingArguments)
    parser = HfArgumentParser(classes, usage="%(prog)s [recipe.yaml] [--option value ...]")
    return parse_with(parser, argv)
