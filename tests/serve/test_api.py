"""The server as OpenAI's own client meets it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import rankfold
from tests.serve.http import BASE, KINDS, Served, saying, served, write_adapters
from tests.train import tiny

TOKENIZER = tiny.tokenizer()
CHAT: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("served") / "adapters")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder) as running:
        yield running
    assert running.engine.pool.used == 0


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def speaking() -> Iterator[Served]:
    with served(model=saying("é🙂".encode())) as running:
        yield running


def alone(folder: Path, name: str, ids: list[int], count: int) -> list[int]:
    """What the model says under the adapter, by whole forwards."""
    model = tiny.llama().eval()
    if name != BASE:
        rankfold.load(model, folder / name, name)
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
            if ids[-1] == TOKENIZER.eos_token_id:
                break
    return ids


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, *sorted(KINDS)]
    assert client.models.retrieve("dora").model_dump()["parent"] == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", [BASE, *KINDS])
def test_a_completion_is_what_the_model_says(client: openai.OpenAI, folder: Path, name: str) -> None:
    prompt = TOKENIZER("Once upon")["input_ids"]
    said = client.completions.create(model=name, prompt="Once upon", max_tokens=12, temperature=0)
    ids = alone(folder, name, prompt, 12)[len(prompt) :]
    assert said.choices[0].text == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert said.object == "text_completion"
    assert said.model == name
    assert said.usage is not None
    ended = ids[-1] == TOKENIZER.eos_token_id
    assert said.choices[0].finish_reason == ("stop" if ended else "length")
    assert said.usage.completion_tokens == len(ids) - ended
    assert said.usage.prompt_tokens == len(prompt)


def test_adapters_differ(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=name, prompt="Hello", max_tokens=10, temperature=0).choices[0].text
        for name in (BASE, *KINDS)
    }
    assert len(texts) == 1 + len(KINDS)


def test_a_chat_goes_through_the_template(client: openai.OpenAI, folder: Path) -> None:
    text = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    same = client.completions.create(model="lora4", prompt=text, max_tokens=10, temperature=0)
    said = client.chat.completions.create(model="lora4", messages=CHAT, max_completion_tokens=10, temperature=0)
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].message.content == same.choices[0].text
    assert said.usage == same.usage
    again = [*CHAT, said.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and 3?"}]}]
    assert client.chat.completions.create(model="lora4", messages=again, max_tokens=3).usage.prompt_tokens > 20  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"stop": ["\x03", "="]}])
@pytest.mark.parametrize("name", ["lora4", "dora"])
def test_a_stream_is_the_whole_in_parts(client: openai.OpenAI, name: str, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": name, "max_tokens": 16, "temperature": 0, **options}
    whole = client.completions.create(prompt="ab", **asked)
    texts, ends, usage = dict.fromkeys(range(len(whole.choices)), ""), {}, None
    for chunk in client.completions.create(prompt="ab", stream=True, stream_options={"include_usage": True}, **asked):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage

    chat = client.chat.completions.create(messages=CHAT, **asked)
    spoken, roles = dict.fromkeys(range(len(chat.choices)), ""), []
    for part in client.chat.completions.create(messages=CHAT, stream=True, **asked):
        assert part.usage is None
        for choice in part.choices:
            spoken[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
    assert list(spoken.values()) == [choice.message.content for choice in chat.choices]
    assert sorted(roles) == list(spoken)


def test_characters_are_whole_in_every_chunk(speaking: Served) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": "é", "max_tokens": 16, "temperature": 0}
    chunks = [c.choices[0].text for c in speaking.client().completions.create(stream=True, **asked)]
    assert "".join(chunks) == "🙂é🙂é🙂"[:5]
    assert [c for c in chunks if c] == ["🙂", "é", "🙂", "é", "🙂"][: len("".join(chunks))]


def test_stop_strings_are_held_back(speaking: Served) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": "é", "max_tokens": 40, "temperature": 0}
    client = speaking.client()
    said = client.completions.create(stop="é🙂é", **asked)
    assert (said.choices[0].text, said.choices[0].finish_reason) == ("🙂", "stop")
    assert said.usage is not None
    assert said.usage.completion_tokens == 4 + 2 + 4 + 2  # to the end of the stop string, and no further
    stream = client.completions.create(stop=["é🙂é", "nothing"], stream=True, **asked)
    assert [c.choices[0].text for c in stream] == ["🙂", ""]
    unfinished = client.completions.create(stop="éx", **asked | {"max_tokens": 6})
    assert (unfinished.choices[0].text, unfinished.choices[0].finish_reason) == ("🙂é", "length")


def test_seeds(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> list[str]:
        asked = {"model": "lora2", "prompt": "x", "max_tokens": 12, "temperature": 1.5, **options}
        return [choice.text for choice in client.completions.create(**asked).choices]

    three = ask(seed=7, n=3)
    assert three == ask(seed=7, n=3)
    assert len(set(three)) == 3
    assert three[:1] == ask(seed=7)
    assert ask(seed=8) != ask(seed=7)
    assert ask(seed=7, top_p=1e-9) == ask(temperature=0)


def test_several_prompts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "dora", "max_tokens": 6, "temperature": 0}
    texts = ["one", "two"]
    both = client.completions.create(prompt=texts, n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    each = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    assert [choice.text for choice in both.choices] == [each[0], each[0], each[1], each[1]]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    assert [c.text for c in client.completions.create(prompt=ids, **asked).choices] == each
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == each[0]


def test_echo(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "dora", "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(prompt="one", **asked).choices[0].text
    ids = TOKENIZER("one")["input_ids"]
    assert client.completions.create(prompt="one", echo=True, **asked).choices[0].text == "one" + plain
    assert client.completions.create(prompt=ids, echo=True, **asked).choices[0].text == "one" + plain
    stream = client.completions.create(prompt="one", echo=True, stream=True, **asked)
    assert "".join(c.choices[0].text for c in stream) == "one" + plain


def test_log_probabilities_of_a_completion(client: openai.OpenAI, folder: Path) -> None:
    prompt = TOKENIZER("Hello")["input_ids"]
    said = client.completions.create(model="lora4", prompt="Hello", max_tokens=5, temperature=0, logprobs=3).choices[0]
    model = tiny.llama().eval()
    rankfold.load(model, folder / "lora4")
    ids = alone(folder, "lora4", prompt, 5)
    with torch.no_grad():
        p = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
    found: Any = said.logprobs
    expected = [float(row[token]) for row, token in zip(p, ids[len(prompt) :], strict=True)]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert [len(top) for top in found.top_logprobs] == [3] * 5
    for row, top in zip(p, found.top_logprobs, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(row.topk(3).values.tolist()), abs=1e-4)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert said.text[offset:].startswith(token) or said.text[offset:].startswith("\N{REPLACEMENT CHARACTER}")


def test_log_probabilities_of_a_chat(speaking: Served) -> None:
    client = speaking.client()
    messages: list[Any] = [{"role": "user", "content": "é"}]
    asked: dict[str, Any] = {"model": BASE, "messages": messages, "max_tokens": 12, "temperature": 0}
    said = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked).choices[0]
    content = said.logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert len(content) == 12
    assert bytes(b for token in content for b in token.bytes or ()).decode("utf-8", "replace") == said.message.content
    assert all(token.top_logprobs[0].bytes == token.bytes for token in content)
    assert all(token.top_logprobs[0].logprob == token.logprob >= token.top_logprobs[1].logprob for token in content)
    streamed = []
    for chunk in client.chat.completions.create(logprobs=True, top_logprobs=2, stream=True, **asked):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert streamed == content
    cut = client.chat.completions.create(logprobs=True, stop="🙂", **asked).choices[0]
    kept = cut.logprobs.content  # type: ignore[union-attr]
    assert kept is not None
    assert bytes(b for token in kept for b in token.bytes or ()).decode("utf-8", "replace") == cut.message.content
    assert cut.message.content == (said.message.content or "").partition("🙂")[0]


def test_none_is_a_parameter_left_out(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": "x", "temperature": 0}
    nothing: dict[str, Any] = {"stop": None, "seed": None, "max_tokens": None, "logprobs": None, "best_of": 1}
    said = client.completions.create(**asked, **nothing, user="me")
    assert said.choices[0].text == client.completions.create(**asked, max_tokens=16).choices[0].text


WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    ("temperature", {"temperature": -1}, "temperature"),
    ("temperature", {"temperature": "1"}, "temperature"),
    ("top_p", {"top_p": 0}, "top_p"),
    ("n", {"n": 0}, "n"),
    ("n", {"n": 100, "prompt": ["a", "b"]}, "n"),
    ("max_tokens", {"max_tokens": 0}, "max_tokens"),
    ("the 2048 tokens", {"max_tokens": 100_000}, "max_tokens"),
    ("stop", {"stop": [""]}, "stop"),
    ("seed", {"seed": 1 << 70}, "seed"),
    ("no such parameter", {"min_p": 0.1}, "min_p"),
    ("does not support", {"presence_penalty": 0.5}, "presence_penalty"),
    ("does not support", {"logit_bias": {"5": 1}}, "logit_bias"),
    ("does not support", {"suffix": "x"}, "suffix"),
    ("does not support", {"best_of": 3}, "best_of"),
    ("log-probabilities", {"echo": True, "logprobs": 1}, "echo"),
    ("stream: true", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("prompt", {"prompt": None}, "prompt"),
    ("prompt is empty", {"prompt": ""}, None),
    ("token ids", {"prompt": [5, 10_000]}, None),
    ("up to 511", {"prompt": "a" * 600}, "prompt"),
    ("512", {"prompt": "a" * 500, "max_tokens": 20}, None),
]


@pytest.mark.parametrize(("says", "changes", "param"), WRONG)
def test_what_cannot_be_is_refused(server: Served, says: str, changes: dict[str, Any], param: str | None) -> None:
    answer = server.post("/v1/completions", {"model": BASE, "prompt": "a", **changes})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 2},
        {"max_tokens": 2, "max_completion_tokens": 3},
    ],
)
def test_chats_that_cannot_be(server: Served, changes: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", {"model": BASE, "messages": CHAT, **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(changes))


def test_a_model_without_a_template_does_not_chat() -> None:
    with served(tokenizer=tiny.tokenizer(chat=False)) as plain:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            plain.client().chat.completions.create(model=BASE, messages=CHAT)
        assert plain.client().completions.create(model=BASE, prompt="a", max_tokens=2).choices


def test_a_template_may_refuse() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('users speak first') }}"
    with served(tokenizer=tokenizer) as strict, pytest.raises(openai.BadRequestError, match="users speak first"):
        strict.client().chat.completions.create(model=BASE, messages=CHAT)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model(server: Served, path: str) -> None:
    answer = server.post(path, {"model": "nobody", "prompt": "a", "messages": CHAT, "stream": True})
    assert answer.status_code == 400  # a chat has no prompt, and a completion no messages
    answer = server.post(path, {"model": "nobody", **({"messages": CHAT} if "chat" in path else {"prompt": "a"})})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "content", [b"", b"x", b"[]", b"5", b'{"model": ', b"[" * 100_000, b'{"model": "\\ud800", "prompt": "\\udfff"}']
)
def test_bodies_that_are_no_request(server: Served, content: bytes) -> None:
    answer = server.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_only_json_is_taken(server: Served) -> None:
    """What a form of a foreign web page can send is no request."""
    body = json.dumps({"model": BASE, "prompt": "a"})
    answer = server.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_paths_and_methods_that_there_are_not(server: Served) -> None:
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"


def test_unloaded_and_loaded_again(tmp_path: Path) -> None:
    folder = write_adapters(tmp_path / "adapters")
    with served(folder) as server:
        client = server.client()

        def ask(name: str = "lora4") -> str:
            return client.completions.create(model=name, prompt="ab", max_tokens=8, temperature=0).choices[0].text

        before = ask()
        assert server.engine.stats()["adapters_in_pool"] == 1
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "lora4"}).json()["status"] == "unloaded"
        assert "lora4" not in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError, match="unloaded"):
            ask()
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "lora4"}).status_code == 404
        (folder / "lora4").rename(tmp_path / "old")
        (folder / "lora2").rename(folder / "lora4")
        reads = server.engine.stats()["adapters_reads"]
        assert server.post("/v1/load_lora_adapter", {"lora_name": "lora4"}).json()["status"] == "loaded"
        assert server.engine.stats()["adapters_reads"] == reads + 1
        assert server.engine.stats()["pages_adapters"] == 0
        assert ask() != before
        assert server.engine.stats()["adapters_reads"] == reads + 1
        (tmp_path / "old").rename(folder / "lora2")
        assert ask("lora2") == before


def test_an_adapter_in_use_is_answered_with_before_it_goes(folder: Path) -> None:
    with served(folder) as server:
        client = server.client()
        asked: dict[str, Any] = {"model": "lora4", "prompt": "a", "max_tokens": 150, "temperature": 1, "seed": 1}
        stream = client.completions.create(stream=True, **asked)
        next(iter(stream))
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "lora4"}).status_code == 200
        again = server.post("/v1/load_lora_adapter", {"lora_name": "lora4"})
        if again.status_code != 200:  # else it was over already
            assert again.status_code == 409
            assert again.json()["error"]["code"] == "adapter_in_use"
        assert [c.choices[0].finish_reason for c in stream][-1] in ("length", "stop")
        assert server.post("/v1/load_lora_adapter", {"lora_name": "lora4"}).status_code == 200


def test_adapters_come_by_name_only(server: Served) -> None:
    for body in ({"lora_name": "lora4", "lora_path": "/etc"}, {"lora_name": ""}, {"name": "lora4"}):
        assert server.post("/v1/load_lora_adapter", body).status_code == 400
    same = {"lora_name": "lora4", "lora_path": "lora4"}
    assert server.post("/v1/load_lora_adapter", same).status_code == 200
    assert server.post("/v1/load_lora_adapter", {"lora_name": "nobody"}).status_code == 404


def test_numbers(server: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.engine.counts, "trained", 7)
    monkeypatch.setitem(server.engine.counts, "trained_beside", 3)
    client.completions.create(model="lora4", prompt="abc", max_tokens=5, temperature=1, seed=1)
    text = server.get("/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values['rankfold_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert values["rankfold_generated_tokens_total"] >= 5
    assert values["rankfold_prompt_tokens_total"] >= 3
    assert values["rankfold_time_to_first_token_seconds_count"] >= 1
    assert values["rankfold_time_per_token_seconds_count"] >= 4
    assert values["rankfold_running_requests"] == values["rankfold_waiting_requests"] == 0
    pages = [values[f'rankfold_pages{{of="{of}"}}'] for of in ("free", "tokens", "adapters")]
    assert sum(pages) == len(server.engine.pool)
    assert values["rankfold_adapter_reads_total"] >= 1
    assert values["rankfold_trained_tokens_total"] == 7
    assert values["rankfold_trained_beside_tokens_total"] == 3
    assert "lora4" not in text


def test_health_and_log(server: Served, client: openai.OpenAI) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    said = client.completions.with_raw_response.create(model="dora", prompt="abc", max_tokens=2)
    noted = next(one for one in reversed(server.logged) if one["path"] == "/v1/completions")
    assert noted["id"] == said.headers["x-request-id"]
    assert (noted["model"], noted["prompt_tokens"], noted["status"]) == ("dora", 3, 200)
    assert "abc" not in json.dumps(noted)


def test_a_failure_inside_shows_nothing_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder) as server:
        monkeypatch.setattr(server.engine, "submit", lambda *a, **b: 1 / 0)
        answer = server.post("/v1/completions", {"model": BASE, "prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "division" not in answer.text
        assert "Traceback" not in answer.text


def test_an_engine_that_stopped_is_not_well(folder: Path) -> None:
    with served(folder) as server:
        server.engine.close()
        assert server.get("/health").status_code == 503
        assert server.post("/v1/completions", {"model": BASE, "prompt": "a"}).status_code == 503
