"""Attach one LoRA adapter (r=8) to the 28 linear layers of a 4-layer Llama; detaching is not timed."""

import harness
import models
import peft

import rankfold

TARGET_MS = 5.0


def main():
    given = harness.arguments(__doc__, rounds=21)
    ours, theirs, wrapped = models.llama(4, 256), models.llama(4, 256), []
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    sides = {
        "rankfold": lambda: rankfold.attach(ours, rankfold.LoRA(rank=8)),
        "peft": lambda: wrapped.append(peft.get_peft_model(theirs, config)),
    }
    after = {"rankfold": lambda: rankfold.detach(ours), "peft": lambda: wrapped.pop().unload()}
    samples = harness.interleaved(sides, given.rounds, patience=given.patience, after=after)
    rows = harness.table(samples, "rankfold", {})
    rows[0]["target"] = f"{TARGET_MS} ms"
    harness.report(given, "attach", rows)


if __name__ == "__main__":
    main()
