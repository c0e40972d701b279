"""Arrays as a source: images and labels that lie as numbers in an `.npz` (MedMNIST) or in HDF5 files (PatchCamelyon).

    {arrays: {images: "pathmnist_224.npz:test_images", labels: "pathmnist_224.npz:test_labels"}}
    {arrays: {images: "test_x.h5:x", labels: "test_y.h5:y"}}
    {arrays: {images: "chestmnist.npz:test_images", labels: "chestmnist.npz:test_labels", columns: [Atelectasis, …]}}

The metadata is `number` (of the image in its array) and `label` (the number of its class), or with `columns` a 0 or 1
by the name of each. Files are not trusted: nothing is unpickled, an array says its size before it is read, and HDF5 may
not lead to other files. An `.npz` is held in memory; of HDF5 each image is read by itself.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.raw import RawSample
from medclip.types import UserError

_MOST_BYTES = 8 << 30  # of an array in an .npz: the largest, TissueMNIST's training images at 224 pixels, has 8.3e9
_FORM = "{images: 'FILE:ARRAY', labels: 'FILE:ARRAY', columns: […]}"


@dataclass(frozen=True)
class Stored:
    """One array in a file: of an `.npz` the values, of HDF5 the place, opened once by each process that reads."""

    path: str
    name: str
    shape: tuple[int, ...]
    values: np.ndarray | None
    _open: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def row(self, i: int) -> np.ndarray:
        """Row i.

        Raises:
            BadSample: HDF5 that cannot be read.
        """
        if self.values is not None:
            return self.values[i]
        process = os.getpid()  # a handle must not be shared with the process that this one was forked from
        try:
            if process not in self._open:
                self._open[process] = _dataset(h5py.File(self.path, "r"), self.name)
            return np.asarray(self._open[process][i])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise BadSample("read error", f"{self.path}:{self.name}: {str(error)[:160]}") from None


@dataclass(frozen=True)
class ArraySource:
    """Images of an array.

    Args:
        name: in messages and reports.
        images: uint8 (n, h, w) grey, or (n, h, w, 3) RGB.
        labels: int64 (n,), or 0 and 1 (n, c) with `columns`; None where there are none.
        columns: names of the labels' columns; () for numbers of classes.
        rows: int64, numbers of the images that are in.
        caption: how captions are made.
        weight: passes per epoch.
        problems: none.
    """

    name: str
    images: Stored
    labels: np.ndarray | None
    columns: tuple[str, ...]
    rows: np.ndarray
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def chunks(self) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return f"{self.images.name}/{int(self.rows[i]):07d}"

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        pixels = self.images.row(int(self.rows[i]))
        # Uncompressed BMP, since whoever decodes wants a file: a copy of the pixels and a header.
        done, file = cv2.imencode(".bmp", pixels[..., ::-1] if pixels.ndim == 3 else pixels)
        if not done:
            raise BadSample("broken image", f"{self.images.name} {self.rows[i]} of shape {pixels.shape}")
        return RawSample(self.key(i), file.tobytes(), None, self._meta(i))

    def fields(self, i: int) -> dict[str, Any]:
        return {"key": self.key(i), "caption": None, **self._meta(i)}

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> ArraySource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        parts: list[Any] = [self.images.path, self.images.name, Path(self.images.path).stat().st_mtime_ns]
        if self.labels is not None:
            parts.append(digest(self.labels))
        return fingerprint([*parts, digest(self.rows)])

    def _meta(self, i: int) -> dict[str, Any]:
        number = int(self.rows[i])
        if self.labels is None:
            return {"number": number}
        if self.columns:
            return {"number": number} | dict(zip(self.columns, self.labels[number].tolist(), strict=True))
        return {"number": number, "label": int(self.labels[number])}


def open_arrays(name: str, config: Any, caption: CaptionRule, weight: float = 1.0) -> ArraySource:
    """The images of an array as a source.

    Args:
        name: of the source.
        config: {images: FILE:ARRAY, labels: FILE:ARRAY, columns: names of the labels' columns}; see above.
        caption: how captions are made; of metadata fields, for arrays have no text.
        weight: passes per epoch.

    Raises:
        UserError: a missing or unreadable file, no such array, or arrays that do not belong together.
    """
    if not isinstance(config, Mapping) or not config.get("images") or set(config) - {"images", "labels", "columns"}:
        raise UserError(f"source {name}: arrays is {config!r}: write {_FORM}")
    if caption.needs_text:
        raise UserError(f"source {name}: arrays have no captions: set caption=false")
    images = _stored(name, str(config["images"]))
    if len(images.shape) not in (3, 4) or (len(images.shape) == 4 and images.shape[3] != 3):
        raise UserError(
            f"source {name}: {images.path}:{images.name} has the shape {images.shape}: images are (n, h, w) or "
            "(n, h, w, 3)"
        )
    columns = tuple(map(str, config.get("columns") or ()))
    labels = None
    if config.get("labels"):
        stored = _stored(name, str(config["labels"]), pixels=False)
        assert stored.values is not None
        labels = stored.values.reshape(len(stored.values), -1)
        if len(labels) != images.shape[0]:
            raise UserError(f"source {name}: {len(labels)} labels for {images.shape[0]} images: give those of one part")
        if labels.shape[1] != (len(columns) or 1):
            raise UserError(
                f"source {name}: {stored.path}:{stored.name} has {labels.shape[1]} labels an image, but arrays.columns "
                f"names {len(columns)}: name each column, or none of a single one"
            )
        labels = labels if columns else labels[:, 0]
    return ArraySource(name, images, labels, columns, np.arange(images.shape[0]), caption, weight)


def _stored(source: str, place: str, *, pixels: bool = True) -> Stored:
    path, colon, name = place.rpartition(":")
    file = Path(path).expanduser()
    if not colon or not name:
        raise UserError(f"source {source}: arrays names {place!r}: write FILE:ARRAY")
    if not file.is_file():
        raise UserError(f"source {source}: {path} is not there: check the path (relative to {Path.cwd()})")
    try:
        if file.suffix.lower() == ".npz":
            values = _npz(file, name)
            stored, kind = Stored(str(file), name, values.shape, values), values.dtype
        elif file.suffix.lower() in (".h5", ".hdf5"):
            with h5py.File(file, "r") as opened:
                dataset = _dataset(opened, name)
                values = None if pixels else _bounded(dataset)
                stored, kind = Stored(str(file), name, tuple(dataset.shape), values), dataset.dtype
        else:
            raise ValueError(f"unknown ending {file.suffix!r}: use .npz, .h5 or .hdf5")
        if kind != np.uint8 if pixels else kind.kind not in "iub":
            raise ValueError(f"{name} holds {kind}, not {'uint8 pixels' if pixels else 'whole numbers'}")
    except KeyError as error:
        raise UserError(f"source {source}: {path} has no array {name!r} (it has {error.args[0]})") from None
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"source {source}: cannot read {path}: {str(error)[:200]}: download it again") from error
    return stored


def _npz(file: Path, name: str) -> np.ndarray:
    """One member, whose header is read before its values; pickled objects are refused."""
    with zipfile.ZipFile(file) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise KeyError(_some([Path(member).stem for member in archive.namelist()]))
        with archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(member)
        if kind.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not unpickled")
        if (size := int(np.prod(shape, dtype=object)) * kind.itemsize) > _MOST_BYTES:
            raise ValueError(f"{name} would be {size / 2**30:.1f} GiB, over the limit of {_MOST_BYTES >> 30}")
        with archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """An array of HDF5 that lies in this very file."""
    if name not in file:
        raise KeyError(_some(list(file)))
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise ValueError(f"{name} is no array of this file")
    return found


def _bounded(dataset: h5py.Dataset) -> np.ndarray:
    if dataset.size * dataset.dtype.itemsize > 1 << 28:
        raise ValueError(f"{dataset.name} has {dataset.size} values: too many for labels")
    return np.asarray(dataset[()])


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
