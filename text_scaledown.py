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
"""Untrusted texts: questions, conversations and documents, checked, and encoded without any special token."""

import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

logger = logging.get_logger(__name__)

ROLES = ("system", "user", "assistant")
# How a tokenizer encodes untrusted text.
AS_TEXT = {
    "add_special_tokens": False,
    "split_special_tokens": True,
    "return_attention_mask": False,
    "verbose": False,
}
# How a tokenizer splits special tokens is its state, not the call's: two threads must not tokenize at once.
_TOKENIZING = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A process forked in between would inherit a lock that nobody releases, and a tokenizer in the midst of its work.
    os.register_at_fork(
        before=_TOKENIZING.acquire, after_in_parent=_TOKENIZING.release, after_in_child=_TOKENIZING.release
    )


@dataclass(frozen=True)
class Conversation:
    """
    A question and what was said before it.

    Args:
        question (`str`): The last turn, which is the user's.
        turns (`tuple[tuple[str, str], ...]`): Role and text of each earlier turn.
        system_prompt (`str`, *optional*): In place of the model's own.
    """

    question: str
    turns: tuple[tuple[str, str], ...] = ()
    system_prompt: str | None = None


def listed(values: object) -> object:
    """Values of an array, a column, a generator or any other iterable as a list; a text, and what is none, as it is."""
    if isinstance(values, str | bytes | Mapping | Set):  # a set has no order
        return values
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, Iterable) else values


def is_conversation(value: object) -> bool:
    """Whether something is a list of messages, rather than a text or a list of questions."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(turn, Mapping) for turn in value)


def read_question(value: object, name: str, system_prompt: str | None = None) -> Conversation:
    """
    Reads a question, or the messages of a conversation that ends in one.

    Args:
        value (`str` or `list[dict]`): A text, or messages of `role` and `content`.
        name (`str`): What to call it in errors.
        system_prompt (`str`, *optional*): In place of the model's own; a system message comes before it.

    Returns:
        `Conversation`: With the question as it is where it is no list of messages.

    Raises:
        ScaleDownError: messages without role or text, or in an order that has no question at its end.
    """
    if not is_conversation(value):
        return Conversation(value, (), system_prompt)
    turns = []
    for i, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise ScaleDownError(
                f"{name}[{i}] is {dict(message)!r}, expected a message with a role ({', '.join(ROLES)}) and a text as "
                "its content."
            )
        check_encodable(content, f"{name}[{i}]")
        turns.append((role, content))
    if turns[0][0] == "system":
        system_prompt = turns.pop(0)[1]
    if not turns or turns[-1][0] != "user" or any(role == "system" for role, _ in turns):
        raise ScaleDownError(
            f"{name} has the roles {', '.join(m['role'] for m in value)}; expected one system message at most, at the "
            "beginning, and the user's question at the end."
        )
    return Conversation(turns[-1][1], tuple(turns[:-1]), system_prompt)


def check_texts(
    questions: str | list[str], documents: list[str] | list[list[str]] | None
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
            f"questions must be a string or a list of strings, got {type(questions).__name__}; pass list(questions)."
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
        check_encodable(question, f"questions[{i}]")
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
            check_encodable(document, f"documents[{i}][{j}]")
    return questions, documents


def tokenize(tokenizer: PreTrainedTokenizerBase, *texts, **settings) -> dict:
    """Calls a tokenizer, one thread at a time."""
    with _TOKENIZING:
        return tokenizer(*texts, **settings)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that prompts are padded with: the end token where a tokenizer has none of its own."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def first_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer puts before a text."""
    single = tokenize(tokenizer, "a", return_special_tokens_mask=True)
    return single["input_ids"][: single["special_tokens_mask"].index(0)]


def last_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the tokenizer puts after a text."""
    single = tokenize(tokenizer, "a", return_special_tokens_mask=True)
    return single["input_ids"][len(single["input_ids"]) - single["special_tokens_mask"][::-1].index(0) :]


def chat_templates(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a tokenizer's chat template; of all where it has several by name; empty where it has none."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that steer the model: special tokens, and added tokens the chat template uses."""
    template = chat_templates(tokenizer)
    ids = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    }
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    named = {getattr(tokenizer, name) for name in names} - {None}
    # An unknown character of ordinary text is no attack, unless the vocabulary uses one id for both.
    return (ids | named) - ({tokenizer.unk_token_id} - named)


def encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of untrusted texts, without any special token whatever the texts spell."""
    return without_control_tokens(tokenizer, texts, tokenize(tokenizer, texts, **AS_TEXT)["input_ids"])


def without_control_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], encoded: list[list[int]]
) -> list[list[int]]:
    """Token ids of untrusted texts as they were encoded with `AS_TEXT`, but for those that got a special token."""
    control = control_ids(tokenizer)
    return [
        ids if control.isdisjoint(ids) else _encode_without_added_tokens(tokenizer, text, control)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: list[str] | tuple[str, ...], as_text: bool = True
) -> list[list[int]]:
    """Token ids of texts that go on from something: some tokenizers begin every text as if it were a new word."""

    def encode(parts: list[str]) -> list[list[int]]:
        if as_text:
            return encode_as_text(tokenizer, parts)
        return tokenize(tokenizer, parts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    # Something is put before the text that does not merge with it, and its ids are taken off again.
    before = ["a" if text[:1].isspace() else "\n" for text in texts]
    letter, line_end, *whole = encode(["a", "\n", *map(str.__add__, before, texts)])
    starts = [letter if piece == "a" else line_end for piece in before]
    return [
        ids[len(start) :] if ids[: len(start)] == start else encode([text])[0]
        for ids, start, text in zip(whole, starts, texts, strict=True)
    ]


def encode_filled(
    tokenizer: PreTrainedTokenizerBase, pieces: list[str], texts: list[list[str]], add_special_tokens: bool = False
) -> list[list[int]]:
    """
    Token ids of untrusted texts and what stands around them, tokenized as one: tokens may reach over a text's ends.

    Where texts spell special tokens they are encoded apart, as `encode_as_text` does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        pieces (`list[str]`): What stands before, between and after the texts; special tokens in it are such.
        texts (`list[list[str]]`): Of each result, one text fewer than pieces.
        add_special_tokens (`bool`, defaults to `False`): Whether the tokenizer adds those of its own.

    Returns:
        `list[list[int]]`: One list per row of texts.
    """
    settings = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    rows = [[*interleaved(pieces, row)] for row in [[""] * (len(pieces) - 1), *texts]]
    frame, *encoded = tokenize(tokenizer, ["".join(row) for row in rows], **settings)["input_ids"]
    control = control_ids(tokenizer)
    expected = [i for i in frame if i in control]
    for n, (ids, row) in enumerate(zip(encoded, texts, strict=True)):
        if [i for i in ids if i in control] != expected:
            settings["add_special_tokens"] = False
            parts = tokenize(tokenizer, list(pieces), **settings)["input_ids"]
            apart = list(itertools.chain.from_iterable(interleaved(parts, encode_as_text(tokenizer, row))))
            if add_special_tokens:
                apart = [*first_special_ids(tokenizer), *apart, *last_special_ids(tokenizer)]
            encoded[n] = apart
    return encoded


def interleaved(pieces: list, fillings: list) -> Iterable:
    """Pieces with a filling after each but the last."""
    yield pieces[0]
    for filling, piece in zip(fillings, pieces[1:], strict=True):
        yield from (filling, piece)


def delimiting_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Finds a special token that takes no white space from its neighbours, to stand where slots are.

    Raises:
        ScaleDownError: the tokenizer has none.
    """
    for token_id in sorted(control_ids(tokenizer)):
        token = tokenizer.added_tokens_decoder.get(token_id)
        if token is not None and token.special and not (token.lstrip or token.rstrip):
            ids = tokenize(tokenizer, token.content, add_special_tokens=False)["input_ids"]
            if ids == [token_id]:
                return token.content
    raise ScaleDownError(
        "tokenize_jointly=True needs a special token that takes no white space from its neighbours, and the tokenizer "
        "has none. Set tokenize_jointly=False."
    )


def _encode_without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str, control: set[int]) -> list[int]:
    """`split_special_tokens` leaves added tokens that are not marked special; here the vocabulary alone decides."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = tokenize(tokenizer, text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    else:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [text]
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for piece in pieces for token in backend.model.tokenize(piece)]
    return [token_id for token_id in ids if token_id not in control]


def warn_of_unknown(tokenizer: PreTrainedTokenizerBase, texts: list[str], encoded: list[list[int]]):
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


def check_encodable(text: str, name: str):
    """Refuses a text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ScaleDownError(
            f"{name} has half of a surrogate pair at character {error.start}, which is no text; remove it, for example "
            'with text.encode("utf-8", "replace").decode("utf-8").'
        ) from None


def check_answers(answers: str | list[str], num_questions: int) -> list[str]:
    """One non-empty text per question, or an error that says which is not."""
    answers = [answers] if isinstance(answers, str) else listed(answers)
    if not isinstance(answers, (list, tuple)):
        raise TypeError(f"answers must be a string or a list of strings, got {type(answers).__name__}.")
    if len(answers) != num_questions:
        raise ScaleDownError(f"{num_questions} questions but {len(answers)} answers; pass one answer per question.")
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ScaleDownError(f"answers[{i}] is {answer!r}, expected a non-empty string.")
        check_encodable(answer, f"answers[{i}]")
    return list(answers)
