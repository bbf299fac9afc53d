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
"""Questions that come at the end of a conversation, and texts in whatever lists them."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

try:
    from .errors_scaledown import ScaleDownError
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from errors_scaledown import ScaleDownError

ROLES = ("system", "user", "assistant")


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
        turns.append((role, content))
    if turns[0][0] == "system":
        system_prompt = turns.pop(0)[1]
    if not turns or turns[-1][0] != "user" or any(role == "system" for role, _ in turns):
        raise ScaleDownError(
            f"{name} has the roles {', '.join(m['role'] for m in value)}; expected one system message at most, at the "
            "beginning, and the user's question at the end."
        )
    return Conversation(turns[-1][1], tuple(turns[:-1]), system_prompt)
