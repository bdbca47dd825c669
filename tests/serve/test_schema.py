"""Requests made from the OpenAPI document, right and wrong ones: none of them makes the server fail."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests.serve.http import Served, served, write_adapters

PHASES = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(write_adapters(tmp_path_factory.mktemp("served") / "adapters"), max_tokens=8) as running:
        yield running
        assert running.engine.alive
        assert {one["status"] for one in running.logged if one["status"] >= 500} == set()


def operations(server: Served) -> Any:
    return schemathesis.openapi.from_dict(server.get("/openapi.json").json())


def fuzz(server: Served, examples: int) -> set[tuple[str, int]]:
    """Which statuses each path answered with."""
    seen: set[tuple[str, int]] = set()
    for found in operations(server).get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @seed(0)
            @settings(
                max_examples=examples,
                phases=PHASES,
                database=None,
                suppress_health_check=list(HealthCheck),
                deadline=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call(base_url=server.url, timeout=30)
                seen.add((case.path, answer.status_code))
                assert answer.status_code < 500
                if answer.status_code >= 400:
                    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

            with suppress(Unsatisfiable):  # of what has no parameters there is nothing wrong
                ask()
    return seen


def test_the_document_names_the_paths(server: Served) -> None:
    paths = {found.ok().path for found in operations(server).get_all_operations()}
    asked = {"/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"}
    assert paths >= asked | {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


def test_nothing_makes_it_fail(server: Served) -> None:
    seen = fuzz(server, 8)
    assert {path for path, _ in seen} >= {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"}
    assert {status for _, status in seen} >= {200, 400, 404}


@pytest.mark.slow
def test_nothing_makes_it_fail_for_long(server: Served) -> None:
    fuzz(server, 300)
