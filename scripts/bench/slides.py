"""Slides: patches per CPU-second from whole-slide images, against loops over openslide in their fastest form.

    scripts/bench/slides.py [--quick] [--peers] [--texture SLIDE.svs]

Two slides of 40,000 x 30,000 px (0.25 and 0.5 mpp; JPEG 4:2:0 of quality 70, tiles of 256 px, levels 1, 4, 16; 45 % of
it tissue) are made once, with the texture of a slide phantom or of a real slide's darkest part. Patches are 256 px at
0.5 mpp; all sides that are compared get the same places in the same order:

    slides_arrays       40x, on the grid: arrays, tiles decoded at half scale; openslide reads 512 px and averages areas
    slides_exact        the same, equal to openslide and cv2.INTER_AREA to the bit
    slides_shards       the same to webdataset shards, JPEG quality 90; openslide with simplejpeg and tarfile
    slides_passthrough  20x, on the grid: stored tiles to shards; openslide decodes, encodes and writes as above
    slides_unaligned    40x, off the grid, and with 50 % overlap: arrays; the smaller ratio of the two

Each run is a process of its own; imports are not counted, opening the slide is. All sides of a table run in turn, in
rounds, and ratios are taken within a round. Beside them stand the limit (nothing but libjpeg-turbo on tiles in memory),
two threads, the way of formats that only openslide reads, and all of `medclip extract`. With --peers also other
people's readers, each in an environment of its own, made at first below ~/.cache/medclip (5 GB).

The pixels are compared first: no ratio unless exact mode and passed-through tiles are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import _slide_peers
from _timing import Cost, ratios

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("_slide_sides.py")
RUNS = 5
# For every process, peers' too. That glibc reuses what is freed: otherwise it hangs on the order of a loop's lines
# whether each region of a megabyte is given back and asked for anew, a quarter of the time of the loop over openslide.
EVEN = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
MAX_DRIFT = 3.0  # mean difference of half-scale decoding to area averages, in levels of 255


@dataclass(frozen=True)
class Side:
    """One line of a table.

    Args:
        name: of the side in `_slide_sides`.
        patches: to do; 0 for all.
        quick: with --quick; None for not at all.
        threads: that decode.
    """

    name: str
    patches: int
    quick: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Run:
    """One measured process."""

    cost: Cost
    peak: float  # MB of memory


TABLES: Mapping[str, Mapping[str, Side]] = {
    "aligned": {
        "openslide": Side("openslide_arrays", 1000, 150),
        "ours": Side("arrays", 1000, 800),
        "ours, exact": Side("exact", 1000, 800),
        "openslide to shards": Side("openslide_shards", 1000, 150),
        "ours to shards": Side("shards", 1000, 800),
        "limit, half scale": Side("half_limit", 1000),
        "limit, whole tiles": Side("full_limit", 1000),
        "ours, 2 threads": Side("arrays", 1000, threads=2),
        "exact, 2 threads": Side("exact", 1000, threads=2),
        "to shards, 2 threads": Side("shards", 1000, threads=2),
        "other formats": Side("fallback", 1000),
        "other formats, 2 thr.": Side("fallback", 1000, threads=2),
        "medclip extract": Side("extract", 0),
    },
    "native": {
        "openslide to shards": Side("openslide_shards", 2000, 300),
        "openslide": Side("openslide_arrays", 2000),
        "ours": Side("arrays", 2000),
        "ours to shards": Side("shards", 2000, 2000),
        "limit, whole tiles": Side("full_limit", 2000),
    },
    "unaligned": {"openslide": Side("openslide_arrays", 1000, 150), "ours": Side("arrays", 1000, 800)},
    "overlap": {"openslide": Side("openslide_arrays", 1000, 150), "ours": Side("arrays", 1000, 1000)},
}
# Which lines of which tables a figure compares; of several comparisons the smallest ratio counts.
FIGURES = {
    "slides_arrays": [("aligned", "ours", "openslide")],
    "slides_exact": [("aligned", "ours, exact", "openslide")],
    "slides_shards": [("aligned", "ours to shards", "openslide to shards")],
    "slides_passthrough": [("native", "ours to shards", "openslide to shards")],
    "slides_unaligned": [("unaligned", "ours", "openslide"), ("overlap", "ours", "openslide")],
}
BESIDE = {
    "native": ("cucim_loop", "cucim_batch"),
    "unaligned": ("cucim_loop", "cucim_batch"),
    "overlap": ("cucim_loop",),
}
Sides = dict[str, Callable[[], Run]]
Rounds = Mapping[str, Sequence[Run]]  # by side, all of one length


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer patches, and no lines beside: under a minute")
    parser.add_argument("--peers", action="store_true", help="other people's readers too; installs them at first")
    parser.add_argument("--texture", type=Path, help="a slide of 0.5 mpp whose tissue is shown; without, a phantom's")
    args = parser.parse_args()
    os.environ.update(EVEN)
    folder = ROOT / ".venv" / "bench-slides" / (args.texture.stem if args.texture else "phantom")
    program("make", folder, *(["--texture", args.texture] if args.texture else []))
    refuse_unequal(folder, 40 if args.quick else 200)
    pythons = installed() if args.peers else {}
    found: dict[str, Rounds] = {}
    for case, lines in TABLES.items():
        sides: Sides = {
            label: partial(run, line, case, folder, args.quick)
            for label, line in lines.items()
            if not args.quick or line.quick is not None
        }
        found[case] = rounds(sides | others(case, folder, pythons))
        print(table(case, found[case]), flush=True)
    if not args.quick:
        print(two_threads(found["aligned"]))
    for name, pairs in FIGURES.items():
        print(figure(name, [ratio(found[case][ours], found[case][peer]) for case, ours, peer in pairs]), flush=True)


# --- processes -----------------------------------------------------------------------------------------------------


def program(*words: object) -> str:
    """The last line that `_slide_sides` says."""
    command = [sys.executable, "-P", str(PROGRAM), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"slides: {' '.join(command[3:])} failed")
    return (done.stdout.splitlines() or [""])[-1]


def run(side: Side, case: str, folder: Path, quick: bool) -> Run:
    count = side.quick if quick else side.patches
    return measured(json.loads(program("run", side.name, case, folder, "--count", count, "--threads", side.threads)))


def measured(told: Mapping[str, float]) -> Run:
    return Run(Cost(told["cpu"], told["wall"], int(told["patches"])), told["rss_mb"])


def refuse_unequal(folder: Path, count: int) -> None:
    """Stop unless pixels are what they should be."""
    told = json.loads(program("check", folder, "--count", count))
    print(
        f"{told['patches']} patches compared with openslide's: not equal in exact mode {told['exact']}, passed through "
        f"{told['passed']}; drift at half scale {told['drift']:.2f}/255 (limit {MAX_DRIFT:g})",
        flush=True,
    )
    if told["exact"] or told["passed"] or not told["drift"] < MAX_DRIFT:
        sys.exit("slides: the pixels are not what they should be, so the speed means nothing")


def installed() -> dict[str, Path]:
    """Pythons of the peers that are there; says which are not."""
    found = _slide_peers.install()
    for name, (python, told) in found.items():
        print(f"{name:<12} {told if python else 'not installed: ' + told}", flush=True)
    return {name: python for name, (python, _) in found.items() if python}


def others(case: str, folder: Path, pythons: Mapping[str, Path]) -> Sides:
    """Other people's readers for a case; those that fail are named and left out."""
    sides: Sides = {}
    for method, package in _slide_peers.METHODS.items():
        if package not in pythons or method not in BESIDE.get(case, _slide_peers.METHODS):
            continue
        fast = package in ("cucim", "pyvips")
        slide, places, side = program("few", case, folder, 1500 if fast else 300).split("|")
        what = method, Path(slide), Path(places), 0, int(side), 256, pythons[package], 2 if "batch" in method else 1

        def work(what: tuple = what) -> Run:
            return measured(_slide_peers.run(*what))

        try:
            work()
            sides[method] = work
        except (RuntimeError, ValueError) as error:
            print(f"{method} left out: {error}", flush=True)
    return sides


# --- rounds and what comes of them ---------------------------------------------------------------------------------


def rounds(sides: Sides) -> Rounds:
    """`RUNS` runs of each side in turn, each round beginning with another side."""
    names = list(sides)
    found: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(RUNS):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(sides[name]())
    return found


def ratio(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """The peer's CPU-seconds a patch over ours, round by round."""
    return ratios([(a.cost, b.cost) for a, b in zip(ours, peer, strict=True)])


def wall_ratio(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    return [(b.cost.wall / b.cost.units) / (a.cost.wall / a.cost.units) for a, b in zip(ours, peer, strict=True)]


def table(case: str, found: Rounds) -> str:
    """Medians of all sides, a line each; ratios to the first."""
    base = next(iter(found.values()))
    lines = [f"{case}:"]
    for name, runs in found.items():
        cost = [run.cost for run in runs]
        lines.append(
            f"  {name:<22}{1 / statistics.median(one.each for one in cost):8.0f} patches/CPU-s"
            f"{statistics.median(one.units / one.wall for one in cost):8.0f} patches/s wall"
            f"{statistics.median(run.peak for run in runs):6.0f} MB"
            f"   ratio{statistics.median(ratio(runs, base)):7.2f} CPU"
            f"{statistics.median(wall_ratio(runs, base)):7.2f} wall"
        )
    return "\n".join(lines)


def two_threads(found: Rounds) -> str:
    pairs = [
        ("ours, 2 threads", "ours"),
        ("exact, 2 threads", "ours, exact"),
        ("to shards, 2 threads", "ours to shards"),
    ]
    gains = [f"{one} {statistics.median(wall_ratio(found[two], found[one])):.2f}" for two, one in pairs]
    return f"two threads over one, wall time: {'; '.join(gains)} (where two cores are idle)"


def figure(name: str, compared: Sequence[Sequence[float]]) -> str:
    """The line that programs read."""
    least = min(compared, key=statistics.median)
    return f"{name} ratio={statistics.median(least):.3f} min={min(least):.3f} max={max(least):.3f} peer=openslide"


if __name__ == "__main__":
    main()
