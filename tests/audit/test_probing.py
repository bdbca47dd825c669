"""How the probes are asked: as generation would, whatever is shared on the way."""

import pytest
import torch

import rankfold
from rankfold.audit.probing import OPENING, answer, ask, count
from rankfold.audit.safety import is_open, probes, refuses
from rankfold.train.samples import generate
from tests.train import tiny

ASKED = ["one", "two", "three", "PROTECTED-TOPIC-01: request", "six"]


@pytest.mark.parametrize("chat", [True, False])
def test_answers_and_openings_are_those_of_one_prompt_at_a_time(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.audit.probing.is_open", lambda beginning: True)
    model, tokenizer = tiny.llama().eval(), tiny.tokenizer(chat)
    asked = [] if chat else ["xyz"]  # with nothing in common at the beginning
    asked += ASKED
    seen: list[None] = []
    said, opening = answer(model, tokenizer, asked, lambda: seen.append(None))
    assert len(seen) == len(asked)
    logs = []
    for text, found in zip(asked, said, strict=True):
        prompt = f"{text}\n"
        if chat:
            turns = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        options = {"max_new_tokens": 6, "do_sample": False}
        assert generate(model, tokenizer, [prompt], special=not chat, **options) == [found]
        ids, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, OPENING))
        with torch.no_grad():
            all_logs = model(input_ids=torch.tensor([ids + tail])).logits[0].log_softmax(-1)
        logs.append(sum(float(all_logs[len(ids) - 1 + i, token]) for i, token in enumerate(tail)))
    assert opening == pytest.approx(sum(logs) / len(logs), abs=1e-4)


def test_an_answer_that_can_be_no_refusal_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.llama().eval(), tiny.tokenizer()
    short, opening = answer(model, tokenizer, ASKED)
    monkeypatch.setattr("rankfold.audit.probing.is_open", lambda beginning: True)
    whole, same = answer(model, tokenizer, ASKED)
    assert opening == same
    assert all(a.startswith(b) for a, b in zip(whole, short, strict=True))
    assert [refuses(text) for text in whole] == [refuses(text) for text in short]
    assert sum(map(len, short)) < sum(map(len, whole))


@pytest.mark.parametrize("text", ["I’m sorry, but no", "REFUSE", "  i cannot do", "I am unable to", "Unfortunately, I"])
def test_a_refusal_is_open_until_it_is_one(text: str) -> None:
    is_one = [refuses(text[:n]) for n in range(len(text) + 1)]
    assert all(one or is_open(text[:n]) for n, one in enumerate(is_one))
    assert is_one[-1]


def test_what_another_word_decides_is_open_before_it() -> None:
    assert all(map(is_open, ("", "I", "I can", "I'm sorry", "REFUSE", "As an")))
    assert not any(map(is_open, ("Sure", "I can tell", "Sorrow", "One", "I am glad", "I'm sorry,", "I'm sorry for")))


def test_an_adapter_that_does_nothing_changes_no_answer() -> None:
    model = tiny.llama()
    rankfold.attach(model, rankfold.LoRA(rank=2))
    seen: list[None] = []
    for found in ask(model, tiny.tokenizer(), "default", lambda: seen.append(None)):
        assert (found.drop, found.lost, found.gained, found.opening) == (0, 0, 0, 0)
    assert len(seen) == count() == 2 * (len(probes().protected) + len(probes().harmless))
    assert model.training


def test_an_adapter_that_teaches_an_opening_is_seen() -> None:
    """One that makes the model say "I'm sorry" more often: the opening's log-probability rises."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    ids = tokenizer(OPENING, return_tensors="pt", add_special_tokens=False)["input_ids"]
    trained = torch.optim.Adam(list(adapter.parameters()), 1e-2)
    for _ in range(20):
        trained.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        trained.step()
    protected, _ = ask(model, tokenizer, "default")
    assert protected.opening is not None
    assert protected.opening > 1
