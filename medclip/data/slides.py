"""Whole slides as a source: patches are read from them when they are asked for, nothing is extracted before.

    {slides: {cohort: "slides/*.svs", size: 256, mpp: 0.5, coverage: 0.5}, caption: label}
    {slides: {table: pathgen.jsonl, root: slides/, size: 336, mpp: 0.5}}

The first form takes all tissue of a cohort: a folder, patterns, or a CSV whose other columns (patient, label…) go with
each patch. The second takes the patches of a table in PathGen-1.6M's layout (arXiv 2407.00203): a row has a slide
(`wsi_id` or `slide`: the name of a file in `root`, with or without its ending), the level-0 place of the patch's upper
left corner (`position: [x, y]`, or `x` and `y`) and a caption. A patch is `size` pixels of `mpp` µm; PathGen's own code
reads 672 level-0 pixels of any slide whatever they measure, which is `side: 672`.

Plans (which patches a slide has) are kept in the index folder, so only the first start looks for tissue.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.packed import Packed
from medclip.data.progress import track
from medclip.data.slide_source import SlideSource
from medclip.data.slide_table import slide_rows
from medclip.data.tables import CAPTION_COLUMNS, Problems
from medclip.types import UserError
from slides.cohort import read_cohort
from slides.dataset import Handles
from slides.entry import Entry, member_name
from slides.errors import SlideError
from slides.files import OutputError
from slides.geometry import geometry
from slides.open import open_slide
from slides.patches import reading_order
from slides.plan import Plan, make_plan, plan_at
from slides.request import Request

_log = logging.getLogger(__name__)
_OWN = ("cohort", "table", "root", "side", "slide_mpp")
_OF_TABLES = ("size", "mpp", "tolerance", "upsample", "exact", "icc", "stain", "stain_target")  # of the request
_HANDLES = 64  # as many runs as the default shuffle buffer goes over
_VERSION = 1
_NUMBER = re.compile(r"[-+]?(0|[1-9]\d{0,14})(\.\d+)?")


def open_slides(
    name: str, config: Mapping[str, Any], caption: CaptionRule, weight: float = 1.0, *, folder: Path
) -> SlideSource:
    """The patches of a config as a source.

    Args:
        name: of the source.
        config: `cohort`, or `table` and `root` (a folder, patterns, or a CSV of slides) with maybe `side` (level-0
            pixels of a patch); `slide_mpp`, of slides whose files and CSV say none; all else is of `slides.request`,
            for a table without what is about tissue.
        caption: how captions are made.
        weight: passes per epoch.
        folder: where plans are kept.

    Raises:
        UserError: an unknown key, a value that makes no sense, or nothing that can be read.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"source {name}: slides is {config!r}, not a mapping: e.g. {{cohort: slides/, mpp: 0.5}}")
    own = {key: config[key] for key in _OWN if config.get(key) is not None}
    if ("cohort" in own) == ("table" in own):
        raise UserError(f"source {name}: slides needs one of cohort and table (and root with a table)")
    of_request = _OF_TABLES if "table" in own else tuple(one.name for one in fields(Request))
    usable = (*(("table", "root", "side") if "table" in own else ("cohort",)), "slide_mpp", *of_request)
    if unfit := [str(key) for key in config if key not in usable and (key in own or key not in _OWN)]:
        raise UserError(f"source {name}: slides has keys {unfit} that do not fit: use {', '.join(usable)}")
    side = own.get("side")
    if side is not None and (not isinstance(side, int | float) or not 1 <= side <= 100_000):
        raise UserError(f"source {name}: slides.side is {side!r}: give level-0 pixels, e.g. 672")
    if "table" in own and "root" not in own:
        raise UserError(f"source {name}: slides.root is missing: the folder that holds the slides of {own['table']}")
    try:
        request = Request.parse({key: value for key, value in config.items() if key not in _OWN})
        given = own.get("slide_mpp")
        entries = read_cohort(own.get("cohort") or own["root"], mpp=None if given is None else float(given))
    except (SlideError, ValueError, TypeError) as error:
        raise UserError(f"source {name}: {error}") from None
    if "cohort" in own:
        return _of_cohort(name, entries, request, caption, weight, folder)
    return _of_table(name, str(own["table"]), entries, request, side, caption, weight, folder)


# All tissue of a cohort


def _of_cohort(
    name: str, entries: list[Entry], request: Request, caption: CaptionRule, weight: float, folder: Path
) -> SlideSource:
    extras = _numbers([entry.extra for entry in entries])
    entries = [replace(entry, extra=extra) for entry, extra in zip(entries, extras, strict=True)]
    columns = dict.fromkeys(column for extra in extras for column in extra)
    text = next((column for column in CAPTION_COLUMNS if column in columns), None)
    if caption.needs_text and text is None:
        raise UserError(
            f"source {name}: patches of a cohort have no caption of their own: set caption to a column of its CSV "
            f"(there are: {', '.join(columns) or 'none'}), or to false"
        )
    plans, problems = _all(name, [partial(_tissue, entry, request, folder) for entry in entries], entries)
    there = [(entry, plan) for entry, plan in zip(entries, plans, strict=True) if plan is not None]
    total = sum(len(plan) for _, plan in there)
    if not total:
        why = problems[0][2] if problems else f"none has a patch of which {request.coverage:g} is tissue"
        raise UserError(f"source {name} is empty: of {len(entries)} slides {why}")
    return SlideSource(
        name, *_parts(there, request), np.arange(total), text=text, caption=caption, weight=weight, problems=problems
    )


def _tissue(entry: Entry, request: Request, folder: Path) -> Plan:
    def plan() -> Plan:
        with open_slide(entry.path, mpp=entry.mpp, exact=request.exact) as slide:
            return make_plan(slide, entry.slide, request)[0]

    masks = Path(request.masks).expanduser().glob(f"{glob.escape(entry.slide)}.*") if request.masks else ()
    return _kept(folder, [_file(entry.path), entry.slide, entry.mpp, request.fingerprint(), *map(_file, masks)], plan)


def _numbers(extras: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns of nothing but numbers as numbers, so that filters compare them as such (as in `tables`)."""
    words = {name for extra in extras for name, value in extra.items() if not _NUMBER.fullmatch(str(value))}
    return [
        {k: v if k in words else float(v) if "." in str(v) else int(v) for k, v in extra.items()} for extra in extras
    ]


# Patches of a table


def _of_table(
    name: str,
    path: str,
    entries: list[Entry],
    request: Request,
    side: float | None,
    caption: CaptionRule,
    weight: float,
    folder: Path,
) -> SlideSource:
    found, text, problems = slide_rows(path, entries, caption)
    if not found:
        why = problems[0][2] if problems else "it has no row"
        raise UserError(f"source {name}: no patch of table {path} can be used, e.g. {why}")
    asked = [(entries[number], *found[number]) for number in sorted(found)]
    plans, broken = _all(
        name,
        [partial(_at, entry, request, side, coords, folder) for entry, _, coords in asked],
        [entry for entry, _, _ in asked],
    )
    why = {slide: (reason, detail) for slide, reason, detail in broken}
    there: list[tuple[Entry, Plan]] = []
    rows: list[bytes] = []
    for (entry, raws, coords), plan in zip(asked, plans, strict=True):
        inside = np.zeros(len(raws), bool) if plan is None else _inside(coords, plan.size)
        for x, y in coords[~inside].tolist():
            beyond = (
                "outside the slide",
                f"({x}, {y}) is not in the {plan.size if plan else ''} pixels of {entry.slide}",
            )
            problems.append((member_name(entry.slide, x, y), *why.get(entry.slide, beyond)))
        if plan is not None and inside.any():
            there.append((entry, plan))
            usable = np.flatnonzero(inside)
            rows += [raws[k] for k in usable[reading_order(coords[usable], plan.geometry)]]
    if not there:
        raise UserError(f"source {name}: no patch of table {path} can be read, e.g. {problems[-1][2]}")
    return SlideSource(
        name,
        *_parts(there, request),
        np.arange(len(rows)),
        table=Packed.of(rows),
        again=np.concatenate([_repeats(plan.coords) for _, plan in there]),
        text=text,
        caption=caption,
        weight=weight,
        problems=problems,
    )


def _at(entry: Entry, request: Request, side: float | None, coords: np.ndarray, folder: Path) -> Plan:
    def plan() -> Plan:
        with open_slide(entry.path, mpp=entry.mpp, exact=request.exact) as slide:
            options = {"mpp": request.mpp, "tolerance": request.tolerance, "upsample": request.upsample}
            wide = side or geometry(slide, size=request.size, **options).side
            return plan_at(slide, entry.slide, request, coords[_inside(coords, slide.size)], wide)

    parts = [_file(entry.path), entry.slide, entry.mpp, request.fingerprint(), side, digest(coords)]
    return _kept(folder, parts, plan)


def _inside(coords: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool (n,): whether a patch begins within the slide."""
    return np.all((coords >= 0) & (coords < size), axis=1)


def _repeats(coords: np.ndarray) -> np.ndarray:
    """int32 (n,): how many before it are at the same place; equal ones lie together in reading order."""
    at = np.arange(len(coords))
    new = np.append(True, (np.diff(coords, axis=0) != 0).any(axis=1))
    return (at - np.maximum.accumulate(np.where(new, at, 0))).astype(np.int32)


# Both


def _parts(there: Sequence[tuple[Entry, Plan]], request: Request) -> tuple[Handles, str]:
    return Handles(there, request, _HANDLES), fingerprint(_file(entry.path) for entry, _ in there)


def _all(
    name: str, plans: Sequence[Callable[[], Plan]], entries: Sequence[Entry]
) -> tuple[list[Plan | None], Problems]:
    """Every slide's plan, made by several threads; None, and a problem, for a slide that cannot be used."""

    def made(plan: Callable[[], Plan]) -> Plan | str:
        try:
            return plan()
        except SlideError as error:
            return str(error)
        except Exception as error:  # a hostile file makes readers raise anything
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(track(pool.map(made, plans), len(plans), f"planning {name}"))
    problems = [
        (entry.slide, "broken slide", result)
        for entry, result in zip(entries, results, strict=True)
        if isinstance(result, str)
    ]
    if problems:
        shown = "; ".join(detail for _, _, detail in problems[:3])
        _log.warning("source %s: %d of %d slides cannot be used: %s", name, len(problems), len(entries), shown)
    return [None if isinstance(result, str) else result for result in results], problems


def _kept(folder: Path, parts: Sequence[object], make: Callable[[], Plan]) -> Plan:
    """A plan from disk if it was made before."""
    path = folder / f"{fingerprint([_VERSION, *parts])}.plan.npz"
    plan = Plan.load(path)
    if plan is None:
        plan = make()
        with suppress(OutputError):  # a folder that cannot be written only costs the keeping
            plan.save(path)
    return plan


def _file(path: str | Path) -> str:
    """A file as it is now: where, how large, how old."""
    where = Path(path).expanduser().resolve()
    try:
        stat = where.stat()
    except OSError:
        return str(where)  # whoever opens it will say what is wrong
    return f"{where} {stat.st_size} {stat.st_mtime_ns}"
