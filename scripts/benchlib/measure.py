"""Measuring side by side: variants take turns within one run, so that a busy machine is busy for all of them."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


def say(text):
    print(text, file=sys.stderr, flush=True)


@dataclass
class Variant:
    """Something to be measured: `run` does it once and gives back its value (seconds where nothing else is said).

    `prepare` is called before each run and is not measured (emptying caches, removing what the last run made).
    """

    name: str
    run: object
    prepare: object = None
    values: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.values)


def interleave(variants, runs, warm_up=1):
    """Runs all variants `runs` times in turns; the first `warm_up` rounds do not count.

    Each round has an order of its own, the same in every measurement: what one leaves behind (jobs that end, mounts that
    go) would else always burden the same other one.
    """
    for number in range(warm_up + runs):
        for variant in random.Random(number).sample(variants, len(variants)):
            if variant.prepare:
                variant.prepare()
            value = variant.run()
            if number >= warm_up:
                variant.values.append(value)
        if sys.stderr.isatty():
            print(f"\r  round {number + 1} of {warm_up + runs}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)


def timed(argv, **options):
    """A function that runs a command and gives back its wall time in seconds; a failing command ends the benchmark."""
    argv = [str(word) for word in argv]

    def run():
        start = time.monotonic()
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              check=False, **options)
        seconds = time.monotonic() - start
        if done.returncode != 0:
            raise SystemExit(f"bench: '{' '.join(argv)}' failed: {done.stderr.decode(errors='replace').strip()}")
        return seconds

    return run


@dataclass
class Row:
    """One line of the result: ours against one peer, at the medians. `values` are ours, for min and max."""

    case: str
    ours: float
    peer: str
    peer_value: float
    unit: str
    values: list
    # What the issue asks for: the highest ratio (`ratio`) or the highest value of ours (`value`) that will do.
    bar: tuple = None

    @property
    def ratio(self):
        return self.ours / self.peer_value if self.peer_value else float("nan")

    def verdict(self):
        if self.bar is None:
            return None
        kind, limit = self.bar
        reached = (self.ratio if kind == "ratio" else self.ours) <= limit
        shown = f"ratio {limit}" if kind == "ratio" else f"{limit} {self.unit}"
        return f"{'reached' if reached else 'MISSED'}: {self.case} against {self.peer}: at most {shown}"


def against(case, ours, peer, unit="ms", scale=1000, bar=None):
    """A row of two measured variants."""
    return Row(case, ours.median * scale, peer.name, peer.median * scale, unit,
               [value * scale for value in ours.values], bar)


def added(case, ours, base, peer, peer_name, unit="ms", scale=1000, bar=None):
    """A row of what `ours` costs over `base`, run by run, against what `peer` costs over it."""
    own = [(value - bare) * scale for value, bare in zip(ours.values, base.values, strict=True)]
    theirs = [(value - bare) * scale for value, bare in zip(peer.values, base.values, strict=True)]
    return Row(case, statistics.median(own), peer_name, statistics.median(theirs), unit, own, bar)


def show(rows):
    """The rows as a table on standard output, and below it how they stand against their bars."""
    head = ("case", "ours", "peer", "peer's value", "unit", "ratio", "min", "max", "runs")
    table = [head] + [
        (row.case, f"{row.ours:.2f}", row.peer, f"{row.peer_value:.2f}", row.unit, f"{row.ratio:.2f}",
         f"{min(row.values):.2f}", f"{max(row.values):.2f}", str(len(row.values)))
        for row in rows
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    verdicts = [verdict for row in rows if (verdict := row.verdict())]
    if verdicts:
        print()
        print("\n".join(verdicts))


def write_json(path, name, rows, notes):
    machine = describe_machine() | notes
    text = json.dumps({
        "name": name,
        "machine": machine,
        "rows": [{"case": row.case, "ours": row.ours, "peer": row.peer, "peer_value": row.peer_value,
                  "unit": row.unit, "ratio": row.ratio, "min": min(row.values), "max": max(row.values),
                  "runs": len(row.values)} for row in rows],
    }, indent=1)
    Path(path).write_text(text + "\n")


def describe_machine():
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}


def version(*argv):
    """The first line a program says about its version, from either stream."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=os.environ | {"USER": "root"})
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"
