from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from radixkv.repository import History, Listing, Packing, Skipped, SourceFile
from radixkv.tokens import Tokens

NEVER = History()


def listing(sizes, versions=None) -> Listing:
    versions = versions or {}
    files = [SourceFile(name, f"{name}{sizes[name]}{versions.get(name, 0)}", "x" * sizes[name]) for name in sorted(sizes)]
    return Listing(tuple(files), ())


def tokenize(file: SourceFile) -> Tokens:
    return Tokens([ord(file.path[0])] * len(file.text))


def paths(packing: Packing) -> str:
    return "".join(file.path for file in packing.files)


@dataclass
class Tree:
    """A tree that is edited: what `Repository` does, without a model."""

    sizes: dict[str, int]
    budget: int = 10_000
    history: History = NEVER
    versions: dict[str, int] = field(default_factory=dict)
    past: list[Packing] = field(default_factory=list)

    def pack(self) -> Packing:
        found = listing(self.sizes, self.versions)
        last = self.past[-1] if self.past else None
        packing = Packing.of(found, self.budget, tokenize, history=self.history, last=last, known=self.past)
        self.past = [one for one in self.past if one.files != packing.files] + [packing]
        return packing

    def edit(self, *names: str) -> Packing:
        for name in names:
            self.versions[name] = self.versions.get(name, 0) + 1
        return self.pack()


def test_without_a_history_the_largest_stand_first_and_equal_ones_by_path():
    assert paths(Tree({"a": 1, "b": 3, "d": 2, "c": 2}).pack()) == "bcda"


def test_with_a_history_the_fewest_changes_per_token_stand_first():
    history = History({"a": 6.0, "b": 2.0, "c": 1.0})
    tree = Tree({"a": 60, "b": 4, "c": 4, "n": 1}, history=history)
    assert paths(tree.pack()) == "acbn"


def test_an_edited_file_goes_to_the_end_and_what_stood_before_it_stays():
    tree = Tree({"a": 5, "b": 4, "c": 3, "d": 2})
    assert (paths(tree.pack()), paths(tree.edit("b"))) == ("abcd", "acdb")
    assert paths(tree.edit("b")) == "acdb"


def test_of_two_files_edited_in_turn_the_longer_stands_first_and_both_come_to_rest():
    tree = Tree({"a": 120, "b": 100, "c": 90, "d": 80})
    tree.pack()
    orders = [paths(tree.edit(name)) for name in "ab" * 10]
    assert set(orders[-10:]) == {"cdab"}


def test_what_is_edited_now_overtakes_what_was_edited_once():
    tree = Tree({"a": 120, "b": 60, "c": 90, "d": 80})
    tree.pack()
    assert paths(tree.edit("b")) == "acdb"
    assert paths(tree.edit("a")) == "cdab"
    assert paths([tree.edit("a") for _ in range(3)][-1]) == "cdba"


def test_an_edit_undone_finds_the_old_order():
    tree = Tree({"a": 5, "b": 4, "c": 3, "d": 2})
    first = tree.pack()
    tree.edit("b")
    tree.versions["b"] = 0
    assert tree.pack().files == first.files


def test_a_branch_checked_out_again_finds_its_order():
    tree = Tree({"a": 9, "b": 8, "c": 7, "d": 6, "e": 5})
    tree.pack()
    main = tree.edit("c")
    branch = tree.edit("a", "d")
    tree.versions.update(a=0, d=0)
    assert tree.pack().files == main.files
    tree.versions.update(a=1, d=1)
    assert tree.pack().files == branch.files


def test_a_branch_whose_edited_file_was_left_out_before_is_left_as_it_was():
    tree = Tree({"a": 40, "b": 30, "c": 20, "d": 10, "w": 45}, budget=100)
    main = tree.pack()
    tree.sizes["w"] = 24
    assert "w" in paths(tree.edit("w"))
    tree.sizes["w"], tree.versions["w"] = 45, 0
    assert tree.pack().files == main.files


def test_another_tree_takes_up_the_order_of_one_it_shares_files_with():
    tree = Tree({"a": 9, "b": 8, "c": 7, "d": 6})
    tree.pack()
    tree.edit("b")
    order = paths(tree.edit("b"))
    other = Tree(dict(tree.sizes), versions={**tree.versions, "d": 1})
    found = listing(other.sizes, other.versions)
    packing = Packing.of(found, 10_000, tokenize, history=NEVER, known=tree.past)
    assert order == "acdb"
    assert paths(packing)[:2] == "ac"
    assert packing.heat == {}
    stranger = Packing.of(listing({"x": 2, "y": 3}), 10_000, tokenize, history=NEVER, known=tree.past)
    assert paths(stranger) == "yx"


def test_a_packing_for_another_budget_is_not_taken_for_the_whole():
    tree = Tree({"a": 40, "b": 30, "c": 20}, budget=50)
    small = tree.pack()
    large = Packing.of(listing(tree.sizes), 100, tokenize, history=NEVER, known=[small])
    assert (len(paths(small)), len(paths(large))) == (2, 3)


def test_new_files_come_last_and_gone_ones_leave_the_rest_as_it_was():
    tree = Tree({"b": 9, "c": 8, "d": 7})
    first = tree.pack()
    tree.sizes = {"a": 99, "b": 9, "c": 8}
    second = tree.pack()
    assert (paths(first), paths(second)) == ("bcd", "bca")
    assert second.changed_since(first) == ("a", "d")


def test_nothing_changed_changes_nothing_but_what_is_skipped():
    tree = Tree({"a": 5, "b": 50, "c": 7}, budget=13)
    first = tree.pack()
    found = Listing(listing(tree.sizes).files, (Skipped("new.bin", "binary"),))
    again = Packing.of(found, 13, tokenize, history=NEVER, last=first)
    assert again.files == first.files
    assert [one.path for one in again.skipped] == ["new.bin", "b"]


def test_the_largest_files_are_left_out_until_the_rest_fits():
    packing = Tree({"a": 5, "b": 50, "c": 7, "d": 20}, budget=13).pack()
    assert sorted(paths(packing)) == ["a", "c"]
    assert [one.path for one in packing.skipped] == ["b", "d"]
    assert "13" in packing.skipped[0].reason


def test_only_what_is_taken_is_tokenised():
    asked = []

    def counted(file):
        asked.append(file.path)
        return tokenize(file)

    Packing.of(listing({"a": 5, "b": 50, "c": 7, "d": 20}), 13, counted, history=NEVER)
    assert sorted(asked) == ["a", "c", "d"]


def test_when_a_file_grows_beyond_the_budget_the_last_of_the_others_makes_room():
    tree = Tree({"a": 40, "b": 30, "c": 20, "d": 10}, budget=100)
    tree.pack()
    tree.sizes["b"] = 35
    packing = tree.edit("b")
    assert paths(packing) == "acb"
    assert [one.path for one in packing.skipped] == ["d"]
    assert tree.pack() == packing


def test_a_file_that_was_left_out_comes_in_when_it_is_edited():
    tree = Tree({"a": 40, "b": 30, "c": 20, "d": 10, "w": 45}, budget=200)
    tree.budget = 100
    assert "w" not in paths(tree.pack())
    tree.sizes["w"] = 24
    assert paths(tree.edit("w")) == "abw"


def test_what_the_listing_skipped_stays_named():
    found = Listing(listing({"a": 1}).files, (Skipped("b.bin", "binary"),))
    assert Packing.of(found, 9, tokenize, history=NEVER).skipped == (Skipped("b.bin", "binary"),)


def test_whatever_happens_what_stands_before_the_first_change_is_found_again():
    random = Random(1)
    moved = kept = left_out = 0
    for _ in range(60):
        names = "abcdefghijkl"
        rates = {name: random.random() for name in names}
        tree = Tree({name: random.randint(1, 9) for name in names}, budget=random.choice([40, 1000]), history=History(rates))
        before = tree.pack()
        for _ in range(12):
            edited = random.sample(names, random.randint(1, 2))
            for name in edited:
                tree.sizes[name] = random.randint(1, 9)
            past = tuple(tree.past)
            after = tree.edit(*edited)
            stays = {file.path for file in after.files} - set(edited)
            first = next((file.start for file in before.files if file.path not in stays), before.num_tokens)
            assert any(after.tokens[:first] == one.tokens[:first] for one in past)
            assert after.num_tokens <= tree.budget
            assert [file.start for file in after.files[1:]] == [file.stop for file in after.files[:-1]]
            moved += paths(after) != paths(before)
            kept += first > 0
            left_out += bool(after.skipped)
            before = after
    assert min(moved, kept, left_out) > 50
