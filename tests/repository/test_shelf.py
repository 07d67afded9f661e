from __future__ import annotations

from radixkv.repository import History, Listing, Packing, Shelf, SourceFile
from radixkv.tokens import Tokens


def packing(text: str) -> Packing:
    found = Listing((SourceFile("a.py", text, text),), ())
    return Packing.of(found, 1000, lambda file: Tokens([len(file.text)]), history=History())


def test_a_namespace_finds_its_own_packings_the_newest_last():
    shelf = Shelf()
    one, two = packing("1"), packing("22")
    for each in (one, two, one):
        shelf.put("mine", each)
    assert shelf.known("mine") == (two, one)
    assert shelf.known("other") == ()


def test_what_is_kept_has_an_end():
    shelf = Shelf()
    for number in range(100):
        shelf.put("mine", packing("x" * number))
    assert [one.seen["a.py"] for one in shelf.known("mine")] == ["x" * number for number in range(68, 100)]
    for number in range(300):
        shelf.put(number, packing("x"))
    assert shelf.known("mine") == ()
    assert shelf.known(299) != ()
