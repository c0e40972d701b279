"""What is asked of every slide of a cohort: plain values, so that they travel to other processes and machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from slides.errors import SlideError

TISSUE = ("robust", "otsu", "hsv", "none")
ARTEFACTS = ("pen", "folds", "blur")
STAINS = ("macenko", "reinhard", "vahadane")


@dataclass(frozen=True)
class Request:
    """Which patches.

    Args:
        size: pixels of a patch, square.
        mpp: µm a pixel of them; None for each slide's own level 0.
        overlap: pixels that neighbours share.
        tolerance: see `geometry.geometry`.
        upsample: see `geometry.geometry`.
        coverage: least share of a patch that is tissue, 0 to 1; 0 takes all.
        tissue: how tissue is found: robust, otsu, hsv, or none (the whole slide).
        tissue_mpp: µm a pixel of the overview that it is found on; coarser where that has over 1.5 million pixels.
        remove: artefacts that are no tissue: pen, folds, blur.
        min_area: µm², smaller pieces of tissue are left out.
        fill_holes: µm², smaller holes are filled.
        masks: folder of the user's own masks, ID.geojson or ID.png, which then are the tissue.
        classes: of the GeoJSON's annotations, those that count; empty for all.
        exclude: of the GeoJSON's annotations, those that are cut out.
        exact: see `patches.read_patches`.
        icc: apply the colour profile of the file, to sRGB.
        stain: macenko, reinhard or vahadane: change the colours to those of `stain_target`.
        stain_target: image whose colours are wanted.
    """

    size: int = 256
    mpp: float | None = 0.5
    overlap: int = 0
    tolerance: float = 0.0
    upsample: bool = False
    coverage: float = 0.5
    tissue: Literal["robust", "otsu", "hsv", "none"] = "robust"
    tissue_mpp: float = 8.0
    remove: tuple[str, ...] = ("pen",)
    min_area: float = 20_000.0
    fill_holes: float = 40_000.0
    masks: str | None = None
    classes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: bool = False
    icc: bool = False
    stain: str | None = None
    stain_target: str | None = None

    def __post_init__(self) -> None:
        if self.tissue not in TISSUE:
            raise SlideError(f"tissue is {self.tissue!r}: choose one of {', '.join(TISSUE)}")
        if unknown := set(self.remove) - set(ARTEFACTS):
            raise SlideError(f"remove names {sorted(unknown)}: choose of {', '.join(ARTEFACTS)}")
        if not 0 <= self.coverage <= 1:
            raise SlideError(f"coverage is {self.coverage:g}: choose 0 to 1")
        if self.stain is not None and (self.stain not in STAINS or self.stain_target is None):
            raise SlideError(f"stain is {self.stain!r}: choose one of {', '.join(STAINS)}, and a stain_target image")
        whole = isinstance(self.size, int) and isinstance(self.overlap, int)
        if not whole or self.size < 1 or not 0 <= self.overlap < self.size:
            raise SlideError(f"size {self.size} and overlap {self.overlap}: whole pixels, the overlap below the size")
        if self.mpp is not None and not 0 < self.mpp < 1000:
            raise SlideError(f"mpp is {self.mpp}: choose µm a pixel, e.g. 0.5, or null for the slide's own")
        if not 0 < self.tissue_mpp < 1000:
            raise SlideError(f"tissue_mpp is {self.tissue_mpp}: choose µm a pixel, e.g. 8")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Request:
        """From a config; lists become tuples.

        Raises:
            SlideError: an unknown key, or a value that makes no sense.
        """
        known = {one.name for one in fields(cls)}
        if unknown := set(map(str, values)) - known:
            raise SlideError(f"unknown keys {sorted(unknown)}: use {', '.join(sorted(known))}")
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            plain |= {k: (plain[k],) for k in ("remove", "classes", "exclude") if isinstance(plain.get(k), str)}
            return cls(**plain)
        except TypeError as error:
            raise SlideError(f"a value has the wrong type ({error})") from None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """Changes with whatever changes a patch."""
        return digest(asdict(self) | {"masks": None if self.masks is None else str(Path(self.masks))})


def digest(values: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]
