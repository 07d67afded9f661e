from __future__ import annotations

from array import array
from random import Random

import pytest

from radixkv.errors import ConfigError, InvariantError, PageError
from radixkv.pages import FREE, TREE, PagePool


@pytest.mark.parametrize("num_pages", [0, -1, -100])
def test_a_pool_has_at_least_one_page(num_pages):
    with pytest.raises(ConfigError) as caught:
        PagePool(num_pages)
    assert (caught.value.setting, caught.value.value) == ("num_pages", num_pages)


def test_low_pages_are_given_out_first():
    pool = PagePool(5)
    assert pool.allocate(2, 7).tolist() == [0, 1]
    assert pool.allocate(3, 8).tolist() == [2, 3, 4]
    assert pool.num_free == 0


def test_pages_freed_last_are_given_out_first_and_in_their_order():
    pool = PagePool(6)
    pages = pool.allocate(6, 7)
    pool.free(pages[:2], 7)
    pool.free(pages[3:5], 7)
    assert pool.allocate(4, 8).tolist() == [3, 4, 0, 1]


@pytest.mark.parametrize("count", [0, 1, 47, 48, 49, 200])
def test_every_page_has_the_owner_it_was_given_to(count):
    pool = PagePool(200)
    pages = pool.allocate(count, 7)
    assert len(pages) == count
    assert pool.owned_by(7) == pages.tolist()
    pool.transfer(pages, 7, TREE)
    assert pool.owned_by(7) == []
    assert pool.owned_by(TREE) == pages.tolist()
    assert all(pool.owner(page) == TREE for page in pages)
    pool.free(pages, TREE)
    assert pool.num_free == 200
    assert [pool.generation(page) for page in range(200)] == [1] * count + [0] * (200 - count)
    pool.check()


def test_a_generation_counts_the_frees_of_its_page_alone():
    pool = PagePool(3)
    for _ in range(4):
        pool.free(pool.allocate(1, 2), 2)
    assert [pool.generation(page) for page in range(3)] == [4, 0, 0]


def state(pool: PagePool) -> list[object]:
    return [pool.num_free, *((pool.owner(page), pool.generation(page)) for page in range(pool.num_pages))]


BAD_FREES = {
    "of a free page": ([0, 1, 5], 7, 5, FREE),
    "of another lease's page": ([0, 3], 7, 3, 8),
    "of the tree's page": ([4], 7, 4, TREE),
    "of one page twice in a call": ([0, 1, 0], 7, 0, FREE),
    "of a page that does not exist": ([0, 6], 7, 6, FREE),
    "of a negative page": ([-3], 8, -3, FREE),
}


@pytest.mark.parametrize("case", BAD_FREES)
def test_a_bad_free_is_named_and_frees_nothing(case):
    pages, claimed, page, owner = BAD_FREES[case]
    pool = PagePool(6)
    pool.allocate(3, 7)  # 0 1 2
    pool.allocate(1, 8)  # 3
    pool.transfer(pool.allocate(1, 9), 9, TREE)  # 4, and 5 stays free
    before = state(pool)
    with pytest.raises(PageError) as caught:
        pool.free(pages, claimed)
    assert (caught.value.page, caught.value.owner, caught.value.claimed) == (page, owner, claimed)
    assert state(pool) == before
    pool.check()


@pytest.mark.parametrize("bad", [[0], [199], [200], [-1], [250], [3, 200]])
def test_a_bad_page_among_many_is_named_and_nothing_is_freed(bad):
    """Long lists are checked by numpy, short ones in a loop."""
    pool = PagePool(250)
    pages = [*pool.allocate(200, 7), *bad]
    before = state(pool)
    with pytest.raises(PageError) as caught:
        pool.free(pages, 7)
    assert caught.value.page in bad
    assert (caught.value.owner, caught.value.claimed) == (FREE, 7)
    assert state(pool) == before
    pool.check()
    pool.free(pages[:200], 7)
    assert pool.num_free == 250


def test_a_page_is_freed_once():
    pool = PagePool(2)
    pages = pool.allocate(2, 7)
    pool.free(pages, 7)
    with pytest.raises(PageError):
        pool.free(pages, 7)
    pool.check()


def test_a_bad_transfer_is_named_and_moves_nothing():
    pool = PagePool(4)
    mine = pool.allocate(2, 7)
    before = state(pool)
    for pages in ([*mine, 3], [2], [-1], [4]):
        with pytest.raises(PageError):
            pool.transfer(pages, 7, TREE)
        assert state(pool) == before


def test_free_and_owned_pages_equal_a_dict_after_any_calls():
    random, pool = Random(3), PagePool(120)
    owners = dict.fromkeys(range(120), FREE)
    for _ in range(600):
        owner = random.choice((TREE, 5, 6, 7))
        mine = [page for page, other in owners.items() if other == owner]
        action = random.randrange(3)
        if action == 0:
            pages = pool.allocate(random.randrange(min(pool.num_free, 60) + 1), owner).tolist()
            assert all(owners[page] == FREE for page in pages)
            assert len(set(pages)) == len(pages)
            owners.update(dict.fromkeys(pages, owner))
        else:
            pages = array("i", random.sample(mine, random.randrange(len(mine) + 1)))
            if action == 1:
                pool.free(pages, owner)
                owners.update(dict.fromkeys(pages, FREE))
            else:
                pool.transfer(pages, owner, 8)
                owners.update(dict.fromkeys(pages, 8))
        for each in (FREE, TREE, 5, 6, 7, 8):
            assert pool.owned_by(each) == [page for page, other in owners.items() if other == each]
        assert pool.num_free == sum(other == FREE for other in owners.values())
        pool.check()


def test_check_names_a_page_that_is_free_twice_or_free_and_owned():
    pool = PagePool(4)
    pool.allocate(2, 7)
    pool._free.append(3)
    with pytest.raises(InvariantError, match="I1"):
        pool.check()
    pool._free.pop()
    pool.check()
    pool._owner[3] = TREE
    with pytest.raises(InvariantError) as caught:
        pool.check()
    assert caught.value.invariant == "I1"
