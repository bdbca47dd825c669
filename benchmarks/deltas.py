"""A train step and its peak memory with each delta on all linear layers but the head, over LoRA's (r=8).

Each method gets the size at which it trains as many numbers as the LoRA, or the nearest it can be given; what it then
trains is in the table. All sides run forward, backward and an AdamW step on the same batch, from token ids.
"""

import harness
import models
import torch

import rankfold
from rankfold.core.method import Method
from rankfold.core.targets import find

# The hyperparameter that sets a method's size, and the values that are tried.
POWERS = [1 << i for i in range(9)]
RANKS = [*range(1, 65), 96, 128, 192, 256]
SIZES: dict[str, tuple[str, list]] = {
    "boft": ("m", [1, 2, 3, 4]),
    "bone": ("rank", POWERS),
    "fourierft": ("n", [1 << i for i in range(8, 13)]),
    "hydra": ("rank", RANKS),
    "lokr": ("rank", RANKS),
    "mos": ("budget", RANKS[:8]),
    "nola": ("k", [32, 64, 128]),
    "oft": ("block_size", [2, 4, 8, 16, 32]),
    "s2ft": ("ratio", [i / 200 for i in range(1, 40)]),
    **{slug: ("density", [i / 400 for i in range(1, 60)]) for slug in ("sft-sparse", "lt-sft", "sara")},
}
FIXED = {"mos": {"rank": 16}, "s2ft": {}}  # beside the size


def sized(slug: str, sites: list, wanted: int) -> Method:
    """The method at the size that trains nearest to `wanted` numbers."""
    fields = type(rankfold.build(slug)).model_fields
    name, values = SIZES.get(slug, ("rank", RANKS if "rank" in fields else []))
    candidates = []
    for value in values:
        try:
            method = rankfold.build(slug, **{name: value, **FIXED.get(slug, {})})
        except rankfold.RankfoldError:
            continue
        if all(method.refusal(site) is None for site in sites):
            candidates.append(method)
    return min(candidates or [rankfold.build(slug)], key=lambda method: abs(method.num_parameters(sites) - wanted))


def main():
    given = harness.arguments(__doc__, rounds=7, layers=2, width=256)
    labels = models.tokens(4, 128)
    base = models.llama(given.layers, given.width)
    sites = [target.site for target in find(base, "all-linear")]
    lora = rankfold.LoRA(rank=8)
    slugs = [entry.slug for entry in rankfold.methods() if entry.axis == "deltas" and entry.supports["linear"] is True]
    sides, adapters, peaks = {}, {}, {}
    for slug in ["lora", *(slug for slug in slugs if slug != "lora")]:
        method = lora if slug == "lora" else sized(slug, sites, lora.num_parameters(sites))
        if method.refusal(sites[0]) is not None:  # bitfit: these layers have no bias
            continue
        model = models.llama(given.layers, given.width)
        adapter = adapters[slug] = rankfold.attach(model, method)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)

        def step(model=model, optimizer=optimizer):
            model(input_ids=labels, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        sides[slug], peaks[slug] = step, harness.peak(step)
    samples = harness.interleaved(sides, given.rounds, warmup=1, patience=given.patience)
    rows = harness.table(samples, "lora", {})
    for row in rows:
        slug = row["side"]
        del row["target"]
        row |= {"peak over lora": peaks[slug] / peaks["lora"], "parameters": adapters[slug].num_parameters()}
        row["hyperparameters"] = ", ".join(f"{k}={v}" for k, v in adapters[slug].method if v is not None)[:60]
    harness.report(given, "deltas", sorted(rows, key=lambda row: row["over lora"]))


if __name__ == "__main__":
    main()
