from __future__ import annotations

from array import array
from random import Random

import pytest

from radixkv.errors import ConfigError, InvariantError, PageError
from radixkv.pages import PagePool


@pytest.mark.parametrize("num_pages", [0, -1, -100])
def test_a_pool_has_at_least_one_page(num_pages):
    with pytest.raises(ConfigError) as caught:
        PagePool(num_pages)
    assert (caught.value.setting, caught.value.value) == ("num_pages", num_pages)


def test_low_pages_are_given_out_first():
    pool = PagePool(5)
    assert pool.allocate(2).tolist() == [0, 1]
    assert pool.allocate(3).tolist() == [2, 3, 4]
    assert pool.num_free == 0


def test_pages_freed_last_are_given_out_first_and_in_their_order():
    pool = PagePool(6)
    pages = pool.allocate(6)
    pool.free(pages[:2])
    pool.free(pages[3:5])
    assert pool.allocate(4).tolist() == [3, 4, 0, 1]


@pytest.mark.parametrize("count", [0, 1, 47, 48, 49, 200])
def test_a_page_is_free_or_in_use(count):
    pool = PagePool(200)
    pages = pool.allocate(count)
    assert len(pages) == count
    assert pool.free_pages() == list(range(count, 200))
    assert not any(pool.is_free(page) for page in pages)
    pool.free(pages)
    assert pool.num_free == 200
    assert [pool.generation(page) for page in range(200)] == [1] * count + [0] * (200 - count)
    pool.check()


def test_a_generation_counts_the_frees_of_its_page_alone():
    pool = PagePool(3)
    for _ in range(4):
        pool.free(pool.allocate(1))
    assert [pool.generation(page) for page in range(3)] == [4, 0, 0]


def state(pool: PagePool) -> list[object]:
    return [pool.num_free, *((pool.is_free(page), pool.generation(page)) for page in range(pool.num_pages))]


BAD_FREES = {
    "of a free page": ([0, 1, 5], 5),
    "of one page twice in a call": ([0, 1, 0], 0),
    "of a page that does not exist": ([0, 6], 6),
    "of a negative page": ([-3], -3),
}


@pytest.mark.parametrize("case", BAD_FREES)
def test_a_bad_free_is_named_and_frees_nothing(case):
    pages, page = BAD_FREES[case]
    pool = PagePool(6)
    pool.allocate(4)  # 4 and 5 stay free
    before = state(pool)
    with pytest.raises(PageError) as caught:
        pool.free(array("i", pages))
    assert caught.value.page == page
    assert state(pool) == before
    pool.check()


@pytest.mark.parametrize("bad", [[0], [199], [200], [-1], [250], [3, 200]])
def test_a_bad_page_among_many_is_named_and_nothing_is_freed(bad):
    """Long lists are checked by numpy, short ones in a loop."""
    pool = PagePool(250)
    used = pool.allocate(200)
    before = state(pool)
    with pytest.raises(PageError) as caught:
        pool.free(used + array("i", bad))
    assert caught.value.page in bad
    assert state(pool) == before
    pool.check()
    pool.free(used)
    assert pool.num_free == 250


def test_a_page_is_freed_once():
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(PageError):
        pool.free(pages)
    pool.check()


def test_free_pages_equal_a_set_after_any_calls():
    random, pool = Random(3), PagePool(120)
    free = set(range(120))
    for _ in range(600):
        if random.randrange(2):
            pages = pool.allocate(random.randrange(min(pool.num_free, 60) + 1)).tolist()
            assert free.issuperset(pages)
            assert len(set(pages)) == len(pages)
            free.difference_update(pages)
        else:
            used = sorted(set(range(120)) - free)
            pages = random.sample(used, random.randrange(len(used) + 1))
            pool.free(array("i", pages))
            free.update(pages)
        assert pool.free_pages() == sorted(free)
        assert pool.num_free == len(free)
        pool.check()


def test_check_names_a_page_that_is_free_twice_or_free_and_in_use():
    pool = PagePool(4)
    pool.allocate(2)
    pool._free.append(3)
    with pytest.raises(InvariantError) as caught:
        pool.check()
    assert caught.value.invariant == "I1"
    pool._free[-1] = 0
    with pytest.raises(InvariantError) as caught:
        pool.check()
    assert caught.value.invariant == "I1"
