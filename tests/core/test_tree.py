from __future__ import annotations

import sys
from array import array
from collections import Counter
from random import Random

import numpy as np
import pytest

import radixkv.siblings
from radixkv.check import check_tree
from radixkv.drawing import draw
from radixkv.errors import InvariantError
from radixkv.node import Account
from radixkv.policies import Lru
from radixkv.prefix import common_prefix_bytes
from radixkv.tokens import token_bytes
from radixkv.tree import RadixTree

NS = b"\x01" * 32
OTHER = b"\x02" * 32


class Forest:
    """A tree, with pages counted up and tokens for bytes."""

    def __init__(self, page_size: int) -> None:
        self.policy = Lru(99)
        self.tree = RadixTree(page_size, self.policy)
        self.tick = self.next_page = 0

    def insert(self, ids, namespace: bytes = NS):
        data = token_bytes(ids)
        assert len(ids) % self.tree.page_size == 0
        count = len(ids) // self.tree.page_size
        pages = array("i", range(self.next_page, self.next_page + count))
        self.next_page += count
        self.tick += 1
        return self.tree.insert(self.tree.root(namespace), 0, data, pages, self.tick, 0)

    def match(self, ids, namespace: bytes = NS):
        return self.tree.match(self.tree.root(namespace), 0, token_bytes(ids))

    def found(self, ids, namespace: bytes = NS) -> tuple[list[int], int, int]:
        """Pages of the match, the partial page, and how many of its tokens match."""
        found = self.match(ids, namespace)
        pages = self.tree.path_pages(found.node, found.num_pages).tolist()
        return pages, found.partial_page, found.partial_tokens

    def structure(self) -> object:
        return [
            (id(node), bytes(node.key), node.pages.tolist(), node.start, node.tick, node.lock_count, node.guard_count)
            for node in self.tree.walk()
        ]


def sequence(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.fixture
def drawn() -> Forest:
    """The tree in the docstring of tree.py."""
    forest = Forest(4)
    for text in ("abcdefghijkl", "abcdefghmnop", "abcXabcX"):
        forest.insert(sequence(text))
    return forest


# -- match ---------------------------------------------------------------------------------------------------------


def test_a_match_is_the_longest_cached_run_and_may_end_inside_a_page(drawn):
    cases = {
        "": ([], -1, 0),
        "z": ([], -1, 0),
        "a": ([], 0, 1),
        "abcX": ([6], -1, 0),
        "abcY": ([], 0, 3),
        "abcd": ([0], -1, 0),
        "abcdef": ([0], 1, 2),
        "abcdefzz": ([0], 1, 2),
        "abcdefgh": ([0, 1], -1, 0),
        "abcdefghi": ([0, 1], 2, 1),
        "abcdefghijkl": ([0, 1, 2], -1, 0),
        "abcdefghijklmnop": ([0, 1, 2], -1, 0),
        "abcdefghmnoq": ([0, 1], 5, 3),
        "abcdefghmnopzzzz": ([0, 1, 5], -1, 0),
        "abcXabcYabcX": ([6], 7, 3),
    }
    for text, expected in cases.items():
        pages, page, tokens = drawn.found(sequence(text))
        assert (pages, tokens) == (expected[0], expected[2]), text
        if text not in ("a", "abcY"):  # two pages begin so: either may be named
            assert page == expected[1], text
        else:
            assert page in (0, 6), text


def test_a_match_changes_nothing(drawn):
    before, text = drawn.structure(), draw(drawn.tree, 200)
    for query in ("", "z", "a", "abcd", "abcdef", "abcdefghijkl", "abcXabcYabcX", "abcdefghijklzzzz"):
        drawn.match(sequence(query))
        assert drawn.structure() == before
        assert draw(drawn.tree, 200) == text
    check_tree(drawn.tree)


def test_a_match_may_start_in_the_middle_of_an_edge():
    forest = Forest(2)
    node = forest.insert(list(range(20))).node
    for position in range(1, 11):
        for length in range(20 - 2 * position + 1):
            tail = token_bytes([*range(2 * position, 2 * position + length), 99, 98])
            found = forest.tree.match(node, position, tail)
            assert found.num_pages * 2 + found.partial_tokens == 2 * position + length


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_match_equals_a_scan_over_all_that_was_inserted(page_size):
    random, forest, known = Random(page_size), Forest(page_size), []
    for _ in range(150):
        base = random.choice(known)[: random.randrange(0, 40)] if known and random.random() < 0.8 else []
        query = base + [random.randrange(3) for _ in range(random.randrange(30))]
        best = max((common(query, other) for other in known), default=0)
        found = forest.match(query)
        assert found.num_pages * page_size + found.partial_tokens == best
        whole = query[: len(query) // page_size * page_size]
        if whole:
            forest.insert(whole)
            known.append(whole)
        check_tree(forest.tree)


def common(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


# -- wide fan-out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> tuple[Forest, np.ndarray]:
    """100,000 children of one node, pages of 4 tokens; some share one token, or two, or three."""
    rng, forest = np.random.default_rng(0), Forest(4)
    firsts = np.stack([rng.integers(0, high, 130_000) for high in (300, 300, 300, 2**31 - 1)], 1).astype(np.int32)
    firsts = firsts[np.unique(firsts[:, :3], axis=0, return_index=True)[1]][:100_000]
    assert len(firsts) == 100_000
    parent = forest.insert([7, 7, 7, 7]).node
    forest.tree.lock(parent)  # or the first child would only make it longer
    data = rng.permutation(firsts).tobytes()
    for page in range(1, 100_001):
        forest.tree.insert(parent, 1, data[16 * page - 16 : 16 * page], array("i", [page]), page, 0)
    check_tree(forest.tree)
    return forest, firsts


def test_among_100_000_children_the_longest_partial_match_is_found(wide):
    forest, firsts = wide
    rng = np.random.default_rng(1)
    queries = [list(row) for row in rng.integers(0, 300, (40, 4)).tolist()]
    queries += [[*row[:2], 299, 5] for row in rng.choice(firsts, 40).tolist()]
    queries += [[*row[:3], 2**31 - 1] for row in rng.choice(firsts, 40).tolist()]
    queries += [row[:length] for row in rng.choice(firsts, 30).tolist() for length in (1, 2, 3)]
    queries += [[400, 1, 1, 1], [2**31 - 1], [0], []]
    seen = Counter()
    for query in queries:
        left, best = firsts, 0
        while best < len(query) and len(left := left[left[:, best] == query[best]]):
            best += 1
        pages, page, tokens = forest.found([7, 7, 7, 7, *query])
        if best == 4:
            assert (len(pages), tokens) == (2, 0)
            continue
        assert (len(pages), tokens) == (1, best), query
        seen[best] += 1
        assert (page >= 0) == (best > 0)
        if best:
            holder = forest.match([7, 7, 7, 7, *query]).partial_node
            assert holder.pages[0] == page
            assert memoryview(bytes(holder.key)).cast("i")[:best].tolist() == query[:best]
    assert all(seen[best] >= 20 for best in (1, 2, 3)), seen


class CountedKey(bytes):
    """A first page that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        CountedKey.comparisons += 1
        return bytes.__lt__(self, other)

    def __gt__(self, other):
        CountedKey.comparisons += 1
        return bytes.__gt__(self, other)

    __hash__ = bytes.__hash__


@pytest.mark.pure
def test_the_neighbour_search_compares_logarithmically_few_keys(wide, monkeypatch):
    forest, firsts = wide
    parent = forest.match([7, 7, 7, 7]).node
    assert len(parent.children) == 100_000
    by_head = parent.siblings._by_head
    for head, alike in list(by_head.items()):
        monkeypatch.setitem(by_head, head, type(alike)(map(CountedKey, alike)))
    lengths = []
    monkeypatch.setattr(
        radixkv.siblings, "common_prefix_bytes", lambda *args: (lengths.append(1), common_prefix_bytes(*args))[1]
    )
    worst = 0
    for row in firsts[::997].tolist():
        CountedKey.comparisons, lengths[:] = 0, []
        found = forest.match([7, 7, 7, 7, *row[:3], row[3] ^ 1])
        assert found.partial_tokens == 3
        worst = max(worst, CountedKey.comparisons)
        assert len(lengths) <= 2
    assert 5 <= worst <= 2 * 9  # 333 begin with one token, log2 of that is 8.4: one bisection over sublists, one inside


def test_children_of_a_wide_node_leave_and_return():
    forest = Forest(2)
    inserted = {}
    for first in range(60):
        inserted[first] = forest.insert([first % 7, first]).node
    parent = forest.tree.root(NS)
    assert parent.siblings is not None
    random = Random(2)
    for _ in range(300):
        first = random.randrange(60)
        if first in inserted:
            forest.tree.trim(inserted.pop(first), 1)
        else:
            inserted[first] = forest.insert([first % 7, first]).node
        check_tree(forest.tree)
        query = random.randrange(60)
        best = max((2 if other == query else other % 7 == query % 7) for other in inserted)
        found = forest.match([query % 7, query])
        assert found.num_pages * 2 + found.partial_tokens == best


# -- insert --------------------------------------------------------------------------------------------------------


def test_the_four_cases_of_an_insert():
    forest = Forest(1)
    first = forest.insert([1, 2, 3, 4])
    assert (first.num_duplicate, forest.tree.num_nodes, forest.tree.num_pages) == (0, 1, 4)
    again = forest.insert([1, 2])  # 1: all of it is there; it gets a node of its own
    assert (again.num_duplicate, forest.tree.num_nodes, forest.tree.num_pages) == (2, 2, 4)
    assert again.node.pages.tolist() == [0, 1]
    assert first.node.pages.tolist() == [2, 3]
    branch = forest.insert([1, 9, 8])  # 2: leaves an edge in the middle
    assert (branch.num_duplicate, forest.tree.num_nodes, forest.tree.num_pages) == (1, 4, 6)
    grown = forest.insert([1, 9, 8, 7, 6])  # 3: continues an unshared leaf
    assert grown.node is branch.node
    assert (grown.num_duplicate, forest.tree.num_nodes, forest.tree.num_pages) == (3, 4, 8)
    below = forest.insert([1, 2, 5])  # 4: continues a node with children
    assert (below.num_duplicate, forest.tree.num_nodes, forest.tree.num_pages) == (2, 5, 9)
    check_tree(forest.tree)
    assert forest.found([1, 9, 8, 7, 6])[0] == [0, 7, 8, 12, 13]


def test_pages_that_were_there_stay_and_the_new_ones_are_the_callers():
    forest = Forest(2)
    forest.insert([1, 1, 2, 2])  # pages 0 1
    done = forest.insert([1, 1, 2, 2, 3, 3])  # pages 2 3 4, of which 2 and 3 are not taken
    assert done.num_duplicate == 2
    assert forest.found([1, 1, 2, 2, 3, 3])[0] == [0, 1, 4]


def test_siblings_that_share_less_than_a_page_stand_side_by_side():
    forest = Forest(4)
    for last in range(40):
        forest.insert([1, 2, 3, last])
    assert forest.tree.num_nodes == 40
    check_tree(forest.tree)
    assert forest.found([1, 2, 3, 17])[0] == [17]
    pages, page, tokens = forest.found([1, 2, 3, 99])
    assert (pages, tokens) == ([], 3)
    assert 0 <= page < 40


def test_a_leaf_grows_only_while_nobody_else_holds_it():
    forest = Forest(1)
    leaf = forest.insert([1, 2]).node
    assert forest.insert([1, 2, 3]).node is leaf
    forest.tree.lock(leaf)
    other = forest.insert([1, 2, 3, 4]).node
    assert other is not leaf
    assert other.parent is leaf
    check_tree(forest.tree)


def test_a_trimmed_leaf_never_grows_again():
    forest = Forest(1)
    leaf = forest.insert([1, 2, 3]).node
    forest.tree.trim(leaf, 1)
    child = forest.insert([1, 2, 9]).node
    assert child is not leaf
    assert (leaf.pages.tolist(), child.parent) == ([0, 1], leaf)
    check_tree(forest.tree)


# -- split and locks -----------------------------------------------------------------------------------------------


def test_a_split_keeps_locks_and_cursors_where_they_end():
    forest = Forest(1)
    node = forest.insert([1, 2, 3, 4]).node
    forest.tree.lock(node)
    forest.tree.lock(node)
    upper = forest.tree.settle(node, 2, 9, 0.0)
    assert (upper.pages.tolist(), upper.start, upper.end, upper.tick) == ([0, 1], 0, 2, 9)
    assert (node.pages.tolist(), node.start, node.end) == ([2, 3], 2, 4)
    assert node.parent is upper
    assert (node.lock_count, upper.lock_count, upper.guard_count) == (2, 0, 1)
    assert forest.tree.num_evictable == 0
    check_tree(forest.tree)
    assert forest.tree.climb(node, 4) == (node, 4)
    assert forest.tree.climb(node, 3) == (node, 3)
    assert forest.tree.climb(node, 2) == (upper, 2)
    assert forest.tree.climb(node, 1) == (upper, 1)
    assert forest.tree.climb(node, 0) == (forest.tree.root(NS), 0)
    for left in (1, 0):
        forest.tree.unlock(node)
        assert forest.tree.num_evictable == (0 if left else 4)
    check_tree(forest.tree)


def test_a_lock_protects_all_above_and_nothing_beside_or_below(drawn):
    tree = drawn.tree
    middle = drawn.match(sequence("abcdefgh")).node
    tree.lock(middle)
    assert tree.num_pages - tree.num_evictable == 2
    evicted = []
    while (leaf := drawn.policy.victim()) is not None:
        evicted += tree.trim(leaf, 1)
        check_tree(tree)
    assert sorted(evicted) == [2, 5, 6, 7]
    assert drawn.found(sequence("abcdefghijkl"))[0] == [0, 1]
    tree.unlock(middle)
    while (leaf := drawn.policy.victim()) is not None:
        tree.trim(leaf, 9)
    assert (tree.num_pages, tree.num_nodes, tree.num_evictable, tree.roots) == (0, 0, 0, {})


def test_a_second_lock_costs_no_walk_up_the_path():
    forest = Forest(1)
    deep = forest.insert([0]).node
    for depth in range(1, 200):
        forest.tree.lock(deep)  # so that the next is a child
        node = forest.insert(list(range(depth + 1))).node
        forest.tree.unlock(deep)
        deep = node
    assert forest.tree.num_nodes == 200
    forest.tree.lock(deep)
    assert steps(lambda: forest.tree.lock(deep)) < 10
    assert steps(lambda: forest.tree.unlock(deep)) < 10
    assert steps(lambda: forest.tree.lock(deep.parent)) < 25
    check_tree(forest.tree)


def steps(call) -> int:
    """Lines of radixkv that a call executes: its operations, on any machine."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "radixkv" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


# -- trim and remove -----------------------------------------------------------------------------------------------


def test_a_leaf_is_trimmed_from_its_end_no_more_than_asked():
    forest = Forest(2)
    leaf = forest.insert([1, 1, 2, 2, 3, 3, 4, 4]).node
    assert forest.tree.trim(leaf, 1).tolist() == [3]
    assert forest.tree.trim(leaf, 2).tolist() == [1, 2]
    assert (leaf.pages.tolist(), leaf.alive, forest.tree.num_pages) == ([0], True, 1)
    check_tree(forest.tree)
    assert forest.tree.trim(leaf, 9).tolist() == [0]
    assert not leaf.alive
    assert forest.tree.roots == {}


def test_a_parent_learns_of_its_childrens_uses_when_they_leave():
    forest = Forest(1)
    forest.insert([1])
    parent = forest.match([1]).node
    forest.tree.lock(parent)
    child = forest.insert([1, 2]).node  # tick 2
    forest.tree.unlock(parent)
    rival = forest.insert([5]).node
    rival.tick = 0
    assert (parent.tick, child.tick) == (1, 2)
    forest.tree.trim(child, 1)
    assert parent.tick == 2
    assert parent in forest.policy


def test_a_root_goes_with_its_last_child_and_comes_back_anew():
    forest = Forest(1)
    old = forest.tree.root(NS)
    leaf = forest.insert([1]).node
    forest.tree.trim(leaf, 1)
    assert not old.alive
    assert NS not in forest.tree.roots
    node, position = forest.tree.climb(leaf, 1)
    assert (node, position) == (forest.tree.root(NS), 0)
    assert node is not old


def test_a_locked_root_stays():
    forest = Forest(1)
    root = forest.tree.root(NS)
    forest.tree.lock(root)
    forest.tree.trim(forest.insert([1]).node, 1)
    assert forest.tree.roots == {NS: root}
    forest.tree.unlock(root)
    assert forest.tree.roots == {}


def test_climb_finds_what_is_left_of_a_path_that_was_cut_and_regrown():
    forest = Forest(1)
    parent = forest.insert([1, 2]).node
    forest.tree.lock(parent)
    child = forest.insert([1, 2, 3, 4]).node
    forest.tree.unlock(parent)
    forest.tree.trim(child, 1)
    assert forest.tree.climb(child, 4) == (child, 3)
    forest.insert([1, 2, 3, 9])
    assert forest.tree.climb(child, 4) == (child, 3)
    forest.tree.trim(forest.match([1, 2, 3, 9]).node, 1)
    forest.tree.trim(child, 1)
    assert forest.tree.climb(child, 4) == (parent, 2)
    forest.insert([1, 2, 7, 7])  # the parent is a leaf again, and grows
    assert parent.end == 4
    assert forest.tree.climb(child, 4) == (parent, 2)


def test_remove_takes_what_continues_a_prefix_and_leaves_what_is_locked(drawn):
    tree = drawn.tree
    locked = drawn.match(sequence("abcdefghmnop")).node
    tree.lock(locked)
    at = drawn.match(sequence("abcd"))
    removal = tree.remove(at.node, at.num_pages)
    assert sorted(removal.pages) == [2]
    assert removal.num_locked == 2  # efgh and mnop
    assert drawn.found(sequence("abcdefghmnop"))[0] == [0, 1, 5]
    tree.unlock(locked)
    removal = tree.remove(tree.root(NS), 0)
    assert sorted(removal.pages) == [0, 1, 5, 6, 7]
    assert (removal.num_locked, tree.num_pages, tree.roots) == (0, 0, {})


def test_remove_inside_a_page_takes_the_pages_that_begin_so():
    forest = Forest(3)
    for last in (1, 2, 3):
        forest.insert([5, 5, last, 6, 6, 6])
    forest.insert([5, 4, 1])
    root = forest.tree.root(NS)
    assert sorted(forest.tree.remove(root, 0, token_bytes([5, 5, 2])).pages) == [2, 3]
    assert sorted(forest.tree.remove(root, 0, token_bytes([5, 5])).pages) == [0, 1, 4, 5]
    assert sorted(forest.tree.remove(root, 0, token_bytes([6])).pages) == []
    node = forest.insert([5, 4, 1, 7, 8, 9]).node  # the leaf grows: pages 6, then 8
    assert sorted(forest.tree.remove(node, 1, token_bytes([8])).pages) == []
    assert sorted(forest.tree.remove(node, 1, token_bytes([7])).pages) == [8]
    check_tree(forest.tree)
    assert forest.tree.num_pages == 1


# -- namespaces, show, check ---------------------------------------------------------------------------------------


def test_one_namespace_never_sees_another(drawn):
    assert drawn.found(sequence("abcdefgh"), OTHER) == ([], -1, 0)
    drawn.insert(sequence("abcd"), OTHER)
    assert drawn.found(sequence("abcdefgh"), OTHER) == ([8], -1, 0)
    check_tree(drawn.tree)
    drawn.tree.remove(drawn.tree.root(OTHER), 0)
    assert drawn.found(sequence("abcdefgh"))[0] == [0, 1]


def test_show_draws_the_tree():
    forest = Forest(2)
    assert draw(forest.tree, 200) == "(empty)"
    forest.insert(list(range(1, 9)))
    forest.insert([1, 2, 3, 4, 50, 60])
    forest.insert([9, 9])
    forest.tree.lock(forest.match([9, 9]).node)
    forest.insert(list(range(100, 120)), OTHER)
    assert draw(forest.tree, 200) == (
        "namespace 010101010101\n"
        "├─ 4 tokens (1,2,3,4) pages [0, 1] tick 1\n"
        "│  ├─ 4 tokens (5,6,7,8) pages [2, 3] tick 1\n"
        "│  └─ 2 tokens (50,60) pages [6] tick 2\n"
        "└─ 2 tokens (9,9) pages [7] tick 3 locks 1\n"
        "namespace 020202020202\n"
        "└─ 20 tokens (100,101,102,103,…) pages [8, 9, 10, 11, 12, … 10] tick 4"
    )


def test_show_of_a_large_tree_says_how_much_it_left_out():
    forest = Forest(1)
    for first in range(300):
        forest.insert([first])
    lines = draw(forest.tree, 50).splitlines()
    assert len(lines) <= 52
    assert lines[-1] == "... 300 nodes in all"


def broken(forest: Forest) -> str:
    with pytest.raises(InvariantError) as caught:
        check_tree(forest.tree)
    return caught.value.invariant


def test_check_names_the_invariant_that_is_broken(drawn):
    tree, node = drawn.tree, drawn.match(sequence("abcdefgh")).node
    check_tree(tree)
    for spoil, mend, name in (
        (lambda: setattr(node, "key", node.key + b"1234"), lambda: setattr(node, "key", node.key[:-4]), "I2"),
        (lambda: node.pages.append(9), node.pages.pop, "I2"),
        (lambda: setattr(node, "start", 3), lambda: setattr(node, "start", 0), "I3"),
        (lambda: setattr(node, "account", Account(NS)), lambda: setattr(node, "account", tree.roots[NS].account), "I8"),
        (lambda: setattr(node, "lock_count", 1), lambda: setattr(node, "lock_count", 0), "I7"),
        (lambda: setattr(node, "guard_count", 1), lambda: setattr(node, "guard_count", 0), "I7"),
        (lambda: setattr(tree.roots[NS].account, "key", OTHER), lambda: setattr(tree.roots[NS].account, "key", NS), "I8"),
        (lambda: setattr(node.account, "num_pages", 1), lambda: setattr(node.account, "num_pages", 6), "I4"),
        (lambda: setattr(tree, "num_pages", 1), lambda: setattr(tree, "num_pages", 6), "I4"),
        (lambda: setattr(tree, "num_evictable", 1), lambda: setattr(tree, "num_evictable", 6), "I4"),
        (lambda: setattr(tree, "num_nodes", 1), lambda: setattr(tree, "num_nodes", 4), "I4"),
    ):
        spoil()
        assert broken(drawn) == name
        mend()
        check_tree(tree)
    leaf = drawn.match(sequence("abcXabcX")).node
    leaf.children = {}
    assert broken(drawn) == "I2"
