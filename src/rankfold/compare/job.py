"""One run as its process is told of it, and what the process answers. Both are files in the run's folder."""

import json
from pathlib import Path
from typing import Any, Literal

from rankfold.compare.result import Part, RunResult, Trial
from rankfold.core.files import write_whole

JOB, OUTCOME, LOG, RUN, SEEN = "job.json", "outcome.json", "log.txt", "run", "seen.json"
_LINES = 8  # of a log, in the reason of a failure


class Job(Part):
    """A probe trains two steps to see its peak memory; a trial is judged on the validation rows, and pruned by the
    trials before it; a run is measured in everything."""

    kind: Literal["probe", "trial", "run"]
    recipe: dict[str, Any]
    threads: int
    number: int = 0  # of a trial
    earlier: tuple[Trial, ...] = ()
    text: dict[str, Any] | None = None  # for forgetting: a recipe's data


class Outcome(Part):
    """A training that cannot go on (its loss is not finite) has finished as well: with a `failure`."""

    peak_memory: int = 0
    failure: str | None = None
    trial: Trial | None = None
    run: RunResult | None = None


def prepare(folder: Path, job: Job) -> None:
    """Put the job into its folder. What another job left there is taken away: only the same one can go on."""
    import shutil

    if read_job(folder) != job:
        shutil.rmtree(folder, ignore_errors=True)
        write_whole(folder / JOB, job.model_dump_json(indent=1))


def read_job(folder: Path) -> Job | None:
    path = folder / JOB
    return Job.model_validate_json(path.read_bytes()) if path.exists() else None


def read_outcome(folder: Path, job: Job) -> Outcome | None:
    """What the folder's run came to, if it has finished, and was this job."""
    path = folder / OUTCOME
    if not path.exists() or read_job(folder) != job:
        return None
    return Outcome.model_validate_json(path.read_bytes())


def last_lines(folder: Path) -> str:
    """The end of what the run's process said."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join([line.rstrip() for line in lines if line.strip()][-_LINES:])


def has_stepped(folder: Path) -> bool:
    """Whether the run has come to its first optimiser step."""
    path = folder / RUN / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any('"loss"' in line for line in lines)


def shown_step(folder: Path) -> int | None:
    """The last step that the run has logged."""
    path = folder / RUN / "metrics.jsonl"
    try:
        return int(json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return None
