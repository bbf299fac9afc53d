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
import datetime
import itertools
import json
import math
import os
import re
import threading
from numbers import Integral, Real

import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

try:
    from .configuration_scaledown import (
        DEFAULT_CLOSED_BOOK_PROMPT,
        DEFAULT_SYSTEM_PROMPT,
        DEFAULT_USER_PROMPT,
        ScaleDownConfig,
        check_prompts,
        check_sizes,
        fill_compression_settings,
    )
    from .conversation_scaledown import Conversation, is_conversation, listed, read_question
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from configuration_scaledown import (
        DEFAULT_CLOSED_BOOK_PROMPT,
        DEFAULT_SYSTEM_PROMPT,
        DEFAULT_USER_PROMPT,
        ScaleDownConfig,
        check_prompts,
        check_sizes,
        fill_compression_settings,
    )
    from conversation_scaledown import Conversation, is_conversation, listed, read_question
    from errors_scaledown import ScaleDownError

logger = logging.get_logger(__name__)

# Stand for the documents and the question while the chat template is rendered, so that no user text ever passes
# through the template.
_DOCUMENTS_MARK = "SCALEDOWN-DOCUMENTS-GO-HERE"
_QUESTION_MARK = "SCALEDOWN-QUESTION-GOES-HERE"
_TURN_MARK = "SCALEDOWN-TURN-{}-GOES-HERE"

# How a chat template asks for today's date, as a format of `strftime`.
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# How a tokenizer splits special tokens is its state, not the call's: two threads must not tokenize at once.
_TOKENIZING = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A process forked in between would inherit a lock that nobody releases, and a tokenizer in the midst of its work.
    os.register_at_fork(
        before=_TOKENIZING.acquire, after_in_parent=_TOKENIZING.release, after_in_child=_TOKENIZING.release
    )

IGNORE_INDEX = -100
# Fields of the configuration that the processor shares.
PROCESSOR_FIELDS = (
    "num_memory_tokens",
    "compression_rate",
    "chunk_length",
    "max_query_length",
    "system_prompt",
    "user_prompt",
    "closed_book_prompt",
    "document_separator",
    "chat_template_kwargs",
    "prompt_date",
)


class ScaleDownProcessor(ProcessorMixin):
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
        self.max_prompt_length = max_prompt_length
        self.system_prompt = system_prompt
        self.user_prompt = user_prompt
        self.closed_book_prompt = closed_book_prompt
        self.document_separator = document_separator
        self.chat_template_kwargs = chat_template_kwargs
        if prompt_date is None and _ASKS_FOR_DATE.search(str(tokenizer.chat_template)):
            prompt_date = datetime.date.today().isoformat()
        self.prompt_date = prompt_date
        fill_compression_settings(self)
        self.check()

    def check(self):
        """
        Checks the settings as they are now.

        Raises:
            ScaleDownError: as in [`ScaleDownConfig`].
        """
        check_sizes(self)
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
            "chunk_slots",
            "chunk_to_document",
            "document_to_example",
            "reranking_labels",
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
            return_tensors (`str`, defaults to `"pt"`): Only PyTorch tensors are built.

        Returns:
            `BatchFeature` with

            - `input_ids`, `attention_mask` of shape `(batch, prompt_len)`: the prompt (and the answer), padded left;
            - `slot_mask` `(batch, prompt_len)`: true where a memory embedding goes, in the order of the chunks;
            - `labels` `(batch, prompt_len)`: the answer and, unless it was cut, its end token; -100 elsewhere;
            - `compressor_input_ids`, `compressor_attention_mask` `(num_chunks, chunk_len)`: query and chunk, padded
              right;
            - `compressor_document_mask` `(num_chunks, chunk_len)`: true on the chunk's own tokens;
            - `chunk_slots` `(num_chunks,)`: memory embeddings of each chunk;
            - `chunk_to_document` `(num_chunks,)` and `document_to_example` `(num_documents,)`: whose part each one is,
              both ascending;
            - `reranking_labels` `(num_documents,)`: teacher scores, NaN where there is none.

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
        batch = self.encode_documents(
            questions, documents, compression_rate=compression_rate, num_memory_tokens=num_memory_tokens
        )
        slots = [[0] * len(row) for row in documents]
        if batch:
            per_document = torch.zeros_like(batch["document_to_example"])
            per_document.index_add_(0, batch["chunk_to_document"], batch["chunk_slots"])
            slots = [part.tolist() for part in per_document.split([len(row) for row in documents])]
        if answers is not None:
            answers = _check_answers(answers, len(questions))
        batch = {**self.build_prompts(questions, slots, answers, max_answer_length, conversations), **batch}
        if reranking_scores is not None:
            labels = _reranking_labels(reranking_scores, documents)
            if "chunk_slots" in batch:
                batch["reranking_labels"] = labels
        return BatchFeature(batch)

    def check_texts(
        self, questions: str | list[str], documents: list[str] | list[list[str]] | None
    ) -> tuple[list[str], list[list[str]]]:
        """
        Brings questions and documents into list form and refuses what is not text.

        Args:
            questions (`str` or `list[str]`):
                One question, or several, in whatever lists them (arrays, generators, columns). A list of messages of
                `role` and `content` is a question too: that of its last message.
            documents (`list[str]`, `list[list[str]]` or `None`): Their documents.

        Returns:
            `tuple[list[str], list[list[str]]]`: As many document lists as questions.

        Raises:
            ValueError: empty texts or wrong counts.
            TypeError: something is not text.
        """
        if isinstance(documents, str):
            raise TypeError(f"documents is one string ({documents[:40]!r}…); pass a list of documents.")
        questions, documents = listed(questions), listed(documents)
        if documents is not None and not isinstance(documents, list):
            raise TypeError(f"documents must be a list, got {type(documents).__name__}; pass list(documents).")
        if is_conversation(questions):
            questions = read_question(questions, "questions").question
        if isinstance(questions, str):
            if documents and isinstance(documents[0], (list, tuple)):
                raise TypeError(
                    "questions is one string but documents[0] is a list: pass that question's documents as a flat "
                    "list, or a list of questions."
                )
            questions, documents = [questions], [documents if documents is not None else []]
        if not isinstance(questions, list):
            raise TypeError(
                f"questions must be a string or a list of strings, got {type(questions).__name__}; pass "
                "list(questions)."
            )
        if len(questions) == 0:
            raise ScaleDownError("questions is empty; pass at least one question.")
        questions = [read_question(question, f"questions[{i}]").question for i, question in enumerate(questions)]
        if documents is None:
            documents = [[] for _ in questions]
        if len(documents) != len(questions):
            raise ScaleDownError(
                f"{len(questions)} questions but {len(documents)} lists of documents; pass one list per question "
                "(an empty list for a question without documents)."
            )
        for i, question in enumerate(questions):
            if not isinstance(question, str):
                raise TypeError(f"questions[{i}] is {type(question).__name__}, expected a string.")
            if not question.strip():
                raise ScaleDownError(f"questions[{i}] is empty; pass the question's text.")
            _check_encodable(question, f"questions[{i}]")
        documents = [listed(row) for row in documents]
        for i, row in enumerate(documents):
            if isinstance(row, str):
                raise TypeError(
                    f"documents[{i}] is a string ({row[:40]!r}…), expected a list of strings: with a list of "
                    "questions, documents holds one list per question."
                )
            if not isinstance(row, list):
                raise TypeError(f"documents[{i}] is {type(row).__name__}, expected a list of strings.")
            for j, document in enumerate(row):
                if not isinstance(document, str):
                    raise TypeError(f"documents[{i}][{j}] is {type(document).__name__}, expected a string.")
                if not document.strip():
                    raise ScaleDownError(f"documents[{i}][{j}] is empty; leave it out or pass its text.")
                _check_encodable(document, f"documents[{i}][{j}]")
        return questions, documents

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
        for prompt in {conversation.system_prompt for conversation in found} - {None}:
            ids = _tokenize(self.tokenizer, prompt, add_special_tokens=False)["input_ids"]
            control = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in _control_ids(self.tokenizer)]
            if control:
                raise ScaleDownError(f"The system prompt {prompt!r} spells the special token {control[0]}; remove it.")
        return found

    def encode_documents(
        self,
        questions: list[str],
        documents: list[list[str]],
        compression_rate: int | None = None,
        num_memory_tokens: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Builds the compressor's side of a batch: every document cut into chunks, the query in each.

        Args:
            questions (`list[str]`): One per list of documents; an empty string compresses without a question.
            documents (`list[list[str]]`): Non-empty texts.
            compression_rate (`int`, *optional*): Document tokens per slot, for this call.
            num_memory_tokens (`int`, *optional*): Slots per chunk at most, for this call.

        Returns:
            `dict[str, torch.Tensor]`: The chunk keys of `__call__`; empty when there are no documents.

        Raises:
            ValueError: an override out of range, or a document without a single token.
        """
        rate, max_slots = self._compression_settings(compression_rate, num_memory_tokens)
        texts = [document for row in documents for document in row]
        if not texts:
            return {}
        tokenizer = self.compressor_tokenizer
        prefix, middle, suffix = self._compressor_frame()
        asked, encoded = (_encode_as_text(tokenizer, part) for part in (questions, texts))
        _warn_of_unknown(tokenizer, [*questions, *texts], [*asked, *encoded])
        queries = [self._cut_query(ids) for ids in asked]
        rows, own, slots, chunk_to_document, document_to_example = [], [], [], [], []
        for i, row in enumerate(documents):
            start = prefix + (queries[i] + middle if queries[i] else [])
            for j in range(len(row)):
                ids = encoded[len(document_to_example)]
                if not ids:
                    raise ScaleDownError(
                        f"documents[{i}][{j}] has no token in the compressor's vocabulary; leave it out."
                    )
                for chunk in _split_evenly(ids, self.chunk_length):
                    rows.append(start + chunk + suffix)
                    own.append([False] * len(start) + [True] * len(chunk) + [False] * len(suffix))
                    slots.append(min(math.ceil(len(chunk) / rate), max_slots))
                    chunk_to_document.append(len(document_to_example))
                document_to_example.append(i)
        # The value is masked and never read, so any id of the vocabulary will do.
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        input_ids, attention_mask = _pad(rows, pad_id, side="right")
        return {
            "compressor_input_ids": input_ids,
            "compressor_attention_mask": attention_mask,
            "compressor_document_mask": _pad(own, False, side="right")[0],
            "chunk_slots": torch.tensor(slots),
            "chunk_to_document": torch.tensor(chunk_to_document),
            "document_to_example": torch.tensor(document_to_example),
        }

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

    def _compressor_frame(self) -> tuple[list[int], list[int], list[int]]:
        """Ids before the query, between query and chunk, and after the chunk, as the backbone was pretrained."""
        tokenizer = self.compressor_tokenizer
        if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
            pair = _tokenize(tokenizer, "a", "b", return_special_tokens_mask=True)
            ids, is_special = pair["input_ids"], pair["special_tokens_mask"]
            first, last = is_special.index(0), len(ids) - 1 - is_special[::-1].index(0)
            gap = [i for i in range(first, last) if is_special[i]]
            return ids[:first], [ids[i] for i in gap], ids[last + 1 :]
        return _first_special_ids(tokenizer), _tokenize(tokenizer, "\n", add_special_tokens=False)["input_ids"], []

    def _cut_query(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_query_length:
            logger.warning_once(
                f"A question of {len(ids)} tokens exceeds max_query_length={self.max_query_length}: the compressor "
                "sees its first part, the generator all of it."
            )
        return ids[: self.max_query_length]

    def build_prompts(
        self,
        questions: list[str],
        document_slots: list[list[int]],
        answers: list[str] | None = None,
        max_answer_length: int = 128,
        conversations: list[Conversation] | None = None,
    ) -> BatchFeature:
        """
        Builds the generator's side of a batch.

        Args:
            questions (`list[str]`): Questions.
            document_slots (`list[list[int]]`): For each question, the slots of each of its documents.
            answers (`list[str]`, *optional*): Answers to learn.
            max_answer_length (`int`, defaults to 128): Longer answers are cut.
            conversations (`list[Conversation]`, *optional*): What stands before each question.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask`, `slot_mask` and, with answers, `labels`, as in `__call__`.

        Raises:
            ValueError: a prompt exceeds the generator's context, answers are cut to nothing, or the chat template does
                not repeat the user's message once.
        """
        learned = [[] for _ in questions]
        if answers is not None:
            learned = self._encode_answers(answers, max_answer_length)
        separator = _encode_continuations(self.tokenizer, [self.document_separator])[0]
        filler = self._slot_filler_id()
        said = [(c.system_prompt, c.turns) for c in conversations or [Conversation(text) for text in questions]]
        kinds = [(not row, *before) for row, before in zip(document_slots, said, strict=True)]
        frames = {kind: self.prompt_frame(*kind) for kind in dict.fromkeys(kinds)}
        leads = [frames[kind][3] for kind in kinds]
        asked = [lead + text for lead, text in zip(leads, questions, strict=True)]
        encoded = _encode_continuations(self.tokenizer, asked)
        prompts = []
        for i, row in enumerate(document_slots):
            before, between, after, _ = frames[kinds[i]]
            ids, is_slot = list(before), [False] * len(before)
            for j, num_slots in enumerate(row):
                if j > 0:
                    ids += separator
                    is_slot += [False] * len(separator)
                ids += [filler] * num_slots
                is_slot += [True] * num_slots
            rest = between + encoded[i] + after
            ids += rest
            is_slot += [False] * len(rest)
            length = len(ids) + len(learned[i])
            if self.max_prompt_length is not None and length > self.max_prompt_length:
                answer = f" and {len(learned[i])} tokens of answer" if answers is not None else ""
                remedy = "Pass fewer documents or a higher compression_rate" if row else "Shorten the question"
                raise ScaleDownError(
                    f"questions[{i}] with its {len(row)} documents needs a prompt of {len(ids)} tokens "
                    f"({sum(is_slot)} of them slots){answer}; the generator reads {self.max_prompt_length}. {remedy}."
                )
            prompts.append((ids, is_slot))
        batch = self._pad_prompts(prompts, learned)
        if answers is None:
            del batch["labels"]
        return BatchFeature(batch)

    def _encode_answers(self, answers: list[str], max_answer_length: int) -> list[list[int]]:
        if max_answer_length < 2:
            raise ScaleDownError(
                f"max_answer_length={max_answer_length} must be at least 2: a token and the end token."
            )
        end = [self.tokenizer.eos_token_id]
        return [(ids + end)[:max_answer_length] for ids in _encode_as_text(self.tokenizer, answers)]

    def prompt_frame(
        self, closed_book: bool, system_prompt: str | None = None, turns: tuple[tuple[str, str], ...] = ()
    ) -> tuple[list[int], list[int], list[int], str]:
        """The prompt without documents and question.

        Args:
            closed_book: The prompt for a question without documents.
            system_prompt: In place of the model's own.
            turns: Role and text of earlier turns.

        Returns:
            Token ids before the documents, between documents and question, and after the question; and the white space
            that belongs in front of the question's text.

        Raises:
            ValueError: the chat template does not repeat the user's message once, or refuses the turns.
        """
        marks = [_TURN_MARK.format(i) for i in range(len(turns))] + [_DOCUMENTS_MARK] * (not closed_book)
        rest, pieces = self._render_prompt(closed_book, system_prompt, turns), []
        for mark in (*marks, _QUESTION_MARK):
            piece, rest = rest.split(mark)
            pieces.append(piece)
        # " Who" is one token for most vocabularies, " " and "Who" are two: the space goes with what is said.
        stripped = [piece.rstrip(" ") for piece in pieces]
        leads = [piece[len(short) :] for piece, short in zip(pieces, stripped, strict=True)]
        if not closed_book:  # slots are no text
            stripped[-2], leads[-2] = pieces[-2], ""
        segments = _encode_continuations(self.tokenizer, [*stripped, rest], as_text=False)
        # Nothing goes before the first, so it continues nothing.
        segments[0] = _tokenize(self.tokenizer, stripped[0], add_special_tokens=False)["input_ids"]
        if self.tokenizer.chat_template is None:
            segments[0][:0] = _first_special_ids(self.tokenizer)
        said = [lead + text for lead, (_, text) in zip(leads, turns, strict=False)]
        said = _encode_continuations(self.tokenizer, said) if said else []
        *before, after = segments
        between = before.pop() if not closed_book else []
        ids = list(itertools.chain.from_iterable(itertools.chain(*pair) for pair in zip(before, said, strict=False)))
        ids += before[-1] if len(before) > len(said) else []
        return (ids, between, after, leads[-1]) if not closed_book else ([], ids, after, leads[-1])

    def _render_prompt(
        self, closed_book: bool, system_prompt: str | None = None, turns: tuple[tuple[str, str], ...] = ()
    ) -> str:
        check_prompts(self)  # which may have been assigned
        system = self.system_prompt if system_prompt is None else system_prompt
        user = self.closed_book_prompt if closed_book else self.user_prompt
        user = user.replace("{documents}", _DOCUMENTS_MARK).replace("{question}", _QUESTION_MARK)
        said = [{"role": role, "content": _TURN_MARK.format(i)} for i, (role, _) in enumerate(turns)]
        said.append({"role": "user", "content": user})
        if self.tokenizer.chat_template is None:
            ends = {"user": "\n\nAnswer:\n", "assistant": "\n\n"}
            return f"{system}\n\n" + "".join(turn["content"] + ends[turn["role"]] for turn in said)
        settings = {**(self.chat_template_kwargs or {}), "tokenize": False, "add_generation_prompt": True}
        if self.prompt_date is not None:
            settings["chat_template"] = _with_date(self.tokenizer.get_chat_template(), self.prompt_date)
        try:
            text = self.tokenizer.apply_chat_template([{"role": "system", "content": system}, *said], **settings)
            refusal = None if system.strip() in text else "it leaves it out"
        except Exception as error:  # templates without a system role raise errors of their own choosing
            refusal = error
        if refusal is not None:
            first = {**said[0], "content": f"{system}\n\n{said[0]['content']}"}
            try:
                text = self.tokenizer.apply_chat_template([first, *said[1:]], **settings)
            except Exception as error:
                if not turns:
                    raise
                roles = ", ".join(turn["role"] for turn in said)
                raise ScaleDownError(f"The chat template refuses the turns {roles}: {error}") from error
            logger.warning_once(f"The chat template takes no system message ({refusal}); it goes into the user's.")
        marks = [_QUESTION_MARK] if closed_book else [_DOCUMENTS_MARK, _QUESTION_MARK]
        if any(text.count(mark) != 1 for mark in marks):
            raise ScaleDownError(
                "The tokenizer's chat template does not repeat the user's message exactly once, so documents and "
                "question cannot be placed. Set tokenizer.chat_template to one that does."
            )
        turn_marks = [_TURN_MARK.format(i) for i in range(len(turns))]
        places = [text.find(mark) for mark in turn_marks]
        if places != sorted(places) or any(text.count(mark) != 1 for mark in turn_marks):
            raise ScaleDownError("The chat template does not repeat earlier turns once and in order; leave them out.")
        return text

    def _slot_filler_id(self) -> int:
        """Id that stands at the slots of `input_ids`; its embedding is replaced and it never means anything."""
        tokenizer = self.tokenizer
        # Not the end token where another is at hand: a repetition penalty looks at the ids of the prompt.
        for token_id in (tokenizer.bos_token_id, tokenizer.pad_token_id):
            if token_id is not None and token_id != tokenizer.eos_token_id:
                return token_id
        return tokenizer.eos_token_id

    def _pad_prompts(
        self, prompts: list[tuple[list[int], list[bool]]], learned: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        rows, slots, labels = [], [], []
        for (ids, is_slot), answer in zip(prompts, learned, strict=True):
            rows.append(ids + answer)
            slots.append(is_slot + [False] * len(answer))
            labels.append([IGNORE_INDEX] * len(ids) + answer)
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        input_ids, attention_mask = _pad(rows, pad_id, side="left")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "slot_mask": _pad(slots, False, side="left")[0],
            "labels": _pad(labels, IGNORE_INDEX, side="left")[0],
        }


def is_whole(number: object) -> bool:
    """Whether something is a whole number, of Python or of an array."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _tokenize(tokenizer: PreTrainedTokenizerBase, *texts, **settings) -> dict:
    with _TOKENIZING:
        return tokenizer(*texts, **settings)


def _with_date(template: str, date: str) -> str:
    """A chat template that takes a date for today's."""
    day = datetime.datetime.fromisoformat(date)
    return _ASKS_FOR_DATE.sub(lambda asked: json.dumps(day.strftime(asked[2]), ensure_ascii=False), template)


def _first_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer puts before a text."""
    single = _tokenize(tokenizer, "a", return_special_tokens_mask=True)
    return single["input_ids"][: single["special_tokens_mask"].index(0)]


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that steer the model: special tokens, and added tokens the chat template uses."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    ids = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    }
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    named = {getattr(tokenizer, name) for name in names} - {None}
    # An unknown character of ordinary text is no attack, unless the vocabulary uses one id for both.
    return (ids | named) - ({tokenizer.unk_token_id} - named)


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of untrusted texts, without any special token whatever the texts spell."""
    settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = _tokenize(tokenizer, texts, split_special_tokens=True, **settings)["input_ids"]
    control = _control_ids(tokenizer)
    return [
        ids if control.isdisjoint(ids) else _encode_without_added_tokens(tokenizer, text, control)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _warn_of_unknown(tokenizer: PreTrainedTokenizerBase, texts: list[str], encoded: list[list[int]]):
    """A vocabulary of one language makes one token of any text of another, which says nothing of it."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    for text, ids in zip(texts, encoded, strict=True):
        if unknown not in ids:
            continue
        known = tokenizer.convert_ids_to_tokens([token_id for token_id in ids if token_id != unknown])
        known = sum(len(token.removeprefix("##").replace("▁", "")) for token in known)
        if known < len("".join(text.split())) / 2:
            logger.warning_once(
                f"More than half of {text[:60]!r} is unknown to the compressor's tokenizer, which makes "
                f"{tokenizer.unk_token!r} of it; the compressor cannot read it. Use a compressor for this language."
            )
            return


def _encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: list[str] | tuple[str, ...], as_text: bool = True
) -> list[list[int]]:
    """Token ids of texts that go on from something: some tokenizers begin every text as if it were a new word."""

    def encode(parts: list[str]) -> list[list[int]]:
        if as_text:
            return _encode_as_text(tokenizer, parts)
        return _tokenize(tokenizer, parts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    # Something is put before the text that does not merge with it, and its ids are taken off again.
    before = ["a" if text[:1].isspace() else "\n" for text in texts]
    starts = [encode([piece])[0] for piece in before]
    whole = encode([piece + text for piece, text in zip(before, texts, strict=True)])
    return [
        ids[len(start) :] if ids[: len(start)] == start else encode([text])[0]
        for ids, start, text in zip(whole, starts, texts, strict=True)
    ]


def _encode_without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str, control: set[int]) -> list[int]:
    """`split_special_tokens` leaves added tokens that are not marked special; here the vocabulary alone decides."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = _tokenize(tokenizer, text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    else:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [text]
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for piece in pieces for token in backend.model.tokenize(piece)]
    return [token_id for token_id in ids if token_id not in control]


def _split_evenly(ids: list[int], chunk_length: int) -> list[list[int]]:
    """The fewest chunks of at most `chunk_length` ids, of equal length, so that none is a leftover of a few tokens."""
    count = math.ceil(len(ids) / chunk_length)
    bounds = [round(k * len(ids) / count) for k in range(count + 1)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


def _pad(rows: list[list], value: int | bool, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor `(len(rows), longest)` and the mask of what is not padding."""
    length = max(len(row) for row in rows)
    gaps = [[value] * (length - len(row)) for row in rows]
    masks = [[0] * len(gap) for gap in gaps]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        padded, mask = zip(gaps, rows, strict=True), zip(masks, ones, strict=True)
    else:
        padded, mask = zip(rows, gaps, strict=True), zip(ones, masks, strict=True)
    return torch.tensor([a + b for a, b in padded]), torch.tensor([a + b for a, b in mask])


def _check_encodable(text: str, name: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ScaleDownError(
            f"{name} has half of a surrogate pair at character {error.start}, which is no text; remove it, for example "
            'with text.encode("utf-8", "replace").decode("utf-8").'
        ) from None


def _check_answers(answers: str | list[str], num_questions: int) -> list[str]:
    answers = [answers] if isinstance(answers, str) else listed(answers)
    if not isinstance(answers, (list, tuple)):
        raise TypeError(f"answers must be a string or a list of strings, got {type(answers).__name__}.")
    if len(answers) != num_questions:
        raise ScaleDownError(f"{num_questions} questions but {len(answers)} answers; pass one answer per question.")
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ScaleDownError(f"answers[{i}] is {answer!r}, expected a non-empty string.")
    return list(answers)


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


if not (__package__ or "").startswith("transformers_modules"):  # two models in one process may come with different code
    AutoProcessor.register(ScaleDownConfig, ScaleDownProcessor, exist_ok=True)
ScaleDownProcessor.register_for_auto_class()

__all__ = ["ScaleDownProcessor"]
