"""The form an answer must have: a JSON schema, any JSON object, a pattern, a choice, or a grammar.

    Structure          what is asked for: a value, so that it can be compared, hashed, sent
    StructureCompiler  one for a tokenizer: turns it into a grammar over the tokenizer's ids, and keeps the last ones
    Matcher            one for an answer: which ids may come next, until the form is complete and only the end may

The grammars are llguidance's; docs/design/0012-structured-output.md says what is asked of it, and what is not left to it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from radixkv.errors import StructureError

if TYPE_CHECKING:
    import llguidance

    from radixkv.engine.tokenizer import Tokenizer

__all__ = ["Matcher", "Structure", "StructureCompiler", "StructureKind"]

T = TypeVar("T")

StructureKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

_LABELS = {"json_schema": "the JSON schema", "json_object": "a JSON object", "regex": "the pattern"}
_LABELS |= {"choice": "the choice", "lark": "the grammar"}
_MAX_CHARS = {"json_schema": 131_072, "json_object": 2, "regex": 32_768, "choice": 131_072, "lark": 131_072}
_MAX_TERMINALS = 500  # NOTE: compiling a chain of n terminals costs n^2: 500 take milliseconds, 10,000 take minutes
_TERMINAL = re.compile(r"^\s*_*[A-Z][A-Z0-9_]*\s*(?:\[[^\]\n]*\]|\.\s*-?\d+)?\s*:", re.MULTILINE)
_STACK_BYTES = 256 << 20  # NOTE: the compiler recurses along chains of definitions; 8 MiB end, with the process, at 1,000
_WHITESPACE = r"[ \n]{1,16}"  # unbounded, a small model can go on with spaces until its tokens are used up
_STACK_LOCK = threading.Lock()
_COMPILE_S = 10.0  # NOTE: intersections (allOf, & in Lark) cost 2^n: 14 patterns take 10 s, 24 take hours
_MAX_INTERSECTED = 8  # patterns and formats below one allOf
_COMPILERS = threading.BoundedSemaphore(2)  # what takes longer cannot be stopped: it keeps its place until it ends
_BOOLEANS = {"true": "{}", "false": '{"enum":[]}'}  # the library takes options for schemas that are objects only


@dataclass(frozen=True, slots=True)
class Structure:
    """The form of an answer. Make one with the class methods; `StructureCompiler` says whether it can be enforced.

    Attributes:
        kind: what `text` is.
        text: a schema as JSON, a pattern, a JSON list of texts, a grammar in Lark's form, or "{}" for any JSON object.

    Raises:
        StructureError: what can be seen to be wrong without a tokenizer.
    """

    kind: StructureKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructureKind):
            raise StructureError("the structure", f"its kind is {self.kind!r}; it must be one of {', '.join(_LABELS)}")
        if not isinstance(self.text, str) or not self.text:
            raise StructureError(self.label, "it must be text that is not empty")
        if len(self.text) > _MAX_CHARS[self.kind]:
            reason = f"it has {len(self.text)} characters and the limit is {_MAX_CHARS[self.kind]}; make it shorter"
            raise StructureError(self.label, reason)
        if not _encodable(self.text):
            raise StructureError(self.label, "it has half of a surrogate pair; send whole characters")
        if self.kind in ("json_schema", "json_object", "choice"):
            self._check_json()

    def _check_json(self) -> None:
        """The text goes into a larger JSON text, so it must be one value and no more."""
        value = _parsed(self.label, self.text)
        if self.kind == "json_schema" and not isinstance(value, (dict, bool)):
            raise StructureError(self.label, "a schema is a JSON object or a boolean")
        if self.kind == "json_object" and value != {}:
            raise StructureError(self.label, "its text must be {}")
        if self.kind == "choice":
            texts = isinstance(value, list) and value and all(isinstance(one, str) and _encodable(one) for one in value)
            if not texts:
                raise StructureError(self.label, "it must be a list of one text or more")

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return _LABELS[self.kind]

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Structure:
        """An answer that is JSON and obeys a schema. Properties come in the order the schema gives them.

        Args:
            schema: the schema, or its JSON text.
        """
        label = _LABELS["json_schema"]
        value = _parsed(label, schema) if isinstance(schema, str) else schema
        try:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise StructureError(label, f"it is no JSON ({error})") from error
        return cls("json_schema", text)

    @classmethod
    def json_object(cls) -> Structure:
        """An answer that is any JSON object."""
        return cls("json_object", "{}")

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """An answer that a regular expression matches from end to end; no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Structure:
        """An answer that is one of some texts."""
        several: Sequence[object] = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) and _encodable(text) for text in several):
            raise StructureError(_LABELS["choice"], "it must be a list of one text or more")
        return cls("choice", json.dumps(several, ensure_ascii=False, separators=(",", ":")))

    @classmethod
    def lark(cls, grammar: str) -> Structure:
        """An answer of a context-free grammar, in llguidance's dialect of Lark: `start` is where it begins."""
        return cls("lark", grammar)


class Matcher:
    """Follows one answer through its form.

    Made by `StructureCompiler.matcher`. Not thread-safe: it belongs to one request.
    """

    __slots__ = ("_label", "_mask", "_matcher", "_vocab_size")

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, label: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._label = label
        self._mask = np.zeros((1, -(-vocab_size // 32)), np.int32)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end of the answer may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def accepting(self) -> bool:
        """Whether what came so far is a whole answer, even if it may go on."""
        return bool(self._matcher.is_accepting()) and not self._matcher.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which ids may come next: [V] of the tokenizer, the end of the text among them where the answer may end.

        Cost: mostly 20 to 500 us.

        Raises:
            StructureError: the grammar grew beyond the limits for one step.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        self._require_sound()
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little", count=self._vocab_size)
        return bits.view(np.bool_)

    @property
    def satisfiable(self) -> bool:
        """Whether anything may come next; asked at the beginning, whether any answer has the form."""
        try:
            return bool(self.allowed().any())
        except StructureError:  # of a grammar that goes round in a circle, the library says that it cannot go on
            return False

    def advance(self, token_id: int) -> None:
        """Take the id that was chosen.

        Raises:
            StructureError: `allowed()` did not have it.
        """
        self._matcher.consume_token(token_id)
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise StructureError(self._label, f"the answer could not be continued: {_reason(self._matcher.get_error())}")


class StructureCompiler:
    """Makes matchers for one tokenizer. Building one takes about a second, a grammar mostly some milliseconds.

    Args:
        tokenizer: of the model.
        eos_ids: ids that end an answer; None takes the tokenizer's own.
        keep: compiled grammars to keep, the last used first.

    Raises:
        StructureError: the tokenizer has no id that ends a text, or is of a kind that grammars cannot be built over.

    Thread safety: any thread may call anything.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int] | None = None, *, keep: int = 64) -> None:
        import llguidance

        ends = sorted(tokenizer.eos_ids if eos_ids is None else eos_ids)
        if not ends:
            raise StructureError("an answer's form", f"model {tokenizer.name!r} has no token that ends a text")
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.backend.to_str(), eos_token=ends)
        except ValueError as error:
            reason = f"the tokenizer of {tokenizer.name!r} is of no supported kind ({_reason(str(error))})"
            raise StructureError("an answer's form", reason) from error
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._keep = keep
        self._kept: OrderedDict[Structure, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, structure: Structure) -> None:
        """Compile a structure, and keep it.

        Raises:
            StructureError: it is invalid, asks for what is not supported, or nothing can satisfy it.
        """
        self._compiled(structure)

    def matcher(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of an answer.

        Raises:
            StructureError: as `check`.
        """
        return Matcher(self._compiled(structure).deep_copy(), self._tokenizer.vocab_size, structure.label)

    def _compiled(self, structure: Structure) -> llguidance.LLMatcher:
        with self._lock:
            if structure in self._kept:
                self._kept.move_to_end(structure)
                return self._kept[structure]
        compiled = _on_deep_stack(lambda: self._compile(structure))  # not under the lock: others need not wait for it
        with self._lock:
            self._kept[structure] = compiled
            self._kept.move_to_end(structure)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, structure: Structure) -> llguidance.LLMatcher:
        import llguidance

        compiled = llguidance.LLMatcher(self._tokenizer, _grammar(structure), log_level=0, limits=self._limits)
        if compiled.is_error():
            raise StructureError(structure.label, _reason(compiled.get_error()))
        first = Matcher(compiled.deep_copy(), self._tokenizer.vocab_size, structure.label)
        if not first.satisfiable:
            raise StructureError(structure.label, "no answer at all satisfies it")
        return compiled


def _grammar(structure: Structure) -> str:
    import llguidance

    kind, text = structure.kind, structure.text
    if kind == "json_object":
        kind, text = "json_schema", '{"type":"object"}'
    if kind == "json_schema":
        text = _BOOLEANS.get(text.strip(), text)
        if (intersected := _most_intersected(json.loads(text))) > _MAX_INTERSECTED:
            reason = f"one allOf joins {intersected} patterns or formats and the limit is {_MAX_INTERSECTED}"
            raise StructureError(structure.label, reason)
        # A keyword that is not enforced is refused, even where the schema itself asks to be read leniently.
        try:
            return llguidance.LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": _WHITESPACE}, overrides={"lenient": False}
            )
        except ValueError as error:  # nested too deeply for its parser, for one
            raise StructureError(structure.label, str(error).strip().splitlines()[0]) from error
    if kind == "lark" and (terminals := len(_TERMINAL.findall(text))) > _MAX_TERMINALS:
        reason = f"it defines {terminals} terminals and the limit is {_MAX_TERMINALS}; join some of them"
        raise StructureError(structure.label, reason)
    return llguidance.grammar_from(kind, text)


def _most_intersected(schema: Any) -> int:
    """The most patterns and formats that any allOf of a schema joins. Cost: O(schema)."""
    counts: Counter[int] = Counter()
    stack, num_all_of = [(schema, 0)], 0  # a value, and the number of the outermost allOf it stands in
    while stack:
        value, inside = stack.pop()
        if isinstance(value, list):
            stack += [(one, inside) for one in value]
        elif isinstance(value, dict):
            for name, one in value.items():
                num_all_of += name == "allOf"
                stack.append((one, num_all_of if name == "allOf" and not inside else inside))
                counts[inside] += bool(inside) and name in ("pattern", "format")
    return max(counts.values(), default=0)


def _on_deep_stack(act: Callable[[], T]) -> T:
    """Run `act` on a thread with a stack for the longest chain of definitions that the limits on a text allow."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(act())
        except BaseException as error:
            failure.append(error)
        finally:
            _COMPILERS.release()

    if not _COMPILERS.acquire(timeout=_COMPILE_S):
        raise StructureError("an answer's form", "others are being compiled; try again later")
    with _STACK_LOCK:  # the stack's size is a setting of the whole process, read when a thread starts
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="radixkv-grammar", daemon=True)
            thread.start()
        except RuntimeError as error:
            _COMPILERS.release()
            reason = f"there is no memory for a stack of {_STACK_BYTES >> 20} MiB, which its compiler is given ({error})"
            raise StructureError("an answer's form", reason) from error
        finally:
            threading.stack_size(before)
    thread.join(_COMPILE_S)
    if thread.is_alive():
        raise StructureError("an answer's form", f"compiling it takes more than {_COMPILE_S:.0f} s; ask for less at once")
    if failure:
        raise failure[0]
    return outcome[0]


def _parsed(label: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StructureError(label, f"it is no JSON ({error})") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _reason(message: str) -> str:
    """What a message of the library says, at most 300 characters: its first line, and the one that names the error."""
    lines = message.strip().splitlines() or ["no reason given"]
    named = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return f"{lines[0]} {named}".strip()[:300]
