"""A forward of 32 rows of 16 tokens, each row under another LoRA adapter (r=8), over the plain model's forward.

Three ways to route: `fresh` gives the rows a new order each time, `repeated` names the same adapters again in each
`using`, `held` runs all forwards inside one `using`. PEFT names them by `adapter_names` in each forward.
"""

import random

import harness
import models
import peft
import torch

import rankfold

TARGET = 1.2
ROWS, LENGTH = 32, 16


def main():
    given = harness.arguments(__doc__, rounds=21, repeat=10)
    plain, ours, theirs = (models.llama(4, 256) for _ in range(3))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    names = [f"tenant{i}" for i in range(ROWS)]
    for i, name in enumerate(names):
        rankfold.attach(ours, rankfold.LoRA(rank=8), name=name, seed=i)
        if i == 0:
            theirs = peft.get_peft_model(theirs, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    for model in (ours, theirs):
        for path, parameter in model.named_parameters():
            if any(name in path for name in names):
                torch.nn.init.normal_(parameter, std=0.02)
    theirs.eval()
    ids = models.tokens(ROWS, LENGTH)
    chance = random.Random(0)

    def forward(model, **more):
        return model(input_ids=ids, use_cache=False, **more).logits

    def routed(order):
        with rankfold.using(ours, order):
            return forward(ours)

    with torch.no_grad():
        alone = torch.cat([_alone(ours, name, ids[i : i + 1]) for i, name in enumerate(names)])
        torch.testing.assert_close(routed(names), alone, atol=1e-4, rtol=1e-4)
        sides = {
            "plain": lambda: forward(plain),
            "rankfold, fresh": lambda: routed(chance.sample(names, ROWS)),
            "rankfold, repeated": lambda: routed(names),
            "peft": lambda: forward(theirs, adapter_names=names),
        }
        samples = harness.interleaved(sides, given.rounds, patience=given.patience, repeat=given.repeat)
        with rankfold.using(ours, names):
            held = harness.interleaved(
                {"plain": sides["plain"], "rankfold, held": lambda: forward(ours)},
                given.rounds,
                patience=given.patience,
                repeat=given.repeat,
            )
    rows = harness.table(samples, "plain", {"rankfold, fresh": TARGET, "rankfold, repeated": TARGET})
    rows[-1:-1] = harness.table(held, "plain", {"rankfold, held": TARGET})[1:]
    harness.report(given, "rows", rows)


def _alone(model, name, ids):
    with rankfold.using(model, name):
        return model(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    main()
