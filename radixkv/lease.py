"""Lease and Cursor: what the cache hands out.

A lease is one request's claim on its cached prefix and on the pages it fills. A cursor is a growing conversation's place
in the tree, so that its next turn is looked up from there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, SupportsIndex, final

from radixkv.errors import ConfigError, CursorBusy, LeaseReleased
from radixkv.match import Match
from radixkv.node import Node
from radixkv.policies import Ended
from radixkv.prefix import TOKEN_BYTES
from radixkv.retention import Retain, Retention
from radixkv.tokens import NOTHING, TokenInput, Tokens, as_count, token_bytes

if TYPE_CHECKING:
    from radixkv.leasing import Leasing

__all__ = ["Cursor", "Lease"]


@final
class Lease:
    """One request's claim: the cached prefix it found, locked, and the pages it fills.

    Made by `PrefixCache.acquire`; a context manager that releases itself.

    Attributes:
        id: unique in its cache.
        owner: the name given to `acquire`.
        namespace: the key of its namespace.
        num_matched: tokens found cached, at the start or attached since, inside a page or not.
        partial_tokens: tokens of `partial_page` that continue the whole matched pages; copy them instead of computing.
            Either copy them before `extend`, or read both after it: where pages are so short that `extend` needs this one,
            it gives it up, and `num_matched` ends with the whole pages.
    """

    __slots__ = (
        "_cursor",
        "_data",
        "_leasing",
        "_node",
        "_num_found",
        "_num_others",
        "_num_sought",
        "_own",
        "_partial_page",
        "_path",
        "_published",
        "_released",
        "_retention",
        "_tag",
        "id",
        "namespace",
        "num_matched",
        "owner",
        "partial_tokens",
    )

    def __init__(
        self,
        leasing: Leasing,
        lease_id: int,
        owner: str,
        namespace: bytes,
        data: bytes | bytearray,
        found: Match,
        cursor: Cursor | None,
        tag: int,
        num_sought: int,
    ) -> None:
        self._leasing = leasing
        self.id = lease_id
        self.owner = owner
        self.namespace = namespace
        self._data = data  # the sequence: the prompt and what was appended, int32 bytes
        self._node = found.partial_node  # holds this lease's one lock
        self._published = self._num_found = found.num_pages  # leading pages that are in the tree
        self._num_others = found.num_pages  # leading pages that others have published
        self._num_sought = num_sought  # whole pages that might have been found
        self._tag = tag
        self._partial_page = found.partial_page
        self.partial_tokens = found.partial_tokens
        self.num_matched = found.num_pages * leasing.page_size + found.partial_tokens
        self._own: array[int] = array("i")
        self._path: array[int] | None = None
        self._cursor = cursor
        self._retention: Retention | None = None
        self._released = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence so far."""
        return len(self._data) // TOKEN_BYTES

    @property
    def tokens(self) -> Tokens:
        """The sequence so far; copies it."""
        return Tokens(bytes(self._data))

    @property
    def pages(self) -> array[int]:
        """Page ids in order: the cached path's, then this lease's own. May change at commit(): then take it again.

        Cost: O(pages) the first time and after a commit that found duplicates, O(1) otherwise.
        """
        with self._leasing.lock:
            return self._leasing.path_pages(self)

    @property
    def num_published(self) -> int:
        """Tokens of the sequence whose pages are in the tree."""
        return self._published * self._leasing.page_size

    @property
    def num_own_pages(self) -> int:
        """Reserved pages that are not published yet."""
        return len(self._own)

    @property
    def partial_page(self) -> int | None:
        """The page to copy `partial_tokens` tokens from, or None. It stays in place until the first commit."""
        return self._partial_page if self._partial_page >= 0 else None

    @property
    def _num_used(self) -> int:
        """Pages of the tree it stands on: the path it found or published, and the page it copies from."""
        return self._published + (self._partial_page >= 0)

    @property
    def released(self) -> bool:
        """Whether the lease has ended."""
        return self._released

    def extend(self, tokens: TokenInput = NOTHING, num_spare: SupportsIndex = 0) -> None:
        """Append `tokens` to the sequence, and reserve pages so that every token of it has a slot.

        Cost: O(new tokens + new pages); evicts where too few pages are free.

        Args:
            tokens: [n] token ids.
            num_spare: slots for so many tokens more, whose ids are not known yet; they are appended later.

        Raises:
            PoolExhausted: too few pages are free or evictable; nothing has changed then.
            TokenError: unusable ids. ConfigError: `num_spare` is no count. LeaseReleased: the lease has ended.
        """
        data = b"" if tokens is NOTHING else token_bytes(tokens)
        spare = as_count("num_spare", num_spare)
        if spare < 0:
            raise ConfigError("num_spare", spare, "0 or more")
        with self._leasing.lock:
            self._leasing.extend(self, data, spare)

    def commit(self, num_tokens: SupportsIndex | None = None) -> int:
        """Publish: the KV of the first `num_tokens` tokens (all of them by default) is written.

        Whole pages go to the tree at once, where another request finds them. A page somebody else published meanwhile
        is dropped here, and `pages` names the other's from then on.

        Cost: O(newly published tokens).

        Returns:
            Pages that somebody else had published.

        Raises:
            ConfigError: more tokens than have pages. LeaseReleased: the lease has ended.
        """
        count = self.num_tokens if num_tokens is None else as_count("num_tokens", num_tokens)
        with self._leasing.lock:
            return self._leasing.commit(self, count)

    def attach(self, limit: SupportsIndex | None = None) -> int:
        """Take over what others have published meanwhile where this lease's published run ends.

        What a request does that waits for another to compute the prefix they share. Pages it had reserved for those tokens
        are freed; `num_matched`, `pages`, `partial_page` and `partial_tokens` are to be read again.

        Cost: O(tokens beyond the published run) compares, no device work.

        Args:
            limit: match at most so many tokens of the sequence, as for `acquire`.

        Returns:
            Tokens more than were matched before.

        Raises:
            LeaseReleased: the lease has ended. ConfigError: a limit that is no integer.
        """
        most = -1 if limit is None else max(as_count("limit", limit), 0)
        with self._leasing.lock:
            return self._leasing.attach(self, most)

    def retain(self, retention: Iterable[Retain]) -> None:
        """Say how much to keep which of its tokens, in place of what was said before: holds from the release on.

        Raises:
            ConfigError: ranges overlap. LeaseReleased: the lease has ended.
        """
        wishes = Retention(retention)
        with self._leasing.lock:
            self._require_live()
            self._retention = wishes if wishes.ranges else None

    def release(self) -> None:
        """End the lease: drop its lock, free the pages it has not published.

        Raises:
            LeaseReleased: it had ended before.
        """
        with self._leasing.lock:
            self._leasing.release(self)

    def __enter__(self) -> Lease:
        self._require_live()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._released:
            self.release()

    def _ended(self, tick: int, time_s: float) -> Ended:
        """What a policy that learns is told when it ends."""
        size, found = self._leasing.page_size, self._num_found
        return Ended(tick, time_s, self.namespace, self._tag, self._data, size, self._published, found, self._num_sought)

    def _require_live(self) -> None:
        if self._released:
            raise LeaseReleased(self.id)

    def __repr__(self) -> str:
        state = "released" if self._released else f"{self.num_published} published, {len(self._own)} own pages"
        return f"Lease(id={self.id}, owner={self.owner!r}, {self.num_matched}/{self.num_tokens} matched, {state})"


@final
class Cursor:
    """A growing sequence and where its cached prefix ends: look-ups cost the new tokens only, whatever the history.

    Pass it to `PrefixCache.acquire`. The lease's `extend` appends here too, and its release moves the place forward. If
    what it points to was evicted meanwhile, it falls back to what is left of the path.

    >>> from radixkv import PrefixCache
    >>> cache = PrefixCache(num_pages=8, page_size=2)
    >>> cursor = cache.cursor(tokens=[1, 2, 3])
    >>> with cache.acquire(cursor) as lease:
    ...     lease.extend(); lease.commit()
    0
    >>> cursor.append([4, 5]); cache.acquire(cursor).num_matched
    2
    """

    __slots__ = ("_data", "_lease", "_leasing", "_namespace", "_node", "_position")

    def __init__(self, leasing: Leasing, namespace: bytes, data: bytearray, node: Node, position: int) -> None:
        self._leasing = leasing
        self._namespace = namespace
        self._data = data
        self._node = node
        self._position = position  # pages of the path to `_node` that are this sequence's
        self._lease: Lease | None = None  # the live lease over it: one at a time

    @property
    def num_tokens(self) -> int:
        """Tokens in the sequence."""
        return len(self._data) // TOKEN_BYTES

    @property
    def tokens(self) -> Tokens:
        """The sequence; copies it."""
        return Tokens(bytes(self._data))

    @property
    def leased(self) -> bool:
        """Whether a lease over it is live."""
        return self._lease is not None

    def tail(self, num_tokens: int) -> Tokens:
        """The last `num_tokens` tokens, fewer if there are not so many. Cost: O(num_tokens)."""
        return Tokens(bytes(self._data[max(len(self._data) - num_tokens * TOKEN_BYTES, 0) :]))

    def append(self, tokens: TokenInput) -> None:
        """Add tokens at the end. Cost: O(new tokens).

        Raises:
            CursorBusy: a lease over it is live; append through the lease.
        """
        data = token_bytes(tokens)
        with self._leasing.lock:
            self._require_idle()
            self._data += data

    def truncate(self, num_tokens: SupportsIndex) -> None:
        """Keep the first `num_tokens` tokens: an undo. Cost: O(1).

        Raises:
            CursorBusy: a lease over it is live. ConfigError: it has fewer tokens.
        """
        keep = as_count("num_tokens", num_tokens)
        with self._leasing.lock:
            self._require_idle()
            if not 0 <= keep <= self.num_tokens:
                raise ConfigError("num_tokens", keep, f"0 to {self.num_tokens}")
            del self._data[keep * TOKEN_BYTES :]
            self._position = min(self._position, keep // self._leasing.page_size)

    def fork(self) -> Cursor:
        """Another cursor at the same place; pages stay shared. Cost: one copy of the token ids."""
        with self._leasing.lock:
            return Cursor(self._leasing, self._namespace, bytearray(self._data), self._node, self._position)

    def _require_idle(self) -> None:
        if self._lease is not None:
            raise CursorBusy(self._lease.id)

    def _rest(self, node: Node, position: int) -> None:
        """The lease over this cursor ended at `position` in `node`."""
        self._node, self._position, self._lease = node, position, None

    def __repr__(self) -> str:
        return f"Cursor(num_tokens={self.num_tokens}, cached_pages<={self._position})"
