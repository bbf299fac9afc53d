"""The project's own options of `train.py`; `arguments` adds them to those of the `Trainer`.

They are separate because the `Trainer`'s take ten seconds to import, and help should not.
"""

import argparse
import sys
from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from errors_scaledown import ScaleDownError

from ..common.command_line import check_least

HELP_ALL = "--help_all"


@dataclass
class ModelArguments:
    """Which backbones to train, or which trained model to go on with."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A ScaleDown model to continue from, instead of backbones."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of model_name_or_path."})
    generator_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal language model that answers: a Hub name or a folder."}
    )
    generator_gguf_file: str | None = field(
        default=None,
        metadata={"help": "GGUF file in the generator's folder or repository; or name a path that ends in .gguf."},
    )
    generator_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the generator."})
    compressor_name_or_path: str | None = field(
        default=None, metadata={"help": "Backbone of a modernbert or llm compressor; n_layers takes none."}
    )
    compressor_gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in the compressor's folder or repository."}
    )
    compressor_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the compressor."})
    compressor_type: Literal["n_layers", "modernbert", "llm"] | None = field(
        default=None,
        metadata={"help": "n_layers (the default), modernbert (any encoder) or llm (any small causal model)."},
    )
    # Unset options take the configuration's defaults, or what the model that is continued has.
    num_compressor_layers: int | None = field(
        default=None, metadata={"help": "Layers of the generator that n_layers copies; 8 by default."}
    )
    num_memory_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum memory embeddings per chunk; by default as chunk_length and compression_rate imply: 8."
        },
    )
    compression_rate: int | None = field(
        default=None,
        metadata={"help": "Document tokens per memory embedding; 16 by default, or as num_memory_tokens implies."},
    )
    slot_pooling: Literal["memory_tokens", "span_mean", "span_attention", "pointer"] | None = field(
        default=None,
        metadata={
            "help": "memory_tokens, span_mean: means over the chunk's own tokens, for a backbone that stays frozen, "
            "span_attention: weighted means that start from the tokens' embeddings (n_layers), quicker to learn, or "
            "pointer: text that the compressor points at, quickest where answers stand in the documents. "
            "span_mean by default in two-stage training from backbones, memory_tokens otherwise."
        },
    )
    pointer_window: int | None = field(
        default=None, metadata={"help": "pointer: slots that hold consecutive text; 8 by default."}
    )
    pointer_loss_weight: float | None = field(
        default=None,
        metadata={"help": "pointer: weight of the loss that asks for a window with the answer; 1 by default."},
    )
    chunk_length: int | None = field(default=None, metadata={"help": "Document tokens per chunk; 128 by default."})
    max_query_length: int | None = field(
        default=None, metadata={"help": "Maximum question tokens for the compressor; 128 by default."}
    )
    enable_reranking: bool | None = field(
        default=None, metadata={"help": "Whether the compressor also scores relevance; true by default."}
    )
    max_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents that the saved model reads where a call names no number, the best by their scores; all "
            "by default. Training reads all."
        },
    )
    reranking_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the reranking loss; 0.05 by default."}
    )
    projector_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the projector (modernbert, llm); 8096 by default."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt of the generator; the paper's by default."}
    )
    train_token_embeddings: bool = field(
        default=True,
        metadata={
            "help": "Whether to train the token embeddings of the compressor's backbone; false keeps them fixed."
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the generator's LoRA, 16 by default; 0 leaves the generator alone."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA; 32 by default."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of LoRA; 0.1 by default."})
    lora_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder of a PEFT adapter to initialize LoRA from, such as the output of --stage reader."},
    )
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "all-linear (the default), or names such as q_proj,v_proj."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the frozen generator in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the frozen generator in 8 bits (bitsandbytes)."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, …"})
    weights_format: Literal["full", "delta"] | None = field(
        default=None,
        metadata={"help": "Checkpoints with every weight (full, the default), or without the generator's."},
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "Merge LoRA into the saved model (weights_format=full): fastest inference."}
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.generator_name_or_path is None):
            raise ScaleDownError(
                "Name either model_name_or_path, a ScaleDown model to continue from, or generator_name_or_path, a "
                "language model to start from."
            )
        begins, unread = "generator_name_or_path", ["revision"]
        if self.model_name_or_path is not None:
            begins = "model_name_or_path"
            unread = ["generator_revision", "generator_gguf_file"]
            unread += ["compressor_name_or_path", "compressor_revision", "compressor_gguf_file"]
        elif self.compressor_name_or_path is None:
            unread += ["compressor_revision", "compressor_gguf_file"]
        for name, least in (("lora_r", 0), ("lora_alpha", 1), ("lora_dropout", 0)):
            value = getattr(self, name)
            if value is not None and (value < least or (name == "lora_dropout" and value >= 1)):
                limit = "from 0 to below 1" if name == "lora_dropout" else f"at least {least}"
                raise ScaleDownError(f"{name}={value} must be {limit}.")
        for name in unread:
            if getattr(self, name) is not None:
                raise ScaleDownError(
                    f"{name}={getattr(self, name)} says nothing about {begins}={getattr(self, begins)}: revision goes "
                    "with model_name_or_path, generator_revision with generator_name_or_path, and compressor_revision "
                    "with compressor_name_or_path; a trained model brings its backbones. Leave it out."
                )

    def backbone_source(self, part: str) -> tuple[str, dict[str, str | None]]:
        """Say where a backbone is read from.

        Args:
            part: generator or compressor.

        Returns:
            Folder or repository, and further arguments of `from_pretrained`: `revision` and `gguf_file`.

        Raises:
            ScaleDownError: There is no such GGUF file.
        """
        from gguf_scaledown import split_gguf  # which needs torch

        name, gguf_file = split_gguf(getattr(self, f"{part}_name_or_path"), getattr(self, f"{part}_gguf_file"))
        return name, {"revision": getattr(self, f"{part}_revision"), "gguf_file": gguf_file}


@dataclass
class DataArguments:
    """What to learn from."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Records to learn from, as prepare_data.py writes; for --stage pretrain plain text: a file (.txt, "
            ".jsonl, .csv, .parquet) or the name of a data set."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "Records to evaluate on, in the same format."})
    text_column: str = field(default="text", metadata={"help": "Pretraining: column of the text."})
    dataset_config: str | None = field(default=None, metadata={"help": "Pretraining: configuration of a data set."})
    train_split: str = field(default="train", metadata={"help": "Pretraining: split of a data set to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Pretraining: split of a data set to evaluate on."})
    streaming: bool = field(
        default=False, metadata={"help": "Pretraining: read the text during training; requires max_steps."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on the first N records only."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate on the first N records only."})
    max_answer_length: int = field(default=128, metadata={"help": "Maximum answer tokens in the loss."})
    too_long: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "What to do with records that exceed the generator's context: skip leaves them out."},
    )
    closed_book: bool = field(default=False, metadata={"help": "Allow that no record has a document."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Two-stage training: folder for the states of stage 1; output_dir/cache by default."},
    )
    cache_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Two-stage training: data type of the cached states."}
    )
    max_shard_size: str = field(default="500MB", metadata={"help": "Two-stage training: maximum size of a cache file."})
    compression_batch_size: int = field(
        default=64, metadata={"help": "Two-stage training: chunks per batch in stage 1."}
    )

    def __post_init__(self):
        if self.train_file is None:
            raise ScaleDownError("train_file is missing; name the records to learn from (prepare_data.py writes them).")
        ones = ("max_train_examples", "max_eval_examples", "compression_batch_size")
        check_least(self, {**dict.fromkeys(ones, 1), "max_answer_length": 2})


@dataclass
class OwnTrainingOptions:
    """What the `Trainer` has no option for, or another default."""

    output_dir: str | None = field(default="runs/joint", metadata={"help": "Folder for checkpoints and the model."})
    stage: Literal["joint", "pretrain", "pointer", "compress", "generate", "reader"] = field(
        default="joint",
        metadata={
            "help": "joint: compressor and generator together. pretrain: both, on plain text. pointer: the "
            "compressor alone, where answers stand and which documents are relevant. compress: write the "
            "cache of two-stage training. generate: train from it. reader: only the generator's LoRA, on whole "
            "documents; the baseline for evaluate.py --reader."
        },
    )
    two_stage: bool = field(
        default=False, metadata={"help": "Run the stages compress and generate, one after the other."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Only report what the run would train, how much memory it needs and how many tokens a step has; no "
            "weights are read."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the generator's LoRA."})
    compressor_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the compressor; 5e-5 for n_layers and 1e-4 otherwise, as in the paper."},
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Questions per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Micro-batches per step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up, in steps or as a share of all steps."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    # The collator reads the records' own columns, and only the answer's labels decide whether there is a loss.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads records."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys that a batch needs for a loss."}
    )
    # Every process gives every weight a gradient, if need be of 0, so that none is waited for in vain.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Must stay off: no weight is left without a gradient."}
    )
    predict_with_generate: bool = field(
        default=False,
        metadata={"help": "Evaluation also answers the questions: exact_match, f1 and match besides the losses."},
    )
    generation_max_new_tokens: int = field(default=32, metadata={"help": "Maximum tokens of these answers."})
    disable_dropout: bool = field(
        default=False,
        metadata={"help": "Train without any dropout: a third faster with a small encoder on a CPU."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after N evaluations without a better metric_for_best_model."},
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Worker processes that tokenize in advance; 4 on a GPU and none on a CPU by default."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16; if neither this nor fp16 is set, the GPU decides."}
    )
    fp16: bool | None = field(default=None, metadata={"help": "Compute in float16 with loss scaling."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between lines of the log."})


def show_help() -> None:
    """Print the project's own options and exit, where help is asked for.

    Raises:
        SystemExit: `-h` or `--help` is among the options.
    """
    if {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        return
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, OwnTrainingOptions),
        usage="%(prog)s [recipe.yaml] [--option value ...]",
        epilog=f"Every option of transformers.TrainingArguments works too; {HELP_ALL} lists them all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.print_help()
    sys.exit()
