"""Asking a model the probes of the safety check, with the adapter and without."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import rankfold
from rankfold.audit.safety import Refusals, compare, is_open, probes

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

    What all prompts begin with (a chat's system prompt) is computed once. Each prompt is read with the opening behind
    it, which gives both the opening's probability and the answer as far as it says the same. Answers are read on until
    it is clear whether they refuse.
    """
    prompts = [_prompt(tokenizer, text) for text in asked]
    ids = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    device = next(model.parameters()).device
    in_step = zip(*(prompt[:-1] for prompt in ids), strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, in_step)]
    prefix = model(torch.tensor([shared], device=device), use_cache=True, logits_to_keep=1) if shared else None

    def read(sequences: Sequence[list[int]], last: int) -> Tensor:
        """Logits at the last positions of each. Padding comes behind a sequence, where no causal model sees it."""
        tails = [torch.tensor(tokens[len(shared) :], device=device) for tokens in sequences]
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        cache = copy.deepcopy(prefix.past_key_values) if prefix else None
        if cache is not None:
            cache.batch_repeat_interleave(len(tails))
        x = pad_sequence(tails, batch_first=True)
        # as a tensor: a slice of the states is not contiguous, and the product with the head five times slower
        kept = torch.arange(int(lengths.min()) - last, x.shape[1], device=device)
        logits = model(x, past_key_values=cache, use_cache=cache is not None, logits_to_keep=kept).logits
        places = (lengths - lengths.min())[:, None] + torch.arange(last, device=device)
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])).float()

    said: list[list[int]] = [[] for _ in ids]
    total = 0.0
    for rows in _together(range(len(ids)), ids):
        logits = read([ids[i] + opening for i in rows], len(opening) + 1)
        total += float(logits[:, :-1].log_softmax(-1)[:, range(len(opening)), opening].sum())
        for i, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
            agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(best, opening, strict=False)))
            said[i] = best[: agreed + 1]
            progress()
    while going_on := [i for i, tokens in enumerate(said) if _goes_on(tokenizer, tokens)]:
        for rows in _together(going_on, ids):
            for i, best in zip(rows, read([ids[i] + said[i] for i in rows], 1).argmax(-1).tolist(), strict=True):
                said[i] += best
    return [_text(tokenizer, tokens[:_NEW_TOKENS]) for tokens in said], total / len(ids)


def _together(rows: Iterable[int], ids: Sequence[list[int]]) -> Iterator[list[int]]:
    """The rows in groups of about one length."""
    ordered = sorted(rows, key=lambda i: len(ids[i]))
    return (ordered[start : start + _AT_ONCE] for start in range(0, len(ordered), _AT_ONCE))


def _goes_on(tokenizer: Any, said: list[int]) -> bool:
    ended = len(said) >= _NEW_TOKENS or tokenizer.eos_token_id in said
    return not ended and is_open(_text(tokenizer, said))


def _text(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _prompt(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        return f"{text}\n"
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
