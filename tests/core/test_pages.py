from __future__ import annotations

from array import array
from random import Random

import pytest

from radixkv.errors import ConfigError, InvariantError
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


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 200])
def test_a_page_is_free_or_in_use(count):
    """Few pages are counted in a loop, many by numpy."""
    pool = PagePool(200)
    assert pool.generation(0) == 0
    pages = pool.allocate(count)
    assert len(pages) == count
    assert pool.free_pages() == list(range(count, 200))
    pool.free(pages)
    assert pool.num_free == 200
    assert [pool.generation(page) for page in range(200)] == [1] * count + [0] * (200 - count)
    assert pool.generations(range(200)).tolist() == [1] * count + [0] * (200 - count)
    pool.check()


def test_a_generation_counts_the_frees_of_its_page_alone():
    pool = PagePool(3)
    pool.free(pool.allocate(3))  # nobody has asked yet
    assert pool.generation(0) == 0
    for _ in range(4):
        pool.free(pool.allocate(1))
    assert [pool.generation(page) for page in range(3)] == [4, 0, 0]


def test_no_more_pages_are_freed_than_there_are():
    pool = PagePool(6)
    pages = pool.allocate(4)
    pool.free(pages[:3])
    for bad in (pages, pages[:2]):
        before = pool.free_pages(), [pool.generation(page) for page in range(6)]
        with pytest.raises(InvariantError) as caught:
            pool.free(bad)
        assert caught.value.invariant == "I1"
        assert (pool.free_pages(), [pool.generation(page) for page in range(6)]) == before


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


@pytest.mark.parametrize("page", [3, 4, -1])
def test_check_names_a_page_that_is_free_twice_or_does_not_exist(page):
    pool = PagePool(4)
    pool.allocate(2)
    pool._free.append(page)
    with pytest.raises(InvariantError) as caught:
        pool.check()
    assert caught.value.invariant == "I1"
