"""What all benchmarks share: two sides run in turn, CPU-seconds beside wall time, one last line to compare.

A side is a function that does its work from a fresh start and returns how many units it did (images, steps).
CPU-seconds are those of this process and of every child that has ended and been waited for, so they hold still where a
busy machine makes wall time jump; the ratio is taken within each pair of neighbouring runs.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    cpu: float  # seconds, children included
    wall: float  # seconds
    units: int

    @property
    def each(self) -> float:
        """CPU-seconds a unit."""
        return self.cpu / self.units


def cpu_seconds() -> float:
    """CPU time so far, user and system, of this process and of the children that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()

    def read(self, units: int) -> Cost:
        """The cost so far of `units` units."""
        return Cost(cpu_seconds() - self.cpu, time.perf_counter() - self.wall, units)


def measure(work: Callable[[], int]) -> Cost:
    """Run `work` once; it returns the units that it did.

    Raises:
        RuntimeError: `work` left worker processes behind, whose time would be missing.
    """
    gc.collect()
    gc.freeze()  # what is there already is no part of the work, and takes long to search
    watch = Stopwatch()
    units = work()
    gc.collect()  # a loader that nobody holds any more ends its workers
    gc.unfreeze()
    if left := multiprocessing.active_children():
        raise RuntimeError(f"{len(left)} worker processes still run: their CPU time is not counted yet")
    return watch.read(units)


def interleave(
    ours: Callable[[], Cost], peer: Callable[[], Cost], *, runs: int = 5, warm_up: bool = True
) -> list[tuple[Cost, Cost]]:
    """`runs` pairs of (ours, peer), in turn, each side first as often as the other.

    Args:
        ours: one run, usually `lambda: measure(work)`.
        peer: likewise.
        runs: pairs that count.
        warm_up: run one pair before, which does not count.
    """
    pairs = []
    for run in range(-int(warm_up), runs):
        if run % 2:
            theirs = peer()
            pair = ours(), theirs
        else:
            pair = ours(), peer()
        if run >= 0:
            pairs.append(pair)
    return pairs


def ratios(pairs: Sequence[tuple[Cost, Cost]]) -> list[float]:
    """Peer's CPU-seconds a unit over ours, pair by pair: above 1, ours is cheaper."""
    return [peer.each / ours.each for ours, peer in pairs]


def table(pairs: Sequence[tuple[Cost, Cost]], unit: str, peer: str) -> str:
    """Medians of both sides, a line each."""
    lines = []
    for name, side in (("ours", [pair[0] for pair in pairs]), (peer, [pair[1] for pair in pairs])):
        cpu = statistics.median(cost.each for cost in side)
        wall = statistics.median(cost.wall / cost.units for cost in side)
        lines.append(
            f"  {name:<18} {1000 * cpu:8.2f} CPU-ms/{unit}  {1 / cpu:8.1f} {unit}/CPU-s  "
            f"{1000 * wall:8.2f} ms/{unit} wall  ({len(side)} runs of {side[0].units})"
        )
    return "\n".join(lines)


def report(name: str, pairs: Sequence[tuple[Cost, Cost]], *, unit: str, peer: str) -> None:
    """Print both sides' costs, then the line that programs read."""
    print(table(pairs, unit, peer))
    found = ratios(pairs)
    middle = statistics.median(found)
    print(f"{name} ratio={middle:.3f} min={min(found):.3f} max={max(found):.3f} peer={peer}", flush=True)


def arguments(description: str | None, **hidden: str) -> argparse.Namespace:
    """Parse `--quick`, and one benchmark's own hidden options (name=default)."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer units: under a minute")
    for name, default in hidden.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=argparse.SUPPRESS)
    return parser.parse_args()
