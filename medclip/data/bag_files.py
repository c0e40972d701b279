"""Files of features, one a slide: TRIDENT's and our features_*/ID.h5, CLAM's h5_files/ID.h5 and pt_files/ID.pt.

What a file holds (patches, width, encoder) is read from its header, features block by block into memory that is there
already, so that a bag costs its own size and nothing beside. Files are not trusted: nothing is unpickled, HDF5 may not
lead to other files, and a size is judged before anything of it is read.
"""

from __future__ import annotations

import functools
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch

from medclip.data.bad import BadSample
from medclip.phantoms.bags import ENCODER, SIDE, BagRecipe, bag_row, bag_size, make_bag
from medclip.types import UserError
from slides.errors import SlideError
from slides.h5 import side_of

_BLOCK = 4096  # rows read at a time
_MOST_BYTES = 32 << 30  # of a bag in float32
_ENDINGS = (".h5", ".pt")


class BagFile(Protocol):
    """Features of one slide."""

    @property
    def slide(self) -> str: ...

    @property
    def patches(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def encoder(self) -> str | None: ...  # its name, where the file says it

    @property
    def weights(self) -> str: ...  # fingerprint of that model's weights, "" where the file does not say it

    def read(self, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Fill `out` (n, dim), of any float type, with the rows asked for (ascending), or with all.

        Raises:
            BadSample: it cannot be read.
        """
        ...

    def about(self) -> dict[str, Any]:
        """`coords` int64 (n, 2) level-0, `side` of a patch in level-0 pixels, `planted` bool (n,): what is known."""
        ...


@dataclass(frozen=True)
class StoredBag:
    """An HDF5 file, or a tensor of its own."""

    slide: str
    path: str
    patches: int
    dim: int
    encoder: str | None
    weights: str = ""

    def read(self, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        try:
            if self.path.endswith(".pt"):
                values = _tensor(self.path)
                # With a mapped file only the pages of these rows are read.
                chosen = values if rows is None else values[torch.from_numpy(rows)]
                torch.from_numpy(out).copy_(chosen)
            else:
                with h5py.File(self.path) as file:
                    _fill(out, _dataset(file, "features"), rows)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise BadSample("read error", f"{self.path}: {str(error)[:160]}") from None

    def about(self) -> dict[str, Any]:
        if self.path.endswith(".pt"):
            return {}
        try:
            with h5py.File(self.path) as file:
                coords = _dataset(file, "coords")
                if coords.shape != (self.patches, 2):
                    raise ValueError(f"coords has shape {coords.shape} for {self.patches} patches")
                found: dict[str, Any] = {"coords": coords[:].astype(np.int64)}
                with suppress(SlideError):
                    found["side"] = side_of(Path(self.path), dict(coords.attrs))
                return found
        except KeyError:
            return {}
        except (OSError, ValueError, RuntimeError) as error:
            raise BadSample("read error", f"{self.path}: {str(error)[:160]}") from None


@dataclass(frozen=True)
class GeneratedBag:
    """A generated slide."""

    recipe: BagRecipe
    index: int

    @property
    def slide(self) -> str:
        return bag_row(self.recipe, self.index)["slide"]

    @property
    def patches(self) -> int:
        return bag_size(self.recipe, self.index)

    @property
    def dim(self) -> int:
        return self.recipe.dim

    @property
    def encoder(self) -> str | None:
        return ENCODER

    @property
    def weights(self) -> str:
        return ""

    def read(self, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        features = make_bag(self.recipe, self.index).features
        out[:] = features if rows is None else features[rows]

    def about(self) -> dict[str, Any]:
        bag = make_bag(self.recipe, self.index)
        return {"coords": bag.coords, "planted": bag.planted, "side": float(SIDE)}


def open_bag(path: str | Path) -> StoredBag:
    """A file by its header.

    Raises:
        BadSample: it cannot be read, or holds no features.
    """
    where = Path(path)
    try:
        state = where.stat()
        return _opened(str(where), state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise BadSample("read error", f"{where}: {error.strerror}") from None


@functools.lru_cache(maxsize=100_000)  # a config asks for the width before the data are opened
def _opened(path: str, changed: int, size: int) -> StoredBag:
    name = weights = None
    try:
        if path.endswith(".pt"):
            shape = tuple(_tensor(path).shape)
        else:
            with h5py.File(path) as file:
                data = _dataset(file, "features")
                shape = tuple(data.shape)
                if len(shape) == 3 and shape[0] == 1:  # TRIDENT's may have a batch axis
                    shape = shape[1:]
                name, weights = (_text(data.attrs.get(key)) for key in ("encoder", "weights"))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise BadSample("read error", f"{path}: {str(error)[:160]}") from None
    if len(shape) != 2:
        raise BadSample("no bag", f"{path}: features has shape {shape}, not (n, d)")
    if shape[0] * shape[1] * 4 > _MOST_BYTES:
        raise BadSample("over size limit", f"{path}: {shape[0]} x {shape[1]} features")
    return StoredBag(Path(path).stem, path, shape[0], shape[1], name, weights or "")


def _text(value: Any) -> str | None:
    """An attribute; a file says what it likes."""
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return None if value is None else str(value)


def find_bags(features: str | Sequence[str], key: str = "data.features") -> dict[str, Path]:
    """Files of features by the names of their slides.

    Args:
        features: a file, a folder, or several: a folder of such files, one that has h5_files/ or pt_files/ (CLAM;
            HDF5 comes first, which says more), or one that leads to a single features_*/ (TRIDENT, `medclip extract`).
        key: of the config, for messages.

    Raises:
        UserError: there is none, several encoders' folders, or two files of one slide.
    """
    places = [features] if isinstance(features, str | Path) else list(features)
    if not places or not all(isinstance(place, str | Path) for place in places):
        raise UserError(f"{key} is {features!r}: give a folder of features, or several")
    found: dict[str, Path] = {}
    for place in places:
        for path in _below(Path(place).expanduser(), key):
            if path.stem in found:
                raise UserError(
                    f"{key}: slide {path.stem} has two files, {found[path.stem]} and {path}: name one folder"
                )
            found[path.stem] = path
    return found


def _below(place: Path, key: str) -> list[Path]:
    if place.is_file() and place.suffix in _ENDINGS:
        return [place]
    if not place.is_dir():
        raise UserError(f"{key}: {place} is no folder, and no .h5 or .pt: name what `medclip extract` wrote")
    folders = [place, *(place / name for name in ("h5_files", "pt_files"))]
    for folder in folders:
        if files := _bags_in(folder):
            return files
    inner = sorted(
        {path for pattern in ("features_*", "*/features_*") for path in place.glob(pattern) if path.is_dir()}
    )
    if len(inner) > 1:
        names = ", ".join(str(path.relative_to(place)) for path in inner[:4])
        raise UserError(f"{key}: {place} has features of several encoders ({names}): name one of these folders")
    if not inner:
        raise UserError(f"{key}: no .h5 or .pt of features in {place}: run medclip extract save=[coords,features]")
    return _below(inner[0], key)


def _bags_in(folder: Path) -> list[Path]:
    """The HDF5 files of a folder, else its tensors."""
    for ending in _ENDINGS:
        if files := sorted(path for path in folder.glob(f"*{ending}") if not path.name.startswith(".")):
            return files
    return []


def describe_bags(
    features: str | Sequence[str] | None, phantoms: Mapping[str, Any] | None = None
) -> tuple[int, str | None]:
    """Width and encoder that most of the files have; None of an encoder that no file names.

    Raises:
        UserError: no file of features can be read.
    """
    if phantoms is not None:
        return BagRecipe.parse(phantoms).dim, ENCODER
    if features is None:
        raise UserError("data.features is not set: name the folder of features that `medclip extract` wrote")
    kinds: Counter[tuple[int, str | None]] = Counter()
    why = ""
    for path in find_bags(features).values():
        try:
            bag = open_bag(path)
        except BadSample as error:
            why = why or error.detail
            continue
        kinds[bag.dim, bag.encoder] += bag.patches > 0
    if not kinds:
        raise UserError(f"data.features: no file can be read, e.g. {why}: extract the features again")
    return kinds.most_common(1)[0][0]


def width(features: str | Sequence[str] | None, phantoms: Mapping[str, Any] | None = None) -> int:
    """Width of the features: what a config gives the model. Raises: as `describe_bags`."""
    return describe_bags(features, phantoms)[0]


def encoder(features: str | Sequence[str] | None, phantoms: Mapping[str, Any] | None = None) -> str | None:
    """Name of the model that made the features: what a config gives the model. Raises: as `describe_bags`."""
    return describe_bags(features, phantoms)[1]


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset of numbers that lies in this very file. Raises: KeyError where there is none, ValueError."""
    if name not in file:
        raise KeyError(f"it has no {name}")
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise ValueError(f"{name} is no array of this file")
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {found.dtype}, not numbers")
    return found


def _fill(out: np.ndarray, data: h5py.Dataset, rows: np.ndarray | None) -> None:
    whole = (0,) if data.ndim == 3 else ()
    n = data.shape[-2]
    if rows is None and len(out) != n:
        raise ValueError(f"it has {n} rows now, not {len(out)}: it was changed")
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        if rows is None:
            data.read_direct(out, np.s_[(*whole, slice(first, last))], np.s_[first:last])
            continue
        begin, end = np.searchsorted(rows, [first, last])
        if begin < end:
            out[begin:end] = data[(*whole, slice(first, last))][rows[begin:end] - first]


def _tensor(path: str) -> torch.Tensor:
    """A tensor (n, d), mapped from its file where that is possible."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged file makes torch raise anything
        raise ValueError(f"no tensor ({str(error).splitlines()[0][:80]})") from None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_sparse:
        raise ValueError("no tensor of floats")
    return value[0] if value.ndim == 3 and value.shape[0] == 1 else value.detach()
