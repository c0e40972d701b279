"""Where the mpp comes from, in order, and what is no mpp."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.errors import SlideError
from slides.mpp import Mpp, read_mpp_table, resolve_mpp
from slides.open import open_slide
from tests.slides.toys import set_mpp, toy_slide

# From the one that goes first to the last.
SOURCES = [
    ({"openslide.mpp-x": "0.21", "openslide.mpp-y": "0.21"}, Mpp(0.21, "openslide.mpp-x")),
    ({"aperio.MPP": "0.22"}, Mpp(0.22, "aperio.MPP")),
    ({"ome.PhysicalSizeX": "0.23", "ome.PhysicalSizeY": "0.23"}, Mpp(0.23, "ome.PhysicalSizeX")),
    ({"leica.mpp-x": "0.24", "leica.mpp-y": "0.24"}, Mpp(0.24, "leica.mpp-x")),
    (
        {
            "tiff.ResolutionUnit": "centimeter",
            "tiff.XResolution": "40000",
            "tiff.YResolution": "40000",
        },
        Mpp(0.25, "tiff.XResolution"),
    ),
    ({"openslide.objective-power": "20"}, Mpp(0.5, "openslide.objective-power")),
    ({"aperio.AppMag": "10"}, Mpp(1.0, "aperio.AppMag")),
]


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_sources_in_their_order(first: int) -> None:
    properties = {key: value for part, _ in SOURCES[first:] for key, value in part.items()}
    found = resolve_mpp("a.svs", properties)
    assert (found.value, found.source) == (pytest.approx(SOURCES[first][1].value), SOURCES[first][1].source)
    assert resolve_mpp("a.svs", properties, 0.3) == Mpp(0.3, "table")


def test_dots_an_inch() -> None:
    """25,400 µm an inch: 50,800 dots are 0.5 µm each; the 72 that most images claim are no scanner's."""
    inch = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}
    assert resolve_mpp("a", inch).value == pytest.approx(0.5)
    with pytest.raises(SlideError, match=r"tiff\.XResolution is 352\.778"):
        resolve_mpp("a", inch | {"tiff.XResolution": "72", "tiff.YResolution": "72"})
    with pytest.raises(SlideError, match="the file does not say"):
        resolve_mpp("a", inch | {"tiff.ResolutionUnit": "none"})
    with pytest.raises(SlideError, match="the file does not say"):
        resolve_mpp("a", inch | {"tiff.XResolution": "0"})


@pytest.mark.parametrize("said", ["0", "nan", "1000", "-0.25", "inf", "fine", "1,000.5", "1e-9"])
def test_what_is_no_mpp_is_passed_over_aloud(said: str, caplog: pytest.LogCaptureFixture) -> None:
    properties = {"aperio.MPP": said, "openslide.objective-power": "40"}
    with caplog.at_level(logging.WARNING):
        assert resolve_mpp("a.svs", properties) == Mpp(0.25, "openslide.objective-power")
    assert "aperio.MPP is" in caplog.text and "mpp 0.25 is from openslide.objective-power" in caplog.text
    with pytest.raises(SlideError) as error:
        resolve_mpp("a.svs", {"aperio.MPP": said})
    for remedy in ("a.svs", "aperio.MPP is", "table", "columns slide, mpp", "slide_mpp=0.5", "leave the slide out"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given_", [0, -1, math.nan, math.inf, 1000, 0.001])
def test_a_table_is_not_believed_either(given_: float) -> None:
    with pytest.raises(SlideError, match="no pixel size"):
        resolve_mpp("a", {"aperio.MPP": "0.25"}, given_)


def test_decimal_commas() -> None:
    assert resolve_mpp("a", {"aperio.MPP": "0,2520"}).value == 0.252


def test_an_objective_is_no_measurement(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_mpp("a", {"hamamatsu.SourceLens": "20"}).value == 0.5
    assert "objective" in caplog.text
    for power in ("0", "nan", "-20", "5000", "forty"):
        with pytest.raises(SlideError, match="its mpp is not known"):
            resolve_mpp("a", {"openslide.objective-power": power})


def test_pixels_that_are_not_square() -> None:
    properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}
    with pytest.raises(SlideError, match=r"not square \(0\.25 x 0\.5"):
        resolve_mpp("a", properties)
    assert resolve_mpp("a", properties, 0.25).value == 0.25
    # Calibrations differ in the third place: the area is what counts.
    assert resolve_mpp("a", {"openslide.mpp-x": "0.2520", "openslide.mpp-y": "0.2500"}).value == pytest.approx(
        math.sqrt(0.252 * 0.25)
    )


@given(st.dictionaries(st.sampled_from([k for part, _ in SOURCES for k in part]), st.text(max_size=8)))
def test_nothing_but_a_plausible_number_or_one_error(properties: dict[str, str]) -> None:
    with contextlib.suppress(SlideError):
        assert 0.01 <= resolve_mpp("a", properties).value <= 50


@pytest.mark.parametrize("said", ["0", "nan", "1000", "-1", "", None])
def test_a_file_without_a_usable_mpp_is_refused_by_name_unless_given(tmp_path: Path, said: str | None) -> None:
    path = set_mpp(toy_slide(tmp_path / "wrong.svs", 200, 150).path, said)
    with pytest.raises(SlideError, match=r"wrong\.svs: its mpp is not known.*slide_mpp=0\.5"):
        open_slide(path)
    with open_slide(path, mpp=0.4) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "table")


def test_the_power_is_used_where_the_mpp_is_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = set_mpp(toy_slide(tmp_path / "a.svs", 200, 150, power=20).path, "0")
    with open_slide(path) as slide:
        assert slide.mpp == 0.5 and "objective" in slide.mpp_source
    assert "10 / 20 = 0.5" in caplog.text


def test_tables(tmp_path: Path) -> None:
    file = tmp_path / "mpp.csv"
    file.write_text('\ufeffslide,note,mpp\na.svs,,0.25\n"b, c.svs",x,"0,5"\n', encoding="utf-8")
    assert read_mpp_table(file) == {"a.svs": 0.25, "b, c.svs": 0.5}
    file.write_text("wsi,mpp\nübersicht.svs,0.4\n", encoding="utf-8")
    assert read_mpp_table(file) == {"übersicht.svs": 0.4}


@pytest.mark.parametrize(
    "content",
    [b"slide,mpp\na.svs,\n", b"slide,mpp\na.svs,nan\n", b"slide,mpp\na.svs,0\n", b"slide;mpp\na.svs;0,5\n",
     b"name,mpp\na.svs,0.5\n", b"slide\na.svs\n", b"slide,mpp\n,0.5\n"],
)  # fmt: skip
def test_tables_that_do_not_say(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mpp.csv"
    file.write_bytes(content)
    with pytest.raises(SlideError, match=r"mpp\.csv: line 2 needs columns slide and mpp"):
        read_mpp_table(file)


def test_tables_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "mpp.csv"
    with pytest.raises(SlideError, match="cannot be read as CSV"):
        read_mpp_table(file)
    file.write_bytes(b"slide,mpp\n\xff\xfe,0.5\n")
    with pytest.raises(SlideError, match="cannot be read as CSV"):
        read_mpp_table(file)
