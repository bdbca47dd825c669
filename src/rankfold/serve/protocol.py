"""What OpenAI's API may be asked here. A parameter that has no effect here is refused, but for values that ask for
none."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

CHOICES = 128  # most answers to one call
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_ANY = object()


class Body(BaseModel):
    """A JSON object; null is as if a key were left out, as OpenAI has it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    include_usage: bool = False


class Asked(Body):
    """What completions and chats have in common."""

    # What else OpenAI's API has, and the values of it that ask for nothing; `_ANY`: all do.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "user": (_ANY,),
    }

    model: _Name
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.neutral.keys() & data.keys():
            if data[name] is not None and cls.neutral[name] != (_ANY,) and data[name] not in cls.neutral[name]:
                raise PydanticCustomError("unsupported", "this server does not support it", {"param": name})
        return {k: v for k, v in data.items() if k not in cls.neutral}

    @model_validator(mode="after")
    def _only_of_streams(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("unsupported", "goes with stream: true only", {"param": "stream_options"})
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


_Texts = Annotated[list[str], Field(min_length=1, max_length=CHOICES)]
_Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionBody(Asked):
    """POST /v1/completions. `prompt` is a text, several, token ids, or several lists of them."""

    neutral = {**Asked.neutral, "suffix": ("",), "best_of": (1,)}

    prompt: str | _Texts | _Tokens | Annotated[list[_Tokens], Field(min_length=1, max_length=CHOICES)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool = False

    @model_validator(mode="after")
    def _can_be_had(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("unsupported", "a prompt has no log-probabilities here", {"param": "echo"})
        if self.n * len(self.prompts) > CHOICES:
            raise PydanticCustomError("too_many", "n times the prompts are too many answers", {"param": "n"})
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]  # type: ignore[return-value]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def written(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatBody(Asked):
    """POST /v1/chat/completions. Without a limit of tokens an answer may be as long as the server allows."""

    neutral = {
        **Asked.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (_ANY,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "metadata": (_ANY,),
        "safety_identifier": (_ANY,),
        "prompt_cache_key": (_ANY,),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("unsupported", "goes with logprobs: true only", {"param": "top_logprobs"})
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("unsupported", "is max_completion_tokens: give one", {"param": "max_tokens"})
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadBody(Body):
    """POST /v1/load_lora_adapter. Adapters are loaded by their names; a path may only say the same again."""

    lora_name: _Name
    lora_path: str | None = None

    @model_validator(mode="after")
    def _by_name(self) -> "LoadBody":
        if self.lora_path not in (None, self.lora_name):
            message = "adapters come from the server's folder, by their names: leave it out"
            raise PydanticCustomError("unsupported", message, {"param": "lora_path"})
        return self


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: _Name
