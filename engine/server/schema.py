"""What a request may say: the fields of the OpenAI API that have a meaning here, with their bounds.

Fields that this server does not know are ignored, as other servers do, but never those that would
change the answer: they are refused by name.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.sampler import Sampling

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

# What a request leaves out is as in the chat: OpenAI's temperature of 1 is for larger models.
DEFAULT_TEMPERATURE, DEFAULT_MIN_P = 0.5, 0.1
COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI has it

_UNSUPPORTED = (
    *("tools", "functions", "tool_choice", "function_call", "audio", "prediction"),
    *("suffix", "echo", "best_of"),
)


class RequestError(Exception):
    """A request that gets an error instead of an answer, in the shape that OpenAI's clients read.

    `retry_after`: seconds, for those that may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    """Text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema that the answer must follow; None: it is free."""
        if self.type == "text":
            return None
        return json.dumps(self.json_schema.json_schema if self.json_schema else {"type": "object"})


class CommonRequest(_Strict):
    """What chat and completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, values: Any) -> Any:
        for name in _UNSUPPORTED if isinstance(values, dict) else ():
            if values.get(name) not in (None, False, [], "none", "auto"):
                raise ValueError(f"{name} is not supported")
        return values

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 16 or not all(1 <= len(text) <= 1000 for text in stops):
            raise ValueError("at most 16 texts of 1 to 1000 characters can stop an answer")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _tokens(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in bias or {}):
            raise ValueError("logit_bias has token ids for its keys")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def n_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self) -> list[Sampling]:
        """Of each choice: the same but for the seeds, which follow each other."""
        seed = secrets.randbits(32) if self.seed is None else self.seed
        # Next to no temperature the noise would be lost in rounding.
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        return [
            Sampling(
                temperature=temperature if temperature > 1e-5 else 0.0,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=DEFAULT_MIN_P if self.min_p is None else self.min_p,
                seed=(seed + i) % (1 << 32),
            )
            for i in range(self.n_choices)
        ]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn; what is said in parts is joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def turn(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(CommonRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _logprobs_for_the_top(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    n_prompts: ClassVar[int] = 1

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of the prompt; EngineError where the model's template refuses the messages."""
        return [tokenizer.encode(tokenizer.chat_prompt([turn.turn() for turn in self.messages]))]

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives to tell of each token; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(CommonRequest):
    """The body of /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, prompt: Any) -> Any:
        if prompt == []:
            raise ValueError("there is none")
        return prompt

    @property
    def _prompts(self) -> list[Any]:
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)

    @property
    def n_prompts(self) -> int:
        return len(self._prompts)

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt."""
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in self._prompts]

    @property
    def most_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


R = TypeVar("R", bound=CommonRequest)


def parse(kind: type[R], body: bytes) -> R:
    """RequestError, which names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        of_first = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
        first = max(of_first, key=lambda one: len(one["loc"]))  # of several types, the nearest
        # Of a field that may be of several types, pydantic names the type as well: str, list[int].
        where = [
            str(part) for part in first["loc"] if not re.match("(str|int|list\\[.*)$", str(part))
        ]
        message = first["msg"].removeprefix("Value error, ")
        param = ".".join(where) or None
        raise RequestError(400, f"{param}: {message}" if param else message, param=param) from None
