"""The example of replicas under Ray Serve, as a user runs it: OpenAI's client, and each adapter at one replica."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.serve import Engine
from tests.train import tiny

pytestmark = pytest.mark.slow
pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
NAMES = ["first", "second", "third", "fourth"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and adapters of two methods that change what it says."""
    folder = tmp_path_factory.mktemp("ray")
    base = tiny.write_llama(folder / "base")
    model = tiny.llama()
    for seed, name in enumerate(NAMES):
        adapter = rankfold.attach(model, rankfold.build(("lora", "ia3")[seed % 2]), name=name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape))
        rankfold.save(model, folder / "adapters" / name, name=name)
        rankfold.detach(model)
    assert base == folder / "base"
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLE, "--model", place / "base", "--adapters", place / "adapters"]
    command += ["--port", port, "--max-memory", 1 << 22, "--cpus", 0.5]
    # Without a token Ray would write one into the home folder; a busy machine takes minutes to start.
    own = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen([str(word) for word in command], env={**os.environ, **own})
    try:
        url = f"http://127.0.0.1:{port}/v1"
        until = time.monotonic() + 400
        while True:
            try:
                openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list()
                break
            except openai.OpenAIError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_answers_are_an_engines_and_adapters_stay_where_they_are(place: Path, url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model, tokenizer = tiny.llama().eval(), tiny.tokenizer()
    expected = {}
    with Engine(model, place / "adapters", max_memory=1 << 22) as engine:
        for name in [None, *NAMES]:
            ids = tokenizer("Where is it?")["input_ids"]
            tokens = engine.submit(ids, name, max_new_tokens=8).result()
            expected[name or "base"] = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(set(expected.values())) > 2

    likeliest: dict[str, Any] = {"prompt": "Where is it?", "max_tokens": 8, "temperature": 0}

    def ask(name: str) -> tuple[str, str]:
        raw = client.completions.with_raw_response.create(model=name, **likeliest)
        return raw.parse().choices[0].text, raw.headers["x-replica"]

    for name, text in expected.items():
        assert ask(name)[0] == text
    time.sleep(2)  # replicas tell what they have ten times a second
    homes = {name: {ask(name)[1] for _ in range(6)} for name in NAMES}
    assert all(len(home) == 1 for home in homes.values()), homes
    assert len(set.union(*homes.values())) == 2
    streamed = client.completions.create(model="second", stream=True, **likeliest)
    assert "".join(part.choices[0].text for part in streamed) == expected["second"]
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ask("nobody")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="first", prompt="Where is it?", max_tokens=-1)
