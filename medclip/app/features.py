"""Features of the cohort's patches, as `medclip extract` wrote them: which there are, and those in use in memory.

Kept as float16 with their lengths beside them, so that a map is one product: 15,000 patches of 512 numbers are 15 MB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from medclip.app.lru import Lru
from medclip.types import UserError
from slides.belongs import refuse_another
from slides.errors import SlideError
from slides.h5 import read_coords, side_of
from slides.reader import Slide

_ROWS = 4096  # read at a time: HDF5 holds the interpreter's lock meanwhile
_RUN = 64  # neighbouring rows of a sample
_MOST_FILES = 100_000


@dataclass(frozen=True)
class FeatureSet:
    """Files of one model's features at one size of patches.

    Args:
        folder: that holds them, features_NAME of `medclip extract`.
        encoder: the model's name, as the files say it.
        weights: fingerprint of its weights; None where they do not say.
        dim: numbers a patch.
        files: by slide.
    """

    folder: Path
    encoder: str
    weights: str | None
    dim: int
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Bag:
    """A slide's patches.

    Args:
        features: float16 (n, d), as the model gave them.
        lengths: float32 (n,), their norms.
        coords: int64 (n, 2), x and y of their corners in level-0 pixels.
        side: of a patch, likewise.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    coords: np.ndarray
    side: float

    @property
    def bytes(self) -> int:
        return self.features.nbytes + self.lengths.nbytes + self.coords.nbytes

    def scores(self, vector: torch.Tensor) -> np.ndarray:
        """float32 (n,) cosines with a vector (d,) of unit norm."""
        parts = [part.float() @ vector for part in self.features.split(_ROWS)]
        return (torch.cat(parts) / self.lengths).numpy()

    def unit(self, row: int) -> torch.Tensor:
        """float32 (d,): a patch, brought to unit norm."""
        return self.features[row].float() / self.lengths[row]


def find_sets(folder: str | Path) -> list[FeatureSet]:
    """The sets of features below a folder: in `features_NAME/*.h5` (TRIDENT) or `features_NAME/h5_files/*.h5` (CLAM).

    Raises:
        UserError: there is no such folder, or none in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"features={folder}: no such folder")
    homes: dict[Path, dict[str, Path]] = defaultdict(dict)
    for count, path in enumerate(sorted(root.rglob("*.h5"))):
        if count == _MOST_FILES:
            raise UserError(f"features={folder}: more than {_MOST_FILES} files below it: give the folder features_NAME")
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            continue
        homes[path.parent][path.stem] = path
    found = [one for home, files in homes.items() if (one := _set(home, files)) is not None]
    if not found:
        more = ", only zarr, which the viewer does not read" if next(root.rglob("*.zarr"), None) is not None else ""
        raise UserError(
            f"features={folder}: no features in it{more}: make them by `medclip extract … 'save=[coords,features]' "
            "encoder=clip encoder.checkpoint=PATH`"
        )
    return found


def _set(home: Path, files: Mapping[str, Path]) -> FeatureSet | None:
    """By the first file that can be read: the others are looked at when they are asked for."""
    for path in files.values():
        try:
            with h5py.File(path) as file:
                data = file.get("features")
                if not isinstance(data, h5py.Dataset) or data.ndim < 2:
                    return None
                folder = home.parent if home.name == "h5_files" else home
                name = data.attrs.get("encoder") or folder.name.removeprefix("features_")
                weights = str(data.attrs["weights"]) if "weights" in data.attrs else None
                return FeatureSet(home, str(name), weights, int(data.shape[-1]), files)
        except OSError:
            continue
    return None


class FeatureStore:
    """Bags by model and slide.

    Args:
        sets: by the model's name in the viewer.
        limit: bytes kept in memory.
    """

    def __init__(self, sets: Mapping[str, FeatureSet], limit: int) -> None:
        self.sets = sets
        self._bags: Lru[tuple[str, str], Bag] = Lru(limit, lambda bag: bag.bytes)

    def has(self, model: str, slide: str) -> bool:
        return slide in self.sets[model].files

    def count(self, slide: str) -> int | None:
        """Patches of a slide by the first model that has some; None where none has."""
        for one in self.sets.values():
            if slide in one.files:
                try:
                    with h5py.File(one.files[slide]) as file:
                        return int(file["coords"].shape[0])  # type: ignore[union-attr]
                except (OSError, KeyError, AttributeError):
                    continue
        return None

    def bag(self, model: str, slide: str, opened: Callable[[], AbstractContextManager[Slide]]) -> Bag:
        """All patches of a slide.

        Args:
            model: its name in the viewer.
            slide: its name.
            opened: gives the open slide, which the features must belong to.

        Raises:
            SlideError: there are none, they cannot be read, or they belong to another slide.
        """

        def make() -> Bag:
            with opened() as own:
                return self._read(model, slide, own=own)

        return self._bags.get((model, slide), make)

    def sample(self, model: str, slide: str, most: int) -> Bag:
        """At most so many patches, in runs spread evenly over the file; not kept.

        Raises:
            SlideError: there are none, or they cannot be read.
        """
        return self._read(model, slide, most=most)

    def _read(self, model: str, slide: str, *, own: Slide | None = None, most: int | None = None) -> Bag:
        one = self.sets[model]
        path = one.files.get(slide)
        if path is None:
            raise SlideError(f"{slide}: {model} has no features of it: run `medclip extract` on it")
        coords, found = read_coords(path)
        side = side_of(path, found)
        rows = _spread(len(coords), most)
        try:
            with h5py.File(path) as file:
                data = file["features"]
                assert isinstance(data, h5py.Dataset)
                if own is not None:
                    refuse_another(path, own, slide, coords, side, dict(data.attrs) | found)
                if data.shape[-2:] != (len(coords), one.dim):
                    raise SlideError(
                        f"{slide}: its features have shape {data.shape}, not ({len(coords)}, {one.dim}): "
                        "extract it again"
                    )
                parts = [
                    _half(np.asarray(data[..., a:b, :], np.float32).reshape(-1, one.dim))
                    for a, b in _runs(rows, len(coords))
                ]
        except (OSError, KeyError, AssertionError) as error:
            raise SlideError(f"{slide}: its features cannot be read ({error}): extract it again") from None
        if not parts:
            raise SlideError(f"{slide}: no patch of it has features: is there tissue on it?")
        features, lengths = (torch.cat(each) for each in zip(*parts, strict=True))
        return Bag(features, lengths, coords if rows is None else coords[rows], side)


def _spread(count: int, most: int | None) -> np.ndarray | None:
    """Numbers of rows to read; None for all."""
    if most is None or count <= most:
        return None
    runs = max(most // _RUN, 1)
    starts = np.linspace(0, count - min(_RUN, most), runs).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(min(_RUN, most))).ravel())


def _runs(rows: np.ndarray | None, count: int) -> Iterable[tuple[int, int]]:
    if rows is None:
        return [(a, min(a + _ROWS, count)) for a in range(0, count, _ROWS)]
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, breaks)]


def _half(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 (n, d) and their float32 lengths (n,), of float32."""
    half = torch.from_numpy(np.clip(features, -65504, 65504)).half()
    return half, half.float().norm(dim=1).clamp(min=1e-12)
