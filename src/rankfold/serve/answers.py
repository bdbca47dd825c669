"""One call's answers: its requests of the engine, heard in the event loop as text that may go out."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rankfold.errors import RankfoldError
from rankfold.serve.engine import Engine
from rankfold.serve.errors import ApiError
from rankfold.serve.library import UnknownAdapterError
from rankfold.serve.request import OverloadedError, Request
from rankfold.serve.text import Decoder, Stops

if TYPE_CHECKING:
    from rankfold.serve.metrics import Metrics


@dataclass(frozen=True)
class Token:
    """A token that was made: where its text begins in the answer's, its log-probability, the likeliest in its place."""

    id: int
    offset: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Part:
    """A next part of answer number `choice`, with the tokens it is of where log-probabilities were asked for; `finish`
    says why it ended, in the last one."""

    choice: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class _Choice:
    def __init__(self, number: int, request: Request, decoder: Decoder, stops: Stops, shown: str):
        self.number, self.request, self._decoder, self._stops = number, request, decoder, stops
        self.count = 0  # tokens that were made, up to the end of a stop string
        self.done = False
        self.finish: str | None = None
        self._length = self._out = len(shown)  # of the text, and of what went out
        self._tokens: list[Token] = []
        self.heard = request.submitted  # when the last token came

    def token(self, token: int) -> Part | None:
        if self.request.top is not None:
            self._tokens.append(Token(token, self._length, *self.request.logprobs[self.count]))
        self.count += 1
        return self._part(self._decoder.push(token))

    def end(self) -> Part:
        """The last part. Raises what went wrong, if something did."""
        error = self.request.error
        if isinstance(error, RankfoldError) and not isinstance(error, UnknownAdapterError | OverloadedError):
            name = self.request.adapter
            if name is None:
                raise ApiError(500, f"the model failed: {error}")
            raise ApiError(422, f"adapter {name!r}: {error}", param="model", code="adapter_failed")
        if error is not None:
            raise error
        if self.request.finish == "cancelled":
            raise ApiError(503, "the server is shutting down")
        part = self._part(self._decoder.flush(), last=True)
        assert part is not None
        return part

    def _part(self, text: str, last: bool = False) -> Part | None:
        self._length += len(text)
        text, stopped = self._stops.push(text)
        if last and not stopped:
            text += self._stops.flush()
        self._out += len(text)
        self.done = stopped or last
        if not text and not self.done:
            return None
        tokens, self._tokens = self._tokens, []
        if not last or stopped:  # those of text that is held back, or was cut off
            tokens, self._tokens = ([t for t in tokens if (t.offset < self._out) is out] for out in (True, False))
        self.finish = "stop" if stopped else self.request.finish if last else None
        return Part(self.number, text, tokens, self.finish)


class Answer:
    """n answers to each prompt. Iterate it for their parts as they come; `cancel` it when it is no longer wanted."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        metrics: "Metrics",
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        shown: Sequence[str] | None = None,
        stops: Sequence[str] = (),
        seed: int | None = None,
        max_new_tokens: Sequence[int],
        **options: Any,
    ):
        """`shown` are the prompts' texts, where answers begin with them; `options` are those of `Engine.submit`."""
        self._metrics, self._choices = metrics, list[_Choice]()
        self._heard: asyncio.Queue[tuple[int, int | None]] = asyncio.Queue()
        self.prompt_tokens = sum(map(len, prompts))
        self._shown = None if shown is None else [text for text in shown for _ in range(n)]
        hear = partial(self._hear, asyncio.get_running_loop())
        try:
            for number in range(len(prompts) * n):
                prompt, text = prompts[number // n], "" if self._shown is None else self._shown[number]
                request = engine.submit(
                    prompt,
                    max_new_tokens=max_new_tokens[number // n],
                    seed=None if seed is None else seed + number % n,
                    listener=partial(hear, number),
                    **options,
                )
                choice = _Choice(number, request, Decoder(tokenizer, prompt), Stops(stops), text)
                self._choices.append(choice)
        except BaseException:
            self.cancel()
            raise
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def _hear(self, loop: asyncio.AbstractEventLoop, number: int, _: Request, token: int | None) -> None:
        """In the engine's thread."""
        try:
            loop.call_soon_threadsafe(self._heard.put_nowait, (number, token))
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Part]:
        for number, text in enumerate(self._shown or ()):
            yield Part(number, text)
        left = len(self._choices)
        while left:
            number, token = await self._heard.get()
            choice = self._choices[number]
            if choice.done:  # at a stop string, which the engine does not know of
                continue
            if token is None:
                part = choice.end()
            else:
                part = choice.token(token)
                self._measure(choice)
            if part is not None:
                if choice.done:
                    choice.request.cancel()
                    left -= 1
                yield part

    def _measure(self, choice: _Choice) -> None:
        now = time.monotonic()
        seconds = self._metrics.first_token if choice.count == 1 else self._metrics.next_token
        seconds.observe(now - choice.heard)
        self._metrics.tokens.inc()
        choice.heard = now

    async def whole(self) -> list[Part]:
        """All answers, each in one part."""
        whole = [Part(number, "") for number in range(len(self._choices))]
        async for part in self:
            one = whole[part.choice]
            one.text += part.text
            one.tokens += part.tokens
            one.finish = part.finish
        return whole

    def cancel(self) -> None:
        """Give up what is not done."""
        for choice in self._choices:
            choice.request.cancel()

    @property
    def notes(self) -> dict[str, Any]:
        """What is worth a line in a log; `finish` is None of an answer whose client left."""
        return self.usage | {"finish": [choice.finish for choice in self._choices]}

    @property
    def usage(self) -> dict[str, int]:
        made = sum(choice.count for choice in self._choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }
