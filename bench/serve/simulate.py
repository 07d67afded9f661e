"""The scheduler on recorded traces, with the real PrefixCache and no model. `python -m bench.serve.simulate [TRACE ...]`.

    trace ─▶ arrivals ─▶ plan() ─▶ leases of the real cache ─▶ a step lasts  base + per_token * its tokens

Time is counted, not waited for: a step of n tokens lasts `--base-ms` + n * `--token-us`. The defaults are of the order of an
8B model on one fast GPU; they are assumptions, and so is what follows from them alone (seconds).

A trace's block of 512 tokens stands here as `--block` tokens (16, so 1 in 32), which is also the page; a prompt's partial
last block and its answer shrink alike. Prompts are cut to `--max-prompt` tokens. A block's tokens are its id and then
zeros: equal ids, equal prefixes. Arrivals are sped up by `--speed`, so that a queue builds up; where the trace gives many
one time stamp, they come at once.

    bursts     a workload made here: agents who ask at once about a few long contexts (`bursts`)
    order      "cache aware" is the default; "first come" is `patience_s=0`
    attach     off: nobody follows another that computes the same prefix now (each job's prompts look foreign to the plan)
    plan       CPU microseconds of one plan() at 16, 256 and 1024 waiting, of a real queue of the trace
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np

from bench.common import percentiles, save, table
from radixkv.cache import PrefixCache
from radixkv.engine.scheduler import Job, Plan, Rules, State, plan
from radixkv.errors import PoolExhausted
from radixkv.lease import Lease
from radixkv.replay.formats import read_trace

DATA = Path(__file__).parent.parent.parent / "tests/data/traces"
WAITING = (16, 256, 1024)
ORDERS = {"cache aware": 5.0, "first come": 0.0}  # patience in seconds


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace, scaled down: when, its tokens, and how many it is answered with."""

    time_s: float
    prompt: np.ndarray[Any, np.dtype[np.int32]]
    num_output: int


@dataclass(frozen=True, slots=True)
class Clock:
    """How long a step of so many tokens lasts, in seconds: a model of a model."""

    base_s: float
    token_s: float

    def step_s(self, num_tokens: int) -> float:
        """Seconds of one step."""
        return self.base_s + self.token_s * num_tokens


class Simulated:
    """One request on its way: its job, its sequence, and its lease while it runs."""

    def __init__(self, number: int, arrival: Arrival, now_s: float, namespace: bytes) -> None:
        answer = np.full(arrival.num_output, -1 - number % 2**30, np.int32) & np.int32(2**31 - 1)
        self.tokens = np.concatenate([arrival.prompt, answer])
        self.prompt = arrival.prompt
        self.job = Job(
            id=number,
            prompt=arrival.prompt.tobytes(),
            namespace=namespace,
            num_tokens=len(arrival.prompt),
            max_output=arrival.num_output,
            arrived_s=now_s,
        )
        self.lease: Lease | None = None
        self.num_hit = -1  # prompt tokens it did not compute, at its first start and by following
        self.first_s: float | None = None


class Simulation:
    """Plans, carried out on a PrefixCache: everything the engine does, but for the numbers in the pages."""

    def __init__(self, num_pages: int, rules: Rules, clock: Clock, *, attach: bool = True) -> None:
        self.cache = PrefixCache(num_pages, rules.page_size)
        self.rules, self.clock, self.attach = rules, clock, attach
        self.waiting: dict[int, Simulated] = {}
        self.running: dict[int, Simulated] = {}
        self.now_s = 0.0
        self.credits: dict[str, float] = {}
        self.ended: list[Simulated] = []
        self.num_steps = self.num_computed = self.num_preempted = 0
        self.plan_s: list[float] = []
        self._next = 0

    def add(self, arrival: Arrival) -> Simulated:
        """Put a request in the queue now."""
        self._next += 1
        alone = b"" if self.attach else self._next.to_bytes(8, "big")
        request = Simulated(self._next, arrival, self.now_s, alone)
        self.waiting[self._next] = request
        return request

    def run(self, arrivals: Sequence[Arrival]) -> None:
        """Serve all arrivals to their ends."""
        coming = deque(arrivals)
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.now_s = max(self.now_s, coming[0].time_s)
            while coming and coming[0].time_s <= self.now_s:
                arrival = coming.popleft()
                request = self.add(arrival)
                request.job.arrived_s = arrival.time_s
            self.step()
        self.cache.check()

    def step(self) -> Plan:
        """One plan, and its consequences."""
        if len(self.running) < self.rules.max_running:
            for request in self.waiting.values():
                self._probe(request)
        stats = self.cache.stats()
        jobs = [[request.job for request in requests.values()] for requests in (self.waiting, self.running)]
        state = State(jobs[0], jobs[1], stats.num_free, stats.num_evictable, self.now_s, self.credits)
        started = thread_time()
        todo = plan(state, self.rules)
        self.plan_s.append(thread_time() - started)
        self.credits = todo.credits
        for number in todo.preempted:
            self._preempt(self.running[number])
        for number in todo.admitted:
            self._begin(self.waiting.pop(number))
        work = [(self.running[share.job_id], share.num_tokens) for share in todo.work if share.job_id in self.running]
        ready = [(request, count) for request, count in work if request.lease is not None and self._reserve(request, count)]
        ready = [(request, count) for request, count in ready if request.lease is not None]
        self.now_s += self.clock.step_s(sum(count for _, count in ready))
        for request, count in ready:
            self._advance(request, min(count, request.job.remaining))
        for number in todo.followers:
            if number in self.running:
                self._attach(self.running[number])
        self.num_steps += 1
        return todo

    def _probe(self, request: Simulated) -> None:
        found = self.cache.probe(request.prompt)
        request.job.num_cached, request.job.num_locked = found

    def _begin(self, request: Simulated) -> None:
        job = request.job
        self.running[job.id] = request
        request.lease = self.cache.acquire(request.tokens[: job.num_tokens], limit=job.num_tokens - 1)
        job.position = request.lease.num_matched
        if request.num_hit < 0:
            request.num_hit = job.position
        self._note(request)
        job.num_found = job.num_pages

    def _attach(self, request: Simulated) -> None:
        lease = request.lease
        assert lease is not None
        gained = lease.attach(request.job.num_tokens - 1)
        request.job.position = max(request.job.position, lease.num_matched)
        request.num_hit += gained
        self._note(request)
        request.job.num_found = lease.num_published // self.rules.page_size

    def _reserve(self, request: Simulated, count: int) -> bool:
        job, lease = request.job, request.lease
        assert lease is not None
        stop = job.num_tokens if job.prefilling else min(job.position + count, job.num_tokens)
        while True:
            try:
                lease.extend(request.tokens[lease.num_tokens : max(stop, lease.num_tokens)])
            except PoolExhausted:
                if len(self.running) == 1:
                    raise
                victim = min(self.running.values(), key=lambda other: (-other.job.arrived_s, -other.job.id))
                self._preempt(victim)
                if victim is request:
                    return False
            else:
                self._note(request)
                return True

    def _advance(self, request: Simulated, count: int) -> None:
        job, lease = request.job, request.lease
        assert lease is not None
        job.position += count
        self.num_computed += count
        lease.commit(job.position)
        if job.position == job.num_tokens:
            request.first_s = self.now_s if request.first_s is None else request.first_s
            job.max_output -= 1
            if job.max_output <= 0:
                self._let_go(request)
                self.ended.append(request)
                return
            job.num_tokens += 1
        self._note(request)

    def _preempt(self, request: Simulated) -> None:
        self._let_go(request)
        job = request.job
        job.position = job.num_pages = job.num_found = 0
        job.resumed = True
        self.waiting[job.id] = request
        self.num_preempted += 1

    def _let_go(self, request: Simulated) -> None:
        assert request.lease is not None
        request.lease.release()
        request.lease = None
        del self.running[request.job.id]

    def _note(self, request: Simulated) -> None:
        lease = request.lease
        assert lease is not None
        request.job.num_pages = lease.num_published // self.rules.page_size + lease.num_own_pages


def arrivals_of(path: Path, *, limit: int, block: int, max_prompt: int, speed: float) -> Iterator[Arrival]:
    """A trace's first requests, scaled down: `block` tokens for each of its blocks."""
    start_s: float | None = None
    for number, request in enumerate(read_trace(path)):
        if number == limit:
            return
        start_s = request.time_s if start_s is None else start_s
        scale = block / request.block_tokens
        blocks = request.blocks[: max_prompt // block]
        tokens = np.zeros((len(blocks), block), np.int32)
        tokens[:, 0] = blocks
        rest = max(int(request.num_input_tokens * scale) - len(request.blocks) * block, 1)
        own = np.full(min(rest, block - 1), 2**31 - 1 - number, np.int32)
        num_output = max(round(request.num_output_tokens * scale), 1)
        yield Arrival((request.time_s - start_s) / speed, np.concatenate([tokens.ravel(), own]), num_output)


def bursts(*, seed: int, num_bursts: int = 40, block: int = 16) -> Iterator[Arrival]:
    """Made, not recorded: every two seconds 24 agents ask at once, in any order, about 6 contexts of 60 blocks, 4 each."""
    rng = np.random.default_rng(seed)
    for burst in range(num_bursts):
        asked = rng.permutation(np.repeat(np.arange(6), 4))
        for number, context in enumerate(asked):
            head = np.repeat(np.arange(60, dtype=np.int32) + 100 * (6 * (burst // 2) + context), block)
            own = rng.integers(10**6, 10**9, 2 * block + number % block, dtype=np.int32)
            yield Arrival(2.0 * burst, np.concatenate([head, own]).astype(np.int32), int(rng.integers(2, 30)))


def measure(trace: str, arrivals: Sequence[Arrival], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size of the pool, order, and setting of attaching."""
    clock = Clock(options.base_ms / 1e3, options.token_us / 1e6)
    for num_pages, (order, patience_s), attach in product(options.pages, ORDERS.items(), (True, False)):
        rules = replace(rules_of(options), patience_s=patience_s)
        world = Simulation(num_pages, rules, clock, attach=attach)
        started = thread_time()
        world.run(arrivals)
        cpu_s = thread_time() - started
        first = percentiles([1e3 * ((one.first_s or 0.0) - one.job.arrived_s) for one in world.ended])
        prompt_tokens = sum(len(arrival.prompt) for arrival in arrivals)
        yield {
            "trace": trace,
            "order": order,
            "attach": attach,
            "requests": len(world.ended),
            "pages": num_pages,
            "hit_rate": sum(one.num_hit for one in world.ended) / prompt_tokens,
            "computed_tokens": world.num_computed,
            "ttft_ms_p50": first["p50"],
            "ttft_ms_p99": first["p99"],
            "served_s": world.now_s,
            "preemptions": world.num_preempted,
            "steps": world.num_steps,
            "host_steps_per_s": world.num_steps / cpu_s,
            "plan_us_p50": 1e6 * percentiles(world.plan_s)["p50"],
            "plan_us_p99": 1e6 * percentiles(world.plan_s)["p99"],
            "base_ms": options.base_ms,
            "token_us": options.token_us,
            "block_tokens": options.block,
            "speed": options.speed,
        }


def plan_times(trace: str, arrivals: Sequence[Arrival], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length of the queue: one plan() that admits, 15 jobs of 16 running, what it costs."""
    for num_waiting in WAITING:
        queue = [Simulated(n, arrivals[n % len(arrivals)], n * 1e-3, b"").job for n in range(num_waiting + 15)]
        cache = PrefixCache(max(options.pages), options.block)
        for job in queue:
            with cache.acquire(np.frombuffer(job.prompt, np.int32)) as lease:
                job.num_cached = lease.num_matched
        running, waiting = queue[:15], queue[15:]
        for job in running:
            job.num_tokens += 1
            job.position = job.num_tokens - 1
            job.num_pages = -(-job.num_tokens // options.block) + 1
        state = State(waiting, running, max(options.pages), 0, 1.0)
        rules = rules_of(options)
        samples = []
        for _ in range(max(2000 // num_waiting, 20)):
            started = thread_time()
            plan(state, rules)
            samples.append(1e6 * (thread_time() - started))
        taken = percentiles(samples)
        yield {"trace": trace, "waiting": num_waiting, "plan_us_p50": taken["p50"], "plan_us_p99": taken["p99"]}


def rules_of(options: argparse.Namespace) -> Rules:
    """The scheduler's settings, scaled as the tokens are."""
    return Rules(
        page_size=options.block, max_running=16, step_tokens=options.step, mixed_tokens=options.step // 4, headroom_tokens=4
    )


def workloads(options: argparse.Namespace) -> Iterator[tuple[str, list[Arrival]]]:
    """Name and arrivals of each trace, and of the made workload."""
    scale = {"limit": options.limit, "block": options.block, "max_prompt": options.max_prompt, "speed": options.speed}
    for path in options.traces:
        yield path.name.split(".")[0], list(arrivals_of(path, **scale))
    yield "bursts", list(bursts(seed=options.seed, block=options.block))


def main() -> None:
    """Replay, print the tables, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, default=sorted(DATA.glob("*.jsonl.gz")))
    parser.add_argument("--limit", type=int, default=2000, help="requests of each trace")
    parser.add_argument("--block", type=int, default=16, help="tokens that a block of the trace becomes, and of a page")
    parser.add_argument("--max-prompt", type=int, default=2048, help="tokens, scaled down; what is longer is cut")
    parser.add_argument("--pages", type=int, nargs="+", default=(1024, 8192), help="of the cache")
    parser.add_argument(
        "--step", type=int, default=256, help="tokens of a step, scaled down; a quarter where somebody decodes"
    )
    parser.add_argument("--base-ms", type=float, default=8.0, help="what a step lasts without tokens")
    parser.add_argument(
        "--token-us", type=float, default=400.0, help="what one (scaled) token adds: 32 real ones at 12.5 us"
    )
    parser.add_argument("--speed", type=float, default=1.5, help="how much faster requests arrive than in the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the made workload")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, arrivals in workloads(options):
        mine, plans = list(measure(name, arrivals, options)), list(plan_times(name, arrivals, options))
        columns = ["pages", "order", "attach", "requests", "hit_rate", "computed_tokens", "ttft_ms_p50", "ttft_ms_p99"]
        print(f"\n{name}")
        print(table(mine, [*columns, "served_s", "preemptions", "steps", "host_steps_per_s", "plan_us_p50", "plan_us_p99"]))
        print(table(plans, ["waiting", "plan_us_p50", "plan_us_p99"]), flush=True)
        rows += mine + plans
    if not options.dry:
        save("serve_simulate", rows, options.seed)


if __name__ == "__main__":
    main()
