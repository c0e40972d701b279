"""Other people's slide readers for the slide benchmark: their environments, and one measured pass by one of them.

    python scripts/bench/_slide_peers.py install [NAME...]         # says which installed, and why others did not
    ENV/bin/python scripts/bench/_slide_peers.py worker METHOD SLIDE COORDS.npy LEVEL READ_SIZE OUT_SIZE [--threads N]

Each peer has a virtual environment of its own below `~/.cache/medclip/bench-peers`, since their pins contradict each
other and ours. It sees the packages of the Python that installs it, so what fits is not installed twice (tiatoolbox
still takes 4 GB). A worker is a process of its own that prints one line of JSON: {patches, wall, cpu, rss_mb, check}.
Imports are not timed, opening the slide is; `check` is the mean of the patches' middle pixels, equal for readers that
see the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("MEDCLIP_BENCH_PEERS", "~/.cache/medclip/bench-peers")).expanduser()


@dataclass(frozen=True)
class Peer:
    """A package to measure.

    Args:
        package: its name.
        module: that must be importable afterwards.
        ways: to install it, tried in turn: what pip is asked for, and what of that without its dependencies.
    """

    package: str
    module: str
    ways: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


PEERS = {
    # all of its dependencies are 3 GB of CUDA, which reading on the CPU does not need
    "cucim": Peer("cucim-cu12", "cucim", ((("lazy-loader",), ("cucim-cu12",)), (("cucim-cu12",), ()))),
    "tiffslide": Peer("tiffslide", "tiffslide", ((("tiffslide",), ()),)),
    "pyvips": Peer("pyvips", "pyvips", ((("pyvips[binary]>=2.2",), ()),)),
    "tiatoolbox": Peer("tiatoolbox", "tiatoolbox.wsicore.wsireader", ((("tiatoolbox",), ()),)),
    # histolab 0.7 asks for numpy <= 1.24.4 and scikit-image < 0.19.4, to be compiled; it reads slides with newer ones
    "histolab": Peer("histolab", "histolab.slide", ((("scikit-image",), ("histolab==0.7.0",)),)),
    "lazyslide": Peer("lazyslide", "wsidata", ((("lazyslide",), ()),)),
}
METHODS = {
    "openslide_loop": None, "cucim_loop": "cucim", "cucim_batch": "cucim", "tiffslide": "tiffslide",
    "pyvips": "pyvips", "tiatoolbox": "tiatoolbox", "histolab": "histolab", "lazyslide": "lazyslide",
}  # fmt: skip


def install(names: list[str] | None = None, cache: Path = CACHE) -> dict[str, tuple[Path | None, str]]:
    """Make the peers' environments; those that are there and work are left as they are.

    Args:
        names: keys of `PEERS`; None: all.
        cache: folder of the environments.

    Returns:
        By name: (its Python, its version), or (None, why it is not there).
    """
    found: dict[str, tuple[Path | None, str]] = {}
    for name in names or PEERS:
        peer, folder = PEERS[name], cache / name
        python = folder / "bin" / "python"
        try:
            version = _version(python, peer) if python.exists() else None
            if version is None:
                _create(folder)
                version = _install(python, peer)
            found[name] = python, version
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            found[name] = None, str(error)
    return found


def run(
    method: str,
    slide: Path,
    coords: Path,
    level: int,
    read_size: int,
    out_size: int,
    python: Path | str,
    threads: int = 1,
    timeout: float = 600,
) -> dict[str, Any]:
    """One measured pass of `method` in a process of its own; `python` is the peer's.

    Raises:
        RuntimeError: it failed, with the last line that it said.
    """  # fmt: skip
    command = [
        str(python), "-P", str(Path(__file__).resolve()), "worker", method, str(slide), str(coords), str(level),
        str(read_size), str(out_size), "--threads", str(threads),
    ]  # fmt: skip
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VIPS_CONCURRENCY")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | limits, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{method}: not done after {timeout:g} s") from None
    if done.returncode:
        raise RuntimeError(f"{method}: {_last(done.stderr) or f'ended with {done.returncode}'}")
    return json.loads(_last(done.stdout))


def _create(folder: Path) -> None:
    """An empty environment that also sees the packages of this Python, after its own."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


def _install(python: Path, peer: Peer) -> str:
    why = ""
    for number, (whole, bare) in enumerate(peer.ways):
        if number:
            _create(python.parents[1])
        for what in (["--no-deps", *bare] if bare else [], list(whole)):
            done = _pip(python, what) if what else None
            if done is not None and done.returncode:
                why = _last(done.stderr)
                break
        else:
            version = _version(python, peer)
            if version is not None:
                return version + (" (without its pins)" if bare else "")
            why = _import_error(python, peer)
    raise RuntimeError(why)


def _pip(python: Path, what: list[str]) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)


def _version(python: Path, peer: Peer) -> str | None:
    """The version, where the module imports; else None."""
    code = f"import importlib.metadata as m, {peer.module}; print(m.version({peer.package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=300, check=False)
    return None if done.returncode else _last(done.stdout)


def _import_error(python: Path, peer: Peer) -> str:
    done = subprocess.run([str(python), "-c", f"import {peer.module}"], capture_output=True, text=True, check=False)
    return f"installs, but `import {peer.module}` says: {_last(done.stderr)}"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# --- below: what a worker runs. Only the method's own packages are imported, by name, before the clock starts.

Reader = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Job:
    """What to read: squares of `read` pixels of a level at level-0 places, within the slide, shrunk to `out` pixels."""

    slide: str
    coords: Any  # int (n, 2)
    level: int
    read: int
    out: int
    threads: int


def _shrink(pixels: Any, out: int) -> Any:
    cv2 = importlib.import_module("cv2")
    return pixels if pixels.shape[0] == out else cv2.resize(pixels, (out, out), interpolation=cv2.INTER_AREA)


def _on_white(rgba: Any) -> Any:
    """RGB of an array with alpha; what was not scanned becomes white."""
    np = importlib.import_module("numpy")
    rgb, alpha = rgba[..., :3], rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(rgb)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def openslide_loop(job: Job) -> Reader:
    openslide, np = (importlib.import_module(name) for name in ("openslide", "numpy"))

    def patches() -> Iterator[Any]:
        with openslide.OpenSlide(job.slide) as slide:
            for x, y in job.coords:
                pixels = np.asarray(slide.read_region((int(x), int(y)), job.level, (job.read, job.read)))
                yield _shrink(_on_white(pixels), job.out)

    return patches


def cucim_loop(job: Job) -> Reader:
    cucim, np = (importlib.import_module(name) for name in ("cucim", "numpy"))

    def patches() -> Iterator[Any]:
        slide = cucim.CuImage(job.slide)
        for x, y in job.coords:
            region = slide.read_region(location=(int(x), int(y)), size=(job.read, job.read), level=job.level)
            yield _shrink(np.asarray(region), job.out)

    return patches


def cucim_batch(job: Job) -> Reader:
    cucim, np = (importlib.import_module(name) for name in ("cucim", "numpy"))

    def patches() -> Iterator[Any]:
        slide = cucim.CuImage(job.slide)
        regions = slide.read_region(
            location=[(int(x), int(y)) for x, y in job.coords], size=(job.read, job.read), level=job.level,
            batch_size=16, num_workers=job.threads, prefetch_factor=2,
        )  # fmt: skip
        left = len(job.coords)
        for batch in regions:
            for pixels in np.asarray(batch).reshape(-1, job.read, job.read, 3)[:left]:
                yield _shrink(pixels, job.out)
                left -= 1

    return patches


def tiffslide(job: Job) -> Reader:
    module = importlib.import_module("tiffslide")

    def patches() -> Iterator[Any]:
        with module.TiffSlide(job.slide) as slide:
            for x, y in job.coords:
                place = (int(x), int(y))
                yield _shrink(slide.read_region(place, job.level, (job.read, job.read), as_array=True), job.out)

    return patches


def pyvips(job: Job) -> Reader:
    module, tifffile, np = (importlib.import_module(name) for name in ("pyvips", "tifffile", "numpy"))
    with tifffile.TiffFile(job.slide) as tiff:  # libvips counts IFDs, thumbnail included
        levels = tiff.series[0].levels
        page = levels[job.level].keyframe.index
        down = round(levels[0].shape[1] / levels[job.level].shape[1])

    def patches() -> Iterator[Any]:
        region = module.Region.new(module.Image.tiffload(job.slide, page=page))
        for x, y in job.coords:
            raw = region.fetch(int(x) // down, int(y) // down, job.read, job.read)
            yield _shrink(np.frombuffer(raw, np.uint8).reshape(job.read, job.read, -1)[..., :3], job.out)

    return patches


def tiatoolbox(job: Job) -> Reader:
    module = importlib.import_module("tiatoolbox.wsicore.wsireader")

    def patches() -> Iterator[Any]:
        slide = module.WSIReader.open(job.slide)
        mpp = float(slide.info.mpp[0]) * slide.info.level_downsamples[job.level] * job.read / job.out
        for x, y in job.coords:
            yield slide.read_rect((int(x), int(y)), (job.out, job.out), resolution=mpp, units="mpp")

    return patches


def histolab(job: Job) -> Reader:
    module, np = (importlib.import_module(name) for name in ("histolab.slide", "numpy"))
    corners = importlib.import_module("histolab.types").CoordinatePair

    def patches() -> Iterator[Any]:
        with tempfile.TemporaryDirectory() as folder:
            slide = module.Slide(job.slide, folder)
            side = job.read * round(slide.level_dimensions(0)[0] / slide.level_dimensions(job.level)[0])
            for x, y in job.coords:
                place = corners(int(x), int(y), int(x) + side, int(y) + side)
                tile = slide.extract_tile(place, tile_size=(job.read, job.read), level=job.level)
                yield _shrink(np.asarray(tile.image.convert("RGB")), job.out)

    return patches


def lazyslide(job: Job) -> Reader:
    module = importlib.import_module("wsidata")

    def patches() -> Iterator[Any]:
        reader = module.open_wsi(job.slide, store=None).reader
        for x, y in job.coords:
            yield _shrink(reader.get_region(int(x), int(y), job.read, job.read, level=job.level)[..., :3], job.out)

    return patches


def measure(method: str, job: Job) -> dict[str, float]:
    """Read all patches; what it took."""
    patches = globals()[method](job)
    _shrink(importlib.import_module("numpy").zeros((2, 2, 3), "uint8"), 1)  # loads OpenCV
    total, count = 0.0, 0
    wall, cpu = time.perf_counter(), _cpu()
    for patch in patches():
        if patch.shape != (job.out, job.out, 3):
            raise RuntimeError(f"a patch of {patch.shape}, not {job.out} pixels")
        total += float(patch[job.out // 2, job.out // 2].sum()) / 3
        count += 1
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"patches": count, "wall": wall, "cpu": cpu, "rss_mb": peak, "check": total / max(count, 1)}


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("install").add_argument("names", nargs="*", choices=[[], *PEERS], help="peers (all)")
    worker = verbs.add_parser("worker")
    worker.add_argument("method", choices=METHODS)
    worker.add_argument("slide")
    worker.add_argument("coords")
    for name in ("level", "read_size", "out_size"):
        worker.add_argument(name, type=int)
    worker.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.verb == "install":
        for name, (python, said) in install(chosen.names).items():
            print(f"{name:<12} {said}" if python else f"{name:<12} not installed: {said}")
        return 0
    coords = importlib.import_module("numpy").load(chosen.coords, allow_pickle=False)
    job = Job(chosen.slide, coords, chosen.level, chosen.read_size, chosen.out_size, chosen.threads)
    print(json.dumps(measure(chosen.method, job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
