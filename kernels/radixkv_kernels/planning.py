"""Who attends to what, cut into equal pieces of work: page tables in, work items out. Plain numpy, no device.

    4 requests that decode           one that prefills 300 tokens
    ████████░░  ░ own tail           ░░░░░░░░▒▒          ▒ new tokens
    ████████░░░                      ░░░░░░░░▒▒▒▒        a wide tile takes some of them, and sees what
    ████████░  █ shared (sharing.py) ░░░░░░░░▒▒▒▒▒▒      lies before its last one

A work item is a run of keys and the query rows that attend to it. Rows with one item only get their answer from it; for the
others each item leaves a partial result, in a slot of its own, and they are merged in a fixed order (attention.py).

Items come in two widths, for a tile of few query rows (decoding) and of many (prefill, or a prefix that many share).
Long runs are cut so that all processors have work; the longest items come first, because the device takes them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from radixkv_kernels.sharing import Sharing, find_shared
from radixkv_kernels.work import ITEM_FIELDS, CannotPlan, Geometry, Ints, Longs, Plan, Span

__all__ = ["ITEM_FIELDS", "CannotPlan", "Geometry", "Plan", "Span", "plan"]

_GRAIN = 64  # tokens; chunks are cut at multiples
_LEAST_CHUNK = (128, 512)  # tokens, narrow and wide; a shorter chunk costs more in its merge than it gains
_MOST_CHUNKS = (256, 16)  # of a run, narrow and wide: a row reads so many partial results
_BUSY_ENOUGH = 0.9  # of the places, on average; more cuts gain less than their merges cost
_LENGTH_CLASSES = 16  # items of one class keep their order


def plan(spans: Sequence[Span], geometry: Geometry, *, window: int | None = None, share: bool = True) -> Plan:
    """Cut the attention of a batch into work items.

    Cost: O(pages + spans log spans), mostly in bulk.

    Args:
        spans: one for each request.
        geometry: of the model and the device.
        window: a token sees so many last tokens only, itself included; nothing is shared then.
        share: read a common prefix of decoding requests once for all of them.

    Raises:
        CannotPlan: a span without tokens, before its request, or with too few pages; a window of nothing.
    """
    for number, span in enumerate(spans):
        if span.num_tokens < 1 or span.position < 0 or len(span.pages) * geometry.page_size < span.end:
            given = f"{span.num_tokens} new tokens at {span.position} with {len(span.pages)} pages of {geometry.page_size}"
            raise CannotPlan(f"span {number}", given, "at least 1 token, at 0 or later, with pages up to the last one")
    if window is not None and window < 1:
        raise CannotPlan("window", window, "at least 1, the token itself, or None for all")
    batch = _Batch(spans, geometry)
    tables = batch.whole_pages() if share and window is None else {}
    sharing = find_shared(tables, len(spans), geometry.page_size, geometry.least_saving)
    common = _common_tiles(batch, sharing)
    prefill = _prefill_tiles(batch)
    own = _own_tiles(batch, sharing.begins, window)
    if window is not None:
        prefill.begin[:] = np.maximum(batch.position[prefill.span] + prefill.offset - window + 1, 0)
    _choose_chunks(batch, own, prefill, common)
    return _Assembly(batch, own, prefill, common).plan()


class _Batch:
    """The spans as arrays.

    Attributes:
        position, num_tokens, end: [R] of each span.
        first_row: [R + 1] of the query rows.
        few: [R] whether its new tokens fit a narrow tile.
    """

    def __init__(self, spans: Sequence[Span], geometry: Geometry) -> None:
        self.spans = tuple(spans)
        self.geometry = geometry
        self.position = np.array([span.position for span in spans], np.int64)
        self.num_tokens = np.array([span.num_tokens for span in spans], np.int64)
        self.end = self.position + self.num_tokens
        self.first_row = np.concatenate([[0], np.cumsum(self.num_tokens)])
        self.few = self.num_tokens <= geometry.narrow_rows

    def whole_pages(self) -> dict[int, Ints]:
        """Of the spans with few new tokens, the pages that lie before these: all of them see all of those."""
        size = self.geometry.page_size
        return {i: self.spans[i].pages[: self.spans[i].position // size] for i in np.flatnonzero(self.few).tolist()}


@dataclass(slots=True)
class _Tiles:
    """Tiles of one span each: keys [begin, end) of `span`, for the query rows from `offset` on.

    Attributes:
        span, offset, count, begin, end: [n].
        num_chunks: [n] how many items each becomes.
    """

    span: Longs
    offset: Longs
    count: Longs
    begin: Longs
    end: Longs
    num_chunks: Longs


@dataclass(slots=True)
class _CommonTiles:
    """Tiles of the runs that several spans share: all rows of all members, `step` of them a tile.

    Attributes:
        sharing: the runs, and who is in them.
        length, num_rows, step, num_tiles: [n] keys, rows, rows of a tile, tiles of each run.
        wide: [n] which tiles.
        num_chunks: [n] how many items each tile becomes.
    """

    sharing: Sharing
    length: Longs
    num_rows: Longs
    step: Longs
    num_tiles: Longs
    wide: npt.NDArray[np.bool_]
    num_chunks: Longs


def _own_tiles(batch: _Batch, begins: Longs, window: int | None) -> _Tiles:
    """One tile for each span with few new tokens: what it shares with nobody."""
    few = np.flatnonzero(batch.few)
    begin = begins[few] if window is None else np.maximum(batch.position[few] - window + 1, 0)
    return _Tiles(few, np.zeros_like(few), batch.num_tokens[few], begin, batch.end[few], np.ones_like(few))


def _prefill_tiles(batch: _Batch) -> _Tiles:
    """Wide tiles of the spans with many new tokens: each sees what lies before its last token."""
    many, step = np.flatnonzero(~batch.few), batch.geometry.wide_rows
    num_tiles = -(-batch.num_tokens[many] // step)
    span = np.repeat(many, num_tiles)
    offset = (np.arange(len(span)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * step
    count = np.minimum(batch.num_tokens[span] - offset, step)
    end = batch.position[span] + offset + count
    return _Tiles(span, offset, count, np.zeros_like(end), end, np.ones_like(end))


def _common_tiles(batch: _Batch, sharing: Sharing) -> _CommonTiles:
    """Wide tiles for the runs whose rows are too many for a narrow one."""
    runs, geometry = sharing.runs, batch.geometry
    length = np.array([run.end - run.begin for run in runs], np.int64)
    num_rows = np.array([batch.num_tokens[run.members].sum() for run in runs], np.int64)
    wide = num_rows > geometry.narrow_rows
    step = np.where(wide, geometry.wide_rows, geometry.narrow_rows)
    return _CommonTiles(sharing, length, num_rows, step, -(-num_rows // np.maximum(step, 1)), wide, np.ones_like(length))


def _choose_chunks(batch: _Batch, own: _Tiles, prefill: _Tiles, common: _CommonTiles) -> None:
    """Say into how many chunks each run of keys is cut."""
    for wide, tiles in ((False, own), (True, prefill)):
        mine = common.wide == wide
        lengths = np.concatenate([tiles.end - tiles.begin, common.length[mine]])
        times = np.concatenate([np.ones_like(tiles.end), common.num_tiles[mine]])
        found = _chunks(lengths, times * batch.geometry.num_kv_heads, batch.geometry, wide)
        tiles.num_chunks, common.num_chunks[mine] = found[: len(tiles.span)], found[len(tiles.span) :]


def _chunks(lengths: Longs, programs: Longs, geometry: Geometry, wide: bool) -> Longs:
    """[n] chunks of runs: no more than fill the processors evenly, as each costs a merge.

    Args:
        lengths: [n] tokens of each run.
        programs: [n] programs that compute it, if it is not cut.
        geometry: says how many run at a time.
        wide: which tiles.
    """
    if not len(lengths):
        return lengths
    places, least = geometry.num_processors * (geometry.wide_places if wide else geometry.narrow_places), _LEAST_CHUNK[wide]
    longest = max(int(lengths.max()), 1)
    even = -(-int((lengths * programs).sum()) // places)  # tokens of each place, if all are busy to the end
    best, chosen = 0.0, longest
    most = min(-(-longest // least), _MOST_CHUNKS[wide])
    for count in range(min(max(longest // max(even, least), 1), most), most + 1):
        chunk = -(-longest // count)
        needed = int((-(-lengths // chunk) * programs).sum())
        busy = needed / (-(-needed // places) * places)
        if busy > best + 0.01:
            best, chosen = busy, chunk
        if best > _BUSY_ENOUGH:
            break
    size = _chunk_size(lengths, np.maximum(-(-lengths // chosen), 1))
    return np.maximum(-(-lengths // size), 1)


class _Assembly:
    """Writes items, rows and pages down. Rows are listed in their own order; those of a shared run follow behind."""

    def __init__(self, batch: _Batch, own: _Tiles, prefill: _Tiles, common: _CommonTiles) -> None:
        self.batch, self.own, self.prefill, self.common = batch, own, prefill, common
        self.chunks: list[int] = common.num_chunks.tolist()
        num_rows = int(batch.first_row[-1])
        self.rows: list[Ints] = [np.arange(num_rows, dtype=np.int32)]
        self.pages: list[Ints] = []
        self.num_rows, self.num_pages = num_rows, 0

    def plan(self) -> Plan:
        """All of it."""
        batch, own, prefill = self.batch, self.own, self.prefill
        parents = self.common.sharing.parents
        before = np.array([self._items_of(parents.get(i, ())) for i in own.span.tolist()], np.int64)
        counts = np.zeros(self.num_rows, np.int64)  # items of each row
        for tiles, more in ((own, before), (prefill, 0)):
            first = batch.first_row[tiles.span] + tiles.offset
            counts[_spread(first, tiles.count)] = np.repeat(tiles.num_chunks + more, tiles.count)
        narrow = [self._items(own, before, self._bases(own.span, own.begin, own.end))]
        wide = [self._items(prefill, np.zeros_like(prefill.span), self._whole_bases(prefill))]
        for number, is_wide in enumerate(self.common.wide.tolist()):
            (wide if is_wide else narrow).append(self._common_items(number))
        slots = np.where(counts > 1, counts, 0)
        tokens = np.arange(len(counts)) - np.repeat(batch.first_row[:-1], batch.num_tokens)
        return Plan(
            spans=batch.spans,
            positions=(tokens + np.repeat(batch.position, batch.num_tokens)).astype(np.int32),
            narrow=_longest_first(narrow),
            wide=_longest_first(wide),
            rows=_joined(self.rows),
            pages=_joined(self.pages),
            slot_begin=np.concatenate([[0], np.cumsum(slots)]).astype(np.int32),
        )

    def _items(self, tiles: _Tiles, before: Longs, bases: Longs) -> Ints:
        """[items, ITEM_FIELDS] of tiles; `before` are the items that their rows have already."""
        chunks = tiles.num_chunks
        which = np.repeat(np.arange(len(chunks)), chunks)
        number = np.arange(len(which)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        size = _chunk_size(tiles.end - tiles.begin, chunks)[which]
        items = np.zeros((len(which), ITEM_FIELDS), np.int32)
        items[:, 0] = (self.batch.first_row[tiles.span] + tiles.offset)[which]
        items[:, 1], items[:, 2] = tiles.count[which], bases[which]
        items[:, 3] = tiles.begin[which] + number * size
        items[:, 4] = np.minimum(items[:, 3] + size, tiles.end[which])
        items[:, 5] = np.where((chunks + before)[which] > 1, before[which] + number, -1)
        return items

    def _common_items(self, run_number: int) -> Ints:
        """[items, ITEM_FIELDS] of a shared run: those of one tile follow each other."""
        batch, common, run = self.batch, self.common, self.common.sharing.runs[run_number]
        chunks, step = self.chunks[run_number], int(common.step[run_number])
        members = np.array(run.members)
        rows = _spread(batch.first_row[members], batch.num_tokens[members]).astype(np.int32)
        base = int(self._bases(members[:1], np.array([run.begin]), np.array([run.end]))[0])
        size = int(_chunk_size(common.length[run_number], common.num_chunks[run_number]))
        first = np.repeat(np.arange(0, len(rows), step), chunks)
        number = np.tile(np.arange(chunks), int(common.num_tiles[run_number]))
        items = np.zeros((len(first), ITEM_FIELDS), np.int32)
        items[:, 0], items[:, 1] = self.num_rows + first, np.minimum(len(rows) - first, step)
        items[:, 2], items[:, 3] = base, run.begin + number * size
        items[:, 4] = np.minimum(items[:, 3] + size, run.end)
        items[:, 5] = self._items_of(run.parents) + number
        self.rows.append(rows)
        self.num_rows += len(rows)
        return items

    def _items_of(self, runs: tuple[int, ...]) -> int:
        """How many items these runs give to each of their rows."""
        return sum(self.chunks[run] for run in runs)

    def _bases(self, span: Longs, begin: Longs, end: Longs) -> Longs:
        """List the pages of keys [begin, end) of spans; returns where the page of each one's key 0 would stand."""
        size = self.batch.geometry.page_size
        first, last = begin // size, -(-end // size)
        spans = self.batch.spans
        self.pages += [spans[i].pages[a:b] for i, a, b in zip(span.tolist(), first.tolist(), last.tolist(), strict=True)]
        places = self.num_pages + np.cumsum(last - first) - (last - first)
        self.num_pages += int((last - first).sum())
        return places - first

    def _whole_bases(self, tiles: _Tiles) -> Longs:
        """The same for tiles, where those of one span share its list."""
        spans, which = np.unique(tiles.span, return_inverse=True)
        return self._bases(spans, np.zeros_like(spans), self.batch.end[spans])[which]


def _chunk_size(length: Longs, num_chunks: Longs) -> Longs:
    """Tokens of each of so many chunks but the last."""
    return np.maximum(-(-length // (num_chunks * _GRAIN)), 1) * _GRAIN


def _spread(first: Longs, count: Longs) -> Longs:
    """The numbers [first, first + count) of every pair, one run after another."""
    return np.arange(int(count.sum())) + np.repeat(first - (np.cumsum(count) - count), count)


def _longest_first(items: list[Ints]) -> Ints:
    """All items, the long ones first; of about one length those stay together that read the same pages, longest first."""
    joined = np.concatenate(items)
    if len(joined) < 2:
        return joined
    length = joined[:, 4] - joined[:, 3]
    length_class = -(-length * _LENGTH_CLASSES // max(int(length.max()), 1))
    return joined[np.lexsort((-length, joined[:, 2], -length_class))]


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
