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
"""Settings that configuration and processor share: their defaults, and whether they go together."""

import datetime
import json
import math

from transformers.utils import logging

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

DEFAULT_RATE = 16
PADDING_SIDES = ("left", "right")

logger = logging.get_logger(__name__)

# What the processor itself passes to `apply_chat_template`.
RESERVED_VARIABLES = {
    "messages",
    "conversation",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "strftime_now",
}


def fill_compression_settings(settings: object):
    """
    Gives slots per chunk and compression rate a value where they have none: what goes with the other.

    Args:
        settings: A configuration or a processor.
    """
    length, rate, slots = settings.chunk_length, settings.compression_rate, settings.num_memory_tokens
    known = [value for value in (length, rate, slots) if value is not None]
    if not all(isinstance(value, int) and value >= 1 for value in known):
        return  # which `check_sizes` says
    if rate is None:
        settings.compression_rate = math.ceil(length / slots) if slots is not None else min(DEFAULT_RATE, length)
    if slots is None:
        settings.num_memory_tokens = math.ceil(length / settings.compression_rate)


def check_sizes(settings: object, more: tuple[str, ...] = ()):
    """
    Checks the sizes of chunks, questions and slots.

    Args:
        settings: A configuration or a processor.
        more (`tuple[str, ...]`): Further names of whole numbers.

    Raises:
        ScaleDownError: a size is out of range, or sizes contradict each other.
    """
    for name in ("num_memory_tokens", "compression_rate", "chunk_length", "max_query_length", *more):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScaleDownError(f"{name}={value!r} must be a whole number of at least 1.")
    if settings.num_memory_tokens > settings.chunk_length:
        raise ScaleDownError(
            f"num_memory_tokens={settings.num_memory_tokens} exceeds chunk_length={settings.chunk_length}: a chunk "
            "would grow instead of shrink. Lower num_memory_tokens or raise chunk_length."
        )
    if settings.compression_rate > settings.chunk_length:
        raise ScaleDownError(
            f"compression_rate={settings.compression_rate} exceeds chunk_length={settings.chunk_length}: one slot "
            "cannot stand for more tokens than a chunk has. Lower compression_rate or raise chunk_length."
        )
    wanted = math.ceil(settings.chunk_length / settings.compression_rate)
    if wanted > settings.num_memory_tokens:
        logger.warning_once(
            f"compression_rate={settings.compression_rate} asks for {wanted} slots for a chunk of chunk_length="
            f"{settings.chunk_length} tokens, and num_memory_tokens={settings.num_memory_tokens} allows no more than "
            f"that: full chunks are compressed {settings.chunk_length / settings.num_memory_tokens:g}×. Leave one of "
            "the two out, and it follows from the other."
        )


def check_prompts(settings: object):
    """
    Checks the parts of the prompt.

    Args:
        settings: A configuration or a processor.

    Raises:
        ScaleDownError: a part is no string, or does not name documents and question once, in that order; variables of
            the chat template or a date that are none.
    """
    variables, date = settings.chat_template_kwargs, settings.prompt_date
    if variables is not None and not (isinstance(variables, dict) and all(isinstance(name, str) for name in variables)):
        raise ScaleDownError(f"chat_template_kwargs={variables!r} must be a dictionary of variables by name, or None.")
    for name in RESERVED_VARIABLES & (variables or {}).keys():
        raise ScaleDownError(f"chat_template_kwargs sets {name}, which the processor decides; leave it out.")
    try:
        json.dumps(variables)
    except TypeError as error:
        raise ScaleDownError(f"chat_template_kwargs={variables!r} cannot be saved ({error}).") from None
    try:
        datetime.date.fromisoformat("2026-01-01" if date is None else date)
    except (TypeError, ValueError):
        raise ScaleDownError(f"prompt_date={date!r} must be a date such as '2026-01-31', or None.") from None
    for name in ("system_prompt", "user_prompt", "closed_book_prompt", "document_separator"):
        if not isinstance(getattr(settings, name), str):
            raise ScaleDownError(f"{name}={getattr(settings, name)!r} must be a string.")
    for name, fields in (("user_prompt", ("{documents}", "{question}")), ("closed_book_prompt", ("{question}",))):
        for field in fields:
            if getattr(settings, name).count(field) != 1:
                raise ScaleDownError(f"{name}={getattr(settings, name)!r} must contain {field} exactly once.")
    if settings.user_prompt.index("{documents}") > settings.user_prompt.index("{question}"):
        raise ScaleDownError(
            f"user_prompt={settings.user_prompt!r} must name {{documents}} before {{question}}, so that a prompt can "
            "be continued from the documents' cache."
        )


def check_compressor_input(settings: object):
    """
    Checks how the compressor's rows are made.

    Args:
        settings: A configuration or a processor.

    Raises:
        ScaleDownError: a value is out of range, or values contradict each other.
    """
    for name in ("fixed_slots", "learned_separator", "tokenize_jointly"):
        if not isinstance(getattr(settings, name), bool):
            raise ScaleDownError(f"{name}={getattr(settings, name)!r} must be True or False.")
    window = settings.pointer_window
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ScaleDownError(f"pointer_window={window!r} must be a whole number of at least 1, or None.")
    prompt, length = settings.compressor_prompt, settings.compressor_max_length
    if window is not None and prompt is not None:
        raise ScaleDownError(
            f"compressor_prompt={prompt!r} makes rows in which a document's own tokens cannot be told apart, which "
            'slot_pooling="pointer" points at; leave it out or choose another slot_pooling.'
        )
    if prompt is not None:
        counts = [prompt.count(field) for field in ("{document}", "{question}")] if isinstance(prompt, str) else [0, 0]
        if counts[0] != 1 or counts[1] > 1 or prompt.find("{question}") > prompt.find("{document}"):
            raise ScaleDownError(
                f"compressor_prompt={prompt!r} must be a text that contains {{document}} exactly once and, at most "
                "once and in front of it, {question}; or None."
            )
    least = settings.num_memory_tokens
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < least):
        raise ScaleDownError(
            f"compressor_max_length={length!r} must be a whole number of at least num_memory_tokens={least}, or None."
        )
    if length is None and (prompt is not None or settings.learned_separator):
        name = "compressor_prompt" if prompt is not None else "learned_separator"
        raise ScaleDownError(
            f"{name} makes one chunk of each document; set compressor_max_length, the tokens of its row."
        )
