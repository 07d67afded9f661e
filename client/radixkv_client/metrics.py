"""What /metrics says, in Prometheus' text form: samples, sums over their labels, and histograms that can be subtracted.

The form is small enough to read here; a client should not need Prometheus' own library for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from radixkv_client.errors import BadAnswer

__all__ = ["Histogram", "Metrics", "Sample", "parse_metrics"]

_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*")
_LABEL = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: a name, its labels, a value."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by size.

    Attributes:
        bounds: upper bounds of the buckets, rising; the last is infinite.
        counts: observations up to each bound, those of smaller bounds included.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def count(self) -> float:
        """All observations."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, before: Histogram) -> Histogram:
        """What was observed since `before`; all of it, if the server began anew since."""
        if before.bounds != self.bounds or any(old > new for old, new in zip(before.counts, self.counts, strict=True)):
            return self
        return Histogram(self.bounds, tuple(new - old for old, new in zip(before.counts, self.counts, strict=True)))

    def quantile(self, share: float) -> float | None:
        """The size that this share of the observations does not exceed, by straight lines inside a bucket.

        As Prometheus estimates it; beyond the last finite bound it is that bound. None: nothing was observed.

        >>> Histogram((1.0, 2.0, math.inf), (0.0, 10.0, 10.0)).quantile(0.5)
        1.5
        """
        if not self.count:
            return None
        rank, low, below = share * self.count, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            low, below = (low if math.isinf(bound) else bound), count
        return low


class Metrics:
    """One reading of /metrics.

    Args:
        samples: all of its lines.
    """

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for sample in samples:
            self._samples.setdefault(sample.name, []).append(sample)

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def samples(self, name: str) -> list[Sample]:
        """Every sample of a name."""
        return list(self._samples.get(name, ()))

    def total(self, name: str, **labels: str) -> float:
        """The sum of a name's samples that carry these labels; 0 where there are none."""
        chosen = self._samples.get(name, ())
        return sum(one.value for one in chosen if all(one.labels.get(key) == text for key, text in labels.items()))

    def histogram(self, name: str) -> Histogram:
        """A histogram, summed over its labels; empty where there is none."""
        counts: dict[float, float] = {}
        for sample in self._samples.get(f"{name}_bucket", ()):
            bound = _number(sample.labels.get("le", "nan"))
            if bound is not None and not math.isnan(bound):
                counts[bound] = counts.get(bound, 0.0) + sample.value
        bounds = sorted(counts)
        return Histogram(tuple(bounds), tuple(counts[bound] for bound in bounds))


def parse_metrics(text: str, url: str = "/metrics") -> Metrics:
    r"""Read Prometheus' text form.

    Raises:
        BadAnswer: a line that is none of it; `url` says where from.

    >>> parse_metrics('# TYPE a counter\na_total{model="x"} 3\na_total{model="y"} 4\n').total("a_total")
    7.0
    """
    return Metrics(_read(text, url))


def _read(text: str, url: str) -> Iterator[Sample]:
    for line in text.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _SAMPLE.fullmatch(line.strip())
        value = _number(found[3]) if found else None
        if found is None or value is None:
            raise BadAnswer(url, f"a line of its metrics cannot be read ({line.strip()[:60]!r})")
        yield Sample(found[1], _labels(found[2] or ""), value)


def _labels(text: str) -> dict[str, str]:
    return {found[1]: _ESCAPED.sub(lambda one: {"n": "\n"}.get(one[1], one[1]), found[2]) for found in _LABEL.finditer(text)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
