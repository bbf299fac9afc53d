# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""ScaleDown processor: questions and ragged lists of documents in, one padded batch out."""

import copy
import math
from numbers import Integral, Real
from pathlib import Path

import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

try:
    from .configuration_scaledown import (
        DEFAULT_CLOSED_BOOK_PROMPT,
        DEFAULT_SYSTEM_PROMPT,
        DEFAULT_USER_PROMPT,
        IS_REMOTE_CODE,
        ScaleDownConfig,
    )
    from .errors_scaledown import ScaleDownError
    from .prompt_scaledown import PromptMixin, date_of, pad
    from .reranking_scaledown import slots_by_document
    from .rows_scaledown import CompressorRowsMixin
    from .settings_scaledown import check_compressor_input, check_prompts, check_sizes, fill_compression_settings
    from .text_scaledown import (
        Conversation,
        check_answers,
        check_encodable,
        check_texts,
        control_ids,
        is_conversation,
        listed,
        read_question,
        tokenize,
    )
    from .windows_scaledown import encode_windows, evidence_by_document
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from configuration_scaledown import (
        DEFAULT_CLOSED_BOOK_PROMPT,
        DEFAULT_SYSTEM_PROMPT,
        DEFAULT_USER_PROMPT,
        IS_REMOTE_CODE,
        ScaleDownConfig,
    )
    from errors_scaledown import ScaleDownError
    from prompt_scaledown import PromptMixin, date_of, pad
    from reranking_scaledown import slots_by_document
    from rows_scaledown import CompressorRowsMixin
    from settings_scaledown import check_compressor_input, check_prompts, check_sizes, fill_compression_settings
    from text_scaledown import (
        Conversation,
        check_answers,
        check_encodable,
        check_texts,
        control_ids,
        is_conversation,
        listed,
        read_question,
        tokenize,
    )
    from windows_scaledown import encode_windows, evidence_by_document

logger = logging.get_logger(__name__)

# Fields of the configuration that the processor shares.
PROCESSOR_FIELDS = (
    "num_memory_tokens",
    "compression_rate",
    "chunk_length",
    "max_query_length",
    "compressor_prompt",
    "compressor_max_length",
    "fixed_slots",
    "learned_separator",
    "tokenize_jointly",
    "pointer_window",
    "system_prompt",
    "user_prompt",
    "closed_book_prompt",
    "document_separator",
    "chat_template_kwargs",
    "prompt_date",
)


class ScaleDownProcessor(CompressorRowsMixin, PromptMixin, ProcessorMixin):
    r"""
    Turns questions and their documents into the inputs of a [`ScaleDownModel`], for training and inference alike.

    Questions and documents are untrusted text: whatever they spell, they are encoded as ordinary text and can neither
    become a special token nor move a slot.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The generator's tokenizer.
        compressor_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The compressor's tokenizer; the generator's when left out (`n_layers`).
        num_memory_tokens (`int`, *optional*): Slots a chunk has at most; 8, as in [`ScaleDownConfig`].
        compression_rate (`int`, *optional*): Document tokens per slot; 16, as in [`ScaleDownConfig`].
        chunk_length (`int`, defaults to 128): Document tokens per chunk.
        max_query_length (`int`, defaults to 128): Query tokens shown to the compressor.
        max_prompt_length (`int`, *optional*): Positions of the generator; a longer prompt is an error.
        system_prompt, user_prompt, closed_book_prompt, document_separator (`str`):
            Parts of the prompt, as in [`ScaleDownConfig`].
        chat_template_kwargs (`dict`, *optional*): Further variables of the chat template.
        prompt_date (`str`, *optional*):
            Date a chat template shows as today's; today, where the template asks for one.
        compressor_prompt, compressor_max_length, fixed_slots, learned_separator, tokenize_jointly, pointer_window:
            How rows and prompts are made, as in [`ScaleDownConfig`].

    Raises:
        ValueError: the generator's tokenizer has no end token.

    Example:

    ```python
    >>> from scaledown import ScaleDownProcessor

    >>> processor = ScaleDownProcessor.from_pretrained(folder)
    >>> batch = processor("Who wrote Ivanhoe?", ["Ivanhoe is a novel by Walter Scott.", "Rob Roy is a river."])
    >>> batch["slot_mask"].sum().item() == batch["chunk_slots"].sum().item()
    True

    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        compressor_tokenizer: PreTrainedTokenizerBase | None = None,
        num_memory_tokens: int | None = None,
        compression_rate: int | None = None,
        chunk_length: int = 128,
        max_query_length: int = 128,
        max_prompt_length: int | None = None,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        user_prompt: str = DEFAULT_USER_PROMPT,
        closed_book_prompt: str = DEFAULT_CLOSED_BOOK_PROMPT,
        document_separator: str = "\n",
        chat_template_kwargs: dict | None = None,
        prompt_date: str | None = None,
        compressor_prompt: str | None = None,
        compressor_max_length: int | None = None,
        fixed_slots: bool = False,
        learned_separator: bool = False,
        tokenize_jointly: bool = False,
        pointer_window: int | None = None,
    ):
        if compressor_tokenizer is None:
            # transformers saves each tokenizer in its own folder and edits it on the way: not the same object twice
            compressor_tokenizer = copy.deepcopy(tokenizer)
        super().__init__(tokenizer, compressor_tokenizer)
        if tokenizer.eos_token_id is None:
            raise ScaleDownError(
                "The generator's tokenizer has no end token, so answers could never end. Set tokenizer.eos_token."
            )
        self.num_memory_tokens = num_memory_tokens
        self.compression_rate = compression_rate
        self.chunk_length = chunk_length
        self.max_query_length = max_query_length
        self.compressor_prompt = compressor_prompt
        self.compressor_max_length = compressor_max_length
        self.fixed_slots = fixed_slots
        self.learned_separator = learned_separator
        self.tokenize_jointly = tokenize_jointly
        self.pointer_window = pointer_window
        self.max_prompt_length = max_prompt_length
        self.system_prompt = system_prompt
        self.user_prompt = user_prompt
        self.closed_book_prompt = closed_book_prompt
        self.document_separator = document_separator
        self.chat_template_kwargs = chat_template_kwargs
        self.prompt_date = date_of(tokenizer) if prompt_date is None else prompt_date
        fill_compression_settings(self)
        self.check()

    def check(self):
        """
        Checks the settings as they are now.

        Raises:
            ScaleDownError: as in [`ScaleDownConfig`].
        """
        check_sizes(self)
        check_compressor_input(self)
        check_prompts(self)

    @classmethod
    def from_config(
        cls,
        config: ScaleDownConfig,
        tokenizer: PreTrainedTokenizerBase,
        compressor_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "ScaleDownProcessor":
        """
        Builds the processor that belongs to a model.

        Args:
            config (`ScaleDownConfig`): The model's configuration.
            tokenizer (`PreTrainedTokenizerBase`): The generator's tokenizer.
            compressor_tokenizer (`PreTrainedTokenizerBase`, *optional*): The compressor's, where it is another.

        Returns:
            `ScaleDownProcessor`: With the configuration's sizes and prompt.
        """
        return cls(
            tokenizer,
            compressor_tokenizer,
            max_prompt_length=getattr(config.generator_config, "max_position_embeddings", None),
            **{name: getattr(config, name) for name in PROCESSOR_FIELDS},
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything `__call__` can return to the model."""
        return [
            "input_ids",
            "attention_mask",
            "slot_mask",
            "labels",
            "compressor_input_ids",
            "compressor_attention_mask",
            "compressor_document_mask",
            "compressor_windows",
            "chunk_slots",
            "chunk_to_document",
            "document_to_example",
            "reranking_labels",
            "pointer_labels",
        ]

    def __call__(
        self,
        questions: str | list[str],
        documents: list[str] | list[list[str]] | None = None,
        answers: str | list[str] | None = None,
        reranking_scores: list[float] | list[list[float] | None] | None = None,
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        max_answer_length: int = 128,
        system_prompt: str | None = None,
        evidence: list[list[list[str]]] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        r"""
        Builds one batch from questions, their documents and, for training, answers and teacher scores.

        Args:
            questions (`str` or `list[str]`):
                One question, or one per example. A question may be a list of messages of `role` and `content`, of which
                the last is the question, the one before are shown to the generator, and a system message stands in
                place of the model's own.
            documents (`list[str]` or `list[list[str]]`, *optional*):
                The documents of the one question, or one list per question; lists may differ in length. An empty list
                (or `None`) gives the closed-book prompt.
            answers (`str` or `list[str]`, *optional*): Answers to learn; adds `labels`.
            reranking_scores (`list[float]` or `list[list[float] | None]`, *optional*):
                Teacher scores, one per document; `None` for a question without. Adds `reranking_labels`.
            compression_rate (`int`, *optional*): Document tokens per slot, for this call.
            num_memory_tokens (`int`, *optional*): Slots per chunk at most, for this call.
            max_answer_length (`int`, defaults to 128): Longer answers are cut (OSCAR, table 7).
            system_prompt (`str`, *optional*): In place of the model's own, for this call.
            evidence (`list[list[list[str]]]`, *optional*):
                Texts to point at in each document of each question, the answer for example, with
                `slot_pooling="pointer"`. Adds `pointer_labels`.
            return_tensors (`str`, defaults to `"pt"`): Only PyTorch tensors are built.

        Returns:
            `BatchFeature` with

            - `input_ids`, `attention_mask` of shape `(batch, prompt_len)`: the prompt (and the answer), padded left;
            - `slot_mask` `(batch, prompt_len)`: true where a memory embedding goes, in the order of the chunks;
            - `labels` `(batch, prompt_len)`: the answer and, unless it was cut, its end token; -100 elsewhere;
            - `compressor_input_ids`, `compressor_attention_mask` `(num_chunks, chunk_len)`: query and chunk, padded
              right;
            - `compressor_document_mask` `(num_chunks, chunk_len)`: true on the chunk's own tokens;
            - `compressor_windows` `(num_chunks, chunk_len, window)`: with `slot_pooling="pointer"`, the generator's ids
              of the text from each token on;
            - `chunk_slots` `(num_chunks,)`: memory embeddings of each chunk;
            - `chunk_to_document` `(num_chunks,)` and `document_to_example` `(num_documents,)`: whose part each one is,
              both ascending;
            - `reranking_labels` `(num_documents,)`: teacher scores, NaN where there is none;
            - `pointer_labels` `(num_chunks, chunk_len)`: true where a window holds a text of `evidence`.

            The chunk keys are absent when no question has documents.

        Raises:
            ValueError: wrong counts, empty texts, values out of range, a prompt past the generator's context. The
                message names the offending index.
            TypeError: something is not text where text is expected.
        """
        if return_tensors != "pt":
            raise ScaleDownError(
                f"return_tensors={return_tensors!r} is not supported: ScaleDown builds PyTorch tensors."
            )
        given = listed(questions)
        questions, documents = self.check_texts(given, documents)
        conversations = self.conversations(given, system_prompt)
        batch = self.encode_documents(questions, documents, compression_rate, num_memory_tokens, evidence)
        slots = slots_by_document(batch, documents)
        if answers is not None:
            answers = check_answers(answers, len(questions))
        batch = {**self.build_prompts(questions, slots, answers, max_answer_length, conversations), **batch}
        if reranking_scores is not None:
            labels = _reranking_labels(reranking_scores, documents)
            if "chunk_slots" in batch:
                batch["reranking_labels"] = labels
        return BatchFeature(batch)

    def check_texts(
        self, questions: str | list[str], documents: list[str] | list[list[str]] | None
    ) -> tuple[list[str], list[list[str]]]:
        """Questions and documents in list form, checked; see `text_scaledown.check_texts`."""
        return check_texts(questions, documents)

    def conversations(self, questions: str | list, system_prompt: str | None = None) -> list[Conversation]:
        """
        Reads what stands before each question.

        Args:
            questions (`str` or `list`): One question, or several; texts or lists of messages.
            system_prompt (`str`, *optional*): For those that bring none of their own.

        Returns:
            `list[Conversation]`: One per question.

        Raises:
            ScaleDownError: as in `read_question`; a system prompt that is no text, or spells a special token.
        """
        if isinstance(questions, str) or is_conversation(questions):
            questions = [questions]
        found = [read_question(question, f"questions[{i}]", system_prompt) for i, question in enumerate(questions)]
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise ScaleDownError(
                f"system_prompt={system_prompt!r} must be a string. A question with one of its own is a list of "
                'messages, the first with the role "system".'
            )
        prompts = {conversation.system_prompt for conversation in found} - {None}
        control = control_ids(self.tokenizer) if prompts else set()  # asking for each token would take seconds
        for prompt in prompts:
            check_encodable(prompt, "The system prompt")
            ids = tokenize(self.tokenizer, prompt, add_special_tokens=False)["input_ids"]
            spelled = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in control]
            if spelled:
                raise ScaleDownError(f"The system prompt {prompt!r} spells the special token {spelled[0]}; remove it.")
        return found

    def encode_documents(
        self,
        questions: list[str],
        documents: list[list[str]],
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
        evidence: list[list[list[str]]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Builds the compressor's side of a batch: every document cut into chunks, the query in each.

        Args:
            questions (`list[str]`): One per list of documents; an empty string compresses without a question.
            documents (`list[list[str]]`): Non-empty texts.
            compression_rate (`int`, *optional*): Document tokens per slot, for this call.
            num_memory_tokens (`int`, *optional*): Slots per chunk at most, for this call.
            evidence (`list[list[list[str]]]`, *optional*): As in `__call__`.

        Returns:
            `dict[str, torch.Tensor]`: The chunk keys of `__call__`; empty when there are no documents.

        Raises:
            ValueError: an override out of range, or a document without a single token.
        """
        rate, max_slots = self._compression_settings(compression_rate, num_memory_tokens)
        if evidence is not None and self.pointer_window is None:
            raise ScaleDownError('evidence is what slot_pooling="pointer" learns to point at; this model has another.')
        evidence = None if evidence is None else evidence_by_document(evidence, documents)
        texts = [document for row in documents for document in row]
        if not texts:
            return {}
        tokenizer = self.compressor_tokenizer
        fixed = self.fixed_slots and compression_rate is None
        rows, own, slots, chunk_to_document, document_to_example = [], [], [], [], []
        for i, row in enumerate(self.compressor_rows(questions, documents)):
            for chunks in row:
                for ids, start, end in chunks:
                    rows.append(ids)
                    own.append([False] * start + [True] * (end - start) + [False] * (len(ids) - end))
                    count = max_slots if fixed else min(math.ceil((end - start) / rate), max_slots)
                    slots.append(count + int(self.learned_separator))
                    chunk_to_document.append(len(document_to_example))
                document_to_example.append(i)
        # The value is masked and never read, so any id of the vocabulary will do.
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        input_ids, attention_mask = pad(rows, pad_id, side="right")
        batch = {
            "compressor_input_ids": input_ids,
            "compressor_attention_mask": attention_mask,
            "compressor_document_mask": pad(own, False, side="right")[0],
            "chunk_slots": torch.tensor(slots),
            "chunk_to_document": torch.tensor(chunk_to_document),
            "document_to_example": torch.tensor(document_to_example),
        }
        if self.pointer_window is not None:
            filled = [count - int(self.learned_separator) for count in slots]
            own = batch["compressor_document_mask"]
            batch.update(encode_windows(self, texts, own, filled, chunk_to_document, evidence))
        return batch

    def decode_answers(self, sequences: torch.Tensor, prompt_length: int = 0) -> list[str]:
        """
        Turns what `generate()` returned into answers.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, prompt_length + new_tokens)`): Token ids.
            prompt_length (`int`, defaults to 0): Leading tokens that are the prompt: `inputs["input_ids"].shape[1]`.

        Returns:
            `list[str]`: One answer per sequence, without special tokens and surrounding white space.
        """
        texts = self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _compression_settings(self, compression_rate: int | None, num_memory_tokens: int | None) -> tuple[int, int]:
        rate = self.compression_rate if compression_rate is None else compression_rate
        if not is_whole(rate) or not 1 <= rate <= self.chunk_length:
            raise ScaleDownError(
                f"compression_rate={rate!r} must be a whole number from 1 to chunk_length={self.chunk_length}."
            )
        limit = self.num_memory_tokens
        max_slots = limit if num_memory_tokens is None else num_memory_tokens
        if not is_whole(max_slots) or not 1 <= max_slots <= limit:
            raise ScaleDownError(
                f"num_memory_tokens={max_slots!r} must be a whole number from 1 to {limit}, the memory embeddings this "
                "model was built with."
            )
        wanted = math.ceil(self.chunk_length / rate)
        if compression_rate is not None and num_memory_tokens is None and wanted > limit:
            logger.warning_once(
                f"compression_rate={rate} asks for {wanted} slots per full chunk; this model has {limit}, so long "
                f"chunks are compressed {self.chunk_length / limit:g}×. Pass num_memory_tokens={limit} to say so."
            )
        return rate, max_slots


def is_lost_folder(name_or_path: str) -> bool:
    """Whether a model was loaded from a folder, known by its whole path, that is not there any more."""
    return Path(name_or_path).is_absolute() and not Path(name_or_path).is_dir()


def check_source(name_or_path: str):
    """
    Checks that the folder a model was loaded from is there, before its processor is read.

    Args:
        name_or_path (`str`): Hub name or folder.

    Raises:
        ScaleDownError: it is a folder that is gone.
    """
    if is_lost_folder(name_or_path):
        raise ScaleDownError(
            f"The folder {name_or_path}, which this model was loaded from, is not there any more, and its "
            "processor was not read before. Put the folder back, or assign a processor: model.processor = "
            "ScaleDownProcessor.from_pretrained(where it is now)."
        )


def is_whole(number: object) -> bool:
    """Whether something is a whole number, of Python or of an array."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _reranking_labels(scores: list, documents: list[list[str]]) -> torch.Tensor:
    """Teacher scores of all documents in a row, NaN for a question without any."""
    scores = listed(scores)  # a teacher returns arrays
    if len(documents) == 1 and any(isinstance(score, Real) for score in scores):
        scores = [scores]
    if len(scores) != len(documents):
        raise ScaleDownError(f"{len(documents)} questions but {len(scores)} lists of reranking_scores; pass one each.")
    labels = []
    for i, (texts, row) in enumerate(zip(documents, scores, strict=True)):
        try:
            row = [math.nan] * len(texts) if row is None else [float(score) for score in row]
        except (TypeError, ValueError):
            raise TypeError(
                f"reranking_scores[{i}] is {row!r}, expected a list of numbers, one per document, or None."
            ) from None
        if len(row) != len(texts):
            raise ScaleDownError(f"reranking_scores[{i}] has {len(row)} scores for {len(texts)} documents.")
        labels += row
    return torch.tensor(labels)


if not IS_REMOTE_CODE:
    AutoProcessor.register(ScaleDownConfig, ScaleDownProcessor, exist_ok=True)
ScaleDownProcessor.register_for_auto_class()

__all__ = ["ScaleDownProcessor"]
