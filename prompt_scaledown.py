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
"""The generator's prompt: the chat template with slots in the place of documents."""

import datetime
import itertools
import json
import re

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.utils import logging

try:
    from .errors_scaledown import ScaleDownError
    from .settings_scaledown import check_prompts
    from .text_scaledown import (
        Conversation,
        chat_templates,
        delimiting_token,
        encode_as_text,
        encode_continuations,
        encode_filled,
        first_special_ids,
        padding_id,
        tokenize,
    )
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError
    from settings_scaledown import check_prompts
    from text_scaledown import (
        Conversation,
        chat_templates,
        delimiting_token,
        encode_as_text,
        encode_continuations,
        encode_filled,
        first_special_ids,
        padding_id,
        tokenize,
    )

logger = logging.get_logger(__name__)

# Stand for the documents and the question while the chat template is rendered, so that no user text ever passes
# through the template.
_DOCUMENTS_MARK = "SCALEDOWN-DOCUMENTS-GO-HERE"
_QUESTION_MARK = "SCALEDOWN-QUESTION-GOES-HERE"
_TURN_MARK = "SCALEDOWN-TURN-{}-GOES-HERE"

# How a chat template asks for today's date, as a format of `strftime`.
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

IGNORE_INDEX = -100


class PromptMixin:
    """How a `ScaleDownProcessor` builds the generator's side of a batch."""

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
            learned = self.encode_answers(answers, max_answer_length)
        separator = encode_continuations(self.tokenizer, [self.document_separator])[0]
        filler = self._slot_filler_id()
        said = [(c.system_prompt, c.turns) for c in conversations or [Conversation(text) for text in questions]]
        kinds = [(not row, *before) for row, before in zip(document_slots, said, strict=True)]
        frames = {kind: self.prompt_frame(*kind) for kind in dict.fromkeys(kinds)}
        leads = [frames[kind][3] for kind in kinds]
        asked = [lead + text for lead, text in zip(leads, questions, strict=True)]
        encoded = encode_continuations(self.tokenizer, asked)
        ends = [
            between + ids + after
            for (_, between, after, _), ids in zip([frames[kind] for kind in kinds], encoded, strict=True)
        ]
        if self.tokenize_jointly:
            ends = self._ends_as_one(questions, kinds, ends)
        prompts = []
        for i, row in enumerate(document_slots):
            before = frames[kinds[i]][0]
            ids, is_slot = list(before), [False] * len(before)
            for j, num_slots in enumerate(row):
                if j > 0:
                    ids += separator
                    is_slot += [False] * len(separator)
                ids += [filler] * num_slots
                is_slot += [True] * num_slots
            ids += ends[i]
            is_slot += [False] * len(ends[i])
            length = len(ids) + len(learned[i])
            if self.max_prompt_length is not None and length > self.max_prompt_length:
                answer = f" and {len(learned[i])} tokens of answer" if answers is not None else ""
                remedy = "Pass fewer documents or a higher compression_rate" if row else "Shorten the question"
                raise ScaleDownError(
                    f"questions[{i}] with its {len(row)} documents needs a prompt of {len(ids)} tokens "
                    f"({sum(is_slot)} of them slots){answer}; the generator reads {self.max_prompt_length}. {remedy}."
                )
            prompts.append((ids, is_slot))
        batch = self.pad_prompts(prompts, learned)
        if answers is None:
            del batch["labels"]
        return BatchFeature(batch)

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
        segments = encode_continuations(self.tokenizer, [*stripped, rest], as_text=False)
        # Nothing goes before the first, so it continues nothing.
        segments[0] = tokenize(self.tokenizer, stripped[0], add_special_tokens=False)["input_ids"]
        if self.tokenizer.chat_template is None:
            segments[0][:0] = first_special_ids(self.tokenizer)
        said = [lead + text for lead, (_, text) in zip(leads, turns, strict=False)]
        said = encode_continuations(self.tokenizer, said) if said else []
        *before, after = segments
        between = before.pop() if not closed_book else []
        ids = list(itertools.chain.from_iterable(itertools.chain(*pair) for pair in zip(before, said, strict=False)))
        ids += before[-1] if len(before) > len(said) else []
        return (ids, between, after, leads[-1]) if not closed_book else ([], ids, after, leads[-1])

    def _ends_as_one(self, questions: list[str], kinds: list[tuple], ends: list[list[int]]) -> list[list[int]]:
        """Ids after the documents where question and prompt are tokenized as one; `ends` where there are none."""
        # Slots are special tokens to whoever tokenizes all of a prompt.
        slot = delimiting_token(self.tokenizer)
        ends = list(ends)
        for kind in {kind for kind in kinds if not kind[0]}:
            rest = self._render_prompt(*kind).split(_DOCUMENTS_MARK)[1]
            pieces = f"{slot}{rest}".split(_QUESTION_MARK)
            places = [i for i, own in enumerate(kinds) if own == kind]
            encoded = encode_filled(self.tokenizer, pieces, [[questions[i]] for i in places])
            for i, ids in zip(places, encoded, strict=True):
                ends[i] = ids[1:]
        return ends

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

    def encode_answers(self, answers: list[str], max_answer_length: int) -> list[list[int]]:
        """
        Encodes answers to learn, each with its end token.

        Args:
            answers (`list[str]`): Answers.
            max_answer_length (`int`): Longer ones are cut, and have no end token then.

        Returns:
            `list[list[int]]`: Token ids.

        Raises:
            ScaleDownError: nothing would be left of an answer.
        """
        if max_answer_length < 2:
            raise ScaleDownError(
                f"max_answer_length={max_answer_length} must be at least 2: a token and the end token."
            )
        end = [self.tokenizer.eos_token_id]
        return [(ids + end)[:max_answer_length] for ids in encode_as_text(self.tokenizer, answers)]

    def _slot_filler_id(self) -> int:
        """Id that stands at the slots of `input_ids`; its embedding is replaced and it never means anything."""
        tokenizer = self.tokenizer
        # Not the end token where another is at hand: a repetition penalty looks at the ids of the prompt.
        for token_id in (tokenizer.bos_token_id, tokenizer.pad_token_id):
            if token_id is not None and token_id != tokenizer.eos_token_id:
                return token_id
        return tokenizer.eos_token_id

    def pad_prompts(
        self, prompts: list[tuple[list[int], list[bool]]], learned: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        """
        Pads prompts and the answers learned after them into one batch.

        Args:
            prompts (`list[tuple[list[int], list[bool]]]`): Token ids, and which of them are slots.
            learned (`list[list[int]]`): Token ids of each answer; empty where there is none.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `slot_mask` and `labels`, as in `__call__`.
        """
        rows, slots, labels = [], [], []
        for (ids, is_slot), answer in zip(prompts, learned, strict=True):
            rows.append(ids + answer)
            slots.append(is_slot + [False] * len(answer))
            labels.append([IGNORE_INDEX] * len(ids) + answer)
        input_ids, attention_mask = pad(rows, padding_id(self.tokenizer), side="left")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "slot_mask": pad(slots, False, side="left")[0],
            "labels": pad(labels, IGNORE_INDEX, side="left")[0],
        }


def _with_date(template: str, date: str) -> str:
    """A chat template that takes a date for today's."""
    day = datetime.datetime.fromisoformat(date)
    return _ASKS_FOR_DATE.sub(lambda asked: json.dumps(day.strftime(asked[2]), ensure_ascii=False), template)


def pad(rows: list[list], value: int | bool, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor `(len(rows), longest)` and the mask of what is not padding."""
    # numpy takes lists of numbers several times as fast as torch does.
    lengths = np.array([[len(row)] for row in rows])  # (num_rows, 1)
    places = np.arange(lengths.max())
    mask = places >= places.size - lengths if side == "left" else places < lengths  # (num_rows, longest)
    padded = np.full(mask.shape, value, dtype=bool if isinstance(value, bool) else np.int64)
    padded[mask] = [item for row in rows for item in row]
    return torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64))


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Today's date, where the chat template of a tokenizer asks for it."""
    return datetime.date.today().isoformat() if _ASKS_FOR_DATE.search(chat_templates(tokenizer)) else None
