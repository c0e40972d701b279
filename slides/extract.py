"""One slide to patches on disk: planned once, written in blocks, each block whole or not at all.

    OUT/shards/ID-00000.tar     webdataset: KEY.jpg and KEY.json with where it is from
    OUT/images/ID/X_Y.jpg       the same as single files
    OUT/arrays/ID.h5            CLAM's image mode: `imgs` (n, size, size, 3) and `coords`
    OUT/patches/ID.h5           coordinates as CLAM has them, or
    OUT/20x_256px_0px_overlap/patches/ID_patches.h5    as TRIDENT has them
    OUT/index/ID.parquet        a row for each patch, corrupt ones too
    OUT/masks/ID.geojson        tissue and artefacts, for QuPath
    OUT/overlays/ID.jpg         the same, and the grid, drawn
    OUT/state/                  what is done: ID.json (a slide's row), ID/ (its plan and blocks while it is under way)

A block's outputs depend on the plan alone, so a run that was killed at any moment writes, when it goes on, the bytes
that it would have written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from slides.colours import recolour
from slides.entry import Entry
from slides.errors import SlideError, said
from slides.files import Busy, OutputError, alone, sweep, write_whole, written
from slides.geojson import mask_to_geojson, write_geojson
from slides.h5 import Layout, coords_file, write_coords
from slides.index import write_index
from slides.open import open_slide
from slides.overlay import draw, save_jpeg
from slides.overview import overview
from slides.patches import CORRUPT, OK, SPARSE, STATUS, Chunk
from slides.plan import Plan, Seen, make_plan
from slides.reader import Slide
from slides.request import Request, digest
from slides.save import ArraySaver, FileSaver, Saver, ShardSaver
from slides.stream import Encoding, stream

SAVE = ("shards", "images", "arrays", "coords")
_DRAWN = 1000  # pixels of the longer side, at least
_COLOURS = {"tissue": (30, 160, 60), "pen": (30, 60, 220), "folds": (220, 120, 20), "blur": (160, 40, 180)}
Progress = Callable[[int, int], None]  # patches planned, patches done, since the last call


@dataclass(frozen=True)
class Output:
    """What is written of each slide.

    Args:
        folder: OUT.
        save: of shards, images, arrays, coords.
        layout: of the coordinates: trident or clam.
        encoding: of patches.
        per_shard: patches of a block, which are a shard.
        drawings: write masks and overlays.
    """

    folder: str
    save: tuple[str, ...] = ("shards", "coords")
    layout: Layout = "trident"
    encoding: Encoding = field(default_factory=Encoding)
    per_shard: int = 2000
    drawings: bool = True

    def __post_init__(self) -> None:
        if not self.save or not set(self.save) <= set(SAVE):
            raise SlideError(f"save is {list(self.save)}: choose of {', '.join(SAVE)}")
        if self.layout not in ("clam", "trident"):
            raise SlideError(f"layout is {self.layout!r}: choose clam or trident")
        if self.per_shard < 1:
            raise SlideError(f"per_shard is {self.per_shard}: choose at least 1")

    @property
    def path(self) -> Path:
        return Path(self.folder).expanduser()

    def fingerprint(self, request: Request) -> str:
        """Changes with whatever changes a byte of the output."""
        return digest([request.fingerprint(), sorted(self.save), self.layout, asdict(self.encoding), self.per_shard])


def extract_slide(
    entry: Entry, request: Request, output: Output, *, threads: int = 1, progress: Progress = lambda planned, done: None
) -> dict[str, Any]:
    """Write what is not yet written of a slide, and return its row of the manifest.

    A slide that cannot be read gets a row that says why (status `failed`), and so does one that another run is at
    work on (`busy`).

    Raises:
        OutputError: nothing can be written; what is written stays.
    """
    state = output.path / "state"
    mark = output.fingerprint(request)
    started = time.perf_counter()
    try:
        with alone(state / f"{entry.slide}.lock"):
            sweep(_folders(request, output), entry.slide)
            if (row := finished(state, entry.slide, mark)) is not None:
                _remove(state / entry.slide)  # killed between the row and this
                progress(row["patches"], row["patches"])
                return row
            row = _extract(entry, request, output, mark, threads, progress)
            row["seconds"] = round(time.perf_counter() - started, 2)
            write_whole(state / f"{entry.slide}.json", orjson.dumps(row))
            _remove(state / entry.slide)
            return row
    except Busy as error:
        return _failed(entry, "busy", str(error), mark)
    except OutputError:
        raise
    except Exception as error:  # a hostile file makes readers raise anything, and is never the end of the run
        row = _failed(entry, "failed", said(error), mark)
        write_whole(state / f"{entry.slide}.json", orjson.dumps(row))
        return row


def _folders(request: Request, output: Output) -> list[Path]:
    names = ("shards", "arrays", "index", "masks", "overlays", "state")
    return [*(output.path / name for name in names), coords_file(output.path, request, output.layout, "").parent]


def work(entry: Entry, progress: Progress, *, request: Request, output: Output, threads: int) -> dict[str, Any]:
    """`extract_slide` as `run.run` calls it; here, so that its processes need no more than this package."""
    return extract_slide(entry, request, output, threads=threads, progress=progress)


def finished(state: Path, slide: str, mark: str) -> dict[str, Any] | None:
    """The row of a slide that is done with these settings."""
    try:
        row = orjson.loads((state / f"{slide}.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return row if row.get("settings") == mark and row.get("status") in ("ok", "empty") else None


def _extract(
    entry: Entry, request: Request, output: Output, mark: str, threads: int, progress: Progress
) -> dict[str, Any]:
    state = output.path / "state" / entry.slide
    with open_slide(entry.path, mpp=entry.mpp, exact=request.exact) as slide:
        plan = Plan.load(state / "plan.npz")
        if plan is None or plan.settings != request.fingerprint():
            _remove(state)
            plan, seen = make_plan(slide, entry.slide, request, threads=threads)
            if output.drawings:
                _draw(slide, plan, seen, output)
            plan.save(state / "plan.npz")
        change = recolour(slide, request, plan)
        progress(len(plan), 0)
        blocks = _blocks(entry, plan, slide, request, output, mark, threads, change, progress)
    status = np.zeros(len(plan), np.uint8)
    reasons: list[str] = []
    for block in blocks:
        for number, word in block["status"].items():
            status[int(number)] = STATUS.index(word)
        reasons += block["broken"]
    if "coords" in output.save:
        write_coords(coords_file(output.path, request, output.layout, entry.slide), plan, status, output.layout)
    if "arrays" in output.save:
        ArraySaver(output.path / "arrays", state).finish(plan, status, output.layout)
    names = [block["shard"] for block in blocks for _ in range(block["patches"])] if "shards" in output.save else None
    write_index(output.path / "index" / f"{entry.slide}.parquet", plan, status, names)
    corrupt = int((status == CORRUPT).sum())
    row = _row(entry, plan, mark) | {
        "corrupt": corrupt,
        "sparse": int((status == SPARSE).sum()),
        "bytes": sum(block["bytes"] for block in blocks),
        "reason": "; ".join(list(dict.fromkeys(reasons))[:3]),
    }
    if not len(plan):
        row |= {"status": "empty", "reason": f"no patch has {request.coverage:g} of tissue"}
    elif corrupt == len(plan):
        row |= {"status": "failed", "reason": f"every patch is corrupt, e.g. {row['reason']}"}
    return row


def _blocks(
    entry: Entry,
    plan: Plan,
    slide: Slide,
    request: Request,
    output: Output,
    mark: str,
    threads: int,
    change: Callable[[np.ndarray], np.ndarray] | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write the blocks that are missing; the notes of all."""
    state = output.path / "state" / entry.slide
    savers: list[Saver] = []
    if "shards" in output.save:
        savers.append(ShardSaver(output.path / "shards", output.encoding.ending))
    if "images" in output.save:
        savers.append(FileSaver(output.path / "images", output.encoding.ending))
    if "arrays" in output.save:
        savers.append(ArraySaver(output.path / "arrays", state))
    if not savers:
        progress(0, len(plan))
        return []
    notes = []
    for number, first in enumerate(range(0, len(plan), output.per_shard)):
        note_file = state / f"{number:05d}.json"
        note = _noted(note_file, mark, output.path)
        last = min(first + output.per_shard, len(plan))
        if note is None:
            chunks = stream(
                slide,
                plan,
                slice(first, last),
                exact=request.exact,
                threads=threads,
                change=change,
                encoding=output.encoding,
                want_files=any(saver.wants_files for saver in savers),
                want_pixels=any(not saver.wants_files for saver in savers),
            )
            tell = partial(progress, 0)
            note = _write(entry, plan, savers, chunks, tell, number, first, last) | {"settings": mark}
            write_whole(note_file, orjson.dumps(note))
        else:
            progress(0, last - first)
        notes.append(note)
    return notes


def _write(
    entry: Entry,
    plan: Plan,
    savers: list[Saver],
    chunks: Iterator[Chunk[Any]],
    tell: Callable[[int], None],
    number: int,
    first: int,
    last: int,
) -> dict[str, Any]:
    """One block to all savers, and its note; `tell` hears of patches as they are saved."""
    status: dict[str, str] = {}
    broken: list[str] = []
    try:
        for saver in savers:
            saver.begin(plan, number)
        for chunk in chunks:
            rows = first + chunk.first + np.arange(len(chunk.status))
            for saver in savers:
                saver.add(entry, plan, rows, chunk)
            status |= {str(r): STATUS[s] for r, s in zip(rows.tolist(), chunk.status.tolist(), strict=True) if s != OK}
            broken += chunk.broken
            tell(len(chunk.status))
        done = [saver.end() for saver in savers]
    except BaseException:
        for saver in savers:
            saver.drop()
        raise
    return {
        "patches": last - first,
        "status": status,
        "broken": list(dict.fromkeys(broken))[:10],
        "shard": done[0][0] if isinstance(savers[0], ShardSaver) else "",
        "files": {name: size for name, size in done if name},
        "bytes": sum(size for _, size in done),
    }


def _noted(path: Path, mark: str, folder: Path) -> dict[str, Any] | None:
    """The note of a block whose files are still there."""
    try:
        note = orjson.loads(path.read_bytes())
        if note["settings"] != mark:
            return None
        if note["shard"] and (folder / "shards" / note["shard"]).stat().st_size != note["files"][note["shard"]]:
            return None
    except (OSError, orjson.JSONDecodeError, KeyError):
        return None
    return note


def _draw(slide: Slide, plan: Plan, seen: Seen, output: Output) -> None:
    masks = [seen.tissue, *seen.artefacts.values()]
    features: dict[str, Any] = {"type": "FeatureCollection", "features": []}
    for mask in masks:
        colour = _COLOURS.get(mask.name, (120, 120, 120))
        part = mask_to_geojson(mask, name=mask.name.capitalize(), color=colour, simplify=mask.downsample / 2)
        features["features"] += part["features"]
    write_geojson(output.path / "masks" / f"{plan.slide}.geojson", features)
    shown = seen.overview
    if max(shown.image.shape) < _DRAWN:  # a small slide is drawn larger than tissue is looked for
        shown = overview(slide, max(slide.size) * slide.mpp / _DRAWN)
    picture = draw(
        shown.image,
        [(mask.array, _COLOURS.get(mask.name, (120, 120, 120))) for mask in masks],
        coords=plan.coords,
        side=plan.geometry.side,
        downsample=shown.downsample,
    )
    save_jpeg(output.path / "overlays" / f"{plan.slide}.jpg", picture)


def _row(entry: Entry, plan: Plan, mark: str) -> dict[str, Any]:
    one = plan.geometry
    return (
        _blank(entry, "ok", "", len(plan))
        | {
            "width": plan.size[0],
            "height": plan.size[1],
            "slide_mpp": plan.mpp,
            "mpp_source": plan.mpp_source,
            "mpp": one.mpp,
            "level": one.level,
            "read_size": one.read,
            "settings": mark,
        }
        | {name: None if value != value else value for name, value in plan.facts.items()}
    )  # JSON has no NaN


def _failed(entry: Entry, status: str, reason: str, mark: str) -> dict[str, Any]:
    return _blank(entry, status, reason, 0) | {"settings": mark}


def _blank(entry: Entry, status: str, reason: str, patches: int) -> dict[str, Any]:
    """What every row has."""
    return {
        "slide": entry.slide,
        "path": entry.path,
        "status": status,
        "reason": reason,
        "patches": patches,
        "corrupt": 0,
        "sparse": 0,
        "seconds": 0.0,
        "bytes": 0,
    }


def _remove(folder: Path) -> None:
    with written(folder):
        if folder.exists():
            shutil.rmtree(folder)
