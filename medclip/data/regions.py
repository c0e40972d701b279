"""Which patches of a slide lie inside its region: outlines as GeoJSON, from QuPath or `scripts/make_slides.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
from jaxtyping import Bool, Int

from medclip.types import UserError
from slides.errors import SlideError
from slides.geojson import geometries


class Regions:
    """Outlines of a cohort.

    Args:
        folder: of SLIDE.geojson, in level-0 pixels.
        classes: of annotations that count; empty: all.
        exclude: of annotations that are cut out.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: str, classes: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"regions.folder={folder}: no such folder; it holds SLIDE.geojson, a file a slide")
        # By name: what a table calls a slide is never made into a path.
        self.files = {path.stem: path for path in self.folder.glob("*.geojson")}
        self.classes, self.exclude = list(classes), list(exclude)

    def __call__(self, slide: str, coords: Int[np.ndarray, "n 2"], side: float) -> Bool[np.ndarray, " n"] | None:
        """Whether the centre of each patch is inside; None for a slide without a file.

        Args:
            slide: its name.
            coords: level-0 (x, y) of the patches' corners.
            side: of a patch, in level-0 pixels.

        Raises:
            UserError: a broken file.
        """
        path = self.files.get(slide)
        if path is None:
            return None
        try:
            found = shapely.union_all(geometries(path, classes=self.classes or None, exclude=self.exclude))
        except SlideError as error:
            raise UserError(f"regions: {error}") from None
        shapely.prepare(found)
        return shapely.contains_xy(found, coords[:, 0] + side / 2, coords[:, 1] + side / 2)
