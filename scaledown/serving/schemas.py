"""Bodies of requests, as clients of OpenAI, Jina and Cohere send them, with the fields that ScaleDown adds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from text_scaledown import check_encodable

Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """A request's body; a field that is not known is an error, since a misspelt one would change the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, fields: Any) -> Any:
        # Clients send null for what nobody set, by names that only their own service knows.
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class Document(Body):
    """A retrieved passage.

    Args:
        text: What it says.
        title: Put in front of the text, as in the training data.
        id: Comes back with the document's score.
    """

    text: Text
    title: str | None = None
    id: str | None = None

    @field_validator("text")
    @classmethod
    def _is_not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is blank; leave the document out")
        return text

    @field_validator("title", "id")
    @classmethod
    def _can_be_written(cls, text: str | None) -> str | None:
        if text is not None:
            check_encodable(text, "the text")
        return text


class Part(Body):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; fields that say who speaks are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


def _as_documents(documents: Any) -> Any:
    if not isinstance(documents, list):
        return documents
    return [{"text": document} if isinstance(document, str) else document for document in documents]


SomeDocuments = Annotated[list[Document], BeforeValidator(_as_documents, json_schema_input_type=list[Text | Document])]
AtLeastOneDocument = Annotated[
    list[Document],
    Field(min_length=1),
    BeforeValidator(_as_documents, json_schema_input_type=Annotated[list[Text | Document], Field(min_length=1)]),
]


class WithDocuments(Body):
    """What every request says of its documents."""

    model: str | None = None
    documents: SomeDocuments = Field(default_factory=list)

    @property
    def asked(self) -> dict[str, str]:
        """The texts beside the documents, by their fields."""
        return {"query": self.query}


class ChatRequest(WithDocuments):
    """`POST /v1/chat/completions`: OpenAI's fields, with documents and how they are read."""

    messages: list[Message] = Field(min_length=1)
    compression_rate: int | None = Field(default=None, ge=1)
    max_documents: int | None = Field(default=None, ge=1)
    min_reranking_score: float | None = Field(default=None, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)  # vLLM's name
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Text] = Field(default_factory=list, max_length=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    # Only these values can be had.
    n: Literal[1] | None = None
    response_format: Any = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    # What clients send along and no answer depends on.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @field_validator("response_format")
    @classmethod
    def _is_text(cls, response_format: Any) -> Any:
        if response_format not in (None, {"type": "text"}):
            raise ValueError('only {"type": "text"} can be written')
        return response_format

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.limit is not None and self.min_tokens > self.limit:
            raise ValueError(f"min_tokens is {self.min_tokens}, expected at most max_tokens, which is {self.limit}")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's question")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens that the answer may have, by either of OpenAI's names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def asked(self) -> dict[str, str]:
        """See `WithDocuments.asked`."""
        return {f"messages[{place}].content": turn.text for place, turn in enumerate(self.messages)}

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as `ScaleDownModel.answer` takes them."""
        return [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
            for turn in self.messages
        ]


class RerankRequest(WithDocuments):
    """`POST /v1/rerank`: the fields of Jina, Cohere and vLLM."""

    query: Text
    documents: AtLeastOneDocument
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False


class CompressRequest(WithDocuments):
    """`POST /v1/compress`: a question and its documents, for those who run their own engine."""

    query: Text
    documents: AtLeastOneDocument
    compression_rate: int | None = Field(default=None, ge=1)
