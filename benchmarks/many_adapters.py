"""Load 2,000 saved LoRA adapters (r=8) of a 4-layer width-256 Llama: seconds, and memory held over their bytes."""

import gc
import os
import tempfile
import time
from pathlib import Path

import harness
import models
import torch

import rankfold

TARGET_SECONDS, TARGET_MEMORY = 20.0, 1.2


def main():
    given = harness.arguments(__doc__, adapters=2000)
    model = models.llama(4, 256)
    with tempfile.TemporaryDirectory() as folder:
        adapter = rankfold.attach(model, rankfold.LoRA(rank=8), name="one")
        size = sum(p.numel() * p.element_size() for p in adapter.parameters())
        parameters = list(adapter.parameters())
        for i in range(given.adapters):
            torch.nn.init.normal_(parameters[i % len(parameters)], std=0.02)  # each adapter differs from the last
            rankfold.save(model, Path(folder, f"{i}"), name="one")
        rankfold.detach(model)
        del adapter, parameters
        gc.collect()
        before, started = _resident(), time.perf_counter()
        for i in range(given.adapters):
            rankfold.load(model, Path(folder, f"{i}"), name=f"tenant{i}", active=False)
        seconds = time.perf_counter() - started
        gc.collect()
        grown = _resident() - before
    _check(model, given.adapters)
    rows = [
        {
            "adapters": given.adapters,
            "seconds": seconds,
            "target s": TARGET_SECONDS * given.adapters / 2000,
            "MB of adapters": size * given.adapters / 1e6,
            "MB resident": grown / 1e6,
            "memory over bytes": grown / (size * given.adapters),
            "target": TARGET_MEMORY,
        }
    ]
    harness.report(given, "many_adapters", rows)


def _check(model, adapters):
    """They are really there: two of them answer differently."""
    ids, answers = models.tokens(1, 8), []
    for name in ("tenant0", f"tenant{adapters - 1}"):
        with torch.no_grad(), rankfold.using(model, name):
            answers.append(model(input_ids=ids).logits)
    assert not torch.equal(*answers)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
