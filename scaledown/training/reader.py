"""The stage `reader`: the generator's LoRA learns to answer from whole documents, without a compressor.

A reader is what a ScaleDown model is measured against: the same generator, LoRA, prompt and questions, so that the
comparison does not set a trained model beside an untrained one. It is saved as an ordinary PEFT adapter, from which
joint training may start (`--lora_name_or_path`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from errors_scaledown import ScaleDownError
from lora_scaledown import LORA_DEFAULTS, fit_to_experts
from modeling_scaledown import ScaleDownModel
from processing_scaledown import ScaleDownProcessor

from ..common.adapters import without_known_warnings
from ..common.prompts import encode_texts, text_prompts
from ..data.records import answers_of
from .arguments import ScaleDownTrainingArguments
from .collators import num_answer_positions
from .dropout import disable_dropout
from .sampling import SamplesByLength


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
        answers = self.processor.encode_answers([answers_of(record)[0] for record in records], self.max_answer_length)
        limit = self.processor.max_prompt_length
        for record, prompt, answer in zip(records, prompts, answers, strict=True):
            if limit is not None and len(prompt) + len(answer) > limit:
                raise ScaleDownError(
                    f"The record {record.get('id')} needs {len(prompt)} tokens for its prompt and {len(answer)} for "
                    f"its answer; the generator reads {limit}. Leave out the record, or some of its documents."
                )
        batch = self.processor.pad_prompts([(prompt, [False] * len(prompt)) for prompt in prompts], answers)
        kept = num_answer_positions(batch["labels"])
        return {
            "input_ids": batch["input_ids"],  # (batch, length)
            "attention_mask": batch["attention_mask"],
            "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0),
            "labels": batch["labels"][:, -kept:],  # (batch, logits_to_keep)
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
    with without_known_warnings():
        if adapter is not None:
            reader = PeftModel.from_pretrained(model.generator, adapter, is_trainable=True)
        else:
            settings = fit_to_experts(model.generator, {**LORA_DEFAULTS, **settings})
            reader = get_peft_model(model.generator, LoraConfig(**settings, task_type="CAUSAL_LM"))
    reader.config.use_cache = False
    return reader


class ReaderTrainer(SamplesByLength, Trainer):
    """The Hugging Face `Trainer` over a generator with an adapter; checkpoints and the result are PEFT adapters.

    Args:
        model: The generator with its adapter.
        args: How to train it.
        kwargs: As in `Trainer`.
    """

    def __init__(self, model: PeftModel, args: ScaleDownTrainingArguments, **kwargs):
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(model=model, args=args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own would add the arguments as a pickle.
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def create_model_card(self, *args, **kwargs):
        """Write none: PEFT's own card, which names the generator, is saved with the adapter."""
