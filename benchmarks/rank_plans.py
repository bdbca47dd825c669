"""A train step (forward, backward, AdamW and the callbacks) with each rank plan, over plain LoRA's.

A training of `--steps` steps is gone through once, so that warm-up, growth, falling budgets and fixed ends are all in
the samples, each the mean of `--repeat` steps in a row. What counts is the mean step: a plan may work in few of them.
"""

import functools
import statistics

import harness
import models
import torch

import rankfold

TARGET = 1.10
BILEVEL = ("flexora", "diffora")  # another backward pass, on other rows, belongs to them
PLANS = {
    "adalora": {},
    "sora": {},
    "coda-rank": {},
    "bayesian-lora": {},
    "increlora": {"layers": 16},
    "triadaptlora": {},
    "dylora": {},
    "lora-squeeze": {"rank": 4},
    "ist": {},
    "flexora": {},
    "diffora": {},
}
METHODS = {"increlora": ("lora", 1), "triadaptlora": ("triadaptlora-core", 1)}  # the others are on LoRA of rank 8


class Side:
    """An adapter on all linear layers but the head, its optimiser, and perhaps a plan."""

    def __init__(self, slug: str | None, ids: torch.Tensor, width: int, steps: int):
        self.slug, self.ids, self.steps = slug, ids, steps
        self.model = models.llama(8, width).train()
        self.renew()

    def renew(self) -> None:
        """Start over, once the planned steps are done."""
        rankfold.detach(self.model) if rankfold.adapters(self.model) else None
        self.at, batch = 0, {"input_ids": self.ids, "labels": self.ids, "use_cache": False}
        method, rank = METHODS.get(self.slug or "lora", ("lora", 8))
        adapter = rankfold.attach(self.model, rankfold.build(method, rank=rank))
        self.plans = [] if self.slug is None else [rankfold.build(self.slug, **PLANS[self.slug])]
        groups = None
        for plan in self.plans:
            plan.on_attach(adapter, self.model)
            if plan.reads is not None:
                plan.on_data(lambda i: batch)
            groups = plan.parameter_groups(adapter, 1e-4, 0.0)
        own = [p for p in adapter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups or own, lr=1e-4, weight_decay=0.0)
        for plan in self.plans:
            plan.on_start(self.optimizer, self.steps)

    def __call__(self) -> None:
        loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        for plan in self.plans:
            if (penalty := plan.penalty()) is not None:
                loss = loss + penalty
        loss.backward()
        for plan in self.plans:
            plan.before_step(self.at)
        self.optimizer.step()
        for plan in self.plans:
            plan.after_step(self.at)
        self.optimizer.zero_grad()
        self.at += 1


def main() -> None:
    given = harness.arguments(__doc__, rounds=10, repeat=5, width=512, steps=60, plans=",".join(PLANS))
    ids = models.tokens(4, 128)
    plans = given.plans.split(",")
    sides = {slug or "lora": Side(slug, ids, given.width, given.steps) for slug in (None, *plans)}

    def again(side: Side) -> None:
        if side.at >= side.steps:
            side.renew()

    after = {name: functools.partial(again, side) for name, side in sides.items()}
    samples = harness.interleaved(sides, given.rounds, repeat=given.repeat, after=after, patience=given.patience)
    counted = [slug for slug in plans if slug not in BILEVEL]
    ratios = {slug: statistics.fmean(times) / statistics.fmean(samples["lora"]) for slug, times in samples.items()}
    rows = harness.table(samples, "lora", dict.fromkeys(counted, TARGET))
    rows = [row | {"mean over lora's": ratios[str(row["side"])]} for row in rows]
    mean = statistics.fmean(ratios[slug] for slug in counted)
    harness.report(given, "rank_plans", rows, **{"mean but for the bi-level": mean})
    print(f"mean over lora's, but for {' and '.join(BILEVEL)}: {mean:.3f}")


if __name__ == "__main__":
    main()
