"""What the slide benchmark measures, each side in a process of its own: ours, the same by hand over openslide, limits.

    python -P scripts/bench/_slide_sides.py make FOLDER [--texture SLIDE]
    python -P scripts/bench/_slide_sides.py check FOLDER --count N
    python -P scripts/bench/_slide_sides.py few CASE FOLDER COUNT
    python -P scripts/bench/_slide_sides.py run SIDE CASE FOLDER [--count N] [--threads N]

`-P`, so that `slides` is the package and not the program beside this file. `run` prints a line of JSON: {patches, wall,
cpu, rss_mb}; imports are not timed, opening the slide is.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import simplejpeg
from PIL import Image

from slides.entry import Entry
from slides.extract import Output, extract_slide
from slides.geometry import Geometry, geometry
from slides.mask import Mask
from slides.open import open_slide
from slides.openslides import OpenSlideSlide
from slides.patches import read_patches, reading_order
from slides.plan import Plan
from slides.pyramid import Encoding, Mosaic, mirrored
from slides.reader import Slide
from slides.request import Request
from slides.save import ShardSaver
from slides.stream import stream
from slides.tiling import tiles

SIZE, MPP, QUALITY, PER_SHARD = 256, 0.5, 90, 2000
LEVEL0 = (40_000, 30_000)
CELL = 256  # level-0 pixels of a value of the map of tissue
TISSUE = 0.45  # share of it
WINDOW = 1664  # pixels of the texture at 0.5 mpp, before it is mirrored
SLIDES = {"40x.svs": 0.25, "20x.svs": 0.5}  # mpp of level 0


@dataclass(frozen=True)
class Case:
    """Which patches of 256 px at 0.5 mpp, of what is tissue.

    Args:
        slide: of `SLIDES`.
        origin: of the grid, level-0 pixels, both ways.
        overlap: pixels that neighbours share.
        cache: bytes that openslide keeps; None: its own choice (32 MiB). As it is fastest.
    """

    slide: str
    origin: int = 0
    overlap: int = 0
    cache: int | None = None


CASES = {
    "aligned": Case("40x.svs", cache=0),
    "unaligned": Case("40x.svs", origin=130),
    "overlap": Case("40x.svs", overlap=SIZE // 2),
    "native": Case("20x.svs", cache=0),
}


# --- the two slides ------------------------------------------------------------------------------------------------


def make(folder: Path, texture: Path | None) -> None:
    """Both slides and the places of all cases, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    noise = cv2.resize(rng.standard_normal((12, 16)).astype(np.float32), (157, 118), interpolation=cv2.INTER_CUBIC)
    tissue = noise > np.quantile(noise, 1 - TISSUE)
    for name, mpp in SLIDES.items():
        if not (folder / name).exists():
            shown = _phantom(mpp) if texture is None else _window(texture, mpp)
            glass = np.full((CELL, CELL, 3), 244, np.uint8)
            encoding = Encoding(quality=70, photometric="ycbcr", subsampling="420")
            Mosaic(tissue.astype(np.int64), CELL, [glass, mirrored(shown)], LEVEL0, encoding=encoding).write(
                folder / name, mpp=mpp
            )
    for name, case in CASES.items():
        with open_slide(folder / case.slide) as slide:
            one = _geometry(slide, case)
            coords, _ = tiles(
                Mask(tissue, float(CELL)), slide.size, one.side, one.step, snap=one.snap,
                origin=(case.origin, case.origin), edge="drop",
            )  # fmt: skip
        np.save(folder / f"{name}.npy", coords[reading_order(coords, one)])


def _phantom(mpp: float) -> np.ndarray:
    """The middle of a slide phantom's first piece, as wide as `WINDOW` pixels at 0.5 mpp or a little less."""
    from medclip.phantoms.slide import slide_phantom

    side, across = 256, int(WINDOW * MPP / mpp) // 256
    phantom = slide_phantom(0, 0, (round(6000 / mpp), round(4500 / mpp)), mpp, label="adenocarcinoma", pen=False)
    middle = phantom.layers[0][1].centroid
    left, top = (int(at) // side - across // 2 for at in (middle.x, middle.y))
    paint = phantom.painter((1,), side)
    rows = [np.concatenate([paint(0, left + x, top + y) for x in range(across)], 1) for y in range(across)]
    return np.concatenate(rows, 0)


def _window(path: Path, mpp: float) -> np.ndarray:
    """The darkest square of a real slide of about 0.5 mpp; for finer pixels enlarged."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        small = np.asarray(slide.get_thumbnail((width // 16, height // 16)).convert("L"), np.float32)
        side = WINDOW // 16
        mean = cv2.boxFilter(small, -1, (side, side), anchor=(0, 0))[: -side or None, : -side or None]
        y, x = np.unravel_index(mean.argmin(), mean.shape)
        region = np.asarray(slide.read_region((int(x) * 16, int(y) * 16), 0, (WINDOW, WINDOW)).convert("RGB"))
    scale = round(MPP / mpp)
    return cv2.resize(region, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else region


# --- sides: a function prepares, and returns what is measured ------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a side does.

    Args:
        slide: its file.
        case: of its patches.
        coords: int64 (n, 2), level-0 x and y, in reading order.
        threads: that decode.
        out: an empty folder.
    """

    slide: Path
    case: Case
    coords: np.ndarray
    threads: int
    out: Path


Work = Callable[[], int]  # patches done


def arrays(job: Job, exact: bool = False) -> Work:
    """Patches in memory, by us."""

    def work() -> int:
        with open_slide(job.slide) as slide:
            return _count(slide, _geometry(slide, job.case), job, exact)

    return work


def exact(job: Job) -> Work:
    return arrays(job, exact=True)


def fallback(job: Job) -> Work:
    """As formats are read that only openslide knows."""

    def work() -> int:
        handle = openslide.OpenSlide(job.slide)
        with OpenSlideSlide(job.slide, handle, mpp=SLIDES[job.case.slide], mpp_source="given") as slide:
            return _count(slide, _geometry(slide, job.case), job, exact=False)

    return work


def shards(job: Job) -> Work:
    """Webdataset shards as `extract` writes them, of known places."""

    def work() -> int:
        entry = Entry("bench", str(job.slide))
        saver = ShardSaver(job.out, "jpg")
        with open_slide(job.slide) as slide:
            plan = _plan(slide, job)
            for number, first in enumerate(range(0, len(plan), PER_SHARD)):
                saver.begin(plan, number)
                for chunk in stream(slide, plan, slice(first, first + PER_SHARD), threads=job.threads):
                    saver.add(entry, plan, first + chunk.first + np.arange(len(chunk.status)), chunk)
                saver.end()
        return len(plan)

    return work


def extract(job: Job) -> Work:
    """All that `medclip extract` does of a slide: tissue, quality, plan, drawings, shards, coordinates, index."""

    def work() -> int:
        output = Output(str(job.out))
        return extract_slide(Entry("bench", str(job.slide)), Request(mpp=MPP), output, threads=job.threads)["patches"]

    return work


def openslide_arrays(job: Job) -> Work:
    """The loop over openslide in its fastest form: shrunk before alpha goes, without a cache where that is faster."""
    return lambda: sum(1 for _ in _openslide_loop(job))


def openslide_shards(job: Job) -> Work:
    """The same loop, the fastest JPEG encoder, and Python's tarfile; the metadata that ours has."""

    def work() -> int:
        with tarfile.open(job.out / "shard.tar", "w") as tar:
            for (x, y), pixels in zip(job.coords.tolist(), _openslide_loop(job), strict=True):
                key = f"bench-{x}-{y}"
                words = {
                    "key": key, "slide": "bench", "x": x, "y": y, "mpp": MPP, "level": 0, "read_size": 512,
                    "size": SIZE, "coverage": 1.0, "status": "ok",
                }  # fmt: skip
                file = simplejpeg.encode_jpeg(pixels, QUALITY, colorsubsampling="420")
                for ending, content in (("jpg", file), ("json", json.dumps(words).encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return len(job.coords)

    return work


def half_limit(job: Job) -> Work:
    """Nothing but decoding the tiles at half scale, from memory."""
    return _limit(job, 2)


def full_limit(job: Job) -> Work:
    return _limit(job, 1)


def _limit(job: Job, reduce: int) -> Work:
    files = []
    with open_slide(job.slide) as slide:
        side = round(_geometry(slide, job.case).side) // SIZE  # tiles
        for x, y in (job.coords // SIZE).tolist():
            files += [slide.tile_jpeg(0, x + right, y + down) for down in range(side) for right in range(side)]
    small, buffer = SIZE // reduce, bytearray(3 * SIZE * SIZE)

    def work() -> int:
        for file in files:
            simplejpeg.decode_jpeg(file, "RGB", min_height=small, min_width=small, buffer=buffer)
        return len(job.coords)

    return work


SIDES = {
    one.__name__: one
    for one in (
        arrays, exact, shards, extract, fallback, openslide_arrays, openslide_shards, half_limit, full_limit,
    )
}  # fmt: skip


def _geometry(slide: Slide, case: Case) -> Geometry:
    return geometry(slide, size=SIZE, mpp=MPP, overlap=case.overlap)


def _count(slide: Slide, one: Geometry, job: Job, exact: bool) -> int:
    chunks = read_patches(slide, one, job.coords, lambda pixels, _: pixels, exact=exact, threads=job.threads)
    return sum(len(chunk.value) for chunk in chunks)


def _plan(slide: Slide, job: Job) -> Plan:
    one = _geometry(slide, job.case)
    cover = np.ones(len(job.coords), np.float32)
    return Plan("bench", "", slide.size, slide.mpp, slide.mpp_source, slide.levels, one, job.coords, cover)


def _openslide_loop(job: Job) -> Iterator[np.ndarray]:
    read = round(SIZE * MPP / SLIDES[job.case.slide])
    with openslide.OpenSlide(job.slide) as slide:
        if job.case.cache is not None:
            slide.set_cache(openslide.OpenSlideCache(job.case.cache))
        for x, y in job.coords.tolist():
            pixels = np.asarray(slide.read_region((x, y), 0, (read, read)))
            if read != SIZE:
                pixels = cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)


# --- whether both sides do the same --------------------------------------------------------------------------------


def check(folder: Path, count: int) -> dict[str, float]:
    """Compare `count` patches of each case with openslide's pixels, area-averaged.

    Returns:
        exact, passed: patches that are not equal to the bit, in exact mode and passed through; drift: of the fast way,
        mean difference in levels of 255.
    """
    found = {"exact": 0, "passed": 0, "drift": 0.0, "patches": 0}
    drift = []
    for name, case in CASES.items():
        coords = _some(folder, name, count)
        with open_slide(folder / case.slide) as slide, openslide.OpenSlide(folder / case.slide) as peer:
            one = _geometry(slide, case)
            side = round(one.side)
            wanted = [np.asarray(peer.read_region((x, y), 0, (side, side)).convert("RGB")) for x, y in coords.tolist()]
            if side != SIZE:
                wanted = [cv2.resize(each, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for each in wanted]
            for exact in (True, False):
                chunks = read_patches(slide, one, coords, lambda pixels, _: pixels, exact=exact)
                got = np.concatenate([chunk.value for chunk in chunks])
                if exact:
                    found["exact"] += sum(not np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
                elif one.reduce > 1:
                    drift.append(cv2.absdiff(got, np.stack(wanted)).mean())
            if name == "native":
                job = Job(folder / case.slide, case, coords, 1, folder)
                chunks = stream(slide, _plan(slide, job), slice(None))
                files = [file for chunk in chunks for file in chunk.value.files or []]
                pixels = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
                stored = [slide.tile_jpeg(0, x, y) for x, y in (coords // SIZE).tolist()]
                found["passed"] += sum(
                    a != b or not np.array_equal(c, d) for a, b, c, d in zip(files, stored, pixels, wanted, strict=True)
                )
        found["patches"] += len(coords)
    found["drift"] = float(np.mean(drift))
    return found


def _some(folder: Path, case: str, count: int) -> np.ndarray:
    """The first patches of a case; all for 0."""
    coords = np.load(folder / f"{case}.npy", allow_pickle=False)
    return coords[: count or None]


def few_places(folder: Path, name: str, count: int) -> str:
    """What other people's readers are told, as slide|places|level-0 pixels of a patch: the first `count` places."""
    places = folder / f"{name}-{count}.npy"
    np.save(places, _some(folder, name, count))
    case = CASES[name]
    return f"{folder / case.slide}|{places}|{round(SIZE * MPP / SLIDES[case.slide])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("make")
    made.add_argument("folder", type=Path)
    made.add_argument("--texture", type=Path)
    same = verbs.add_parser("check")
    same.add_argument("folder", type=Path)
    same.add_argument("--count", type=int, default=100)
    few = verbs.add_parser("few")
    few.add_argument("case", choices=CASES)
    few.add_argument("folder", type=Path)
    few.add_argument("count", type=int)
    ran = verbs.add_parser("run")
    ran.add_argument("side", choices=SIDES)
    ran.add_argument("case", choices=CASES)
    ran.add_argument("folder", type=Path)
    ran.add_argument("--count", type=int, default=0)
    ran.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    if chosen.verb == "make":
        return make(chosen.folder, chosen.texture)
    if chosen.verb == "check":
        return print(json.dumps(check(chosen.folder, chosen.count)))
    case = CASES[chosen.case]
    if chosen.verb == "few":
        return print(few_places(chosen.folder, chosen.case, chosen.count))
    with tempfile.TemporaryDirectory(dir=chosen.folder) as out:
        coords = _some(chosen.folder, chosen.case, chosen.count)
        work = SIDES[chosen.side](Job(chosen.folder / case.slide, case, coords, chosen.threads, Path(out)))
        wall, cpu = time.perf_counter(), time.process_time()
        patches = work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"patches": patches, "wall": wall, "cpu": cpu, "rss_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
