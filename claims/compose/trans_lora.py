"""Trans-LoRA: a small model's adapter goes to a larger one, by filtered prompts of a noisy sampler."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rankfold
from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS
from rankfold.compose._synthetic import collect

LETTERS, TASK, LENGTH = "abcdefghijklmnopqrstuvwxyz", "abcdefgh", 4
COUNT, MADE = 64, 16  # |D|, and |D_syn| of most sides
WRONG = "share of letters that are wrong"


@dataclass(frozen=True)
class Words:
    model: str = "2-layer Llama, width 64, to a 4-layer one, width 96; both from scratch, on copying words"
    data: str = "words of the first eight letters, to be answered by each letter's successor"


TASKS["words"] = Words()


def words(rng: random.Random, count: int, letters: str) -> list[str]:
    return ["".join(rng.choice(letters) for _ in range(LENGTH)) for _ in range(count)]


def successors(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


def ids(texts: Sequence[str]) -> Tensor:
    return torch.tensor([list(text.encode()) for text in texts])


def fitted(model: Any, parameters: Any, batch: Callable[[], list[str]], answer: int, lr: float, steps: int) -> None:
    """Train on texts of which the last `answer` letters carry the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        x = ids(batch())
        labels = x.clone()
        labels[:, :-answer] = -100
        optimizer.zero_grad()
        model(input_ids=x, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@functools.cache
def pretrained(layers: int, width: int) -> dict[str, Tensor]:
    """A model that copies words of any letters: `word>word`."""
    rng, model = random.Random(0), made(layers, width, None)

    def batch() -> list[str]:
        return [f"{word}>{word}" for word in words(rng, 32, LETTERS)]

    fitted(model, list(model.parameters()), batch, LENGTH, 3e-3, 350)
    return model.state_dict()


def made(layers: int, width: int, state: dict[str, Tensor] | None) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes))
    if state is not None:
        model.load_state_dict(state)
    return model


@functools.cache
def source(seed: int) -> tuple[Any, tuple[str, ...]]:
    """The small model with the adapters "task" and "discriminator", and five seeds: the data D ends with this call."""
    rng, model = random.Random(seed), made(2, 64, pretrained(2, 64))
    data = words(rng, COUNT, TASK)
    seeds = tuple(data[:5])
    noisy = noise(seeds, seed + 50)
    negatives = [word for i in range(COUNT // 16) for word in noisy(i)]
    told = [f"{word}?{'y' if i < COUNT else 'n'}" for i, word in enumerate([*data, *negatives])]
    shown = [f"{word}>{successors(word)}" for word in data]
    for name, texts, answer, steps in (("task", shown, LENGTH, 200), ("discriminator", told, 1, 400)):
        adapter = rankfold.attach(model, rankfold.LoRA(rank=8), name=name, seed=seed)
        fitted(model, list(adapter.parameters()), lambda texts=texts: rng.sample(texts, 16), answer, 1e-2, steps)
    return model.eval(), seeds


def noise(seeds: Sequence[str], seed: int) -> Callable[[int], list[str]]:
    """Rounds of 16 seeds with letters exchanged: for another of the task's, and one time in three for any."""

    def draw(index: int) -> list[str]:
        rng = random.Random(f"{seed}/{index}")

        def letter(old: str) -> str:
            return rng.choice(LETTERS) if rng.random() < 1 / 3 else rng.choice(TASK) if rng.random() < 1 / 2 else old

        return ["".join(map(letter, rng.choice(seeds))) for _ in range(16)]

    return draw


@torch.no_grad()
def judge(model: Any, texts: Sequence[str]) -> list[float]:
    with rankfold.using(model, "discriminator"):
        logits = model(ids([f"{text}?" for text in texts])).logits[:, -1]
    return (logits[:, ord("y")] - logits[:, ord("n")]).tolist()


@torch.no_grad()
def answers(model: Any, texts: Sequence[str]) -> list[str]:
    """By greedy decoding."""
    x = ids([f"{text}>" for text in texts])
    for _ in range(LENGTH):
        x = torch.cat([x, model(x).logits[:, -1:].argmax(-1)], 1)
    return [bytes(row.tolist()).decode() for row in x[:, -LENGTH:]]


def moved(loaded: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    assert side.method is not None
    teacher, seeds = source(seed)
    which, count = side.method["prompts"], side.method.get("count", MADE)
    draw, rng = noise(seeds, seed), random.Random(100 + seed)
    if which == "filtered":
        made_up = collect(count, draw, lambda texts: judge(teacher, texts), seeds=seeds)
    else:
        made_up = collect(count, draw, lambda texts: [1.0] * len(texts), seeds=seeds)
    prompts = {
        "filtered": [text for text, _ in made_up.kept],
        "unfiltered": [text for text, _ in made_up.kept],
        "seeds": list(seeds),
        "random": ["".join(chr(rng.randrange(33, 127)) for _ in range(LENGTH)) for _ in range(count)],
        "none": [],
    }[which]
    model = teacher if side.method.get("on") == "source" else made(4, 96, pretrained(4, 96))
    test = words(random.Random(1000 + seed), 200, TASK)
    if prompts:
        with rankfold.using(teacher, "task"):
            pairs = [f"{x}>{y}" for x, y in zip(prompts, answers(teacher, prompts), strict=True)]
        adapter = rankfold.attach(model, rankfold.LoRA(rank=8), name="moved", seed=seed)
        size = min(16, len(pairs))
        fitted(model, list(adapter.parameters()), lambda: rng.sample(pairs, size), LENGTH, float(side.lr), 150)  # type: ignore[arg-type]
    model.eval()
    with rankfold.using(teacher, "task"), torch.no_grad():
        x = ids([f"{word}>{successors(word)}" for word in test])
        labels = x.clone()
        labels[:, :-LENGTH] = -100
        loss = float(model(input_ids=x, labels=labels).loss)
        said = answers(model, test)
    wrong = [a != b for word, one in zip(test, said, strict=True) for a, b in zip(successors(word), one, strict=True)]
    inside = sum(set(text) <= set(TASK) for text in prompts) / max(1, len(prompts))
    return {"held-out loss": loss, WRONG: sum(wrong) / len(wrong), "prompts of the task": inside}


def side(prompts: str, **more: Any) -> Side:
    return Side({"name": "lora", "rank": 8, "prompts": prompts, **more}, lr=1e-2)


run(
    claim="The adapter that was moved is better than the target alone and at least as good as the source with its own; "
    "random text < seeds only < unfiltered < filtered prompts; and more prompts help at equal steps.",
    source="arXiv 2405.17258",
    task="words",
    sides={
        "source with its adapter": side("none", on="source"),
        "target alone": side("none"),
        "random text": side("random"),
        "seeds only": side("seeds"),
        "unfiltered": side("unfiltered"),
        "filtered": side("filtered"),
        "filtered, 4 times as many": side("filtered", count=COUNT),
    },
    expects=[
        Expect("filtered", "target alone", WRONG),
        Expect("filtered", "source with its adapter", WRONG),
        Expect("seeds only", "random text", WRONG),
        Expect("unfiltered", "seeds only", WRONG),
        Expect("filtered", "unfiltered", WRONG),
        Expect("filtered, 4 times as many", "filtered", WRONG),
    ],
    how=moved,
)
