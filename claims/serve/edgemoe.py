"""Statistical prefetch and eviction by frequency and layer, against LRU and FIFO; widths by sensitivity, at random."""

import copy
import functools
import random
import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS, FromScratch
from rankfold.serve.expert_files import pack_experts
from rankfold.serve.experts import PagedExperts, Stats
from rankfold.serve.widths import Profile, profile

LAYERS, EXPERTS, STEPS, TOKENS = 4, 16, 250, 150
CACHE = LAYERS * EXPERTS // 4


@dataclass(frozen=True)
class Paged:
    model: str = f"{LAYERS}-layer Mixtral from scratch, {EXPERTS} experts a layer, 2 a token"
    data: str = TASKS["code"].data


TASKS["paged mixture"] = Paged()


class Mixture(FromScratch):
    """A small Mixtral of bytes, two experts a token; nothing balances its routers."""

    def fresh(self, seed: int) -> None:
        self.model = copy.deepcopy(trained(self, seed))  # whose experts paging takes away


@functools.cache
def mixture() -> Mixture:
    return Mixture(TASKS["code"])


@functools.cache
def trained(loaded: FromScratch, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=2, output_router_logits=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for batch in islice(loaded.batches(seed), STEPS):
        with torch.enable_grad():
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@functools.cache
def profiled(loaded: FromScratch, seed: int) -> Profile:
    return profile(trained(loaded, seed), list(islice(loaded.batches(1000 + seed, size=16), 1)))


@torch.no_grad()
def paged(_: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Misses while held-out text is read token by token, after as much training text; or the loss at chosen widths."""
    assert side.merge is not None
    loaded = mixture()
    loaded.fresh(seed)
    with tempfile.TemporaryDirectory() as folder:
        one = widths if side.merge["name"] == "widths" else cached
        return one(loaded, seed, Path(folder) / "experts", **side.merge)


def cached(loaded: Mixture, seed: int, file: Path, name: Any, prefetch: bool) -> dict[str, float]:
    before = loaded.evaluate()["held-out loss"]
    pack_experts(loaded.model, file, 8)
    with PagedExperts(loaded.model, file, CACHE, policy=name, prefetch=prefetch) as pages:
        for rows in (loaded.train, loaded.held_out):
            pages.stats, cache = Stats(), None
            for token in torch.cat([rows[i] for i in range(TOKENS // len(rows[0]) + 1)])[:TOKENS]:
                cache = loaded.model(input_ids=token.view(1, 1), past_key_values=cache).past_key_values
        found = pages.stats
    return {
        "held-out loss": before,
        "share of misses": 1 - found.hit_rate,
        "bytes read a token": found.bytes_read / TOKENS,
    }


def widths(loaded: Mixture, seed: int, file: Path, name: str, by: str) -> dict[str, float]:
    found = profiled(loaded, seed)
    narrow = [found.bytes[0, 0][bits] for bits in (4, 2)]
    if by == "chance":
        told = list(found.loss.values())
        random.Random(seed).shuffle(told)
        found = replace(found, loss=dict(zip(found.loss, told, strict=True)))
    chosen = found.choose(budget=LAYERS * EXPERTS * sum(narrow) // 2)
    pack_experts(loaded.model, file, chosen)
    before = loaded.evaluate()["held-out loss"]
    with PagedExperts(loaded.model, file, LAYERS * EXPERTS):
        after = loaded.evaluate()["held-out loss"]
    taken = sum(found.bytes[key][bits] for key, bits in chosen.items())
    return {"held-out loss": after, "loss that widths add": after - before, "bytes of all experts": float(taken)}


def side(name: str, prefetch: bool) -> Side:
    return Side(None, 0.0, merge={"name": name, "prefetch": prefetch})


run(
    claim="At the same size of the cache, prefetch by statistics with eviction by frequency and layer misses less "
    "than LRU and FIFO; widths by sensitivity lose less than the same widths dealt at random.",
    source="arXiv 2308.14352",
    task="paged mixture",
    sides={
        "edgemoe": side("frequency", True),
        "without prefetch": side("frequency", False),
        "lru": side("lru", False),
        "fifo": side("fifo", False),
        "lru with prefetch": side("lru", True),
        "by sensitivity": Side(None, 0.0, merge={"name": "widths", "by": "sensitivity"}),
        "at random": Side(None, 0.0, merge={"name": "widths", "by": "chance"}),
    },
    expects=[
        Expect("edgemoe", "lru", "share of misses"),
        Expect("edgemoe", "fifo", "share of misses"),
        Expect("by sensitivity", "at random", "loss that widths add"),
    ],
    how=paged,
    note=f"{CACHE} of {LAYERS * EXPERTS} experts fit; {TOKENS} held-out tokens after as many of training text, one at "
    "a time. Widths of 8, 4 and 2 bits in the bytes of half the experts at 4 and half at 2 bits. Two "
    "sides tell what prefetch and eviction do alone; the paper claims nothing of them.",
)
