"""Pages, tables of requests, and the peak that requests will need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import RankfoldError
from rankfold.serve.pool import Pool, PoolFullError, Table
from rankfold.serve.schedule import peak


def small(pages: int = 8, block: int = 4) -> Pool:
    layers, width = 3, 5
    return Pool(layers, width, pages * layers * 2 * block * width * 4, block=block)


def test_the_pool_is_never_larger_than_allowed():
    pool = Pool(3, 5, 1000, block=2)  # a page takes 3 x 2 x 2 x 5 numbers of 4 bytes
    assert pool.page_bytes == 240
    assert (len(pool), pool.pages.nbytes) == (4, 960)
    with pytest.raises(RankfoldError, match="one page"):
        Pool(3, 5, 239, block=2)


def test_the_lowest_free_pages_are_taken_and_none_where_there_are_too_few():
    pool = small(6)
    assert pool.take(4) == [0, 1, 2, 3]
    pool.release([1, 3])
    assert pool.take(3) == [1, 3, 4]
    with pytest.raises(PoolFullError):
        pool.take(2)
    assert pool.free == 1


def test_a_run_lies_side_by_side():
    pool = small(8)
    pool.take(8)
    pool.release([1, 3, 4, 6, 7])
    assert pool.take_run(2) == [3, 4]
    with pytest.raises(PoolFullError):
        pool.take_run(3)
    assert pool.take(3) == [1, 6, 7]


def test_a_page_cannot_be_freed_twice():
    pool = small()
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(RuntimeError):
        pool.release(pages)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_request_wastes_less_than_a_page(length: int):
    table = Table(small())
    for _ in range(length):
        table.extend(1)
    assert len(table.pages) == -(-length // 4)
    table.free()
    assert table.pool.used == 0


def test_a_fork_shares_all_pages_and_copies_the_last_when_it_writes():
    pool = small()
    table = Table(pool)
    table.extend(6)
    pool.pages[table.pages[1]] = 7.0
    fork = table.fork(6)
    assert pool.used == 2
    assert (fork.needs(1), fork.needs(3)) == (1, 2)
    fork.extend(1)
    assert fork.pages[0] == table.pages[0]
    assert fork.pages[1] != table.pages[1]
    assert pool.used == 3
    assert bool((pool.pages[fork.pages[1]] == 7).all())
    table.extend(1)  # alone on its page by now
    assert pool.used == 3
    table.free()
    assert pool.used == 2
    fork.free()
    assert pool.used == 0


def test_a_fork_of_the_beginning_shares_no_more_than_that():
    table = Table(small())
    table.extend(11)
    fork = table.fork(5)
    assert fork.pages == table.pages[:2]
    table.free()
    assert fork.pool.used == 2
    fork.free()
    assert fork.pool.used == 0


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    table = Table(small())
    table.extend(4)
    fork = table.fork(4)
    fork.extend(1)
    assert table.pool.used == 2


def test_the_peak_is_that_of_the_card():
    assert peak([(10, 5), (4, 2)]) == 18
    assert peak([]) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6), st.integers(1, 5))
def test_the_peak_is_what_running_them_takes(loads: list[tuple[int, int]], block: int):
    """Against all of them written out token by token."""
    most = 0
    for t in range(max((left for _, left in loads), default=0) + 1):
        there = [used + t for used, left in loads if left >= t]
        most = max(most, sum(-(-n // block) for n in there))
    assert peak(loads, block) == most


def test_rows_of_a_token_are_its_own():
    pool = small(4, 3)
    seen = set()
    for page in range(4):
        for slot in range(3):
            first = int(pool.row(torch.tensor(page), torch.tensor(slot)))
            for layer in range(3):
                keys = first + layer * pool.layer_step
                seen |= {keys, keys + pool.value_step}
    assert seen == set(range(len(pool.rows)))
