"""Replicas of `rankfold serve` on a Ray cluster: a request goes to a replica that has its adapter in memory already.

    python examples/ray_serve.py --model BASE --adapters DIR --replicas 2

Every replica is the whole server, with OpenAI's API, over the same folder of adapters. In front of them stands one
process that reads which adapter a request is for, and leaves the choice of the replica to Ray Serve's multiplexing: one
that has the adapter, else the one that has fewest, and another when the right one is busy. It needs "ray[serve]".
"""

import argparse
import asyncio
import json
import math
import os
import secrets
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from rankfold.serve.server import check_key

ADAPTERS = 64  # that Ray remembers a replica by; how many it really holds, its engine decides


@serve.deployment(max_ongoing_requests=256)
class Replica:
    """A model, its engine, and the application that `rankfold serve` runs, called without a socket."""

    def __init__(self, model: str, adapters: str, name: str, max_memory: int, key: str | None):
        import transformers

        from rankfold.serve import Engine
        from rankfold.serve.api import Settings, create_app

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
        self.engine = Engine(loaded.eval(), adapters, max_memory=max_memory).start()
        self.app, self.id = create_app(self.engine, tokenizer, Settings(name, key)), secrets.token_hex(4)

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS)
    async def has(self, adapter: str) -> str:
        """Tells Ray that this replica has the adapter. Reading it is the engine's business."""
        return adapter

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The messages that the application answers with; when nobody wants more of them, it hears of that."""
        adapter = serve.get_multiplexed_model_id()
        if adapter in self.engine.library.names():
            await self.has(adapter)
        gone, answers = asyncio.Event(), asyncio.Queue[dict[str, Any] | None]()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        working = asyncio.ensure_future(self.app(scope, receive, answers.put))
        working.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (message := await answers.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self.id.encode())]
                yield message
        finally:
            gone.set()
            await working

    def __del__(self) -> None:
        self.engine.close(drain=False)


@serve.deployment(max_ongoing_requests=1024)
class Front:
    """Passes requests on, with the adapter's name beside them."""

    def __init__(self, replicas: Any, name: str):
        self.replicas, self.name = replicas.options(method_name="answer", stream=True), name

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        adapter = asked_for(body)
        scope = {key: request.scope[key] for key in _PASSED if key in request.scope} | {"asgi": {"version": "3.0"}}
        handle = self.replicas.options(multiplexed_model_id="" if adapter == self.name else adapter)
        messages = handle.remote(scope, body)
        start = await anext(messages)

        async def rest() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            finally:
                messages.cancel()

        response = StreamingResponse(rest(), start["status"])
        response.raw_headers = list(start["headers"])
        return response


_PASSED = ("type", "http_version", "method", "path", "raw_path", "query_string", "headers", "scheme", "client")


def asked_for(body: bytes) -> str:
    """The name under "model" in a request; "" where there is none, which is for the replica to complain about."""
    try:
        named = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError):
        return ""
    return named if isinstance(named, str) and len(named) <= 128 else ""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="directory or hub id of the base model")
    arguments.add_argument("--adapters", required=True, help="folder whose subfolders are adapters, seen by every node")
    arguments.add_argument("--name", default="base", help="what requests call the base model")
    arguments.add_argument("--replicas", type=int, default=2)
    arguments.add_argument("--cpus", type=float, default=1, help="of each replica")
    arguments.add_argument("--gpus", type=float, default=0, help="of each replica")
    arguments.add_argument("--max-memory", type=int, default=1 << 30, help="bytes of a replica's pool")
    arguments.add_argument("--host", default="127.0.0.1")
    arguments.add_argument("--port", type=int, default=8000)
    arguments.add_argument("--address", help="of a cluster that runs; default: one on this machine")
    given = arguments.parse_args()
    key = os.environ.get("RANKFOLD_API_KEY")
    check_key(given.host, key)
    local = {"num_cpus": math.ceil(given.replicas * given.cpus), "include_dashboard": False}
    ray.init(given.address) if given.address else ray.init("local", **local)
    serve.start(http_options={"host": given.host, "port": given.port})
    replica = Replica.options(
        num_replicas=given.replicas, ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus}
    ).bind(given.model, given.adapters, given.name, given.max_memory, key)
    front = Front.options(ray_actor_options={"num_cpus": 0}).bind(replica, given.name)
    print(f"starting {given.replicas} replicas at http://{given.host}:{given.port}/v1", flush=True)
    serve.run(front, blocking=True)


if __name__ == "__main__":
    main()
