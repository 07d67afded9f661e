"""Server-sent events, however they are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv_client import Event, EventDecoder, StreamBroken

STREAM = (
    "\ufeff: a comment\n\nevent: error\rdata: {\r\ndata: }\r\n\r\ndata:one\n\nid: 7\nretry: 3\n\n"
    "data: h\u00e9 \U0001f600\u2028\n\ndata\n\n: ping\r\rdata:  two\r\n\n"
).encode()
EVENTS = [
    Event("error", "{\n}"),
    Event("message", "one"),
    Event("message", "h\u00e9 \U0001f600\u2028"),
    Event("message", ""),
    Event("message", " two"),
]


def decoded(*parts):
    decoder = EventDecoder()
    return [event for part in parts for event in decoder.feed(part)]


def test_a_stream_of_every_form_is_read():
    assert decoded(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_where_the_network_cuts_does_not_matter(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert decoded(*(STREAM[a:b] for a, b in itertools.pairwise(edges))) == EVENTS


def test_byte_by_byte_is_the_same():
    assert decoded(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == EVENTS


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=30), min_size=1, max_size=5))
def test_what_is_written_as_data_lines_comes_back(lines):
    text = "".join(f"data: {line}\n" for line in lines) + "\n"
    assert decoded(text.encode()) == [Event("message", "\n".join(lines))]


def test_an_event_without_its_empty_line_is_unfinished():
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: half\n")) == []
    assert decoder.unfinished


@pytest.mark.parametrize("data", [b"data: " + b"x" * 100, b"data: xxxxxxxxxxxx\n" * 6])
def test_an_endless_event_is_refused(data):
    with pytest.raises(StreamBroken, match="longer"):
        list(EventDecoder(max_bytes=64).feed(data))


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(StreamBroken, match="no text"):
        list(EventDecoder().feed(b"data: \xff\n"))
