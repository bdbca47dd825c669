"""Processes of their own: pinned, measured, stopped in good order, and gone with their parent."""

import asyncio
import os
from pathlib import Path

import pytest
import torch

from rankfold.compare import worker
from rankfold.compare.execution import Cluster, Local, environment
from rankfold.compare.job import LOG, Job, has_stepped, last_lines, prepare, read_outcome, shown_step
from rankfold.compare.memory import Gauge
from rankfold.errors import RankfoldError
from tests.compare.conftest import died_after_a_step, point, well


def test_everything_that_starts_threads_is_held() -> None:
    held = environment(3)
    assert {held[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}


def test_processes_take_turns_and_leave_our_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three at once, in processes that are not this one, each told its threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr("rankfold.compare.execution._process", _note)
    execution = Local(jobs=2, threads=1)
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()

    async def all_of_them() -> None:
        await asyncio.gather(*(execution.run(folder) for folder in folders))

    asyncio.run(all_of_them())
    notes = [(folder / "note").read_text().split() for folder in folders]
    assert len({pid for pid, *_ in notes} | {str(os.getpid())}) == 4
    assert {threads for _, threads, *_ in notes} == {"1"}
    times = [(float(start), float(end)) for *_, start, end in notes]
    assert max(sum(a <= start < b for a, b in times) for start, _ in times) == 2
    assert os.environ["OMP_NUM_THREADS"] == "7"


def _note(folder: str, threads: int) -> None:
    from time import sleep, time

    start = time()
    sleep(0.3)
    (Path(folder) / "note").write_text(f"{os.getpid()} {threads} {start} {time()}")


def test_a_gauge_sees_what_came_after_its_start() -> None:
    before = torch.ones(100 << 18)  # 100 MiB, gone by then
    del before
    gauge = Gauge()
    gauge.start()
    during = torch.ones(50 << 18)
    del during
    assert 48 << 20 < gauge.peak() < 70 << 20


def job(**changes: object) -> Job:
    return Job.model_validate({"kind": "run", "recipe": {"seed": 0, "optimizer": {"lr": 1.0}}, "threads": 1, **changes})


def test_a_folder_is_cleared_for_another_job_only(tmp_path: Path) -> None:
    prepare(tmp_path / "a", job())
    died_after_a_step(tmp_path / "a")
    prepare(tmp_path / "a", job())
    assert has_stepped(tmp_path / "a")
    assert shown_step(tmp_path / "a") == 1
    prepare(tmp_path / "a", job(threads=2))
    assert not has_stepped(tmp_path / "a")
    assert shown_step(tmp_path / "a") is None


def test_an_outcome_counts_for_its_own_job_only(tmp_path: Path) -> None:
    one = job(kind="probe")
    prepare(tmp_path, one)
    assert read_outcome(tmp_path, one) is None
    (tmp_path / "outcome.json").write_text(well(one, peak=3).model_dump_json())
    found = read_outcome(tmp_path, one)
    assert found is not None
    assert found.peak_memory == 3
    assert read_outcome(tmp_path, job(kind="probe", threads=2)) is None


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    assert last_lines(tmp_path) == ""
    (tmp_path / LOG).write_text("".join(f"line {i}\n\n" for i in range(20)))
    assert last_lines(tmp_path).splitlines() == [f"line {i}" for i in range(12, 20)]


def test_a_curve_is_what_was_held_out(tmp_path: Path) -> None:
    lines = ['{"step": 0, "seconds": 0, "held_out_loss": 2.0}', '{"step": 1, "seconds": 1, "loss": 9}']
    lines += ['{"step": 1, "seconds": 1.5, "held_out_loss": 1.0, "held_out_accuracy": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert worker.curve_of(tmp_path) == (
        point(0, 2.0),
        point(1, 1.0).model_copy(update={"seconds": 1.5, "accuracy": 0.5}),
    )


def test_one_that_is_cancelled_is_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.compare.execution._process", _patient)
    execution = Local(jobs=1, threads=1)

    async def cancelled() -> None:
        running = asyncio.create_task(execution.run(tmp_path))
        while not (tmp_path / "there").exists():
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancelled())
    assert (tmp_path / "stopped").read_text() == "in good order"


def _patient(folder: str, threads: int) -> None:
    import signal
    from time import sleep

    def stop(number: int, frame: object) -> None:
        (Path(folder) / "stopped").write_text("in good order")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    (Path(folder) / "there").touch()
    sleep(60)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(RankfoldError, match=f"--ray: no cluster at {address}: "):
        Cluster(address, threads=1)
