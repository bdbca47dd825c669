"""Where the processes of a comparison run: on this machine, or on a Ray cluster."""

import asyncio
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import threading
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from rankfold.errors import RankfoldError

_GRACE = 60.0  # seconds to save a checkpoint in, once asked to stop
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


class Execution(Protocol):
    """Runs the job in a folder in a process of its own, once there is room. The process leaves its outcome there."""

    async def run(self, folder: Path) -> None: ...

    def close(self) -> None: ...


def environment(threads: int) -> dict[str, str]:
    """What holds everything that starts threads to so many, and keeps other libraries' chatter out of the logs."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return dict.fromkeys(_THREADS, str(threads)) | quiet | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class Local:
    """At most `jobs` processes at once. One that is cancelled is asked to stop, and saves a checkpoint.

    Where the system can fork, they are forks of one that has imported what a training needs, which takes longer than
    many a small training does. As always with multiprocessing, a script that gets here guards its main part.
    """

    def __init__(self, jobs: int, threads: int):
        self.room = asyncio.Semaphore(jobs)
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self.context.set_forkserver_preload(["rankfold.compare.quiet", "rankfold.compare.worker"])
        self.threads = threads
        before = {name: os.environ.get(name) for name in environment(threads)}
        os.environ.update(environment(threads))  # libraries read it when they are imported
        try:
            first = self.context.Process(target=_nothing)
            first.start()
            first.join()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    async def run(self, folder: Path) -> None:
        async with self.room:
            process = self.context.Process(target=_process, args=(str(folder), self.threads))
            process.start()
            try:
                await _ended(process)
            finally:
                if process.is_alive():
                    process.terminate()
                    try:
                        await _ended(process, _GRACE)
                    finally:
                        process.kill()

    def close(self) -> None: ...


async def _ended(process: Any, within: float = float("inf")) -> None:
    until = monotonic() + within
    while process.is_alive() and monotonic() < until:
        await asyncio.sleep(0.05)


def _nothing() -> None: ...


def _process(folder: str, threads: int) -> None:
    from rankfold.compare.worker import work

    if hasattr(os, "setsid"):  # Ctrl-C is for the parent, which passes it on
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment(threads))
    work(Path(folder))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # it was killed: another one may go on in this folder


class Cluster:
    """Tasks of a Ray cluster, each in a process of its own on a node, which has to see the same folders."""

    def __init__(self, address: str, threads: int):
        try:
            ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError:
            raise RankfoldError("--ray: Ray is not installed; try: pip install 'rankfold[ray]'") from None
        _check_there(address)
        names = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")
        ours = {name: os.environ[name] for name in names if name in os.environ}
        try:
            ray.init(
                address=None if address == "local" else address,
                runtime_env={"env_vars": {**ours, **environment(threads)}},
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, ValueError) as error:
            raise RankfoldError(f"--ray: no cluster at {address}: {' '.join(str(error).split())}") from None
        self.ray: Any = ray
        # A process a task: a model that a task before left in memory would count as the next one's.
        self.task = ray.remote(num_cpus=threads, max_retries=0, max_calls=1)(_on_node)

    async def run(self, folder: Path) -> None:
        reference = self.task.remote(str(folder.resolve()), str(Path.cwd()))
        try:
            await reference
        except self.ray.exceptions.RayTaskError as error:
            raise RankfoldError(f"--ray: {error.cause}") from None
        except self.ray.exceptions.RayError:  # its process died: the log has the reason
            return
        except asyncio.CancelledError:
            self.ray.cancel(reference, force=True)
            raise

    def close(self) -> None:
        self.ray.shutdown()


def _check_there(address: str) -> None:
    """Refuse an address where nothing answers: Ray itself would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if place is not None:
        try:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise RankfoldError(f"--ray: no cluster at {address}: {error}") from None


def _on_node(folder: str, working: str) -> None:
    if not Path(folder).is_dir():
        raise RuntimeError(f"a node of the cluster does not see {folder}: put --output where all nodes see it")
    if Path(working).is_dir():  # what the plan names may be seen from there
        os.chdir(working)
    from rankfold.compare.worker import work

    work(Path(folder))
