"""What others may do to an engine that runs: errands between its steps, adapters taken out and put back."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold.errors import RankfoldError
from rankfold.serve import Engine
from rankfold.serve.engine import AdapterInUseError, ClosedError
from rankfold.serve.library import UnknownAdapterError


@pytest.mark.parametrize("threaded", [False, True])
def test_errands_run_when_no_step_does(model: Any, library: Path, threaded: bool) -> None:
    with Engine(model, library) as engine:
        if threaded:
            engine.start()
        assert engine.alive == threaded
        request = engine.submit([1, 2, 3], "lora4", 30)
        free = [engine.between(engine._stepping.locked) for _ in range(5)]
        assert all(future.result(10) for future in free)  # held by whoever runs the errand, so no step goes on
        with pytest.raises(ZeroDivisionError):
            engine.between(lambda: 1 / 0).result(10)
        assert len(request.result(20)) == 30
    assert not engine.alive
    assert engine.between(lambda: 5).result(0) == 5
    with pytest.raises(ClosedError):
        engine.submit([1])


def test_a_step_that_fails_leaves_nobody_waiting(model: Any, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model, library) as engine:
        monkeypatch.setattr(engine, "_admit", lambda: 1 / 0 if engine._waiting else None)
        engine.start()
        with pytest.raises(ZeroDivisionError):
            engine.submit([1, 2], "dora").result(10)
        monkeypatch.undo()
        assert len(engine.submit([1, 2], "dora").result(10)) == 16
    assert engine.pool.used == 0


def test_an_unloaded_adapter_goes_when_the_last_request_is_answered(model: Any, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(library, folder)
    with Engine(model, folder) as engine:
        before = engine.submit([1, 2, 3], "lora4").result()
        running, waiting = engine.submit([1, 2, 3], "lora4"), engine.submit([1, 2, 3], "lora4")
        engine.step()
        engine.unload("lora4")
        assert "lora4" not in engine.library.names()
        for ask in (lambda: engine.submit([1], "lora4"), lambda: engine.unload("lora4")):
            with pytest.raises(UnknownAdapterError, match="unloaded"):
                ask()
        with pytest.raises(AdapterInUseError):
            engine.restore("lora4")
        assert running.result() == waiting.result() == before
        assert engine.stats()["pages_used"] == 0
        shutil.rmtree(folder / "lora4")
        shutil.copytree(library / "lora8", folder / "lora4")
        engine.restore("lora4")
        assert engine.submit([1, 2, 3], "lora4").result() == engine.submit([1, 2, 3], "lora8").result() != before
        engine.unload("lora4")
        assert engine.library.entry("lora4") is None
        engine.restore("lora4")
        engine.restore("lora4")
        with pytest.raises(UnknownAdapterError):
            engine.unload("nobody")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_say_nothing_end_their_request(model: Any, library: Path, temperature: float, value: float) -> None:
    with Engine(model, library) as engine:
        well = engine.submit([1, 2, 3], "lora4").result()
        lost = engine.submit([1, 2, 3], "lora8", temperature=temperature)
        lost.take = lambda logits: type(lost).take(lost, torch.full_like(logits, value))  # type: ignore[method-assign]
        beside = engine.submit([1, 2, 3], "lora4")
        with pytest.raises(RankfoldError, match="NaN"):
            lost.result()
        assert beside.result() == well
        assert engine.stats()["pages_tokens"] == 0


def test_where_files_lie_is_not_told(model: Any, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(library, folder)
    (folder / "dora" / "adapter.safetensors").write_bytes(b"x" * 100)
    with Engine(model, folder) as engine, pytest.raises(RankfoldError) as raised:
        engine.submit([1], "dora").result()
    assert str(tmp_path) not in str(raised.value)
    assert "dora" in str(raised.value)
