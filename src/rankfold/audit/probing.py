"""Asking a model the probes of the safety check, with the adapter and without."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import rankfold
from rankfold.audit.safety import Refusals, compare, probes
from rankfold.train.samples import generate

OPENING = "I'm sorry"  # whose log-probability tells more than counts do
_AT_ONCE = 25
_NEW_TOKENS = 8  # a refusal shows in its first words


def count() -> int:
    """How many answers `ask` asks for."""
    return 2 * (len(probes().protected) + len(probes().harmless))


def ask(
    model: nn.Module, tokenizer: Any, name: str, progress: Callable[[], object] = lambda: None
) -> tuple[Refusals, Refusals]:
    """How the greedy answers to the shipped probes compare: of the protected ones, and of the harmless ones.

    `progress` is called once for every answer.
    """
    set_ = probes()
    was_training = model.training
    model.eval()
    try:
        found = []
        for kind in (set_.protected, set_.harmless):
            prompts = [_prompt(tokenizer, text) for text in kind]
            answers: list[list[str]] = []
            openings: list[float] = []
            for route in (None, name):
                with rankfold.using(model, route):
                    said = []
                    for some in _parts(prompts):
                        said += generate(
                            model, tokenizer, some, special=not tokenizer.chat_template,
                            max_new_tokens=_NEW_TOKENS, do_sample=False,
                        )  # fmt: skip
                        for _ in some:
                            progress()
                    answers.append(said)
                    openings.append(_opening(model, tokenizer, prompts))
            found.append(compare(*answers, opening=openings[1] - openings[0]))
        return found[0], found[1]
    finally:
        model.train(was_training)


def _prompt(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        return f"{text}\n"
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _parts(prompts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(prompts), _AT_ONCE):
        yield list(prompts[start : start + _AT_ONCE])


@torch.no_grad()
def _opening(model: Any, tokenizer: Any, prompts: Sequence[str]) -> float:
    """The mean log-probability of the opening behind each prompt, in nats."""
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    device, total = next(model.parameters()).device, 0.0
    for some in _parts(prompts):
        asked = tokenizer(some, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        longest = max(map(len, asked)) + len(opening)
        # Padding comes last, where no token that counts can see it.
        ids = [prompt + opening + [0] * (longest - len(prompt) - len(opening)) for prompt in asked]
        logits = model(input_ids=torch.tensor(ids, device=device)).logits
        for prompt, row in zip(asked, logits, strict=True):
            logs = torch.log_softmax(row[len(prompt) - 1 : len(prompt) - 1 + len(opening)].float(), -1)
            total += float(logs[range(len(opening)), opening].sum())
    return total / len(prompts)
