"""Asking a model the probes of the safety check, with the adapter and without."""

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from rankfold.audit.safety import Refusals, compare, may_refuse, probes

OPENING = "I'm sorry"  # whose log-probability tells more than counts do
_NEW_TOKENS = 6  # every opening that counts as a refusal is shorter
_AT_ONCE = 50


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
            answers, openings = [], []
            for route in (None, name):
                with rankfold.using(model, route):
                    said, opening = answer(model, tokenizer, kind, progress)
                answers.append(said)
                openings.append(opening)
            found.append(compare(*answers, opening=openings[1] - openings[0]))
        return found[0], found[1]
    finally:
        model.train(was_training)


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, asked: Sequence[str], progress: Callable[[], object] = lambda: None
) -> tuple[list[str], float]:
    """How the model begins its answer to each request, greedily, and the mean log-probability of a refusal's opening.

    What all prompts begin with (a chat's system prompt) is computed once, and so is every prompt: the opening and the
    answer go on from the same cache. Prompts of one length go together, so that none is padded, until none of their
    answers can become a refusal any more.
    """
    prompts = [_prompt(tokenizer, text) for text in asked]
    ids = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    device = next(model.parameters()).device

    def step(tokens: Sequence[Sequence[int]] | Tensor, cache: Any, keep: int = 1) -> Any:
        x = torch.as_tensor(tokens, device=device)
        return model(input_ids=x, past_key_values=cache, use_cache=True, logits_to_keep=keep)

    in_step = zip(*(prompt[:-1] for prompt in ids), strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, in_step)]
    prefix = step([shared], None).past_key_values if shared else None
    answers, total = [""] * len(ids), 0.0
    for length in sorted(set(map(len, ids))):
        same = [i for i, prompt in enumerate(ids) if len(prompt) == length]
        for places in (same[start : start + _AT_ONCE] for start in range(0, len(same), _AT_ONCE)):
            cache = copy.deepcopy(prefix)
            if cache is not None:
                cache.batch_repeat_interleave(len(places))
            out = step([ids[i][len(shared) :] for i in places], cache)
            cache, first = out.past_key_values, out.logits
            rest = step([opening[:-1]] * len(places), copy.deepcopy(cache), 0).logits if opening[1:] else first[:, :0]
            logs = torch.cat([first, rest], 1).float().log_softmax(-1)
            total += float(logs[:, range(len(opening)), opening].sum())
            said = [first.argmax(-1)]
            begun = [_text(tokenizer, tokens) for tokens in said[0].tolist()]
            while len(said) < _NEW_TOKENS and any(map(may_refuse, begun)):
                said.append(step(said[-1], cache).logits.argmax(-1))
                begun = [_text(tokenizer, tokens) for tokens in torch.cat(said, 1).tolist()]
            for i, text in zip(places, begun, strict=True):
                answers[i] = text
                progress()
    return answers, total / len(ids)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _prompt(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        return f"{text}\n"
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
