"""Whole-slide images to patches on a machine without torch or hydra; a killed run goes on where it was.

    python scripts/extract_patches.py --cohort slides.csv --out patches --mpp 0.5 --size 256
    python scripts/extract_patches.py --cohort 'slides/**/*.svs' --out patches --part 3 16     # of an array job

Needs the package `slides` alone. `medclip extract` does the same by config, and features too.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

from slides.cohort import read_cohort, take_part
from slides.errors import SlideError
from slides.extract import SAVE, Output, work
from slides.mpp import read_mpp_table
from slides.request import ARTEFACTS, STAINS, TISSUE, Request
from slides.run import run, split_cores
from slides.stream import Encoding


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cohort(parser)
    add_request(parser)
    parser.add_argument("--save", nargs="+", choices=SAVE, default=["shards", "coords"], help="%(default)s")
    parser.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="of patches (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG (%(default)s)")
    parser.add_argument("--no-passthrough", action="store_true", help="encode also what could be handed on as it is")
    parser.add_argument("--per-shard", type=int, default=2000, help="patches of a shard (%(default)s)")
    parser.add_argument("--no-drawings", action="store_true", help="neither masks as GeoJSON nor overlays")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="%(default)s")
    parser.add_argument("--processes", type=int, help="slides at a time (as the cores allow)")
    return parser


def add_cohort(parser: argparse.ArgumentParser) -> None:
    """Which slides, and where to."""
    parser.add_argument("--cohort", nargs="+", required=True, help="a folder, patterns, or a CSV with a column path")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--layout", choices=("trident", "clam"), default="trident", help="of HDF5 files (%(default)s)")
    parser.add_argument("--slide-mpp", type=float, help="µm a level-0 pixel of slides that say none")
    parser.add_argument("--mpp-table", type=Path, help="CSV with the columns slide and mpp")
    parser.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), help="every N-th slide from I, counted from 0")
    parser.add_argument("--threads", type=int, help="that read a slide (as the cores allow)")


def add_request(parser: argparse.ArgumentParser) -> None:
    """Which patches: `slides.request.Request`, whose defaults these are."""
    usual = Request()
    parser.add_argument("--size", type=int, default=usual.size, help="pixels (%(default)s)")
    parser.add_argument("--mpp", type=float, default=usual.mpp, help="µm a pixel; 0: level 0 as it is (%(default)s)")
    parser.add_argument("--overlap", type=int, default=usual.overlap, help="pixels (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=usual.tolerance, help="of the mpp, to avoid resampling")
    parser.add_argument("--upsample", action="store_true", help="allow pixels finer than the slide's")
    parser.add_argument("--coverage", type=float, default=usual.coverage, help="least share of tissue (%(default)s)")
    parser.add_argument("--tissue", choices=TISSUE, default=usual.tissue, help="%(default)s")
    parser.add_argument("--remove", nargs="*", choices=ARTEFACTS, default=list(usual.remove), help="%(default)s")
    parser.add_argument("--masks", help="folder of your own masks: ID.geojson, ID.png")
    parser.add_argument("--classes", nargs="*", default=[], help="of the GeoJSON, those that count")
    parser.add_argument("--exclude", nargs="*", default=[], help="of the GeoJSON, those that are cut out")
    parser.add_argument("--exact", action="store_true", help="bit-identical to openslide + area averaging")
    parser.add_argument("--icc", action="store_true", help="apply the file's colour profile")
    parser.add_argument("--stain", choices=STAINS, help="normalise to the colours of --stain-target")
    parser.add_argument("--stain-target", help="an image")


def request_of(chosen: argparse.Namespace) -> Request:
    names = ("size", "overlap", "tolerance", "upsample", "coverage", "tissue", "remove", "masks", "classes", "exclude")
    names += ("exact", "icc", "stain", "stain_target")
    return Request.parse({name: getattr(chosen, name) for name in names} | {"mpp": chosen.mpp or None})


def entries_of(chosen: argparse.Namespace):
    table = read_mpp_table(chosen.mpp_table) if chosen.mpp_table else None
    entries = read_cohort(chosen.cohort, mpp=chosen.slide_mpp, mpp_table=table)
    return take_part(entries, *chosen.part) if chosen.part else entries


def main() -> int:
    chosen = arguments().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        request, entries = request_of(chosen), entries_of(chosen)
        encoding = Encoding(chosen.format, chosen.quality, passthrough=not chosen.no_passthrough)
        save = tuple(dict.fromkeys(chosen.save))
        output = Output(str(chosen.out), save, chosen.layout, encoding, chosen.per_shard, not chosen.no_drawings)
        processes, threads = split_cores(len(entries), chosen.processes, chosen.threads)
        if chosen.engine == "ray":
            processes, threads = chosen.processes or 0, chosen.threads or 1
        call = functools.partial(work, request=request, output=output, threads=threads)
        mark = output.fingerprint(request)
        rows = run(entries, call, output.path, settings=mark, engine=chosen.engine, processes=processes, cpus=threads)
    except SlideError as error:
        print(f"extract_patches: {error}", file=sys.stderr)
        return 2
    tell_failures("extract_patches", rows)
    print(json.dumps({status: sum(row["status"] == status for row in rows) for status in {r["status"] for r in rows}}))
    return 0 if any(row["status"] in ("ok", "empty") for row in rows) else 2


def tell_failures(name: str, rows: list[dict[str, Any]]) -> None:
    """The first few by name; the manifest has all."""
    bad = [row for row in rows if row["status"] in ("failed", "busy")]
    for row in bad[:5]:
        print(f"{name}: {row['slide']}: {row['reason']}", file=sys.stderr)
    if len(bad) > 5:
        print(f"{name}: … and {len(bad) - 5} more: see manifest.csv", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
