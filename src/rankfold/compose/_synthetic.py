"""Texts like a few examples: drawn from a model, and kept if a discriminator takes them for real ones."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankfold.errors import RankfoldError

PATIENCE = 50  # rounds in a row in which nothing was kept
YES, NO = "yes", "no"


@dataclass
class Synthetic:
    """How far a collection is: rounds drawn, texts drawn and the texts kept, each with `log p(yes) − log p(no)`."""

    rounds: int = 0
    drawn: int = 0
    kept: list[tuple[str, float]] = field(default_factory=list)
    idle: int = 0  # rounds since the last text that was kept


def collect(
    count: int,
    draw: Callable[[int], Sequence[str]],
    judge: Callable[[Sequence[str]], Sequence[float]],
    so_far: Synthetic | None = None,
    after_round: Callable[[Synthetic], Any] = lambda synthetic: None,
    seeds: Sequence[str] = (),
) -> Synthetic:
    """Draw round after round until `count` texts are kept: those with `p(yes) > p(no)`.

    An empty text, a copy of a seed and a text that is there already are not judged. `draw(i)` gives the texts of round
    i, always the same, so that a collection goes on from what `after_round` was given as if it had not been stopped.
    """
    made = so_far or Synthetic()
    there = {*seeds, *(text for text, _ in made.kept), ""}
    while len(made.kept) < count:
        if made.idle >= PATIENCE:
            raise RankfoldError(
                f"of {made.drawn} texts the discriminator kept {len(made.kept)}, and none in the last {PATIENCE} "
                "rounds: ask for fewer, let another model generate, or train the discriminator for longer"
            )
        texts = list(draw(made.rounds))
        new = [text for text in dict.fromkeys(texts) if text not in there]
        real = [(text, margin) for text, margin in zip(new, judge(new) if new else (), strict=True) if margin > 0]
        made.kept += real[: count - len(made.kept)]
        there |= {text for text, _ in real}
        made.rounds, made.drawn, made.idle = made.rounds + 1, made.drawn + len(texts), 0 if real else made.idle + 1
        after_round(made)
    return made


def around(seeds: Sequence[str], rng: random.Random) -> str:
    """A prompt that lists the examples, in an order of its own, and asks for the next."""
    listed = [f"Example {i}: {text}" for i, text in enumerate(rng.sample(list(seeds), len(seeds)), 1)]
    return "\n\n".join([*listed, f"Example {len(seeds) + 1}:"])


def sampled(
    model: nn.Module, tokenizer: Any, seeds: Sequence[str], size: int, seed: int, temperature: float = 1.0
) -> Callable[[int], list[str]]:
    """Rounds of `size` texts that the model writes behind the seeds, each cut where the next example would begin.

    A text has at most twice the tokens of the longest seed.
    """
    from rankfold.train.samples import generate

    longest = 2 * max(len(ids) for ids in tokenizer(list(seeds))["input_ids"])
    end = next(mark for mark in ("\n", "\n\n", "\nExample ") if mark[-1] == " " or not any(mark in s for s in seeds))

    def draw(index: int) -> list[str]:
        rng = random.Random(f"{seed}/{index}")
        prompts = [around(seeds, rng) for _ in range(size)]
        with torch.random.fork_rng():
            torch.manual_seed(rng.getrandbits(63))
            texts = generate(
                model, tokenizer, prompts, max_new_tokens=longest, do_sample=True, temperature=temperature, top_k=0
            )
        return [text.partition(end)[0].strip() for text in texts]

    return draw


def question(text: str, name: str) -> str:
    """What the discriminator is asked of a text."""
    return f"{text}\nIs the above question from {name} dataset?\n"


def margins(model: nn.Module, tokenizer: Any, name: str, size: int = 16) -> Callable[[Sequence[str]], list[float]]:
    """`log p(yes | t(x)) − log p(no | t(x))` of each text by the model as it stands, p of the answers' first tokens."""
    yes, no = (_first_token(tokenizer, question("1", name), answer) for answer in (YES, NO))
    if yes == no:
        raise RankfoldError(f"the tokenizer begins {YES!r} and {NO!r} with one token: it cannot be a discriminator's")

    def judge(texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), size):
            logits = next_token_logits(model, tokenizer, [question(text, name) for text in texts[start : start + size]])
            found += (logits[:, yes] - logits[:, no]).tolist()
        return found

    return judge


@torch.no_grad()
def next_token_logits(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """(prompts, vocabulary): what the model says comes behind each prompt."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    options = {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.logits[0].float()


def _first_token(tokenizer: Any, before: str, answer: str) -> int:
    ids, whole = (tokenizer(text)["input_ids"] for text in (before, before + answer))
    same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    return whole[same]
