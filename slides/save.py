"""Where patches go: webdataset shards, single files, or CLAM's HDF5 of pixels. A block appears whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import h5py
import numpy as np
import orjson

from slides import tar
from slides.entry import Entry, member_name
from slides.files import renamed, write_whole, written
from slides.h5 import Layout, attributes
from slides.patches import CORRUPT, STATUS, Chunk
from slides.plan import Plan
from slides.stream import Made


class Saver(Protocol):
    """Takes a block's chunks in order."""

    @property
    def wants_files(self) -> bool: ...  # else pixels

    def begin(self, plan: Plan, number: int) -> None: ...

    def add(self, entry: Entry, plan: Plan, rows: np.ndarray, chunk: Chunk[Made]) -> None: ...

    def end(self) -> tuple[str, int]: ...  # name of what was written, or "", and its bytes

    def drop(self) -> None: ...  # the block failed: nothing is left of it


def metadata(entry: Entry, plan: Plan, row: int, status: int) -> bytes:
    """The JSON beside a patch: all that is needed to find it again, and what the user's table says of its slide."""
    one = plan.geometry
    x, y = plan.coords[row].tolist()
    known = {
        "key": member_name(entry.slide, x, y),
        "slide": entry.slide,
        "x": x,
        "y": y,
        "mpp": one.mpp,
        "level": one.level,
        "read_size": one.read,
        "size": one.size,
        "coverage": round(float(plan.coverage[row]), 4),
        "status": STATUS[status],
    }
    return orjson.dumps({**entry.extra, **known})


class ShardSaver:
    """OUT/shards/SLIDE-00000.tar: KEY.jpg and KEY.json of a block's patches; corrupt ones are not in it."""

    wants_files = True

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder, self.ending = folder, ending
        self._name = ""
        self._file: BinaryIO | None = None

    def begin(self, plan: Plan, number: int) -> None:
        self._name = f"{plan.slide}-{number:05d}.tar"
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb", buffering=1 << 20)

    @property
    def _part(self) -> Path:
        return self.folder / f".{self._name}.{os.getpid()}.part"

    def add(self, entry: Entry, plan: Plan, rows: np.ndarray, chunk: Chunk[Made]) -> None:
        assert self._file is not None and chunk.value.files is not None
        members: list[bytes] = []
        for row, status, file in zip(rows.tolist(), chunk.status.tolist(), chunk.value.files, strict=True):
            if status == CORRUPT:
                continue
            key = member_name(entry.slide, *plan.coords[row].tolist())
            members.append(tar.member(f"{key}.{self.ending}", file))
            members.append(tar.member(f"{key}.json", metadata(entry, plan, row, status)))
        with written(self._part):
            self._file.writelines(members)

    def end(self) -> tuple[str, int]:
        assert self._file is not None
        with written(self._part):
            self._file.write(tar.END)
        return self._name, _complete(self._file, self._part, self.folder / self._name)

    def drop(self) -> None:
        _discard(self._file, self._part)


class FileSaver:
    """OUT/images/SLIDE/X_Y.jpg."""

    wants_files = True

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder, self.ending = folder, ending
        self._bytes = 0

    def begin(self, plan: Plan, number: int) -> None:
        self._bytes = 0
        for part in (self.folder / plan.slide).glob(".*.part"):
            part.unlink(missing_ok=True)

    def add(self, entry: Entry, plan: Plan, rows: np.ndarray, chunk: Chunk[Made]) -> None:
        assert chunk.value.files is not None
        for (x, y), status, file in zip(
            plan.coords[rows].tolist(), chunk.status.tolist(), chunk.value.files, strict=True
        ):
            if status != CORRUPT:
                write_whole(self.folder / entry.slide / f"{x}_{y}.{self.ending}", file, durable=False)
                self._bytes += len(file)

    def end(self) -> tuple[str, int]:
        return "", self._bytes

    def drop(self) -> None:
        pass  # each file was written whole, and will be again


class ArraySaver:
    """OUT/arrays/SLIDE.h5 as CLAM's image mode has it: `imgs` uint8 (n, size, size, 3), `coords`.

    Blocks wait in the state folder, as bare pixels, until all are there; a corrupt patch has no row.
    """

    wants_files = False

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder, self.state = folder, state
        self._name = ""
        self._file: BinaryIO | None = None

    def begin(self, plan: Plan, number: int) -> None:
        self._name = f"pixels-{number:05d}"
        with written(self.state):
            self.state.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")

    @property
    def _part(self) -> Path:
        return self.state / f".{self._name}.{os.getpid()}.part"

    def add(self, entry: Entry, plan: Plan, rows: np.ndarray, chunk: Chunk[Made]) -> None:
        assert self._file is not None and chunk.value.pixels is not None
        with written(self._part):
            self._file.write(chunk.value.pixels[chunk.status != CORRUPT].tobytes())

    def end(self) -> tuple[str, int]:
        assert self._file is not None
        return "", _complete(self._file, self._part, self.state / self._name)

    def drop(self) -> None:
        _discard(self._file, self._part)

    def finish(self, plan: Plan, status: np.ndarray, layout: Layout) -> None:
        """All blocks to one file."""
        side = plan.geometry.size
        keep = status != CORRUPT
        with renamed(self.folder / f"{plan.slide}.h5") as part, h5py.File(part, "w") as file:
            images = file.create_dataset(
                "imgs",
                shape=(int(keep.sum()), side, side, 3),
                maxshape=(None, side, side, 3),
                chunks=(1, side, side, 3),
                dtype=np.uint8,
            )
            images.attrs.update(attributes("clam", plan, str(self.folder)) | {"wsi_name": plan.slide})
            place = 0
            for block in sorted(self.state.glob("pixels-*")):
                if block.stat().st_size:  # a file of no bytes cannot be mapped
                    pixels = np.memmap(block, np.uint8, "r").reshape(-1, side, side, 3)
                    images[place : place + len(pixels)] = pixels
                    place += len(pixels)
            coords = file.create_dataset("coords", data=plan.coords[keep].astype(np.int32), maxshape=(None, 2))
            coords.attrs.update(attributes(layout, plan, str(self.folder)))


def _complete(file: BinaryIO, part: Path, path: Path) -> int:
    """Flush a file to the disk and give it its name; its bytes."""
    with written(part):
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.close()
        part.replace(path)
    return size


def _discard(file: BinaryIO | None, part: Path) -> None:
    if file is not None:
        with suppress(OSError):  # what it still holds may not fit on the disk either
            file.close()
        with suppress(OSError):
            part.unlink(missing_ok=True)
