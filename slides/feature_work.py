"""One slide on its way to features: opened and planned, its blocks kept on disk, at the end its file."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from slides.colours import Change, recolour
from slides.entry import Entry
from slides.errors import SlideError, said
from slides.files import Busy, OutputError, alone, sweep, write_whole, written
from slides.h5 import Layout, read_coords, side_of, write_features
from slides.identity import identity
from slides.open import open_slide
from slides.patches import CORRUPT, SPARSE, read_patches
from slides.plan import Plan, make_plan, plan_at
from slides.reader import Slide
from slides.request import Request, digest

Told = Callable[[Plan, Path, np.ndarray], None]  # plan, file, features (n, d)


@dataclass(frozen=True)
class FeatureOutput:
    """Where features go.

    Args:
        folder: OUT.
        layout: of the HDF5: trident or clam.
        format: h5 or zarr.
        batch_size: patches that the model is given at once.
        block: patches whose features are written at once; what a kill can cost.
        coords: folder of CLAM's, TRIDENT's or our files of coordinates, whose patches are taken instead of new ones.
    """

    folder: str
    layout: Layout = "trident"
    format: Literal["h5", "zarr"] = "h5"
    batch_size: int = 64
    block: int = 4096
    coords: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in ("clam", "trident") or self.format not in ("h5", "zarr"):
            raise SlideError(f"layout {self.layout!r}, format {self.format!r}: choose clam or trident, h5 or zarr")
        if self.batch_size < 1 or self.block < 1:
            raise SlideError(f"batch_size {self.batch_size} and block {self.block} must be at least 1")

    @property
    def path(self) -> Path:
        return Path(self.folder).expanduser()


class SlideWork:
    """A slide of a run.

    The reading thread fills `status` ahead of the features, which come in the same order; both together tell which
    rows a block covers.
    """

    def __init__(self, entry: Entry, folder: Path, mark: str, output: FeatureOutput) -> None:
        self.entry, self.folder, self.mark, self.output = entry, folder, mark, output
        self.row: dict[str, Any] = {"slide": entry.slide, "path": entry.path, "settings": mark, "patches": 0}
        self.plan: Plan | None = None
        self.slide: Slide | None = None
        self.change: Change | None = None
        self.identity = ""
        self.done = 0  # rows whose features are on disk
        self.status = np.zeros(0, np.uint8)
        self.blocks: list[np.ndarray] = []  # features on disk
        self.waiting: list[np.ndarray] = []  # features that are not
        self.held = ExitStack()
        self.started = time.perf_counter()

    def __len__(self) -> int:
        return 0 if self.plan is None else len(self.plan)

    @property
    def state(self) -> Path:
        return self.folder / "state" / self.entry.slide

    @property
    def target(self) -> Path:
        below = "h5_files" if self.output.layout == "clam" and self.output.format == "h5" else ""
        return self.folder / below / f"{self.entry.slide}.{self.output.format}"

    def open(self, request: Request) -> None:
        """Lock, open and plan it, take up what a killed run left; or learn why not, which `row` then says.

        Raises:
            OutputError: nothing can be written.
        """
        try:
            self.held.enter_context(alone(self.folder / "state" / f"{self.entry.slide}.lock"))
            sweep([self.folder, self.folder / "state", self.target.parent], self.entry.slide)
            if self._is_finished():
                shutil.rmtree(self.state, ignore_errors=True)  # killed between the row and this
                self.close()
                return
            self.slide = self.held.enter_context(open_slide(self.entry.path, mpp=self.entry.mpp, exact=request.exact))
            self.identity = identity(self.entry.path)
            self.change = recolour(self.slide, request, self._take_up(self.slide, request))
        except OutputError:
            raise
        except Busy as error:
            self.row |= {"status": "busy", "reason": str(error)}
        except Exception as error:  # one bad slide is never the end of the run
            self.failed(error)
            self.close()

    def failed(self, error: Exception) -> None:
        """Keep why in the slide's row, and have done with it."""
        self.row |= {"status": "failed", "reason": said(error)}
        self.plan = None
        self._note()

    def _is_finished(self) -> bool:
        try:
            row = orjson.loads(self.state.with_name(f"{self.entry.slide}.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return False
        if row.get("settings") != self.mark or row.get("status") not in ("ok", "empty"):
            return False
        if row["status"] == "ok" and not self.target.exists():
            return False
        self.row = {key: value for key, value in row.items() if key != "table"}
        return True

    def _take_up(self, slide: Slide, request: Request) -> Plan:
        """The plan, and what a killed run has left of it."""
        if self.output.coords is not None:
            plan = self._given(slide, request, Path(self.output.coords).expanduser())
        else:
            plan = Plan.load(self.state / "plan.npz")
            if plan is None or plan.settings != request.fingerprint():
                plan, _ = make_plan(slide, self.entry.slide, request)
                plan.save(self.state / "plan.npz")
        self.plan = plan
        self.status = np.zeros(len(plan), np.uint8)
        mark = digest([self.mark, plan.settings])
        if not (self.state / "mark").is_file() or (self.state / "mark").read_text() != mark:
            for block in self.state.glob("block-*.npz"):
                block.unlink()
            write_whole(self.state / "mark", mark.encode())
        while (block := self._load(self.done)) is not None:
            status, features = block
            self.status[self.done : self.done + len(status)] = status
            self.done += len(status)
            self.blocks.append(features)
        return plan

    def _given(self, slide: Slide, request: Request, root: Path) -> Plan:
        for name in (f"{self.entry.slide}.h5", f"{self.entry.slide}_patches.h5"):
            if (root / name).is_file():
                coords, found = read_coords(root / name)
                return plan_at(slide, self.entry.slide, request, coords, side_of(root / name, found))
        raise SlideError(f"{self.entry.slide}: no coordinates in {root} (looked for {self.entry.slide}[_patches].h5)")

    def _load(self, first: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The block that begins with a row, where it is on disk and fits."""
        try:
            with np.load(self._block(first), allow_pickle=False) as file:
                status, features = file["status"], file["features"]
        except Exception:  # a damaged zip makes its readers raise anything
            return None
        fits = first + len(status) <= len(self) and len(features) == int((status != CORRUPT).sum()) and len(status)
        return (status, features) if fits else None

    def _block(self, first: int) -> Path:
        return self.state / f"block-{first:09d}.npz"

    def read(self, request: Request, threads: int) -> Iterator[np.ndarray]:
        """Patches that still need features, uint8 (n, size, size, 3) at a time, without corrupt ones."""
        if self.plan is None or self.slide is None:
            return
        place, change = self.done, self.change

        def then(pixels: np.ndarray, status: np.ndarray) -> np.ndarray:
            pixels = pixels if not (status == CORRUPT).any() else pixels[status != CORRUPT]
            return pixels if change is None else change(pixels)

        chunks = read_patches(
            self.slide, self.plan.geometry, self.plan.coords[place:], then, exact=request.exact, threads=threads
        )
        for chunk in chunks:
            self.status[place : place + len(chunk.status)] = chunk.status
            place += len(chunk.status)
            if chunk.broken:
                self.row.setdefault("reason", chunk.broken[0])
            yield chunk.value

    def take(self, features: np.ndarray) -> None:
        """The next features, (n, d); full blocks go to disk."""
        if len(features):
            self.waiting.append(features)
        count = sum(map(len, self.waiting))
        if count >= self.output.block:
            # Up to the row of the last feature; corrupt rows after it belong to the next block.
            good = np.cumsum(self.status[self.done :] != CORRUPT)
            self._flush(int(np.searchsorted(good, count)) + 1)

    def _flush(self, rows: int) -> None:
        features = np.concatenate(self.waiting) if self.waiting else np.zeros((0, 0), np.float32)
        raw = io.BytesIO()
        np.savez(raw, status=self.status[self.done : self.done + rows], features=features)
        write_whole(self._block(self.done), raw.getvalue())
        self.blocks.append(features)
        self.waiting = []
        self.done += rows

    def finish(self, encoder: str, told: Told | None = None, weights: str = "") -> None:
        """Write the slide's file, tell of it, write its row, and let go of it.

        `weights` is the encoder's fingerprint, an attribute of the features where there is one.
        """
        extra = {"slide_identity": self.identity} | ({"weights": weights} if weights else {})
        none = np.zeros((0, 0), np.float32)
        try:
            if self.plan is None:
                return
            features = np.concatenate([part for part in [*self.blocks, *self.waiting] if part.size] or [none])
            rows = np.flatnonzero(self.status != CORRUPT)
            self.row |= {
                "status": "ok" if len(rows) else "failed" if len(self.plan) else "empty",
                "patches": len(self.plan),
                "corrupt": len(self.plan) - len(rows),
                "sparse": int((self.status == SPARSE).sum()),
                "dim": features.shape[1],
                "slide_mpp": self.plan.mpp,
                "mpp": self.plan.geometry.mpp,
                "seconds": round(time.perf_counter() - self.started, 2),
            }
            if not len(rows):
                why = (
                    f"every patch is corrupt, e.g. {self.row.get('reason')}"
                    if len(self.plan)
                    else "no patch has tissue"
                )
                self.row["reason"] = why
                self._note()
                return
            if self.output.format == "zarr":
                write_zarr(self.target, self.plan, rows, features, encoder, extra)
            else:
                write_features(self.target, self.plan, rows, features, self.output.layout, encoder, extra)
            if told is not None:
                told(self.plan, self.target, features)
            self._note()  # last: a kill before it has the slide finished again
            with written(self.state):
                shutil.rmtree(self.state, ignore_errors=True)
        finally:
            self.close()

    def _note(self) -> None:
        # With what the user's table says, for the index that also other runs write.
        row = self.row | {"table": {key: str(value) for key, value in self.entry.extra.items()}}
        write_whole(self.state.with_name(f"{self.entry.slide}.json"), orjson.dumps(row))

    def close(self) -> None:
        """Let go of the file and the lock."""
        self.held.close()
        self.slide = None


def write_zarr(
    path: Path,
    plan: Plan,
    rows: np.ndarray,
    features: np.ndarray,
    encoder: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`features`, `coords` and `coverage` as a zarr group, its attributes those of the HDF5."""
    try:
        import zarr
    except ImportError:
        raise SlideError("format=zarr needs zarr: pip install 'medclip-adapt[zarr]'") from None
    from slides.h5 import attributes

    part = path.with_name(f".{path.name}.part")
    with written(path):
        shutil.rmtree(part, ignore_errors=True)
        group = zarr.open_group(str(part), mode="w")
        chunk = min(4096, len(rows))
        group.create_array("features", data=features, chunks=(chunk, features.shape[1]))
        group.create_array("coords", data=plan.coords[rows], chunks=(chunk, 2))
        group.create_array("coverage", data=plan.coverage[rows], chunks=(chunk,))
        known = attributes("trident", plan, str(path.parent)) | {"encoder": encoder} | dict(extra or {})
        group.attrs.update({k: v.item() if isinstance(v, np.generic) else v for k, v in known.items()})
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
