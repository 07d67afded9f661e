"""Every error radixkv raises on purpose, as one tree.

    RadixKVError
    ├── TokenError (ValueError)          the token ids themselves are unusable
    │   ├── TokenTypeError (TypeError)   floats, 2-D arrays, text
    │   ├── TokenRangeError              negative, or above int32
    │   └── EmptyTokensError             a request of no tokens
    ├── ConfigError (ValueError)         a setting has a value it cannot have
    ├── CacheError
    │   ├── PoolExhausted                no page is free or evictable
    │   ├── QuotaExceeded                a namespace asked for more than its quota, and its own pages do not suffice
    │   ├── LeaseError
    │   │   ├── LeaseReleased            used or released after its release
    │   │   ├── CursorBusy               a cursor was used beside the live lease over it
    │   │   └── ForeignLease             handed to a cache that did not give it out
    │   ├── PinError                     not possible to pin: pins are off, or nothing is cached
    │   │   ├── PinBudgetExceeded        more pages than the budget of all pins, or of the owner's, has left
    │   │   └── PinReleased              released a second time
    │   ├── NamespaceError               not a usable namespace
    │   └── InvariantError               check() found the structure broken: our fault
    ├── EngineError
    │   ├── PromptTooLong                longer than the context of the model
    │   │   └── SessionTooLong           a kept session, by its characters: no prompt could be made of it
    │   ├── RequestTooLarge              needs more pages than the whole pool has
    │   ├── SessionClosed                a chat was used after close()
    │   ├── SessionBusy                  a chat was used while a turn of it is being answered
    │   ├── QueueFull                    too many requests wait already
    │   ├── DeadlineExceeded             a request had not ended when its time was over
    │   ├── SessionNotFound              no session of this id, or it has expired
    │   ├── TooManySessions              as many sessions are open as may be
    │   ├── StructureError               an answer's form (JSON schema, grammar) that cannot be enforced
    │   ├── RepositoryError              a source tree that cannot be asked about
    │   ├── RequestInterrupted           whoever drove the engine was interrupted in the middle of a step
    │   ├── ChatTemplateMissing          the model has no chat template
    │   └── EngineClosed                 the engine was used after close()
    └── ModelError
        ├── ModelNotFound                no such folder, file or hub id
        ├── ModelCorrupt                 a weight file is truncated or not what it says
        ├── UnsupportedModel             an architecture whose KV we cannot page
        └── FetchError                   a download failed
            └── ChecksumMismatch         what arrived is not what was asked for

Each carries its facts as fields, so a caller never parses the text. The text says what was asked, what is true, and
what to do.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "ChatTemplateMissing",
    "ChecksumMismatch",
    "ConfigError",
    "CursorBusy",
    "DeadlineExceeded",
    "EmptyTokensError",
    "EngineClosed",
    "EngineError",
    "FetchError",
    "ForeignLease",
    "InvariantError",
    "LeaseError",
    "LeaseReleased",
    "ModelCorrupt",
    "ModelError",
    "ModelNotFound",
    "NamespaceError",
    "PinBudgetExceeded",
    "PinError",
    "PinReleased",
    "PoolExhausted",
    "PromptTooLong",
    "QueueFull",
    "QuotaExceeded",
    "RadixKVError",
    "RepositoryError",
    "RequestInterrupted",
    "RequestTooLarge",
    "SessionBusy",
    "SessionClosed",
    "SessionNotFound",
    "SessionTooLong",
    "StructureError",
    "TokenError",
    "TokenRangeError",
    "TokenTypeError",
    "TooManySessions",
    "UnsupportedModel",
]


class RadixKVError(Exception):
    """Base of every error raised on purpose by radixkv."""

    def __init__(self, message: str, **fields: object) -> None:
        """Keep `message` as the text and every field as an attribute of the same name."""
        super().__init__(message)
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)


class TokenError(RadixKVError, ValueError):
    """Token ids that cannot be used."""


class TokenTypeError(TokenError, TypeError):
    """Token ids of a type or shape that cannot be read as a list of integers."""

    def __init__(self, got: str) -> None:
        super().__init__(
            f"token ids must be one flat sequence of integers, got {got}; "
            "pass a list[int], a 1-D integer array or tensor, or raw little-endian int32 bytes",
            got=got,
        )


class TokenRangeError(TokenError):
    """A token id below 0, above 2**31 - 1, or beyond the model's vocabulary."""

    def __init__(self, value: int, index: int, limit: int = 2**31) -> None:
        super().__init__(
            f"token id {value} at index {index} is outside 0..{limit - 1}; check that the tokenizer fits the model",
            value=value,
            index=index,
            limit=limit,
        )


class EmptyTokensError(TokenError):
    """A request that has no tokens at all."""

    def __init__(self) -> None:
        super().__init__("the prompt has no tokens; at least one is needed to compute an answer")


class ConfigError(RadixKVError, ValueError):
    """A setting outside what it can be."""

    def __init__(self, setting: str, value: object, expected: str) -> None:
        super().__init__(
            f"{setting}={value!r} is not possible; expected {expected}", setting=setting, value=value, expected=expected
        )


class CacheError(RadixKVError):
    """Base of the errors of the cache."""


class PoolExhausted(CacheError):
    """Pages were asked for and too few are free or evictable."""

    needed: int
    free: int
    evictable: int
    leased: int
    pinned: int
    reserved: int

    def __init__(self, needed: int, free: int, evictable: int, leased: int, pinned: int = 0, reserved: int = 0) -> None:
        held = [f"{leased} held by leases"]
        advice = ["release leases", "wait for running requests"]
        if pinned:
            held.append(f"{pinned} pinned")
            advice.append("release pins")
        if reserved:
            held.append(f"{reserved} reserved for other namespaces")
            advice.append("lower reservations")
        super().__init__(
            f"needed {needed} pages, but {free} are free and {evictable} evictable; {', '.join(held)}: "
            f"{', '.join(advice)}, or make the pool larger",
            needed=needed,
            free=free,
            evictable=evictable,
            leased=leased,
            pinned=pinned,
            reserved=reserved,
        )


class QuotaExceeded(CacheError):
    """A namespace asked for pages beyond its quota, and evicting its own would not make room."""

    namespace: object
    needed: int
    max_pages: int
    used: int
    evictable: int

    def __init__(self, namespace: object, needed: int, max_pages: int, used: int, evictable: int) -> None:
        super().__init__(
            f"namespace {namespace!r} needed {needed} pages; it holds {used} of at most {max_pages}, and {evictable} of "
            "those can be evicted; release its leases or pins, send shorter prompts, or raise its quota",
            namespace=namespace,
            needed=needed,
            max_pages=max_pages,
            used=used,
            evictable=evictable,
        )


class LeaseError(CacheError):
    """Base of the errors of leases."""


class LeaseReleased(LeaseError):
    """A lease was used, or released again, after its release."""

    def __init__(self, lease_id: int) -> None:
        super().__init__(f"lease {lease_id} was already released; acquire a new one", lease_id=lease_id)


class CursorBusy(LeaseError):
    """A cursor was changed, or leased again, while a lease over it is live."""

    def __init__(self, lease_id: int) -> None:
        super().__init__(
            f"lease {lease_id} over this cursor is live; release it first, or fork() the cursor", lease_id=lease_id
        )


class ForeignLease(LeaseError):
    """A lease or cursor was handed to a cache that did not create it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} belongs to another cache; use the cache that gave it out", what=what)


_NOT_PINNED = {
    "off": "pins are off; make the cache with pin_budget_pages, at most half of its pages",
    "not_cached": "no whole page of them is cached; compute them first, then pin",
}


class PinError(CacheError):
    """A prefix cannot be pinned; where it is no subclass, `reason` is "off" or "not_cached"."""

    def __init__(self, reason: str, num_tokens: int) -> None:
        what = _NOT_PINNED.get(reason, reason)
        super().__init__(f"the {num_tokens} tokens cannot be pinned: {what}", reason=reason, num_tokens=num_tokens)


class PinBudgetExceeded(PinError):
    """A pin would hold more pages than a budget has left."""

    needed: int
    left: int
    owner: str
    budget: int

    def __init__(self, needed: int, left: int, owner: str, budget: int) -> None:
        RadixKVError.__init__(
            self,
            f"the pin of {owner!r} needs {needed} more pages, and {left} of the budget's {budget} are left; "
            "release pins, pin a shorter prefix, or give the cache a larger pin budget",
            needed=needed,
            left=left,
            owner=owner,
            budget=budget,
        )


class PinReleased(PinError):
    """A pin was released again, or used, after its release."""

    def __init__(self, pin_id: int) -> None:
        RadixKVError.__init__(self, f"pin {pin_id} was already released; pin the prefix again", pin_id=pin_id)


class NamespaceError(CacheError):
    """Not a usable namespace."""

    def __init__(self, namespace: object, reason: str) -> None:
        super().__init__(f"namespace {namespace!r} cannot be used: {reason}", namespace=namespace, reason=reason)


class InvariantError(CacheError):
    """`check()` found a broken invariant: a defect of radixkv, never of its caller."""

    def __init__(self, invariant: str, **state: object) -> None:
        detail = ", ".join(f"{name}={value!r}" for name, value in state.items())
        super().__init__(f"invariant {invariant} is broken ({detail}); please report this", invariant=invariant, **state)


class EngineError(RadixKVError):
    """Base of the errors of the engine."""


class PromptTooLong(EngineError):
    """A prompt that does not fit the model's context."""

    def __init__(self, num_tokens: int, max_context: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, and the context holds {max_context} with at least one to generate; "
            "shorten the prompt, or use a model with a longer context",
            num_tokens=num_tokens,
            max_context=max_context,
        )


class SessionTooLong(PromptTooLong):
    """A session would hold more text than any prompt can."""

    num_chars: int
    max_chars: int

    def __init__(self, num_chars: int, max_chars: int) -> None:
        RadixKVError.__init__(
            self,
            f"the session would hold {num_chars:,} characters, and no prompt can have more than {max_chars:,}; nothing was "
            "added: send less, rewind the session, or open a new one",
            num_chars=num_chars,
            max_chars=max_chars,
        )


class RequestTooLarge(EngineError):
    """One request needs more pages than the pool has in all."""

    def __init__(self, num_pages: int, pool_pages: int) -> None:
        super().__init__(
            f"the request needs up to {num_pages} pages and the whole pool has {pool_pages}; "
            "lower max_tokens, shorten the prompt, or give the engine a larger pool",
            num_pages=num_pages,
            pool_pages=pool_pages,
        )


class SessionClosed(EngineError):
    """A session was used after it was closed."""

    def __init__(self) -> None:
        super().__init__("this session is closed; open a new one with engine.chat()")


class SessionBusy(EngineError):
    """A session was used while one of its turns is open, or has moved on since a stream over it was made."""

    def __init__(self) -> None:
        super().__init__(
            "another turn of this session is open or came first; read or close its stream before the next, or fork() earlier"
        )


class QueueFull(EngineError):
    """Too many requests wait already; `retry_after_s` is when there should be room."""

    waiting: int
    limit: int
    retry_after_s: float

    def __init__(self, waiting: int, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"{waiting} requests wait already and the limit is {limit}; try again in {retry_after_s:g} s, "
            "or raise max_waiting",
            waiting=waiting,
            limit=limit,
            retry_after_s=retry_after_s,
        )


class DeadlineExceeded(EngineError):
    """A request had not ended when its time was over; what it computed stays cached."""

    def __init__(self, deadline_s: float, num_generated: int) -> None:
        super().__init__(
            f"the request had generated {num_generated} tokens when its {deadline_s:g} s were over; "
            "ask again (what it computed is cached), or give it more time",
            deadline_s=deadline_s,
            num_generated=num_generated,
        )


class SessionNotFound(EngineError):
    """No session of this id: never opened, closed, or expired."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"there is no session {session_id!r}; it was closed or has expired: open a new one", session_id=session_id
        )


class TooManySessions(EngineError):
    """As many sessions are open as may be: in all, or of one tenant."""

    num_open: int
    limit: int

    def __init__(self, num_open: int, limit: int) -> None:
        super().__init__(
            f"{num_open} sessions are open and the limit is {limit}; close sessions or let them expire, or raise the limit",
            num_open=num_open,
            limit=limit,
        )


class StructureError(EngineError):
    """A form of the answer (JSON schema, grammar) that cannot be enforced."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} cannot be enforced: {reason}", what=what, reason=reason)


class RepositoryError(EngineError):
    """A source tree that cannot be asked about."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be asked about: {reason}", path=path, reason=reason)


class RequestInterrupted(EngineError):
    """A request ended because whoever drove the engine was interrupted in the middle of its step."""

    def __init__(self) -> None:
        super().__init__("the step that computed this request was interrupted; ask again, what it published is cached")


class EngineClosed(EngineError):
    """The engine was used after it was closed."""

    def __init__(self) -> None:
        super().__init__("this engine is closed; create a new one")


class ChatTemplateMissing(EngineError):
    """Messages were given to a model that has no chat template."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r} has no chat template, so messages cannot be rendered; "
            "use generate() with plain text, or a model tuned for chat",
            model=model,
        )


class ModelError(RadixKVError):
    """Base of the errors about model files."""


class ModelNotFound(ModelError):
    """No model of this name or path."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r} was not found: {reason}", model=model, reason=reason)


class ModelCorrupt(ModelError):
    """A weight file is truncated, or not of the format it claims."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"{path} cannot be read as a model: {reason}; fetch or copy the file again", path=path, reason=reason
        )


class UnsupportedModel(ModelError):
    """An architecture whose attention does not keep plain per-layer keys and values."""

    def __init__(self, model: str, architecture: str, supported: str) -> None:
        super().__init__(
            f"model {model!r} has the architecture {architecture}, which cannot be paged; supported: {supported}",
            model=model,
            architecture=architecture,
            supported=supported,
        )


class FetchError(ModelError):
    """A download did not succeed."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"fetching {what} failed: {reason}", what=what, reason=reason)


class ChecksumMismatch(FetchError):
    """A file arrived, and its content is not the expected one."""

    def __init__(self, path: str, expected: str, actual: str) -> None:
        RadixKVError.__init__(
            self,
            f"{path} has sha256 {actual}, expected {expected}; the file was removed, fetch it again",
            path=path,
            expected=expected,
            actual=actual,
        )
