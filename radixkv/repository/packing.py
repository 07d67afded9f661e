"""Files in an order that edits disturb little, under a token budget.

    packing before   [ a | b | c | d | e ]      c is edited: c, d and e are computed again in whatever order they stand,
    packing after    [ a | b ][ d | e | c ]     so from c on all are ordered anew, the likeliest to change next at the end
                      as it was   ordered anew

An edit costs what stands behind it. With change rates p and lengths n the least is expected in ascending order of p / n.
A file's rate is half its rate in the history (the mean file has 1), 1 if it is in no commit yet, and 1 for each time
it was seen with new contents, which halves with every ten times that anything was (docs/design/0011-repository.md).

Any packing known is taken up again where it fits longer than the last: an undone edit, a branch checked out again, another
worktree find the order they had, and so the cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import takewhile

from radixkv.repository.files import Listing, Skipped, SourceFile
from radixkv.repository.history import History
from radixkv.tokens import Tokens

__all__ = ["PackedFile", "Packing"]

_HISTORY_WEIGHT = 0.5
_COOLING = 0.5 ** (1 / 10)
_COLD = 0.01  # an edit that counts less is forgotten
_FRESH_SHARE = 0.25  # of the budget, for edited files that were not in the packing before


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file in the prompt: tokens [start, stop) of the packing."""

    path: str
    content_id: str
    start: int
    tokens: Tokens

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Packing:
    """What of a source tree is in the prompt, in which order.

    Attributes:
        files: in order.
        skipped: files that are not in it, and why.
        seen: content ids of all text files there were, by path.
        heat: how often, and how lately, each path was seen with new contents since the tree was opened.
        budget_tokens: what it had to fit in.
    """

    files: tuple[PackedFile, ...]
    skipped: tuple[Skipped, ...]
    seen: Mapping[str, str]
    heat: Mapping[str, float]
    budget_tokens: int

    @classmethod
    def of(
        cls,
        listing: Listing,
        budget_tokens: int,
        tokenize: Callable[[SourceFile], Tokens],
        *,
        history: History,
        last: Packing | None = None,
        known: Sequence[Packing] = (),
    ) -> Packing:
        """Pack a listing.

        Cost: `tokenize` for every file that is taken, and one more; a sort.

        Args:
            listing: what there is.
            budget_tokens: tokens that all files together may have.
            tokenize: a file's tokens, with whatever says where it begins and ends.
            history: how likely files are to change.
            last: the packing of this tree before.
            known: packings of this tree and of others, whose prefixes may be cached; later ones are preferred.
        """
        seen = {file.path: file.content_id for file in listing.files}
        changed = {path for path in seen if last.seen.get(path) != seen[path]} if last is not None else set[str]()
        heat = _heated(last, seen, changed)
        own = (*known, last) if last is not None else tuple(known)
        for one in reversed(own):
            if one.seen == seen and one.budget_tokens == budget_tokens:
                left_out = [file for file in one.skipped if file.path in seen]
                return replace(one, skipped=(*listing.skipped, *left_out), heat=heat)
        longest = max(reversed(own), key=lambda one: _end(one._unchanged(seen)), default=_NOTHING)
        anchors = (longest,) if last is None or longest is last else (last, longest)
        choices = [_choose(listing, budget_tokens, tokenize, anchor, changed) for anchor in anchors]
        choice = max(choices, key=lambda one: _end(one.kept))  # the last one's, where both keep as much
        tokens = choice.tokens

        mean = history.mean(tokens)

        def restless(path: str) -> tuple[float, int, str]:
            rate = _HISTORY_WEIGHT * history.rate(path) / mean + heat.get(path, 0.0) + history.is_new(path)
            return (rate / max(len(tokens[path]), 1), -len(tokens[path]), path)

        packed = list(choice.kept)
        for path in sorted(tokens.keys() - {file.path for file in packed}, key=restless):
            packed.append(PackedFile(path, seen[path], _end(packed), tokens[path]))
        return cls(tuple(packed), (*listing.skipped, *choice.left_out), seen, heat, budget_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of all files in it."""
        return _end(self.files)

    @property
    def tokens(self) -> Tokens:
        """All files' tokens. Cost: one copy."""
        return Tokens(b"".join(file.tokens.data for file in self.files))

    def changed_since(self, before: Packing) -> tuple[str, ...]:
        """Paths that came in, went out, or have other contents than before, in order; those that went last."""
        old = {file.path: file.content_id for file in before.files}
        new = [file.path for file in self.files if old.get(file.path) != file.content_id]
        gone = sorted(old.keys() - {file.path for file in self.files})
        return (*new, *gone)

    def _unchanged(self, seen: Mapping[str, str]) -> tuple[PackedFile, ...]:
        """Its first files, as far as all have the contents seen now."""
        return tuple(takewhile(lambda file: seen.get(file.path) == file.content_id, self.files))


_NOTHING = Packing((), (), {}, {}, 0)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Who is in: `kept` where they stood, and all of them with their tokens."""

    kept: tuple[PackedFile, ...]
    tokens: dict[str, Tokens]
    left_out: tuple[Skipped, ...]


def _choose(
    listing: Listing, budget_tokens: int, tokenize: Callable[[SourceFile], Tokens], anchor: Packing, changed: Set[str]
) -> _Choice:
    """Whom the budget has room for: files just edited, within a share of it; who was in; then the smallest."""
    places = {file.path: place for place, file in enumerate(anchor.files)}
    by_size = sorted(listing.files, key=lambda file: (len(file.text), file.path))
    was_in = sorted((one for one in by_size if one.path in places), key=lambda f: (f.path not in changed, places[f.path]))
    tokens: dict[str, Tokens] = {}
    room = budget_tokens

    def take(file: SourceFile, most: float) -> bool:
        nonlocal room
        own = tokenize(file)
        if len(own) <= most:
            tokens[file.path] = own
            room -= len(own)
        return file.path in tokens

    for file in by_size:
        if file.path in changed and file.path not in places:
            take(file, room - (1 - _FRESH_SHARE) * budget_tokens)
    for file in was_in:  # what stands last is left out first, to make room: least is computed again
        take(file, room)
    for file in by_size:
        if file.path not in tokens and file.path not in places and not take(file, room):
            break  # the others are larger
    reason = f"does not fit in the budget of {budget_tokens:,} tokens"
    seen = {file.path: file.content_id for file in listing.files}
    kept = tuple(takewhile(lambda file: file.path in tokens, anchor._unchanged(seen)))
    return _Choice(kept, tokens, tuple(Skipped(file.path, reason) for file in listing.files if file.path not in tokens))


def _heated(last: Packing | None, seen: Mapping[str, str], changed: Set[str]) -> Mapping[str, float]:
    if last is None:
        return {}
    if last.seen == seen:
        return last.heat
    heat = {path: one * _COOLING for path, one in last.heat.items() if one > _COLD}
    return heat | {path: heat.get(path, 0.0) + 1.0 for path in changed}


def _end(files: Sequence[PackedFile]) -> int:
    return files[-1].stop if files else 0
