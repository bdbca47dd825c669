"""Many clients at once, some of whom leave at any moment: every token is right, and no page is lost."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from rankfold.serve.engine import Limits
from tests.serve.http import BASE, KINDS, Served, served, write_adapters


@dataclass
class Case:
    """What is asked, and its answer when nobody else asks."""

    asked: dict[str, Any]
    alone: str

    @property
    def chats(self) -> bool:
        return "messages" in self.asked


def cases(client: openai.OpenAI, count: int) -> list[Case]:
    draw, made = random.Random(0), list[Case]()
    for i in range(count):
        text = "".join(chr(draw.randrange(97, 123)) for _ in range(draw.randrange(1, 60)))
        asked: dict[str, Any] = {"model": draw.choice([BASE, *KINDS]), "max_tokens": draw.randrange(1, 24)}
        asked |= {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i, "top_p": 0.9}
        if i % 3 == 0:
            asked |= {"stop": [chr(draw.randrange(33, 126)) for _ in range(4)]}
        if i % 5 == 0:
            messages: list[Any] = [{"role": "user", "content": text}]
            said = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
            made.append(Case(asked | {"messages": messages}, said or ""))
        else:
            made.append(Case(asked | {"prompt": text}, client.completions.create(prompt=text, **asked).choices[0].text))
    return made


class _GoneError(Exception):
    """The client left."""


class Client:
    """Asks until it is time to stop, now whole, now as a stream, and now and then leaves without a word."""

    def __init__(self, server: Served, known: list[Case], seed: int, until: float):
        self._client, self._known, self._draw, self._until = server.client(), known, random.Random(seed), until
        self.wrong, self.right, self.left, self.refused = list[tuple[Case, str]](), 0, 0, 0

    def run(self) -> None:
        with self._client:
            self._ask_on()

    def _ask_on(self) -> None:
        while time.monotonic() < self._until:
            case, how = self._draw.choice(self._known), self._draw.random()
            try:
                if how < 0.4:
                    self._compare(case, self._ask(case, lambda _: None))
                elif how < 0.7:
                    self._compare(case, self._ask(case, lambda _: None, stream=True))
                else:
                    self._leave(case, stream=how < 0.85)
            except (openai.RateLimitError, openai.APITimeoutError) as error:
                self.refused += isinstance(error, openai.RateLimitError)
                self.left += isinstance(error, openai.APITimeoutError)

    def _compare(self, case: Case, text: str) -> None:
        if text == case.alone:
            self.right += 1
        else:
            self.wrong.append((case, text))

    def _leave(self, case: Case, stream: bool) -> None:
        """In the middle of a stream, or while nothing has come yet."""
        if not stream:
            self._ask(case, lambda _: None, timeout=self._draw.uniform(0.001, 0.2))
            return
        after = self._draw.randrange(4)

        def leave(chunks: int) -> None:
            if chunks == after:
                self.left += 1
                raise _GoneError

        came = self._ask(case, leave, stream=True)
        if not case.alone.startswith(came):
            self.wrong.append((case, came))

    def _ask(self, case: Case, heard: Callable[[int], None], timeout: float = 60, stream: bool = False) -> str:
        create: Any = self._client.chat.completions.create if case.chats else self._client.completions.create
        if not stream:
            choice = create(timeout=timeout, **case.asked).choices[0]
            return choice.message.content if case.chats else choice.text
        text = ""
        with create(stream=True, timeout=timeout, **case.asked) as chunks, suppress(_GoneError):
            for i, chunk in enumerate(chunks):
                heard(i)
                text += (chunk.choices[0].delta.content or "") if case.chats else chunk.choices[0].text
        return text


def soak(folder: Path, seconds: float, clients: int, count: int) -> None:
    # So little memory that adapters come and go, and so few places that some have to wait or are refused.
    with served(folder, max_memory=1 << 17, limits=Limits(batch=6, step_tokens=48, waiting=6)) as server:
        known = cases(server.client(), count)
        until = time.monotonic() + seconds
        crowd = [Client(server, known, seed, until) for seed in range(clients)]
        threads = [threading.Thread(target=client.run) for client in crowd]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [client.wrong for client in crowd] == [[] for _ in crowd]
        assert sum(client.right for client in crowd) > clients
        assert sum(client.left for client in crowd) > 0
        end = time.monotonic() + 30
        while server.engine.stats()["running"] or server.engine.stats()["waiting"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        stats = server.engine.stats()
        assert stats["pages_tokens"] == 0
        assert stats["failed"] == 0
        assert {one["status"] for one in server.logged} <= {200, 429, 499}
        assert server.get("/health").status_code == 200
    assert server.engine.pool.used == 0


def test_clients_that_come_and_go(tmp_path: Path) -> None:
    soak(write_adapters(tmp_path / "adapters"), seconds=15, clients=6, count=20)


@pytest.mark.slow
def test_clients_that_come_and_go_for_long(tmp_path: Path) -> None:
    soak(write_adapters(tmp_path / "adapters"), seconds=180, clients=12, count=100)
