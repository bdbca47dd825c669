"""Settings for every test: no hub is asked for anything, and test workers share the cores."""

import os
import sys
from collections.abc import Iterator

# Read when these libraries are first imported, so they stand before any import; subprocesses of tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# A worker's share of the cores, and no more than was asked for: two threads on one core wait for each other. What a
# worker inherits was set here, for the process that starts the workers.
_share = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_threads = min(_share, int(os.environ.get("OMP_NUM_THREADS") or _share))
os.environ["OMP_NUM_THREADS"] = str(_threads)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(_threads)
# A slow machine is no counterexample.
hypothesis.settings.register_profile("rankfold", deadline=None)
hypothesis.settings.load_profile("rankfold")


# Every test and every shared fixture starts from the same seed, whatever ran before it in the same worker.


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    """Compiled code of one test does not count against the recompile limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    if fixturedef.scope != "function":
        torch.manual_seed(0)
