"""Who may ask a server, how much of it, and what becomes of those who leave."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import openai
import pytest
import torch

import rankfold
from rankfold.errors import RankfoldError
from rankfold.serve.engine import Limits
from rankfold.serve.server import bind, check_key, is_loopback
from tests.serve.http import BASE, Served, served, write_adapters
from tests.train import tiny

ASKED: dict[str, Any] = {"model": BASE, "prompt": "a", "max_tokens": 4, "temperature": 0}
LONG: dict[str, Any] = {"model": BASE, "prompt": "a", "max_tokens": 500, "temperature": 1, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("served") / "adapters")


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with served(key="sésame-1".encode().hex(), max_body=10_000) as running:
        yield running


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds."""
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def free(server: Served) -> bool:
    stats = server.engine.stats()
    return stats["running"] == stats["waiting"] == stats["pages_tokens"] == 0


# ---- keys and addresses


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing"])
def test_everything_but_health_needs_the_key(locked: Served, path: str) -> None:
    for given in (None, "", "Bearer", "Bearer x", f"Basic {locked.key}", f"Bearer {locked.key}x", "Bearer \xe9"):
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        answer = locked.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert str(locked.key) not in answer.text
    assert locked.get(path, headers={"Authorization": f"bearer {locked.key}"}).status_code != 401
    assert locked.get("/health").status_code == 200


def test_the_client_brings_the_key(locked: Served) -> None:
    assert locked.client().completions.create(**ASKED).choices
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="wrong").completions.create(**ASKED)


def test_a_name_that_leads_here_is_not_enough(folder: Path) -> None:
    """A web page may make its own name lead to 127.0.0.1, and its scripts then ask what is there."""
    with served(folder) as server:
        port = server.url.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "127.0.0.1.nip.example"):
            assert server.get("/v1/models", headers={"Host": host}).status_code == 403
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "[::1]"):
            assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_no_other_site_may_read(folder: Path) -> None:
    with served(folder) as server:
        answer = httpx.options(
            f"{server.url}/v1/completions",
            headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        )
        assert "access-control-allow-origin" not in answer.headers


def test_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("::")
    assert not is_loopback("192.0.2.1")
    with pytest.raises(RankfoldError, match="no address"):
        is_loopback("no such host.")


def test_others_need_a_key() -> None:
    check_key("127.0.0.1", None)
    check_key("0.0.0.0", "a-key")
    with pytest.raises(RankfoldError, match="set a key in RANKFOLD_API_KEY"):
        check_key("0.0.0.0", None)
    for wrong in ("", " ", "a\nb", "clé"):
        with pytest.raises(RankfoldError, match="ASCII"):
            check_key("127.0.0.1", wrong)


def test_an_address_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(RankfoldError, match="cannot be served"):
            bind("127.0.0.1", first.getsockname()[1])


# ---- sizes


def test_long_bodies_are_refused(locked: Served) -> None:
    headers = {"Authorization": f"Bearer {locked.key}"}
    for size in (10_001, 100_000, 3_000_000):
        try:
            answer = locked.post("/v1/completions", ASKED | {"prompt": "a" * size}, headers=headers)
        except httpx.TransportError:
            assert size > 16 * 10_000  # what goes on and on is cut off
            continue
        assert answer.status_code == 413
        assert "10,000 bytes" in answer.json()["error"]["message"]

    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 1000

    assert locked.post("/v1/completions", content=parts(), headers=headers).status_code == 413
    assert locked.client().completions.create(**ASKED).choices


def test_prompts_and_answers_have_limits(folder: Path) -> None:
    with served(folder, max_prompt=10, max_tokens=5) as server:
        client = server.client()
        assert client.completions.create(**ASKED | {"prompt": "a" * 10}).choices
        with pytest.raises(openai.BadRequestError, match="11 tokens; this server takes up to 10"):
            client.completions.create(**ASKED | {"prompt": "a" * 11})
        with pytest.raises(openai.BadRequestError, match="6 is more than the 5"):
            client.completions.create(**ASKED | {"max_tokens": 6})
        chat: list[Any] = [{"role": "user", "content": "a"}]
        said = client.chat.completions.create(model=BASE, messages=chat, temperature=1, seed=1)
        assert said.usage is not None
        assert said.usage.completion_tokens <= 5


# ---- adapters


@pytest.fixture(scope="module")
def beside(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A folder of adapters that has another one beside it, a link to that, and a hidden one."""
    place = tmp_path_factory.mktemp("beside")
    inside = place / "adapters"
    for copy in (inside / "lora4", inside / ".hidden", place / "outside"):
        shutil.copytree(folder / "lora4", copy)
    (inside / "link").symlink_to(place / "outside")
    with served(inside) as running:
        yield running
        assert running.engine.stats()["adapters_reads"] == 1


NAMES = ["../outside", "..", ".", "lora4/../lora4", "/etc", "a/b", "a\\b", "\0", "lora4\0", "\uff4cora4", "%2e%2e"]


@pytest.mark.parametrize("name", [*NAMES, "link", ".hidden"])
def test_no_name_leads_out_of_the_folder(beside: Served, name: str) -> None:
    assert beside.post("/v1/completions", ASKED | {"model": name}).status_code == 404
    assert beside.post("/v1/load_lora_adapter", {"lora_name": name}).status_code == 404
    assert beside.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 404
    if name not in (".", ".."):  # of which clients make another path
        assert beside.get(f"/v1/models/{quote(name, safe='')}").status_code == 404
    assert [model["id"] for model in beside.get("/v1/models").json()["data"]] == [BASE, "lora4"]
    assert beside.post("/v1/completions", ASKED | {"model": "lora4"}).status_code == 200


def spoil(folder: Path, how: str) -> None:
    tensors, document = folder / "adapter.safetensors", folder / "adapter.json"
    match how:
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        case "empty":
            tensors.write_bytes(b"")
        case "document":
            document.write_text("{")
        case "garbage":
            tensors.write_bytes(bytes(range(256)) * 8)
        case "other base":
            model = tiny.llama(hidden_size=64)
            rankfold.attach(model, rankfold.build("lora", rank=2), name="spoilt")
            rankfold.save(model, folder, name="spoilt")
        case "overflow":
            model = tiny.llama()
            adapter = rankfold.attach(model, rankfold.build("lora", rank=2), name="spoilt")
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.fill_(3e38)
            rankfold.save(model, folder, name="spoilt")
        case "huge":
            model = tiny.llama()
            rankfold.attach(model, rankfold.build("lora", rank=16), name="spoilt")
            rankfold.save(model, folder, name="spoilt")


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_adapter_fails_its_own_requests(folder: Path, tmp_path: Path, stream: bool) -> None:
    inside = tmp_path / "adapters"
    shutil.copytree(folder, inside)
    broken = ["cut", "empty", "document", "garbage", "other base", "overflow", "huge"]
    for how in broken:
        shutil.copytree(folder / "lora4", inside / how.replace(" ", "-"))
        spoil(inside / how.replace(" ", "-"), how)
    with served(inside, max_memory=1 << 16) as server:
        client = server.client()
        asked = ASKED | {"temperature": 1.0, "seed": 1}
        well = client.completions.create(**asked | {"model": "lora2"}).choices[0].text
        for how in broken:
            for _ in range(2):
                answer = server.post("/v1/completions", asked | {"model": how.replace(" ", "-"), "stream": stream})
                assert answer.status_code == 422, (how, answer.text)
                error = answer.json()["error"]
                assert error["code"] == "adapter_failed"
                assert how.replace(" ", "-") in error["message"]
                assert str(tmp_path) not in error["message"]
            assert client.completions.create(**asked | {"model": "lora2"}).choices[0].text == well
        failed = server.post("/v1/load_lora_adapter", {"lora_name": "cut"})
        assert failed.status_code == 422
        assert str(tmp_path) not in failed.text
        assert soon(lambda: free(server))
        assert server.get("/health").status_code == 200


# ---- leaving, and too many


def slowly(server: Served) -> None:
    """Let every step take a while, so that a long request is not over before others come."""
    server.engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))


def begin(server: Served, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own; who reads it is up to the caller."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_its_pages(folder: Path, stream: bool) -> None:
    with served(folder) as server:
        slowly(server)
        left = [begin(server, LONG | {"stream": stream, "model": name}) for name in (BASE, "lora4", "dora")]
        assert soon(lambda: server.engine.stats()["running"] == 3)
        if stream:
            assert all(connection.recv(100).startswith(b"HTTP/1.1 200") for connection in left)
        for connection in left:
            connection.close()
        assert soon(lambda: free(server))
        assert server.engine.counts["cancelled"] == 3
        assert soon(lambda: len(server.logged) == 3)


def test_who_leaves_while_waiting_is_not_answered(folder: Path) -> None:
    with served(folder, limits=Limits(batch=1)) as server:
        slowly(server)
        first, second = begin(server, LONG), begin(server, LONG)
        assert soon(lambda: server.engine.stats()["waiting"] == 1)
        second.close()
        assert soon(lambda: server.engine.stats()["waiting"] == 0)
        assert server.engine.stats()["running"] == 1
        first.close()
        assert soon(lambda: free(server))


def test_who_leaves_within_a_body(folder: Path) -> None:
    with served(folder) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert soon(lambda: [one["status"] for one in server.logged] == [499])


def test_too_many_are_told_when_to_come_again(folder: Path) -> None:
    with served(folder, limits=Limits(batch=1, waiting=2)) as server:
        slowly(server)
        held = [begin(server, LONG)]
        assert soon(lambda: server.engine.stats()["running"] == 1)
        held += [begin(server, LONG) for _ in range(2)]
        assert soon(lambda: server.engine.stats()["waiting"] == 2)
        answer = server.post("/v1/completions", ASKED)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**ASKED | {"n": 2})
        for connection in held:
            connection.close()
        assert soon(lambda: free(server))
        several = ASKED | {"n": 4, "max_tokens": 300, "temperature": 1}
        assert server.post("/v1/completions", several).status_code == 429  # and none of the four is left behind
        assert soon(lambda: free(server))
        assert server.client(max_retries=5).completions.create(**ASKED).choices


def test_who_would_wait_too_long_is_told_so(folder: Path) -> None:
    with served(folder, limits=Limits(batch=1, first_token=0.2)) as server:
        slowly(server)
        with begin(server, LONG):
            assert soon(lambda: server.engine.stats()["running"] == 1)
            for stream in (False, True):
                answer = server.post("/v1/completions", ASKED | {"model": "lora4", "stream": stream})
                assert answer.status_code == 429
                assert "retry-after" in answer.headers
        assert soon(lambda: free(server))


def test_others_are_answered_while_one_streams(folder: Path) -> None:
    with served(folder) as server:
        alone = server.client().completions.create(**ASKED).choices[0].text
        with begin(server, LONG | {"stream": True}) as connection:
            assert connection.recv(10)
            assert server.client().completions.create(**ASKED).choices[0].text == alone
        assert soon(lambda: free(server))


def test_draining_answers_what_was_accepted(folder: Path) -> None:
    texts: list[str] = []
    with served(folder) as server:
        asked = ASKED | {"max_tokens": 60}
        alone = server.client().completions.create(**asked).choices[0].text
        ask = threading.Thread(target=lambda: texts.append(server.client().completions.create(**asked).choices[0].text))
        ask.start()
        assert soon(lambda: server.engine.stats()["running"] == 1)
    ask.join()
    assert texts == [alone]
