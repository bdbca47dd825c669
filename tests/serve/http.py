"""A server that answers on a free port of this machine, as long as a test needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import torch

from rankfold.serve import Engine
from rankfold.serve.api import Settings, create_app
from rankfold.serve.server import Server, bind
from tests.serve.conftest import save_adapter
from tests.train import tiny

BASE = "tiny"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora4": ("lora", {"rank": 4}),
    "lora2": ("lora", {"rank": 2, "rslora": True}),
    "dora": ("dora", {"rank": 2}),
    "ia3": ("ia3", {}),
}


def write_adapters(folder: Path) -> Path:
    model = tiny.llama().eval()
    folder.mkdir(exist_ok=True)
    for seed, (name, (method, options)) in enumerate(KINDS.items()):
        save_adapter(model, folder / name, method, seed, **options)
    return folder


def saying(text: bytes) -> Any:
    """A model that goes on with these bytes over and over; none of them may be twice among them."""
    model = tiny.llama().eval()
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text.decode())["input_ids"]
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        E = model.get_input_embeddings().weight
        E.copy_(torch.nn.functional.normalize(torch.randn(E.shape, generator=torch.Generator().manual_seed(0)), dim=1))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[1:] + ids[:1]] = 4 * E[ids]
    return model


class Served:
    """`url` of a server, its `engine`, and what it logged."""

    def __init__(self, engine: Engine, url: str, logged: list[dict[str, Any]], key: str | None):
        self.engine, self.url, self.logged, self.key = engine, url, logged, key
        self.http = httpx.Client(base_url=url, timeout=60)

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": self.key or "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=json, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)


@contextmanager
def served(
    adapters: Path | None = None, model: Any = None, tokenizer: Any = None, key: str | None = None, **options: Any
) -> Iterator[Served]:
    """`options` are those of Settings and of Engine."""
    own = {name: options.pop(name) for name in ("max_body", "max_prompt", "max_tokens") if name in options}
    logged: list[dict[str, Any]] = []
    ready = threading.Event()
    model = tiny.llama() if model is None else model
    with Engine(model, adapters, **{"max_memory": 1 << 20, **options}).start() as engine, bind("127.0.0.1", 0) as where:
        app = create_app(engine, tokenizer or tiny.tokenizer(), Settings(BASE, key, **own), logged.append)
        server = Server(app, ready.set)
        thread = threading.Thread(target=server.run, args=([where],))
        thread.start()
        assert ready.wait(20)
        running = Served(engine, f"http://127.0.0.1:{where.getsockname()[1]}", logged, key)
        try:
            yield running
        finally:
            server.should_exit = True
            thread.join()
            running.http.close()
