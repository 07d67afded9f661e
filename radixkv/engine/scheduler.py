"""What the next step computes: a pure function of plain state. No model, no clock, no cache: decide, then act.

    State: jobs that wait or run, free pages, credits, the time
       │ plan(state, rules)
       ▼
    Plan: overdue ── preempted ── admitted ── work: so many tokens of each running job ── followers

One step's tokens, at most `step_tokens`, or `mixed_tokens` where somebody decodes, so that nobody's next token waits long:

    [ one token of every decoding job | prefill of whoever has least left | ... of the next | ... ]

so that a hit never waits behind somebody's long miss; who has waited long comes first all the same.

Who is admitted next: tenants in credit before tenants in debt; of those, the highest priority, where waiting raises it; of
those, whoever has waited past all patience; then the longest cached prefix, and among equals the order of their tokens,
which walks the tree depth first. That is deficit longest prefix match (arXiv:2501.14312), with ageing.

A job whose prefix an earlier one is computing right now follows it: it gets no tokens, and takes over the pages that the
other publishes, one step after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes

__all__ = ["Job", "Plan", "Rules", "Share", "State", "level", "plan", "rank"]


@dataclass(slots=True, eq=False)
class Job:
    """What the scheduler knows of a request. Its owner keeps it true; `plan` only reads it.

    Attributes:
        id: unique among the jobs.
        prompt: int32 token ids as bytes.
        namespace: the key of its namespace; prefixes are shared inside one only.
        num_tokens: tokens whose KV must be there before its next token can be chosen: prompt and generated.
        max_output: tokens it may still generate.
        tenant: whom its tokens are charged to.
        priority: higher first.
        affinity: equal ones are admitted one after another, where nothing else decides.
        arrived_s: when it came.
        deadline_at_s: when its time is over.
        resumed: it ran before and was preempted.
        paged: whether it uses the cache and its pages at all.
        num_cached, num_locked: while it waits: tokens it would find cached, and how many of those are locked anyway.
        room_pages: pages that its namespace may take now; None: as many as there are.
        position: while it runs: tokens whose KV is there.
        num_pages: while it runs: pages it holds, found ones included.
        num_found: while it runs: pages of those that it found and did not compute.
    """

    id: int
    prompt: bytes
    namespace: bytes
    num_tokens: int
    max_output: int
    tenant: str = ""
    priority: int = 0
    affinity: str = ""
    arrived_s: float = 0.0
    deadline_at_s: float = inf
    resumed: bool = False
    paged: bool = True
    num_cached: int = 0
    num_locked: int = 0
    room_pages: int | None = None
    position: int = 0
    num_pages: int = 0
    num_found: int = 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return self.num_tokens - self.position

    @property
    def prefilling(self) -> bool:
        """Whether some of its prompt is not computed yet."""
        return self.position * TOKEN_BYTES < len(self.prompt)


@dataclass(frozen=True, slots=True)
class Rules:
    """How to decide.

    Attributes:
        page_size: tokens in a page.
        max_running: jobs that may run at once.
        step_tokens: tokens of a step in which nobody decodes; a last chunk may be half as long again.
        mixed_tokens: tokens of a step in which somebody does.
        chunk: tokens that a prefill is computed in multiples of (exact mode), from position 0 on.
        patience_s: who waited so long comes before whoever has more of its prefix cached.
        rise_s: seconds since its arrival that raise a job's priority by one, up to the highest of all.
        quantum_tokens: tokens each waiting tenant is credited with when nobody is in credit.
        headroom_tokens: tokens of each running job's answer that an admission leaves pages for.
    """

    page_size: int
    max_running: int = 16
    step_tokens: int = 2048
    mixed_tokens: int = 512
    chunk: int = 1
    patience_s: float = 5.0
    rise_s: float = 10.0
    quantum_tokens: int = 4096
    headroom_tokens: int = 64

    def pages(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)


@dataclass(slots=True)
class State:
    """Everything a decision depends on.

    Attributes:
        waiting: jobs in the queue, in any order.
        running: jobs that run, in order of their admission.
        num_free, num_evictable: pages.
        now_s: on the clock of the jobs.
        credits: tokens each tenant may still have computed before others come first; who is not in it starts beside the
            best of those who are.
    """

    waiting: Sequence[Job]
    running: Sequence[Job]
    num_free: int
    num_evictable: int
    now_s: float
    credits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of one job in a step, from its position on."""

    job_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order; jobs by their ids.

    Attributes:
        overdue: jobs whose time is over: to be ended.
        preempted: running jobs to be put back in the queue; what they computed stays cached.
        admitted: waiting jobs that start.
        work: what to compute; decoding jobs first.
        followers: running jobs to be offered what this step publishes.
        credits: of every tenant with a job, afterwards.
    """

    overdue: tuple[int, ...]
    preempted: tuple[int, ...]
    admitted: tuple[int, ...]
    work: tuple[Share, ...]
    followers: tuple[int, ...]
    credits: dict[str, float]


def plan(state: State, rules: Rules) -> Plan:
    """Decide the next step.

    Cost: O(running x prefilling) compares of prompts; O(waiting log waiting) where somebody may be admitted.
    Mutates: nothing.
    """
    notes = _Notes(state, rules)
    notes.decode()
    notes.follow()
    notes.admit()
    notes.prefill()
    return Plan(
        tuple(notes.overdue),
        tuple(notes.preempted),
        tuple(notes.admitted),
        tuple(Share(job_id, count) for job_id, count in notes.work.items()),
        tuple(notes.followers),
        notes.credits,
    )


def level(job: Job, highest: int, now_s: float, rules: Rules) -> int:
    """A job's priority, raised by its age, up to the highest of all jobs.

    While it runs too, or whom it has overtaken would preempt it at once.
    """
    return min(job.priority + int((now_s - job.arrived_s) / rules.rise_s), highest)


def rank(job: Job, job_level: int, credit: float) -> tuple[float, ...]:
    """Who makes room first has the smallest: a tenant in debt, a low level, then late arrival."""
    return (credit > 0, job_level, -job.arrived_s, -job.id)


class _Notes:
    """What is noted down while one plan is made."""

    def __init__(self, state: State, rules: Rules) -> None:
        self.rules = rules
        self.now_s = state.now_s
        self.running = [job for job in state.running if job.deadline_at_s > state.now_s]
        self.waiting = [job for job in state.waiting if job.deadline_at_s > state.now_s]
        ended = [job for job in state.running if job.deadline_at_s <= state.now_s]
        self.overdue = [job.id for job in (*ended, *state.waiting) if job.deadline_at_s <= state.now_s]
        self.highest = max((job.priority for job in (*self.running, *self.waiting)), default=0)
        start = min(max(state.credits.values(), default=0.0), 0.0)  # nobody pays for what was to be had without a rival
        self.credits = {job.tenant: state.credits.get(job.tenant, start) for job in (*self.running, *self.waiting)}
        self.num_spare = state.num_free + state.num_evictable + sum(map(_own_pages, ended))  # pages
        self.budget = rules.step_tokens
        self.num_decoding = 0
        self.preempted: list[int] = []
        self.admitted: list[int] = []
        self.work: dict[int, int] = {}
        self.followers: dict[int, int] = {}  # id -> tokens it will take over, from the beginning on
        self.queue: list[Job] = []  # those that prefill, whose turn it is last

    # -- running ------------------------------------------------------------------------------------------------------

    def decode(self) -> None:
        """One token for every decoding job; where pages do not suffice, the last in rank are preempted."""
        while True:
            ready = [job for job in self.running if not job.prefilling and job.remaining == 1]
            needed = sum(self._missing(job, 1) for job in ready)
            paged = [job for job in self.running if job.paged]
            if needed <= self.num_spare or len(paged) <= 1:
                break
            self._preempt(min(paged, key=self._rank))
        self.num_spare -= needed
        if ready:
            self.budget = self.rules.mixed_tokens
        for job in ready:
            self._give(job, 1)
        self.num_decoding = len(ready)

    def follow(self) -> None:
        """Who has its prefix computed by an earlier one waits for that; the others line up for what is left of the step."""
        for job in self.running:
            if job.id not in self.work and job.remaining:  # else its last token is being chosen
                if (ahead := self._ahead(job)) > job.position:
                    self.followers[job.id] = ahead
                else:
                    self.queue.append(job)
        self.queue.sort(key=self._prefill_turn, reverse=True)

    def prefill(self, before: tuple[float, ...] = (inf,)) -> None:
        """What is left of the step to those whose turn comes before that one, as far as it goes."""
        while self.queue and self._prefill_turn(self.queue[-1]) < before:
            job = self.queue.pop()
            if self.budget > 0 and (count := self._chunk(job)):
                self._give(job, count)

    def _prefill_turn(self, job: Job) -> tuple[float, ...]:
        """What prefills are ordered by, smallest first: what has least left, unless somebody has waited too long."""
        urgent_at, debt = self._urgent_at(job), self.credits[job.tenant] <= 0
        urgent = urgent_at <= self.now_s
        return (debt, -self._level(job), not urgent, urgent_at if urgent else 0.0, job.remaining, job.arrived_s, job.id)

    def _chunk(self, job: Job) -> int:
        """Tokens that it gets of what is left. A short last chunk would read all weights for a few tokens."""
        chunk, left, budget = self.rules.chunk, job.remaining, self.budget
        alone = not self.work
        if left <= (budget + budget // 2 if alone and chunk == 1 else budget):
            return left
        if chunk == 1:
            return budget
        whole = (job.position + budget) // chunk * chunk - job.position
        first = len(self.work) == self.num_decoding  # one chunk in every step, or prefills would wait for all who decode
        return min(max(whole, chunk if first else 0), left)

    def _ahead(self, job: Job) -> int:
        """Up to which token an earlier job, at or ahead of this one, computes this one's prefix; 0: none does."""
        if not job.paged or not job.prefilling:
            return 0
        grain = max(self.rules.page_size, self.rules.chunk)
        most, longest = (len(job.prompt) // TOKEN_BYTES - 1) // grain * grain, 0
        for other in self.running:
            if other.id == job.id:
                break
            if other.prefilling and other.paged and other.namespace == job.namespace and other.position >= job.position:
                shared = common_prefix_bytes(job.prompt, 0, other.prompt) // TOKEN_BYTES // grain * grain
                longest = max(longest, min(shared, most))
        return longest

    def _give(self, job: Job, count: int) -> None:
        self.work[job.id] = count
        self.budget -= count
        self.credits[job.tenant] -= count

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self.preempted.append(job.id)
        self.num_spare += _own_pages(job)
        self.credits[job.tenant] += self.work.pop(job.id, 0)
        self.followers.pop(job.id, None)
        self.queue = [other for other in self.queue if other.id != job.id]

    # -- waiting ------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Start jobs while the step has tokens for them, and pages; followers need none of its tokens."""
        if not self.waiting or (len(self.running) >= self.rules.max_running and not self._outranked()):
            return
        self.num_spare -= sum(self._to_come(job) + self._missing(job, job.remaining) for job in self.running)
        line: list[Job] = []
        debtors: set[str] | None = None
        waiting = {job.id: job for job in self.waiting}
        while waiting and not self.preempted:  # who was preempted has to let go before others start
            self._credit({job.tenant for job in waiting.values()})
            if debtors != (debtors := {tenant for tenant, credit in self.credits.items() if credit <= 0}):
                line = self._ordered(waiting.values())
            job = waiting.pop(line.pop().id)
            if not self._starved(job) and not self._start(job):
                return

    def _outranked(self) -> bool:
        """Whether anybody waits who would have a running job preempted."""
        lowest: dict[str, int] = {}
        for job in self.running:
            lowest[job.tenant] = min(lowest.get(job.tenant, self.highest), self._level(job))
        if any(self._level(job) > lowest.get(job.tenant, self.highest) for job in self.waiting):
            return True
        runs = Counter(job.tenant for job in self.running)
        return max(runs.values()) > 1 and any(
            job.tenant not in runs and self._urgent_at(job) <= self.now_s for job in self.waiting
        )

    def _level(self, job: Job) -> int:
        return level(job, self.highest, self.now_s, self.rules)

    def _rank(self, job: Job) -> tuple[float, ...]:
        return rank(job, self._level(job), self.credits[job.tenant])

    def _ordered(self, jobs: Iterable[Job]) -> list[Job]:
        """The queue, whose turn it is last."""
        return sorted(jobs, key=self._turn, reverse=True)

    def _turn(self, job: Job) -> tuple[object, ...]:
        """What the queue is ordered by, smallest first."""
        urgent_at = self._urgent_at(job)
        urgent = urgent_at <= self.now_s
        return (
            self.credits[job.tenant] <= 0,
            -self._level(job),
            not urgent,
            urgent_at if urgent else 0.0,
            not job.resumed,
            -(job.num_cached // self.rules.page_size),
            job.affinity,
            job.prompt,
            job.arrived_s,
            job.id,
        )

    def _urgent_at(self, job: Job) -> float:
        """When it has waited past all patience, or comes close to its deadline."""
        return min(job.arrived_s + self.rules.patience_s, job.deadline_at_s - self.rules.patience_s)

    def _credit(self, tenants: set[str]) -> None:
        """Where every waiting tenant is in debt, all of them get as many quanta as the first needs to be in credit."""
        best, quantum = max(self.credits[tenant] for tenant in tenants), self.rules.quantum_tokens
        if best <= 0:
            rounds = int(-best // quantum) + 1
            for tenant in tenants:
                self.credits[tenant] = min(self.credits[tenant] + rounds * quantum, quantum)

    def _starved(self, job: Job) -> bool:
        """Whether its own namespace must end something first; nobody else waits for that."""
        if job.room_pages is None or self._needed(job) <= job.room_pages:
            return False
        return any(other.namespace == job.namespace for other in self.running)

    def _start(self, job: Job) -> bool:
        """Admit a job and give it its first tokens; False where it has to wait, and all behind it."""
        if self._would_be_ousted(job):
            return True
        placed = replace(job, position=min(job.num_cached, job.num_tokens - 1) // self.rules.chunk * self.rules.chunk)
        ahead = self._ahead(placed)
        follows = ahead > placed.position
        if not follows:
            self.prefill(before=self._prefill_turn(placed))
            if self.budget <= 0:
                return False
        found = max(job.num_cached, ahead) // self.rules.page_size
        wanted = self._needed(job, found) + self._taken(job) + self._to_come(job)
        if not self._fits(wanted):
            self._make_room(job, wanted)
            return False
        self.num_spare -= wanted
        self.admitted.append(job.id)
        self.running.append(placed)
        if follows:
            self.followers[job.id] = ahead
        elif count := self._chunk(placed):
            self._give(placed, count)
        return True

    def _would_be_ousted(self, job: Job) -> bool:
        """Whether it made room before, and those of a higher level still come: it would only begin once more, and again."""
        above = (other for other in self.running if other.tenant == job.tenant and self._level(other) > self._level(job))
        return job.resumed and any(above)

    def _fits(self, wanted: int) -> bool:
        """Whether a job that wants so many pages may start: always, where it would be alone."""
        return not self.running or (len(self.running) < self.rules.max_running and wanted <= self.num_spare)

    def _make_room(self, job: Job, wanted: int) -> None:
        """Preempt jobs that give way to this one, if it fits then: it starts with the next step."""
        slots, pages = self.rules.max_running - len(self.running), self.num_spare
        victims: list[Job] = []
        for victim in self._yielding(job):
            if slots > 0 and pages >= wanted:
                break
            victims.append(victim)
            slots, pages = slots + 1, pages + _own_pages(victim) + self._to_come(victim)
        if slots > 0 and pages >= wanted:
            for victim in victims:
                self._preempt(victim)

    def _yielding(self, job: Job) -> list[Job]:
        """Who gives way to a job, the last in rank first: those of its tenant that have a lower level.

        Where its tenant runs nothing and it has waited past all patience, also the last of a tenant that runs the most, and
        more than one: nobody keeps all places for itself.
        """
        level = self._level(job)
        begun = [other for other in self.running if other.id not in self.admitted]
        own = [other for other in begun if other.tenant == job.tenant]
        lower = sorted((other for other in own if self._level(other) < level), key=self._rank)
        runs = Counter(other.tenant for other in self.running)
        if job.tenant in runs or self._urgent_at(job) > self.now_s or max(runs.values(), default=0) < 2:
            return lower
        (most, _), *_ = runs.most_common(1)
        return sorted((other for other in begun if other.tenant == most), key=self._rank)[:1]

    def _needed(self, job: Job, found: int | None = None) -> int:
        """Pages that a waiting job lacks, where it finds so many."""
        if not job.paged:
            return 0
        found = job.num_cached // self.rules.page_size if found is None else found
        return max(self.rules.pages(job.num_tokens) - found, 0)

    def _taken(self, job: Job) -> int:
        """Pages that can be evicted now, and not once a waiting job has locked them."""
        return -(-(job.num_cached - job.num_locked) // self.rules.page_size)

    def _missing(self, job: Job, count: int) -> int:
        """Pages that a running job lacks for so many tokens more, those it will take over left out."""
        if not job.paged:
            return 0
        found = self.followers.get(job.id, 0) // self.rules.page_size
        return max(self.rules.pages(job.position + count) - max(job.num_pages, found), 0)

    def _to_come(self, job: Job) -> int:
        """Pages that a job's answer will ask for soon."""
        if not job.paged:
            return 0
        written = job.num_tokens - 1
        tokens = min(job.max_output, self.rules.headroom_tokens)
        return self.rules.pages(written + tokens) - self.rules.pages(written)


def _own_pages(job: Job) -> int:
    """Pages that can be had when it stops: those it did not find."""
    return max(job.num_pages - job.num_found, 0)
