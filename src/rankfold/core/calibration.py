"""Calibration (being written)."""
from collections.abc import Iterable, Sequence
from typing import Any


class Statistic: ...


class Calibration: ...


def calibrate(model: Any, batches: Iterable[Any], statistics: Sequence[Statistic], targets: Any) -> Calibration:
    raise NotImplementedError
