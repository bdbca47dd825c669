"""Answers in the words of OpenAI's API: whole objects, and the chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from rankfold.serve.answers import Part, Token
from rankfold.serve.text import spelled

_LEAST = -9999.0  # JSON has no -∞


class Form:
    """How the answers of one call are written. `logprobs` is how many of the likeliest tokens were asked for."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, tokenizer: Any, logprobs: int | None):
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._common = {"id": self.id, "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._begun = set[int]()

    def whole(self, parts: Sequence[Part], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self._choice(part) for part in parts]
        return {**self._common, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunks(self, part: Part, with_usage: bool) -> list[dict[str, Any]]:
        """The part as chunks; `with_usage`, each says that the usage comes later."""
        later = {"usage": None} if with_usage else {}
        return [self._chunk([choice]) | later for choice in self._deltas(part)]

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_object, "choices": choices}

    def _choice(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _log(self, part: Part) -> dict[str, Any] | None:
        """The log-probabilities of a part's tokens."""
        return None if self._logprobs is None else self._said(part.tokens)

    def _said(self, tokens: Sequence[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def _spelled(self, token: int) -> bytes:
        return spelled(self._tokenizer, token)


class CompletionForm(Form):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, part: Part) -> dict[str, Any]:
        return {"index": part.choice, "text": part.text, "logprobs": self._log(part), "finish_reason": part.finish}

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        return [self._choice(part)]

    def _said(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._key(t.id) for t in tokens],
            "token_logprobs": [max(t.logprob, _LEAST) for t in tokens],
            "top_logprobs": [{self._key(id): max(p, _LEAST) for id, p in t.top} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _key(self, token: int) -> str:
        """Tokens that are a part of a character are spelled in bytes, so that no two are one key."""
        own = self._spelled(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class ChatForm(Form):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text}
        return {"index": part.choice, "message": message, "logprobs": self._log(part), "finish_reason": part.finish}

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        deltas = []
        if part.choice not in self._begun:
            self._begun.add(part.choice)
            deltas.append(self._delta(part.choice, {"role": "assistant", "content": ""}))
        if part.text or part.tokens:
            deltas.append(self._delta(part.choice, {"content": part.text}, self._log(part)))
        if part.finish is not None:
            deltas.append(self._delta(part.choice, {}, finish=part.finish))
        return deltas

    def _delta(
        self, choice: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _said(self, tokens: Sequence[Token]) -> dict[str, Any]:
        said = [self._one(t.id, t.logprob) | {"top_logprobs": [self._one(*one) for one in t.top]} for t in tokens]
        return {"content": said, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        own = self._spelled(token)
        return {"token": own.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(own)}
