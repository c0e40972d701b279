"""What OME-XML says, units and all; and what it must not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from slides.errors import SlideError
from slides.ome import ome_properties
from slides.open import open_slide
from slides.pyramid import LOSSLESS
from slides.tiff import TiffSlide
from tests.slides.toys import toy_pixels, toy_slide

HEAD = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'


def xml(pixels: str, more: str = "") -> str:
    return f'{HEAD}{more}<Image ID="Image:0"><Pixels ID="Pixels:0" {pixels}/></Image></OME>'


@pytest.mark.parametrize(
    ("size", "unit", "micrometres"),
    [
        ("0.25", None, 0.25),
        ("0.25", "µm", 0.25),  # micro sign
        ("0.25", "μm", 0.25),  # Greek mu
        ("250", "nm", 0.25),
        ("0.00025", "mm", 0.25),
        ("2.5E-5", "cm", 0.25),
        ("2.5e-7", "m", 0.25),
    ],
)
def test_units(size: str, unit: str | None, micrometres: float) -> None:
    said = " ".join(
        f'PhysicalSize{a}="{size}"' + (f' PhysicalSize{a}Unit="{unit}"' if unit else "") for a in ("X", "Y")
    )
    found = ome_properties("a", xml(said))
    assert float(found["ome.PhysicalSizeX"]) == pytest.approx(micrometres)
    assert float(found["ome.PhysicalSizeY"]) == pytest.approx(micrometres)


def test_an_unknown_unit_or_no_size_is_no_mpp() -> None:
    assert "ome.PhysicalSizeX" not in ome_properties("a", xml('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"'))
    assert "ome.PhysicalSizeX" not in ome_properties("a", xml(""))
    assert ome_properties("a", xml('PhysicalSizeX="wide"'))["ome.PhysicalSizeX"] == "nan"


def test_the_first_image_counts() -> None:
    """Later ones are the label and the macro."""
    later = '<Image ID="Image:1"><Pixels ID="Pixels:1" PhysicalSizeX="50"/></Image></OME>'
    found = ome_properties("a", xml('PhysicalSizeX="0.5"').replace("</OME>", later))
    assert found["ome.PhysicalSizeX"] == "0.5"


def test_the_objective() -> None:
    more = '<Instrument ID="I:0"><Objective ID="O:0" NominalMagnification="40.0"/></Instrument>'
    assert ome_properties("a", xml("", more))["ome.NominalMagnification"] == "40.0"


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE OME SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        "<! doctype OME []>",
    ],
)
def test_entities_are_refused_before_anything_is_parsed(head: str) -> None:
    with pytest.raises(SlideError, match=r"a\.tif: its OME-XML declares entities"):
        ome_properties("a.tif", f'<?xml version="1.0"?>{head}{xml("")}')


def test_broken_and_endless_xml() -> None:
    with pytest.raises(SlideError, match=r"a\.tif: its OME-XML is broken"):
        ome_properties("a.tif", xml("")[:-8])
    with pytest.raises(SlideError, match="over 16 MB"):
        ome_properties("a.tif", HEAD + " " * (17 << 20) + "</OME>")


def test_a_pyramid_in_sub_ifds(tmp_path: Path) -> None:
    toy = toy_slide(
        tmp_path / "a.ome.tif", 500, 340, tile_size=64, flavour="ome", downsamples=(1, 2, 4), encoding=LOSSLESS
    )
    with open_slide(toy.path) as slide:
        assert isinstance(slide, TiffSlide) and (slide.mpp, slide.mpp_source) == (0.25, "ome.PhysicalSizeX")
        assert [one.downsample for one in slide.levels] == [1, 2, 4]
        assert np.array_equal(slide.read(0, 0, 0, 500, 340), toy.pixels)
        means = toy.pixels.reshape(85, 4, 125, 4, 3).mean((1, 3))
        assert np.abs(slide.read(2, 0, 0, 125, 85) - means).max() <= 0.5


def test_a_file_with_entities_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "evil.ome.tif"
    evil = '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "b">]>' + xml('PhysicalSizeX="0.5"')
    tifffile.imwrite(path, toy_pixels(100, 80)[0], tile=(64, 64), photometric="rgb", description=evil, metadata=None)
    with pytest.raises(SlideError, match=r"evil\.ome\.tif: its OME-XML declares entities"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"tile": (64, 64), "planarconfig": "separate"}, "stored apart"), ({}, "no tiles")],
)
def test_other_ome_tiffs_are_refused_with_a_remedy(tmp_path: Path, options: dict, why: str) -> None:
    path = tmp_path / "a.ome.tif"
    pixels = toy_pixels(100, 80)[0]
    pixels = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    tifffile.imwrite(path, pixels, ome=True, photometric="rgb", **options)
    with pytest.raises(SlideError, match=rf"a\.ome\.tif: .*{why}.*convert it to tiled 8-bit RGB"):
        open_slide(path, mpp=0.5)


def test_sixteen_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, toy_pixels(100, 80)[0].astype(np.uint16), ome=True, photometric="rgb", tile=(64, 64))
    with pytest.raises(SlideError, match="more than 8 bits"):
        open_slide(path, mpp=0.5)
