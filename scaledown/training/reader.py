"""The stage `reader`: the generator's LoRA learns to answer from whole documents, without a compressor.

A reader is what a ScaleDown model is measured against: the same generator, LoRA, prompt and questions, so that the
comparison does not set a trained model beside an untrained one. It is saved as an ordinary PEFT adapter, from which
joint training may start (`--lora_name_or_path`).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from transformers import PreTrainedModel, Trainer

from errors_scaledown import ScaleDownError
from lora_scaledown import LORA_DEFAULTS
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor
from prompt_scaledown import IGNORE_INDEX, pad
from text_scaledown import padding_id

from ..common.prompts import encode_texts, text_prompts
from ..data.records import answers_of
from .collators import num_answer_positions

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class ReaderCollator:
    """Builds batches of whole documents: the prompt of `JointCollator`, with text where that has slots.

    Args:
        processor: The processor that builds the prompt.
        max_answer_length: Answer tokens learned at most, end token included.
    """

    processor: ScaleDownProcessor
    max_answer_length: int = 128

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build one batch.

        Args:
            records: Rows as `JointCollator` takes them. Of several gold answers the first is learned.

        Returns:
            `input_ids`, `attention_mask` and `position_ids` of shape (batch, length), padded left, `labels` of shape
            (batch, logits_to_keep) and `logits_to_keep`: logits are computed where an answer is learned.

        Raises:
            ValueError: A prompt with its answer exceeds the generator's context.
        """
        queries = [record["query"] for record in records]
        prompts = text_prompts(
            self.processor, queries, encode_texts(self.processor, [record["documents"] for record in records])
        )
        answers = self.processor._encode_answers([answers_of(record)[0] for record in records], self.max_answer_length)
        limit = self.processor.max_prompt_length
        for record, prompt, answer in zip(records, prompts, answers, strict=True):
            if limit is not None and len(prompt) + len(answer) > limit:
                raise ScaleDownError(
                    f"The record {record.get('id')} needs {len(prompt)} tokens for its prompt and {len(answer)} for "
                    f"its answer; the generator reads {limit}. Leave out the record, or some of its documents."
                )
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        learned = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids, attention_mask = pad(rows, padding_id(self.processor.tokenizer), side="left")  # (batch, length)
        labels, _ = pad(learned, IGNORE_INDEX, side="left")
        kept = num_answer_positions(labels)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels[:, -kept:],  # (batch, logits_to_keep)
            "logits_to_keep": kept,
        }


def add_reader_lora(model: ScaleDownModel, settings: dict[str, Any], adapter: str | None = None) -> PeftModel:
    """Put trainable LoRA layers around a generator.

    Args:
        model: A ScaleDown model, of which the generator is used.
        settings: Arguments of `peft.LoraConfig` over the defaults of `ScaleDownModel.add_lora`.
        adapter: Folder of an adapter to go on with, whose settings count then.

    Returns:
        The generator with its adapter, which the `Trainer` saves and goes on with by itself.
    """
    if adapter is not None:
        reader = PeftModel.from_pretrained(model.generator, adapter, is_trainable=True)
    else:
        settings = {**LORA_DEFAULTS, **settings}
        with warnings.catch_warnings():
            # PEFT asks for checkpointing by the name that transformers 5.23 replaces.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            reader = get_peft_model(model.generator, LoraConfig(**settings, task_type="CAUSAL_LM"))
    reader.config.use_cache = False
    return reader


def start_lora_from(model: ScaleDownModel, folder: str) -> None:
    """Give a model's generator the LoRA layers of an adapter, to go on training them.

    Args:
        model: A ScaleDown model without LoRA, or with LoRA of the adapter's rank and modules.
        folder: Folder of a PEFT adapter, such as the stage `reader` saves.

    Raises:
        ScaleDownError: The folder holds no LoRA adapter, or one of another generator or with other settings.
    """
    _check_is_adapter(folder)
    saved = LoraConfig.from_pretrained(folder)
    shape = {"r": saved.r, "lora_alpha": saved.lora_alpha, "target_modules": sorted(saved.target_modules)}
    if model.config.lora_config is None:
        model.add_lora(**shape, lora_dropout=saved.lora_dropout)
    own = {name: parameter for name, parameter in model.generator.named_parameters() if "lora_" in name}
    found = {}
    for name, tensor in load_peft_weights(folder, device="cpu").items():
        name = name.removeprefix("base_model.model.").removesuffix(".weight")
        found[f"{name}.default.weight"] = tensor
    wrong = [name for name in own.keys() | found.keys() if name not in own or name not in found]
    wrong += [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    if wrong:
        raise ScaleDownError(
            f"The adapter in {folder} does not fit the model's LoRA: {len(wrong)} of its weights are missing, left "
            f"over or of another shape ({sorted(wrong)[0]}, …). Use the generator it was trained on, and its lora_r "
            f"({saved.r}) and lora_target_modules."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def load_reader(generator: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Merge a reader's LoRA into its generator.

    Args:
        generator: The generator the reader was trained on; it is changed.
        folder: What the stage `reader` saved.

    Returns:
        The generator, which reads whole documents as it was taught.

    Raises:
        ScaleDownError: The folder holds no LoRA adapter, or one of another generator.
    """
    _check_is_adapter(folder)
    try:
        return PeftModel.from_pretrained(generator, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:  # of another shape, or none of its modules is there
        raise ScaleDownError(
            f"The adapter in {folder} does not fit the generator ({str(error).splitlines()[0]}). Name the reader that "
            "was trained on this generator."
        ) from error


def _check_is_adapter(folder: str) -> None:
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise ScaleDownError(
            f"{folder} holds no {ADAPTER_CONFIG}; name the folder of a PEFT adapter, such as train.py --stage reader "
            "saves."
        )


class ReaderTrainer(Trainer):
    """The Hugging Face `Trainer` over a generator with an adapter; checkpoints and the result are PEFT adapters."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own would add the arguments as a pickle.
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def create_model_card(self, *args, **kwargs):
        """Write none: PEFT's own card, which names the generator, is saved with the adapter."""
