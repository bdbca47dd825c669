"""`rankfold serve` as a process of its own: what it says, and how it stops."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from rankfold.cli import run
from tests.serve.http import KINDS, write_adapters
from tests.train import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    tiny.write_llama(place / "tiny-llama")
    write_adapters(place / "adapters")
    return place


class Serving:
    """The command in this thread, as signals need it, and `do` in another, which is given the address.

    Where `do` does not stop the server, or fails, it is stopped.
    """

    def __init__(self, place: Path, do: Callable[["Serving"], None], monkeypatch: pytest.MonkeyPatch, *options: str):
        self._told: queue.Queue[list[str]] = queue.Queue()
        monkeypatch.setattr(sys.modules["rankfold.cli.serve"], "say", self._told.put)
        self._ended, failures = threading.Event(), list[BaseException]()
        self.url = self.example = ""

        def act() -> None:
            try:
                said = self._told.get(timeout=60)
                told = re.fullmatch(r"serving tiny-llama and 4 adapters at (http://\S+)/v1", said[0])
                assert told is not None
                self.url, self.example = told[1], said[1].removeprefix("try: ")
                do(self)
            except BaseException as error:
                failures.append(error)
            finally:
                for _ in range(2):
                    self._ended.wait(2) or self.stop()

        acting = threading.Thread(target=act)
        acting.start()
        command = ["serve", "--model", str(place / "tiny-llama"), "--adapters", str(place / "adapters"), "--port", "0"]
        self.code = run([*command, "--max-memory", "4MB", *options])
        self._ended.set()
        acting.join()
        assert failures == []

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_it_says_how_to_ask_and_drains(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "secret-7"
    monkeypatch.setenv("RANKFOLD_API_KEY", key)

    def ask(server: Serving) -> None:
        said = subprocess.run(["bash", "-c", server.example], capture_output=True, text=True)
        assert json.loads(said.stdout)["usage"]["total_tokens"] > 0
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert key not in server.example
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny-llama", *sorted(KINDS)]
        asked: dict[str, Any] = {"model": "lora4", "prompt": "a", "max_tokens": 100, "temperature": 1, "seed": 0}
        events = iter(client.completions.create(stream=True, logprobs=0, **asked))
        next(events)
        server.stop()
        assert list(events)[-1].choices[0].finish_reason in ("length", "stop")
        with pytest.raises(openai.APIConnectionError):
            client.models.list()

    assert Serving(place, ask, monkeypatch, "--log", "json").code == 0
    out, err = capfd.readouterr()
    logged = [json.loads(line) for line in out.splitlines()]
    assert [one["status"] for one in logged] == [200, 401, 200, 200]
    assert logged[3]["model"] == "lora4"
    assert "Traceback" not in err
    assert key not in out + err


def test_a_second_signal_stops_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Exception] = []

    def ask(server: Serving) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def wait() -> None:
            try:
                client.completions.create(model="lora4", prompt="a", max_tokens=500, n=64, temperature=1)
            except openai.APIError as error:
                ended.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while "rankfold_running_requests 0" in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        server.stop()
        time.sleep(0.3)
        assert waiting.is_alive()
        server.stop()
        waiting.join(20)
        assert not waiting.is_alive()

    assert Serving(place, ask, monkeypatch, "--log", "none").code == 130
    assert len(ended) == 1


@pytest.mark.slow
def test_a_process_of_its_own(place: Path) -> None:
    command = [sys.executable, "-m", "rankfold", "serve", "--model", str(place / "tiny-llama"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while not (line := process.stderr.readline()).startswith("try: "):
                assert line
            said = subprocess.run(["bash", "-c", line.removeprefix("try: ")], capture_output=True, text=True)
            assert json.loads(said.stdout)["choices"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines: set a key"),
        (["--host", "0.0.0.0", "--api-key", ""], "--api-key: a key is one word"),
        (["--max-memory", "much"], "--max-memory: 'much' is no size"),
        (["--max-memory", "4XB"], "is no unit"),
        (["--max-memory", "1kB"], "max_memory is 1,000 bytes; one page of this model"),
        (["--adapters", "nowhere"], "--adapters: nowhere is no folder"),
    ],
)
def test_what_cannot_be_served(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.delenv("RANKFOLD_API_KEY", raising=False)
    assert run(["serve", "--model", str(place / "tiny-llama"), "--port", "0", *options]) == 2
    assert says in capfd.readouterr().err


def test_an_encoder_decoder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.write_t5(tmp_path / "t5")
    assert run(["serve", "--model", str(tmp_path / "t5"), "--port", "0"]) == 2
    assert "encoder-decoder" in capfd.readouterr().err


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--help"]) == 0
    out = capfd.readouterr().out
    assert "Example: rankfold serve --model" in out
    assert "Traceback" not in out
