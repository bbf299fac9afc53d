"""What the answer teacher will cost, before it is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...common.prompts import build_messages

# Rule of thumb for English, where no tokenizer is named.
CHARACTERS_PER_TOKEN = 4.0
# Records looked at; the others are taken to be like them.
SAMPLE = 500


@dataclass(frozen=True)
class CostEstimate:
    """Requests, tokens and money.

    Args:
        requests: Answers to be written.
        prompt_tokens: Tokens to be read.
        completion_tokens: Tokens to be written, at most.
        price_input: Price of a million tokens read; None where unknown.
        price_output: Price of a million tokens written; None where unknown.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    price_input: float | None = None
    price_output: float | None = None

    @property
    def price(self) -> float | None:
        """The money, in the currency of the prices, at most; None where no price is known."""
        if self.price_input is None and self.price_output is None:
            return None
        return (
            self.prompt_tokens * (self.price_input or 0.0) + self.completion_tokens * (self.price_output or 0.0)
        ) / 1e6

    def __str__(self) -> str:
        text = (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} tokens of prompt, at most "
            f"{self.completion_tokens:,} tokens of answer"
        )
        return text if self.price is None else f"{text}, about {self.price:,.2f} in the currency of the prices"


def estimate_cost(
    record_at: Callable[[int], dict[str, Any]],
    indices: Sequence[int],
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
) -> CostEstimate:
    """Estimate what the answers cost, from a sample of the records.

    Args:
        record_at: Returns the record of an index.
        indices: The records without an answer.
        max_tokens: Tokens of an answer at most.
        tokenizer: Counts the tokens; without it, four characters are taken as one.
        price_input: Price of a million tokens read.
        price_output: Price of a million tokens written.

    Returns:
        The estimate.
    """
    size = min(len(indices), SAMPLE)
    sampled = [record_at(indices[place * len(indices) // size]) for place in range(size)]
    prompts = [
        "\n".join(message["content"] for message in build_messages(record["query"], record["documents"]))
        for record in sampled
    ]
    if tokenizer is None:
        tokens = sum(len(prompt) / CHARACTERS_PER_TOKEN for prompt in prompts)
    else:
        tokens = sum(map(len, tokenizer(prompts, verbose=False)["input_ids"])) if prompts else 0
    prompt_tokens = round(tokens / max(len(prompts), 1) * len(indices))
    return CostEstimate(len(indices), prompt_tokens, len(indices) * max_tokens, price_input, price_output)
