"""Training tokens in the requests' forward: gradients of the whole sequence, and requests that do not see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.serve.attention import NAME
from rankfold.serve.guest import Window
from rankfold.serve.pool import Table
from rankfold.serve.request import Request, Sampling
from rankfold.serve.runner import Runner
from rankfold.serve.stack import Stack
from rankfold.serve.windows import Windowed
from tests.serve.conftest import save_adapter
from tests.serve.test_windows import MODELS, attached, made, same, sequence, taken, whole

FOLDER = {"product": "lora", "other": "dora"}


class Server:
    """A runner with a request under each adapter of a folder and one of the base, and an adapter that is trained."""

    def __init__(self, model: Any, folder: Path, method: Any):
        self.model = model
        for seed, (name, slug) in enumerate(FOLDER.items()):
            save_adapter(model, folder / name, slug, seed, rank=2)
        self.stack, self.runner = Stack(model), Runner(model, folder, 1 << 20, 1 << 20, 4)
        for name in FOLDER:
            entry = None
            while entry is None:
                entry = self.runner.library.ready(name)
            self.runner.library.place(entry)
        self.adapter = attached(model, method)
        rankfold.set_active(model, None)
        self.requests = [
            Request([7 + i, 8, 9, 30 + i], name, 9, Sampling(), frozenset(), None, None)
            for i, name in enumerate(("other", "product", None))
        ]
        for request in self.requests:
            request.table = Table(self.runner.pool)

    def forward(self, run: Windowed | None = None, n: int = 0) -> torch.Tensor:
        """A row of each request more (their whole prompts first), with the next n tokens of the run beside."""
        batch = [(r, r.unread) for r in self.requests]
        for request, new in batch:
            request.table.extend(new)
        window = None if run is None else Window(run, n, self.adapter)
        logits = self.runner.forward(batch, window)
        for i, (request, new) in enumerate(batch):
            request.read += new
            request.tokens.append(int(logits[i].argmax()))
        return logits

    @contextmanager
    def training(self) -> Iterator[None]:
        """The model as a job has it in its own turns."""
        self.model.set_attn_implementation("sdpa")
        with rankfold.using(self.model, self.adapter.name):
            yield
        self.model.set_attn_implementation(NAME)

    def close(self) -> None:
        rankfold.detach(self.model, self.adapter.name)
        self.runner.close()


def test_what_is_compared(tmp_path: Path) -> None:
    """The adapters differ, and so would the rows of a request if they went under another's."""
    server = Server(made(MODELS["llama"]), tmp_path, rankfold.LoRA(rank=4))
    first = server.forward()
    for request in server.requests:
        request.adapter, request.prompt = None, server.requests[0].prompt
    assert len({request.tokens[0] for request in server.requests} | {float(x) for x in first[:, 0]}) > 3
    server.close()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_exact_gradients_and_undisturbed_requests(tmp_path: Path, name: str) -> None:
    ids, labels = sequence()
    expected_loss, expected = 0.0, {}
    logits: dict[bool, list[torch.Tensor]] = {}
    for beside in (False, True):
        model = made(MODELS[name])
        server = Server(model, tmp_path / str(beside), rankfold.LoRA(rank=4))
        run = Windowed(server.stack, ids, labels)
        if beside:
            logits[True] = [server.forward(run, n) for n in (5, 1, 4)]
            assert run.done == 10
            with server.training():
                run.forward(9)
                while run.behind:
                    run.backward(4)
            assert run.loss == pytest.approx(expected_loss, rel=1e-9)
            same(taken(server.adapter), expected)
            server.close()
        else:
            logits[False] = [server.forward() for _ in range(3)]
            assert run.done == 0
            server.runner.close()
            rankfold.set_active(model, server.adapter.name)
            expected_loss, expected = whole(model, server.adapter, ids, labels)
    for ours, theirs in zip(logits[True], logits[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slug", ["dora", "vera", "ia3", "boft", "mos", "spectral"])
def test_a_methods_gradients(tmp_path: Path, slug: str) -> None:
    """An adapter that is trained goes by rows whatever it is, and its parameters are seen as they are now."""
    model, (ids, labels) = made(MODELS["llama"]), sequence()
    server = Server(model, tmp_path, rankfold.build(slug))
    for _ in range(2):
        run = Windowed(server.stack, ids, labels)
        for n in (6, 7):
            server.forward(run, n)
        with server.training():
            while run.behind:
                run.backward(5)
            ours = taken(server.adapter)
            loss, expected = whole(model, server.adapter, ids, labels)
        assert run.loss == pytest.approx(loss, rel=1e-9)
        same(ours, expected)
        with torch.no_grad():
            for parameter in server.adapter.parameters():
                parameter.mul_(1.5)
    server.close()


def test_a_window_in_which_something_is_drawn_does_not_count(tmp_path: Path) -> None:
    model, (ids, labels) = made(MODELS["llama"]), sequence()
    server = Server(model, tmp_path, rankfold.LoRA(rank=4, dropout=0.5))
    server.adapter.train()
    run, before = Windowed(server.stack, ids, labels), torch.get_rng_state()
    server.forward(run, 5)
    assert (run.done, run.alone) == (0, True)
    assert torch.equal(torch.get_rng_state(), before)
    server.close()


def test_a_forward_that_fails_leaves_the_run_where_it_was(tmp_path: Path) -> None:
    model, (ids, labels) = made(MODELS["llama"]), sequence()
    server = Server(model, tmp_path, rankfold.LoRA(rank=4))
    run = Windowed(server.stack, ids, labels)
    server.forward(run, 5)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.forward(run, 5)
    handle.remove()
    assert (run.done, run.alone) == (5, True)
    assert all("forward" not in layer.__dict__ for layer in server.stack.layers)
    server.close()
