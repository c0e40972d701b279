"""Outlines of regions: patches by their centres, classes, slides without a file; pictures of patches from a slide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip.data.regions import Regions
from medclip.data.slide_pictures import SlidePictures
from medclip.types import UserError

COORDS = np.array([[0, 0], [100, 0], [200, 0], [100, 100]])


def outline(name: str, x0: int, y0: int, x1: int, y1: int) -> dict:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    about = {"objectType": "annotation", "classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}


def test_patches_whose_centre_is_inside(tmp_path: Path) -> None:
    features = [outline("tumour", 90, 0, 240, 100), outline("necrosis", 0, 0, 100, 100)]
    (tmp_path / "s.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    found = Regions(str(tmp_path), classes=["tumour"])("s", COORDS, 100)
    assert found is not None and found.tolist() == [False, True, False, False]  # of the third 40 of 100 pixels
    both = Regions(str(tmp_path))("s", COORDS, 100)
    assert both is not None and both.tolist() == [True, True, False, False]
    assert Regions(str(tmp_path))("../s", COORDS, 100) is None


def test_broken_outlines_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Regions(str(tmp_path / "none"))
    (tmp_path / "s.geojson").write_text("{")
    with pytest.raises(UserError, match="cannot be read as GeoJSON"):
        Regions(str(tmp_path))("s", COORDS, 100)


def test_pictures_are_the_patches(tmp_path: Path) -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:100, 100:200, 0] = 250
    Image.fromarray(pixels).save(tmp_path / "s.png")
    pictures = SlidePictures(str(tmp_path / "*.png"), pixels=32)
    found = pictures("s", COORDS, 100)
    assert [p.shape for p in found] == [(32, 32, 3)] * 4
    assert [int(p[..., 0].mean()) for p in found] == [0, 250, 0, 0]
    assert pictures("another", COORDS, 100) == []
    with pytest.raises(UserError, match="pictures: no slide"):
        SlidePictures(str(tmp_path / "*.svs"))
