"""What an engine promises: a request's tokens are its own, nothing is lost, and everything is freed."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rankfold
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.serve import Engine, OverloadedError
from rankfold.serve.engine import Limits
from rankfold.serve.library import UnknownAdapterError
from tests.serve.conftest import KINDS, save_adapter, tiny_llama

NAMES = [None, *KINDS]


def greedy(model: Any, folder: Path, adapter: str | None, prompt: list[int], count: int) -> tuple[list[int], float]:
    """The likeliest tokens by whole forwards of the model under the loaded adapter, and the closest call of them."""
    if adapter is not None:
        rankfold.load(model, folder / adapter, adapter)
    tokens, closest = list(prompt), float("inf")
    with torch.no_grad():
        for _ in range(count):
            logits, ids = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
            closest = min(closest, float(logits[0] - logits[1]))
            tokens.append(int(ids[0]))
    if adapter is not None:
        rankfold.detach(model)
    return tokens[len(prompt) :], closest


def prompts(seed: int, count: int, longest: int = 30) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(97) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_model_under_the_adapter(model: Any, library: Path, name: str | None):
    asked = prompts(1, 4)
    wanted = [greedy(model, library, name, prompt, 6) for prompt in asked]
    with Engine(model, library) as engine:
        got = [engine.submit(prompt, name, 6) for prompt in asked]
        for request, (tokens, closest) in zip(got, wanted, strict=True):
            assert closest > 1e-6  # or rounding would decide
            assert request.result() == tokens
            assert request.finish == "length"


def test_a_mixed_batch_runs_in_one_forward(model: Any, library: Path):
    with Engine(model, library) as engine:
        requests = [engine.submit(prompt, name, 5) for prompt, name in zip(prompts(2, len(NAMES)), NAMES, strict=True)]
        for name in KINDS:
            while engine.library.ready(name) is None:
                engine.library.wait(1)
        for request in requests:
            request.result()
        assert engine.counts["steps"] == 5
        assert engine.stats()["adapters_in_pool"] == len(KINDS)
        assert engine.stats()["pages_tokens"] == 0
    assert engine.pool.used == 0


@pytest.fixture(scope="module")
def alone(library: Path) -> dict[tuple[int, str | None], list[int]]:
    """20 tokens for each of four prompts under each adapter, each request alone in an engine."""
    texts = prompts(3, 4)
    with Engine(tiny_llama(), library) as engine:
        return {(i, name): engine.submit(texts[i], name, 20).result() for i in range(4) for name in NAMES}


requests_of = st.lists(
    st.tuples(
        st.integers(0, 3),  # the prompt
        st.sampled_from(NAMES),
        st.integers(1, 20),  # tokens
        st.integers(0, 6),  # steps between it and the one before
        st.booleans(),  # whether it is cancelled a few steps later
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=15, phases=(Phase.generate,), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests_of, st.integers(40, 200), st.integers(1, 64), st.integers(1, 4))
def test_tokens_do_not_depend_on_neighbours(
    library: Path, alone: dict[Any, list[int]], arrivals: list[Any], pages: int, step_tokens: int, batch: int
):
    texts = prompts(3, 4)
    limits = Limits(batch=batch, step_tokens=step_tokens, distinct=2)
    with Engine(tiny_llama(), library, max_memory=pages * 768, block=2, limits=limits) as engine:
        assert engine.pool.page_bytes == 768
        asked = []
        for i, (prompt, name, count, gap, cancelled) in enumerate(arrivals):
            for _ in range(gap):
                engine.step()
            try:
                asked.append((engine.submit(texts[prompt], name, count), alone[prompt, name][:count], cancelled))
            except RankfoldError:
                assert 2 * len(engine.pool) < len(texts[prompt]) + count
            if cancelled and i % 2:
                asked[-1][0].cancel()
        for request, _, cancelled in asked:
            if cancelled:
                request.cancel()
        while engine.step():
            assert engine.pool.used <= len(engine.pool)
        for request, tokens, cancelled in asked:
            if isinstance(request.error, RankfoldError):
                assert "pages" in str(request.error)  # it and its adapter cannot fit
            elif cancelled:
                assert request.tokens == tokens[: len(request.tokens)]
            else:
                assert request.result() == tokens
        assert engine.stats()["pages_tokens"] == 0
    assert engine.pool.used == 0


def test_adapters_take_turns_in_a_pool_that_holds_few(model: Any, library: Path, alone: dict[Any, list[int]]):
    texts = prompts(3, 4)
    with Engine(model, library, max_memory=120 * 768, block=2) as engine:
        order = [(i % 4, name) for i, name in enumerate([*KINDS, *reversed(KINDS)])]
        asked = [(engine.submit(texts[i], name, 8), alone[i, name][:8]) for i, name in order]
        for request, tokens in asked:
            assert request.result() == tokens
        assert engine.library.counts["evicted"] > 0


def test_a_prompt_is_read_once_for_all_that_share_it(model: Any, library: Path):
    text = prompts(7, 1, 30)[0] + [5] * 20
    with Engine(model, library, block=4) as engine:
        first = [engine.submit(text, "lora4", 8, temperature=2.0, seed=seed).result() for seed in range(3)]
        assert len(set(map(tuple, first))) == 3
        rows = engine.counts["rows"]
        together = [engine.submit(text, "lora4", 8, temperature=2.0, seed=seed) for seed in range(3)]
        other = engine.submit(text, "lora8", 8)
        assert [request.result() for request in together] == first
        assert other.result() == engine.submit(text, "lora8", 8).result()
        # The prompt three times: under lora4 once, under lora8 twice; one more row for each that forked.
        assert engine.counts["rows"] - rows == 3 * len(text) + 5 * 7 + 2
        assert engine.stats()["pages_tokens"] == 0


def test_drawn_tokens_follow_the_seed_and_not_the_batch(model: Any, library: Path):
    texts = prompts(4, 3)

    def drawn(engine: Engine, beside: int) -> list[int]:
        others = [engine.submit(text, "lora8", 9, temperature=2.0) for text in texts[:beside]]
        mine = engine.submit(texts[0], "lora4", 12, temperature=1.5, top_p=0.9, seed=7).result()
        for other in others:
            other.result()
        return mine

    with Engine(model, library) as engine:
        first = drawn(engine, 0)
        assert drawn(engine, 3) == first
        assert engine.submit(texts[0], "lora4", 12, temperature=1.5, top_p=0.9, seed=8).result() != first


def test_top_p_leaves_out_unlikely_tokens(model: Any):
    with Engine(model) as engine:
        request = engine.submit([1, 2, 3], None, 20, temperature=5.0, top_p=1e-6, seed=1)
        assert request.result() == engine.submit([1, 2, 3], None, 20).result()


def test_log_probabilities_are_those_of_the_model(model: Any):
    with Engine(model) as engine:
        request = engine.submit([5, 6, 7], None, 3, logprobs=4)
        tokens = request.result()
    with torch.no_grad():
        p = torch.log_softmax(model(torch.tensor([[5, 6, 7, *tokens]])).logits[0, 2:-1], -1)
    for i, (own, top) in enumerate(request.logprobs):
        assert own == pytest.approx(float(p[i, tokens[i]]), abs=1e-5)
        assert [token for token, _ in top] == p[i].topk(4).indices.tolist()


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(model: Any):
    with Engine(model) as engine:
        whole = engine.submit([1, 2, 3], None, 12).result()
        end = whole[4]
        request = engine.submit([1, 2, 3], None, 12, ends=[end])
        assert request.result() == whole[: whole.index(end)]
        assert request.finish == "stop"


def test_tokens_come_one_by_one(model: Any):
    with Engine(model) as engine:
        seen: list[int | None] = []
        request = engine.submit([1, 2, 3], None, 5, listener=lambda _, token: seen.append(token))
        stream = iter(request)
        first = next(stream)
        assert (request.tokens, request.done) == ([first], False)
        assert [first, *stream] == request.result()
        assert seen == [*request.tokens, None]


def test_a_thread_serves_many_askers(model: Any, library: Path, alone: dict[Any, list[int]]):
    texts = prompts(3, 4)
    engine = Engine(model, library).start()
    asked = [(engine.submit(texts[i], name, 10), alone[i, name][:10]) for i in range(4) for name in NAMES]
    assert all(request.result(60) == tokens for request, tokens in asked)
    engine.close()
    with pytest.raises(RankfoldError, match="closed"):
        engine.submit([1])


def test_closing_finishes_what_was_accepted(model: Any, library: Path):
    engine = Engine(model, library).start()
    requests = [engine.submit(prompt, "lora4", 15) for prompt in prompts(5, 6)]
    engine.close()
    assert all(len(request.result(0)) == 15 for request in requests)


def test_closing_without_draining_cancels(model: Any, library: Path):
    engine = Engine(model, library)
    request = engine.submit([1, 2], None, 200)
    engine.step()
    engine.close(drain=False)
    assert request.finish == "cancelled"
    assert engine.pool.used == 0


def test_the_model_is_as_it_was_after_closing(model: Any, library: Path):
    before = model(torch.tensor([[1, 2, 3]])).logits
    with Engine(model, library) as engine:
        for name in NAMES:
            engine.submit([1, 2, 3], name, 3).result()
        with pytest.raises(RankfoldError, match="being served"):
            model(torch.tensor([[1, 2, 3]]))
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
    assert rankfold.attach(model, rankfold.LoRA(rank=2)).num_parameters() > 0


@pytest.mark.parametrize("damage", ["cut", "other model", "text"])
def test_a_broken_adapter_fails_its_own_requests(model: Any, library: Path, tmp_path: Path, damage: str):
    shutil.copytree(library / "lora4", tmp_path / "good")
    shutil.copytree(library / "lora4", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("no adapter at all")
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        shutil.rmtree(tmp_path / "bad")
        config = LlamaConfig(
            vocab_size=97, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
        save_adapter(LlamaForCausalLM(config), tmp_path / "bad", "lora", rank=2)
    with Engine(model, tmp_path) as engine:
        bad, good = engine.submit([1, 2], "bad", 3), engine.submit([1, 2], "good", 3)
        assert len(good.result()) == 3
        with pytest.raises(RankfoldError):
            bad.result()
        shutil.rmtree(tmp_path / "bad")
        shutil.copytree(library / "lora8", tmp_path / "bad")
        assert len(engine.submit([1, 2], "bad", 3).result()) == 3  # mended, it serves


@pytest.mark.parametrize("name", ["..", "a/b", "../lora4", "none", "", "lora4/", "a" * 500])
def test_names_lead_nowhere_but_to_adapters(model: Any, library: Path, name: str):
    with Engine(model, library) as engine, pytest.raises(UnknownAdapterError):
        engine.submit([1], name)


def test_a_link_out_of_the_folder_is_no_adapter(model: Any, library: Path, tmp_path: Path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "link").symlink_to(library / "lora4")
    with Engine(model, folder) as engine, pytest.raises(UnknownAdapterError, match="link"):
        engine.submit([1], "link")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [97]}, "outside"),
        ({"prompt": [-1]}, "outside"),
        ({"prompt": [1], "max_new_tokens": 0}, "at least one"),
        ({"prompt": [1] * 200, "max_new_tokens": 57}, "more than the model's 256"),
        ({"prompt": [1] * 100, "max_new_tokens": 40}, "whole pool"),
        ({"prompt": [1], "temperature": -1}, "temperature"),
        ({"prompt": [1], "temperature": float("nan")}, "temperature"),
        ({"prompt": [1], "top_p": 0}, "top_p"),
    ],
)
def test_what_cannot_be_asked(model: Any, options: dict[str, Any], cause: str):
    with Engine(model, max_memory=50 * 768, block=2) as engine, pytest.raises(RankfoldError, match=cause):
        engine.submit(**options)


def test_too_many_waiting_are_told_when_to_come_back(model: Any):
    with Engine(model, limits=Limits(waiting=2)) as engine:
        engine.submit([1]), engine.submit([1])
        with pytest.raises(OverloadedError) as told:
            engine.submit([1])
        assert told.value.retry_after >= 1


def test_nan_fails_the_request_that_has_it(model: Any, library: Path):
    with Engine(model, library) as engine:
        engine.submit([1, 2], "lora4", 2).result()
        entry = engine.library.entry("lora4")
        assert entry is not None
        engine.pool.pages[entry.pages[0]] = float("nan")
        broken = engine.submit([1, 2], "lora4", 2)
        sound = engine.submit([1, 2], None, 2)
        assert len(sound.result()) == 2
        with pytest.raises(RankfoldError, match="NaN"):
            broken.result()


def test_an_error_in_one_forward_is_that_requests_own(model: Any, library: Path):
    """A layer that refuses a token: the others of the batch go on."""
    with Engine(model, library) as engine:
        wanted = engine.submit([1, 2, 3], "lora4", 4).result()

        def refuse(_: Any, args: Any) -> None:
            if bool((args[0] == 13).any()):
                raise RuntimeError("no 13 here")

        hook = model.model.embed_tokens.register_forward_pre_hook(refuse)
        bad, good = engine.submit([4, 13], None, 4), engine.submit([1, 2, 3], "lora4", 4)
        assert good.result() == wanted
        with pytest.raises(RuntimeError, match="13"):
            bad.result()
        hook.remove()
        assert engine.stats()["pages_tokens"] == 0


def test_a_model_that_keeps_more_than_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedError):
        Engine(MambaForCausalLM(config))


@pytest.mark.parametrize("kind", ["mistral-window", "gpt2", "qwen2", "gemma"])
def test_other_models(kind: str, tmp_path: Path):
    import transformers as t

    common = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
    deep = {**common, "num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model: Any = {
        "mistral-window": lambda: t.MistralForCausalLM(t.MistralConfig(**deep, sliding_window=8, **ids)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, **ids)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**deep, **ids)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**deep, head_dim=8, **ids)),
    }[kind]().eval()
    save_adapter(model, tmp_path / "lora", "lora", rank=3)
    text = prompts(6, 1, 25)[0] + [3] * 12
    wanted = [greedy(model, tmp_path, name, text, 8) for name in (None, "lora")]
    with Engine(model, tmp_path, block=4, limits=Limits(step_tokens=7)) as engine:
        got = [engine.submit(text, name, 8) for name in (None, "lora")]
        for request, (tokens, closest) in zip(got, wanted, strict=True):
            assert closest > 1e-6
            assert request.result() == tokens


def test_adapters_of_peft_are_served(model: Any, tmp_path: Path):
    adapter = rankfold.attach(model, rankfold.LoRA(rank=3), ["q_proj", "down_proj"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    rankfold.export_peft(model, tmp_path / "of-peft")
    rankfold.save(model, tmp_path / "own")
    rankfold.detach(model)
    with Engine(model, tmp_path) as engine:
        assert engine.library.names() == ["of-peft", "own"]
        assert engine.submit([1, 2, 3], "of-peft", 9).result() == engine.submit([1, 2, 3], "own", 9).result()


def test_requests_that_come_too_late_are_refused_and_the_last_ones_served(model: Any):
    limits = Limits(batch=1, first_token=5.0)
    with Engine(model, limits=limits) as engine:
        first = engine.submit([1, 2], None, 200)
        engine.step()
        late = [engine.submit([3, 4], None, 3) for _ in range(3)]
        for request in late:
            request.submitted -= 10.0
        fresh = [engine.submit([5, 6], None, 3) for _ in range(2)]
        engine.step()
        for request in late:
            with pytest.raises(OverloadedError, match="first token"):
                request.result()
        first.cancel()
        while not any(r.done for r in fresh):
            engine.step()
        assert (fresh[0].done, fresh[1].done) == (False, True)
        assert len(fresh[0].result()) == 3


def test_rare_adapters_leave_first(model: Any, library: Path):
    with Engine(model, library) as engine:
        for name in ("lora8", "lora4", "lora8", "lora3", "lora8"):
            engine.submit([1, 2], name, 1).result()
        entry = engine.library.entry("lora8")
        assert entry is not None
        in_use: Any = lambda name: False  # noqa: E731
        engine.library.make_room(len(engine.pool) - entry.size, in_use)
        assert [e.name for e in engine.library.in_pool] == ["lora8"]


def read_meanwhile(model: Any, library: Path, names: list[str], host_memory: int) -> list[str]:
    """Which of the adapters of waiting requests are in host memory by the time that the one before them is through."""
    with Engine(model, library, limits=Limits(batch=1), host_memory=host_memory) as engine:
        first = engine.submit([1, 2, 3], None, 60)
        waiting = [engine.submit([4, 5], name, 2) for name in names]
        while not first.done:
            engine.step()
            engine.library.wait(1)
        entries = {name: engine.library.entry(name) for name in names}
        there = [name for name, entry in entries.items() if entry is not None and entry.read is not None]
        assert not any(entry is not None and entry.in_pool for entry in entries.values())
        reads = engine.library.counts["reads"]
        for request in waiting:
            request.result()
        assert engine.library.counts["reads"] - reads == len(names) - len(there)
        return there


def test_adapters_of_those_who_wait_are_read_while_others_run(model: Any, library: Path):
    assert read_meanwhile(model, library, ["lora8", "dora", "lora3", "vera"], 1 << 20) == [
        "lora8", "dora", "lora3", "vera"
    ]  # fmt: skip


def test_no_more_are_read_ahead_than_host_memory_holds(model: Any, library: Path):
    assert read_meanwhile(model, library, ["lora8", "lora4", "lora3"], 1) == ["lora8"]


def test_a_broken_adapter_that_is_read_ahead_fails_its_own_request(model: Any, library: Path, tmp_path: Path):
    shutil.copytree(library, tmp_path / "adapters")
    (tmp_path / "adapters" / "lora8" / "adapter.safetensors").write_bytes(b"broken")
    with Engine(model, tmp_path / "adapters", limits=Limits(batch=1)) as engine:
        first = engine.submit([1, 2, 3], None, 40)
        broken, good = engine.submit([4, 5], "lora8", 2), engine.submit([4, 5], "lora4", 2)
        while not first.done:
            engine.step()
            engine.library.wait(1)
        assert not broken.done
        assert engine.library.entry("lora4").read is not None  # type: ignore[union-attr]
        assert len(good.result()) == 2
        with pytest.raises(RankfoldError, match="lora8"):
            broken.result()


class Steps:
    """Stands in for a fine-tuning job that always wants more."""

    ended, ready = False, True

    def __init__(self) -> None:
        self.given: list[int] = []

    def window(self, tokens: int) -> None:
        """It has nothing that could go beside requests."""

    def advance(self, tokens: int) -> int:
        self.given.append(tokens)
        return tokens

    def close(self) -> None:
        self.ended = True


def test_a_job_gets_what_a_step_leaves(model: Any):
    limits = Limits(step_tokens=40, latency=1000.0)
    job: Any = Steps()
    with Engine(model, limits=limits) as engine:
        engine.train(job)
        requests = [engine.submit([1] * 20, None, 30) for _ in range(3)]
        seen = []
        while any(not r.done for r in requests):
            before = engine.counts["rows"]
            given = len(job.given)
            engine.step()
            seen.append((engine.counts["rows"] - before, sum(job.given[given:])))
        assert all(rows + trained <= 40 for rows, trained in seen)
        assert any(rows == 3 and trained > 0 for rows, trained in seen)
        assert engine.counts["trained"] == sum(job.given) > 0
    assert job.ended


def test_a_job_gets_nothing_where_steps_take_as_long_as_they_may(model: Any):
    job: Any = Steps()
    with Engine(model, limits=Limits(latency=1e-6)) as engine:
        for _ in range(3):
            engine.submit([1, 2, 3], None, 4).result()
        engine.train(job)
        engine.submit([1, 2, 3], None, 4).result()
        assert job.given == []
