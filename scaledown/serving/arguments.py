"""Arguments of `python -m scaledown.serving`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from errors_scaledown import ScaleDownError

from ..common.choices import DTYPES
from ..common.command_line import parse_options

KEY_VARIABLE = "SCALEDOWN_API_KEY"


@dataclass
class ServingArguments:
    """What is served, where, and within which limits."""

    model: str = field(metadata={"help": "A ScaleDown model: a folder, or a name on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    served_model_name: str | None = field(
        default=None, metadata={"help": "What clients call the model; the last part of its name by default."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    engine: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={"help": "Who writes the answers: this process, or a vLLM server that reads prompt embeddings."},
    )
    vllm_url: str = field(
        default="http://127.0.0.1:8001/v1",
        metadata={"help": "vLLM's API. It must be reached by this service alone: prompt embeddings are trusted."},
    )
    vllm_model: str | None = field(
        default=None, metadata={"help": "Name that vLLM serves the generator by; vLLM is asked by default."}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, …; auto takes the accelerator."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Tokens of an answer where a request sets no max_tokens."}
    )
    max_batch_size: int = field(default=16, metadata={"help": "Requests that are answered together at most."})
    max_wait_ms: float = field(
        default=5.0, metadata={"help": "Milliseconds that a request waits for others to share its batch."}
    )
    max_queue: int = field(default=256, metadata={"help": "Requests that may wait; more are answered with 429."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds that an answer may take; then 504."})
    max_body_bytes: int = field(default=8_000_000, metadata={"help": "Size of a request at most; then 413."})
    max_documents: int = field(default=200, metadata={"help": "Documents of a request at most."})
    max_document_tokens: int = field(
        default=65_536, metadata={"help": "Tokens of all documents of a request at most, its messages included."}
    )
    cache_entries: int = field(
        default=4096, metadata={"help": "Chunks whose compression is kept with their question; 0 keeps none."}
    )
    api_key: str | None = field(
        default=None,
        metadata={"help": f"Key that clients must send; better set in the environment, as {KEY_VARIABLE}."},
    )
    cors_origins: list[str] = field(
        default_factory=list, metadata={"help": "Origins whose pages may call the service; none by default."}
    )

    def __post_init__(self) -> None:
        if self.api_key is None:
            self.api_key = os.environ.get(KEY_VARIABLE) or None
        if self.dtype not in DTYPES:
            raise ScaleDownError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        for name in (
            "max_new_tokens",
            "max_batch_size",
            "max_queue",
            "max_body_bytes",
            "max_documents",
            "max_document_tokens",
        ):
            if getattr(self, name) < 1:
                raise ScaleDownError(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name in ("max_wait_ms", "cache_entries"):
            if getattr(self, name) < 0:
                raise ScaleDownError(f"{name} is {getattr(self, name)}, expected at least 0.")
        if self.timeout <= 0:
            raise ScaleDownError(f"timeout is {self.timeout}, expected more than 0 seconds.")
        if not 0 <= self.port < 65_536:
            raise ScaleDownError(f"port is {self.port}, expected 0 to 65535.")


def parse_arguments(argv: Sequence[str] | None = None) -> ServingArguments:
    """Parse options, or a YAML recipe and options.

    Args:
        argv: `[recipe.yaml] [--option value …]`; None for the command line.

    Returns:
        The arguments.
    """
    return parse_options(
        ServingArguments, argv, prog="scaledown-serve", description="Serve a ScaleDown model over HTTP."
    )
