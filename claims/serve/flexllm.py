"""Training in the slack of a server's steps, against turns of whole sequences between them, under bursts."""

import functools
import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import transformers

import rankfold
from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS, FromScratch
from rankfold.serve import Engine
from rankfold.serve.engine import Limits
from rankfold.serve.guest import Window
from rankfold.serve.stack import Stack
from rankfold.serve.training import BACKWARD
from rankfold.serve.windows import Windowed

# Times are in units of a step that writes one token of each of `BURST` requests.
BURST, PROMPT, ANSWER, BETWEEN, UNITS = 8, 24, 24, 60, 500
LATENCY, FIRST, NEXT = 4.0, 15.0, 5.0
LENGTH = 128
SLACK = 0.01  # of late tokens, which time-slicing may have more than co-serving
# A sequence after each so many steps of inference (0: after none), and whether also while nothing is asked.
SLICES = [(every, idle) for idle in (False, True) for every in (0, 8, 4, 2)]


@dataclass(frozen=True)
class Served:
    model: str = "6-layer Llama of width 256 from scratch"
    data: str = TASKS["code"].data


TASKS["served and trained"] = Served()


class Training:
    """LoRA by AdamW, a sequence a step; what an engine asks of a job."""

    ended, ready = False, True

    def __init__(self, loaded: FromScratch, engine: Engine, seed: int):
        self.engine, self.trained = engine, 0
        self.stack = Stack(loaded.model, engine.runner.attention)
        self.adapter = rankfold.attach(loaded.model, rankfold.LoRA(rank=8), name="trained", seed=seed)
        rankfold.set_active(loaded.model, None)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), 3e-3)
        self.rows = loaded.batches(seed, size=LENGTH // loaded.task.block)
        self.begin()

    def begin(self) -> None:
        ids = next(self.rows)["input_ids"].flatten()
        self.run = Windowed(self.stack, ids, ids)

    def window(self, tokens: int) -> Window | None:
        n = min(tokens, self.run.length - self.run.done)
        return Window(self.run, n, self.adapter) if n > 0 else None

    def advance(self, tokens: int) -> int:
        model = self.stack.model
        paged = model.config._attn_implementation
        model.set_attn_implementation(self.stack.attention)
        with rankfold.using(model, self.adapter.name):
            if self.run.done < self.run.length:
                used = self.run.forward(tokens)
            else:
                used = BACKWARD * self.run.backward(max(1, tokens // BACKWARD))
            if self.run.done == self.run.length and not self.run.behind:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.trained += self.run.length
                self.begin()
        model.set_attn_implementation(paged)
        return used

    def close(self) -> None:
        rankfold.detach(self.stack.model, self.adapter.name)


@functools.cache
def server() -> FromScratch:
    loaded = FromScratch(TASKS["code"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4
    )
    config.eos_token_id = None
    loaded.model = transformers.LlamaForCausalLM(config).eval()
    return loaded


@functools.cache
def unit() -> float:
    """Seconds of a step that writes a token of each request of a burst, nothing beside."""
    with Engine(server().model, max_memory=1 << 28) as engine:
        for i in range(BURST):
            engine.submit([1 + i] * PROMPT, None, 40)
        taken = []
        for _ in range(40):
            began = time.process_time()
            engine.step()
            taken.append(time.process_time() - began)
    return median(taken[2:])


def arrivals(seed: int) -> list[float]:
    """When each request comes: bursts at random times, the requests of each within a step."""
    rng, now, found = random.Random(seed), 0.0, list[float]()
    while (now := now + rng.expovariate(1 / BETWEEN)) < UNITS:
        found += [now + rng.random() for _ in range(rng.randint(BURST // 2, 3 * BURST // 2))]
    return sorted(found)


@functools.cache
def went(seed: int, slices: tuple[int, bool] | None) -> dict[str, float]:
    """A trace, with training in slices or (None) in the slack of each step."""
    loaded, u = server(), unit()
    rng, coming = random.Random(seed), arrivals(seed)
    written, asked, busy = list[list[float]](), list[Any](), 0
    limits = Limits(latency=LATENCY * u, step_tokens=256)
    with Engine(loaded.model, max_memory=1 << 28, limits=limits) as engine:
        engine.clock = time.process_time  # others who use the machine do not make a step longer
        job: Any = Training(loaded, engine, seed)
        if slices is None:
            engine.train(job)
        began = time.process_time()
        while (now := (time.process_time() - began) / u) < UNITS:
            while len(asked) < len(coming) and coming[len(asked)] <= now:
                prompt, times = [rng.randrange(1, 128) for _ in range(PROMPT)], list[float]()
                note = lambda _, token, times=times: times.append(time.process_time() - began)  # noqa: E731
                asked.append(engine.submit(prompt, None, ANSWER, listener=note))
                written.append(times)
            inferred = engine.step()
            if slices is not None:
                every, idle = slices
                busy += inferred
                if (every and inferred and busy % every == 0) or (idle and not inferred):
                    job.advance(LENGTH)
                    job.advance(BACKWARD * LENGTH)
        for request in asked:
            request.cancel()
        while engine.stats()["running"] or engine.stats()["waiting"]:
            engine.jobs.clear()
            engine.step()
        loss = held_out(loaded, job)
        job.close()
    due = [(t + FIRST + NEXT * i, times, i) for t, times in zip(coming, written, strict=False) for i in range(ANSWER)]
    due = [one for one in due if one[0] < UNITS]
    late = sum(i >= len(times) or times[i] / u > by for by, times, i in due)
    return {"held-out loss": loss, "share of late tokens": late / len(due), "tokens trained": float(job.trained)}


@torch.no_grad()
def held_out(loaded: FromScratch, job: Training) -> float:
    loaded.model.set_attn_implementation(job.stack.attention)
    with rankfold.using(loaded.model, job.adapter.name):
        loss = loaded.evaluate()["held-out loss"]
    loaded.model.set_attn_implementation("rankfold_paged")
    return loss


def traced(_: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    assert side.merge is not None
    mine = went(seed, None)
    if side.merge["name"] == "co-serving":
        return mine
    sliced = [went(seed, one) for one in SLICES]
    allowed = mine["share of late tokens"] + SLACK
    in_time = [one for one in sliced if one["share of late tokens"] <= allowed]
    if in_time:
        return max(in_time, key=lambda one: one["tokens trained"])
    return min(sliced, key=lambda one: one["share of late tokens"])


if __name__ == "__main__":
    run(
        claim="With a bursty arrival trace, co-serving finishes more fine-tuning tokens than time-slicing at the same "
        "inference deadline misses.",
        source="arXiv 2402.18789",
        task="served and trained",
        sides={
            "co-serving": Side(None, 0.0, merge={"name": "co-serving"}),
            "time-slicing": Side(None, 0.0, merge={"name": "time-slicing"}),
        },
        expects=[
            Expect("time-slicing", "co-serving", "tokens trained"),
            Expect("co-serving", "time-slicing", "share of late tokens", by=SLACK),
        ],
        how=traced,
        note=f"A unit is a step of {BURST} requests that write; bursts of {BURST // 2} to {3 * BURST // 2} requests "
        f"come every {BETWEEN} units on average, for {UNITS} units of the processor's time. Token i of an answer is "
        f"late after {FIRST:g} + {NEXT:g} i units. Time-slicing trains a whole sequence of {LENGTH} tokens after each "
        "2, 4 or 8 steps of inference or after none, with or without the time in which nothing is asked; of these it "
        f"is, for each seed, the one that trains most with at most {SLACK:g} more late tokens than co-serving.",
    )
