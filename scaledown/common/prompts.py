"""The paper's prompt with the documents' full texts, for the answer teacher, the reader and the text baselines.

The documents come from anywhere, so they must not speak for the system or the user. A local teacher's prompt is put
together from token ids, in which text stays text. An endpoint applies its chat template itself and may read control
tokens out of the text; there, what looks like one is taken apart by a blank.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from configuration_scaledown import DEFAULT_CLOSED_BOOK_PROMPT, DEFAULT_SYSTEM_PROMPT, DEFAULT_USER_PROMPT
from processing_scaledown import ScaleDownProcessor
from text_scaledown import encode_continuations

DOCUMENT_SEPARATOR = "\n"
# Control tokens of the chat templates in use, such as <|im_start|>, </s>, [INST], <<SYS>> and <start_of_turn>.
CONTROL_TOKEN = re.compile(
    r"<\|(?=[^<>|\n]{1,40}\|>)|<｜(?=[^<>｜\n]{1,40}｜>)|<(?=/?s>)|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\])"
    r"|<<(?=/?SYS>>)|<(?=(?:start|end)_of_turn>)|<(?=(?:bos|eos|pad|unk)>)"
)


def build_messages(query: str, documents: Sequence[str]) -> list[dict[str, str]]:
    """The prompt as chat messages.

    Args:
        query: The question.
        documents: Full texts; none for a question asked without.

    Returns:
        A system and a user message, without anything in question and documents that looks like a control token.
    """
    query = defused(query)
    if documents:
        texts = DOCUMENT_SEPARATOR.join(map(defused, documents))
        # One pass over the template: a document that spells "{question}" gets none.
        before, after = DEFAULT_USER_PROMPT.split("{documents}")
        user = before + texts + after.replace("{question}", query)
    else:
        user = DEFAULT_CLOSED_BOOK_PROMPT.replace("{question}", query)
    return [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, {"role": "user", "content": user}]


class PromptEncoder:
    """The prompt as token ids: that of the full-text baseline, and of the trained model but for its slots.

    Args:
        tokenizer: The teacher's tokenizer, with or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._processor = ScaleDownProcessor(tokenizer, tokenizer)
        for closed_book in (False, True):
            self._processor.prompt_frame(closed_book)  # a chat template it cannot use is refused now

    def __call__(self, query: str, documents: Sequence[str]) -> list[int]:
        """Encode the prompt of one question.

        Args:
            query: The question.
            documents: Full texts; none for a question asked without.

        Returns:
            Token ids, no special token among those of the texts.
        """
        return text_prompts(self._processor, [query], encode_texts(self._processor, [documents]))[0]


def encode_texts(processor: ScaleDownProcessor, documents: Sequence[Sequence[str]]) -> list[list[int] | None]:
    """Encode each question's documents as they stand in a prompt, one after another.

    Args:
        processor: The processor of the model the prompt is for.
        documents: Full texts of each question.

    Returns:
        Token ids of each question's documents; None where it has none.
    """
    joined = encode_continuations(processor.tokenizer, [processor.document_separator.join(d) or "-" for d in documents])
    return [ids if listed else None for ids, listed in zip(joined, documents, strict=True)]


def text_prompts(
    processor: ScaleDownProcessor, queries: Sequence[str], bodies: Sequence[list[int] | None]
) -> list[list[int]]:
    """Build the prompts that compressed questions would have, with text where those have slots.

    Args:
        processor: The processor of the model.
        queries: Questions.
        bodies: Token ids of each question's documents; None gives the prompt of a question without any.

    Returns:
        Token ids, no special token among those of the texts.
    """
    frames = {closed: processor.prompt_frame(closed) for closed in {body is None for body in bodies}}
    asked = [frames[body is None][3] + query for body, query in zip(bodies, queries, strict=True)]
    prompts = []
    for body, question in zip(bodies, encode_continuations(processor.tokenizer, asked), strict=True):
        before, between, after, _ = frames[body is None]
        prompts.append([*before, *(body or []), *between, *question, *after])
    return prompts


def defused(text: str) -> str:
    """Take apart what looks like a control token.

    Args:
        text: Untrusted text.

    Returns:
        The text with a blank in each.
    """
    return CONTROL_TOKEN.sub(lambda match: f"{match.group()} ", text)
