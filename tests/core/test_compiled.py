"""Loops in parts, each in a thread."""

import os
import threading

import pytest

from rankfold.core.compiled import in_parts


def test_every_part_runs_once_and_each_in_a_thread_of_its_own() -> None:
    met, ran = threading.Barrier(3, timeout=10), list[tuple[str, int, int]]()

    def run(name: str, first: int, last: int) -> None:
        met.wait()  # nobody passes before all three are there
        ran.append((name, first, last))

    in_parts(run, ("a",), [0, 2, 2, 7])
    assert sorted(ran) == [("a", 0, 2), ("a", 2, 2), ("a", 2, 7)]


def test_an_error_in_any_part_is_raised() -> None:
    def run(first: int, last: int) -> None:
        if last == 2:
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        in_parts(run, (), [0, 1, 2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    def twice() -> None:
        met = threading.Barrier(2, timeout=10)
        in_parts(lambda *part: met.wait(), (), [0, 1, 2])

    twice()
    if (child := os.fork()) == 0:
        try:
            twice()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
