"""A small language model trained on code, then packed: what that costs on code it has not seen.

A side says in `merge` how: the fields of a scheme, `how`, `compensate`, and `blocks` of 8 x 64 bytes of code for
calibration, which the seed chooses. Without a scheme the model stays as it is.
"""

import functools
import json
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

import rankfold
from claims.harness import Measure, Side, build
from claims.tasks import TASKS, FromScratch, Loaded
from rankfold.core.codebooks import Codebooks
from rankfold.quantizers._distil import Teacher, divergence

KL, GAIN = "KL from the float model", "loss that the compensation takes away"


def packed(
    format: str | None, how: dict[str, Any] | str = "rtn", compensate: Any = None, *, blocks: int = 0, **scheme: Any
) -> Side:
    """In groups of 32 numbers where the scheme does not say another size."""
    told = None if format is None else {"format": format, "group": 32, **scheme}
    rule = {"name": how} if isinstance(how, str) else how
    return Side(None, lr=0.0, merge={"scheme": told, "how": rule, "compensate": compensate, "blocks": blocks})


def in_codebooks(blocks: int, scheme: dict[str, int], **rule: Any) -> Side:
    """By PV-tuning."""
    how = {"name": "pv-tuning", **rule}
    return Side(None, lr=0.0, merge={"scheme": scheme, "how": how, "compensate": None, "blocks": blocks})


def run_packed(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """The loss on held-out code, and the divergence from what the float model says there."""
    assert side.merge is not None
    return _found(json.dumps(side.merge), seed if side.merge["blocks"] else 0)


@functools.cache
def _found(asked: str, seed: int) -> dict[str, float]:
    """Without a text the seed makes no difference."""
    part, teacher = _on_code()
    part.fresh(seed)
    told = json.loads(asked)
    found, repair = {}, told["compensate"]
    if told["scheme"] is not None:
        scheme = (Codebooks if "books" in told["scheme"] else rankfold.Scheme)(**told["scheme"])
        text = list(islice(part.batches(seed), told["blocks"])) or None
        report = rankfold.quantize(
            part.model,
            scheme,
            build(told["how"]),
            calibration=text,
            compensate=None if repair is None else build(repair),
        )
        found["bits"] = sum(one.bits for one in report.values()) / len(report)
    found |= {"held-out loss": part.evaluate()["held-out loss"], KL: _divergence(part.model, teacher)}
    if repair is not None:
        with rankfold.using(part.model, None):
            found[GAIN] = part.evaluate()["held-out loss"] - found["held-out loss"]
    return {name: float(f"{value:.6g}") for name, value in found.items()}


@functools.cache
def _on_code() -> tuple[FromScratch, Teacher]:
    part = FromScratch(replace(TASKS["from code"], texts="code"))
    part.fresh(0)
    return part, Teacher(part.model, [{"input_ids": part.held_out}])


@torch.no_grad()
def _divergence(model: Any, teacher: Teacher) -> float:
    part, _ = _on_code()
    return float(divergence(model.eval()(part.held_out).logits, teacher[0]))
