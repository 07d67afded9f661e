"""Replay of public request traces: what would this cache have hit, and what would more memory buy.

    trace files ── formats ──▶ TraceRequest ── workload ──▶ Workload: page ids of each request, kept on disk
        Workload ── simulate ──▶ Row            the real PrefixCache, under one policy at one capacity
        Workload ── reuse ──▶ Reuse             which request used a page last, in one pass
            Reuse ── curve ──▶ Curve            the exact LRU hit rate at every capacity
            Reuse ── optimum ──▶ Row            the offline optimum (MIN)
        rows ── cost, report, plot, html ──▶    FLOPs and GPU-hours; table, JSON, PNG, HTML

Import from the modules: this package itself imports nothing, so that the command line starts fast.

>>> from radixkv.replay.simulate import simulate
>>> from radixkv.replay.workload import Workload
>>> with Workload.load(["conversation_trace.jsonl.gz"]) as workload:      # doctest: +SKIP
...     round(simulate(workload, "lru", capacity_pages=3417).page_hit_rate, 4)
0.0801
"""

__all__: list[str] = []
