"""An engine over HTTP, in the words of OpenAI's API."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import rankfold
from rankfold.errors import RankfoldError
from rankfold.serve.answers import Answer, Part
from rankfold.serve.engine import Engine
from rankfold.serve.errors import ApiError, as_api_error
from rankfold.serve.forms import ChatForm, CompletionForm, Form
from rankfold.serve.gate import NOTES, Gate, Log
from rankfold.serve.jobs import add_jobs
from rankfold.serve.library import UnknownAdapterError
from rankfold.serve.metrics import Metrics
from rankfold.serve.prompts import Prompts
from rankfold.serve.protocol import Asked, ChatBody, CompletionBody, LoadBody, UnloadBody

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a server answers to, and the most it takes.

    Args:
        name: of the base model, as requests say it.
        api_key: a bearer token that every request has to bring; None: only this machine's own programs may ask.
        max_body: bytes of a request.
        max_prompt: tokens of a prompt; None: what the model can read.
        max_tokens: of an answer.
    """

    name: str
    api_key: str | None = None
    max_body: int = 1 << 20
    max_prompt: int | None = None
    max_tokens: int = 2048


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_WRONG: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    for status, what in (
        (400, "The request is wrong"),
        (401, "The key is missing or wrong"),
        (404, "There is no such model or path"),
        (409, "The adapter is still in use"),
        (413, "The body is too long"),
        (422, "The adapter cannot be used"),
        (429, "Too many requests wait; Retry-After says when to come again"),
    )
}


def create_app(engine: Engine, tokenizer: Any, settings: Settings, log: Log | None = None) -> FastAPI:
    """The application; the engine has to be started, and is closed by whoever did that."""
    app = FastAPI(title="Rankfold", version=rankfold.__version__, docs_url=None, redoc_url=None, responses=_WRONG)
    metrics = Metrics(engine)
    app.add_middleware(Gate, metrics=metrics, api_key=settings.api_key, max_body=settings.max_body, log=log)
    for kind in (ApiError, RankfoldError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, lambda _, error: as_api_error(error).response)
    _add_answers(app, _Desk(engine, tokenizer, metrics, settings))
    _add_models(app, engine, settings)
    _add_operation(app, engine, metrics)
    add_jobs(app, engine)
    return app


# ---- asking


class _Desk:
    """Takes what is asked to the engine, and gives out what comes back."""

    def __init__(self, engine: Engine, tokenizer: Any, metrics: Metrics, settings: Settings):
        self.engine, self.tokenizer, self.metrics, self.settings = engine, tokenizer, metrics, settings
        self.prompts = Prompts(engine, tokenizer, settings.max_prompt, settings.max_tokens)

    def adapter(self, model: str) -> str | None:
        if model == self.settings.name:
            return None
        self.engine.library.check(model)
        return model

    async def answer(
        self,
        http: Request,
        body: Asked,
        form: Form,
        prompts: list[list[int]],
        lengths: list[int],
        logprobs: int | None,
        shown: list[str] | None = None,
    ) -> Response:
        answer = Answer(
            self.engine,
            self.tokenizer,
            self.metrics,
            prompts,
            body.n,
            adapter=self.adapter(body.model),
            shown=shown,
            stops=body.stops,
            seed=body.seed,
            max_new_tokens=lengths,
            temperature=body.temperature,
            top_p=body.top_p,
            ends=self.prompts.ends,
            logprobs=logprobs,
        )
        notes = http.scope[NOTES]
        notes["model"] = body.model
        try:
            if not body.stream:
                parts = await _unless_gone(http, answer.whole())
                notes |= answer.notes
                return JSONResponse(form.whole(parts, answer.usage))
            parts = aiter(answer)
            first = await _unless_gone(http, anext(parts))  # an error before it has its own HTTP status
        except BaseException as error:
            answer.cancel()
            notes |= answer.notes
            if isinstance(error, _GoneError):
                return Response(status_code=499)
            raise
        return _Stream(answer, _events(answer, form, first, parts, body.wants_usage), notes)


class _GoneError(Exception):
    """The client hung up."""


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is given up when the client hangs up."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise _GoneError
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    answer: Answer, form: Form, first: Part, parts: AsyncIterator[Part], with_usage: bool
) -> AsyncIterator[str]:
    try:
        part: Part | None = first
        while part is not None:
            for chunk in form.chunks(part, with_usage):
                yield _event(chunk)
            part = await anext(parts, None)
        if with_usage:
            yield _event(form.last(answer.usage))
    except Exception as error:
        yield _event(as_api_error(error).body)
        if not isinstance(error, ApiError | RankfoldError):
            raise
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Stream(StreamingResponse):
    """Events as they come. However it ends, and the client may leave at any time, the requests behind it end too."""

    def __init__(self, answer: Answer, events: AsyncIterator[str], notes: dict[str, Any]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer, self._notes = answer, notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
            self._notes |= self._answer.notes


def _add_answers(app: FastAPI, desk: _Desk) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        """Go on from a text. With `stream`, server-sent events."""
        desk.adapter(body.model)
        prompts = await desk.prompts.of_texts(body.prompts)
        shown = [desk.prompts.text(p) if isinstance(p, list) else p for p in body.prompts] if body.echo else None
        lengths = [desk.prompts.length(prompt, body.max_tokens, "max_tokens") for prompt in prompts]
        form = CompletionForm(body.model, desk.tokenizer, body.logprobs)
        return await desk.answer(http, body, form, prompts, lengths, body.logprobs, shown)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        """Answer a chat, written with the model's own template. With `stream`, server-sent events."""
        desk.adapter(body.model)
        prompt = await desk.prompts.of_chat([message.written() for message in body.messages])
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        lengths = [desk.prompts.length(prompt, body.limit, name)]
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatForm(body.model, desk.tokenizer, logprobs)
        return await desk.answer(http, body, form, [prompt], lengths, logprobs)


# ---- the models


def _add_models(app: FastAPI, engine: Engine, settings: Settings) -> None:
    started, library = int(time.time()), engine.library

    def shown(name: str) -> dict[str, Any]:
        base = {"id": name, "object": "model", "created": started, "owned_by": "rankfold"}
        return base if name == settings.name else base | {"parent": settings.name}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The base model, and the adapters on it."""
        names = [name for name in library.names() if name != settings.name]
        return {"object": "list", "data": [shown(name) for name in (settings.name, *names)]}

    @app.get("/v1/models/{model}")
    def model(model: str) -> dict[str, Any]:
        if model != settings.name:
            library.check(model)
        return shown(model)

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> dict[str, str]:
        """Read an adapter of the server's folder before it is asked for, anew where it was unloaded."""
        name = body.lora_name
        await asyncio.wrap_future(engine.between(lambda: engine.restore(name)))
        library.check(name)
        try:
            while await asyncio.wrap_future(engine.between(lambda: library.ready(name))) is None:
                await asyncio.sleep(0.01)
        except UnknownAdapterError:
            raise
        except RankfoldError as error:
            raise ApiError(422, f"adapter {name!r}: {error}", param="lora_name", code="adapter_failed") from error
        return {"status": "loaded", "id": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> dict[str, str]:
        """Take an adapter out of service until it is loaded again. Requests that were accepted are still answered."""
        engine.unload(body.lora_name)
        return {"status": "unloaded", "id": body.lora_name}


# ---- running it


def _add_operation(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health")
    def health() -> Response:
        """Whether requests are being worked on."""
        well = engine.alive
        return JSONResponse({"status": "ok" if well else "the engine has stopped"}, 200 if well else 503)

    @app.get("/metrics", response_class=Response)
    def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
