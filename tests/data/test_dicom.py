"""DICOM as a viewer shows it: by the standard's formulas, pydicom's own files and pipeline; and what is refused."""

from __future__ import annotations

import io
import logging
import re
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from medclip.data.bad import BadSample
from medclip.data.dicom import codestream_size, windowed
from medclip.data.formats import open_picture

LIMIT = 89_000_000
VOLUMES = Path(__file__).parents[3] / "shared" / "data" / "volumes"
RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)


def dicom(
    array: np.ndarray,
    syntax: uid.UID = uid.ExplicitVRLittleEndian,
    frame: bytes | None = None,
    **elements: Any,
) -> bytes:
    """A file of 12-bit greys in 16, or of whatever `elements` say; `frame` is its one compressed frame."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Secret^Jane", "SECRET-4711", "19001224"
    ds.Rows, ds.Columns = array.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, int(array.dtype.kind == "i")
    if array.ndim == 3:
        ds.NumberOfFrames = len(array)
    ds.PixelData = encapsulate([frame]) if frame is not None else array.tobytes()
    ds["PixelData"].VR = "OW"
    ds["PixelData"].is_undefined_length = frame is not None
    for name, value in elements.items():
        setattr(ds, name, value)
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def shown(data: bytes, limit: int = LIMIT, **options: Any) -> np.ndarray:
    picture = open_picture(data, limit, **options)
    pixels = picture.pixels(1)
    assert pixels.dtype == np.uint8 and pixels.shape == (picture.height, picture.width, 3)
    return pixels


def grey(data: bytes) -> np.ndarray:
    pixels = shown(data)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def sample(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path).read_bytes()


# By the standard's formulas


def test_linear_window_by_hand() -> None:
    """PS3.3 C.11.2.1.2: 2048 / 4096 is the identity of 12 bits; the standard's example of centre 0, width 100."""
    np.testing.assert_array_equal(
        grey(dicom(GREY, WindowCenter=2048, WindowWidth=4096)), np.rint(GREY / 4095 * 255).astype(np.uint8)
    )
    x = np.array([-51.0, -50, -49, 0, 48, 49, 50])
    np.testing.assert_allclose(windowed(x, 0, 100), np.clip((x + 0.5) / 99 + 0.5, 0, 1))
    assert windowed(x, 0, 100)[[0, 1, -2, -1]].tolist() == [0, 0, 1, 1]
    assert windowed(x, 0, 100, "LINEAR_EXACT")[[1, 3, 6]].tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(windowed(x, 0, 100, "SIGMOID"), 1 / (1 + np.exp(-4 * x / 100)))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_windows_as_pydicom_applies_them(function: str, signed: bool) -> None:
    stored = (GREY.astype(np.int16) - 2048) if signed else GREY
    options = {"RescaleSlope": 0.5, "RescaleIntercept": -300, "WindowCenter": 40, "WindowWidth": 900}
    data = dicom(stored, VOILUTFunction=function, **options)
    ds = pydicom.dcmread(io.BytesIO(data))
    theirs = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    low, high = (v * 0.5 - 300 for v in ((-2048, 2047) if signed else (0, 4095)))
    np.testing.assert_allclose(grey(data), (theirs - low) / (high - low) * 255, rtol=0, atol=0.5 + 1e-9)


def test_a_negative_slope_is_not_upside_down() -> None:
    """Greater values after the rescale are brighter; pydicom's windowing has it the other way round."""
    data = dicom(GREY, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(grey(data), np.rint((4095 - GREY.astype(int)) / 4095 * 255))


def test_of_several_windows_the_first() -> None:
    one = grey(dicom(GREY, WindowCenter=1000, WindowWidth=500))
    np.testing.assert_array_equal(grey(dicom(GREY, WindowCenter=[1000, 2048], WindowWidth=[500, 4096])), one)


def test_without_a_window_the_pictures_own_range() -> None:
    stored = GREY // 4 + 1000
    low, high = int(stored.min()), int(stored.max())
    np.testing.assert_array_equal(grey(dicom(stored)), np.rint((stored.astype(int) - low) / (high - low) * 255))
    np.testing.assert_array_equal(grey(dicom(stored, WindowCenter=None, WindowWidth=None)), grey(dicom(stored)))


def test_padding_does_not_stretch_the_range() -> None:
    stored = GREY // 4 + 2000
    framed = np.pad(stored, 3)
    inner = grey(dicom(framed, PixelPaddingValue=0))[3:-3, 3:-3]
    np.testing.assert_array_equal(inner, grey(dicom(stored)))
    assert grey(dicom(framed))[3:-3, 3:-3].min() > 100  # what it would be
    spread = np.pad(stored, 3, constant_values=7)
    np.testing.assert_array_equal(
        grey(dicom(spread, PixelPaddingValue=0, PixelPaddingRangeLimit=10))[3:-3, 3:-3], inner
    )


def test_monochrome1_is_inverted() -> None:
    for options in ({}, {"WindowCenter": 1000, "WindowWidth": 500}):
        one = grey(dicom(GREY, PhotometricInterpretation="MONOCHROME1", **options))
        np.testing.assert_array_equal(one, 255 - grey(dicom(GREY, **options)))


def test_lookup_tables() -> None:
    """A VOI LUT comes before a window; a modality LUT before both."""

    def table(values: np.ndarray, first: int, bits: int) -> Dataset:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [len(values), first, bits])
        item.add_new("LUTData", "US", values.tolist())
        return item

    curve = np.rint(65535 * (np.arange(4096) / 4095) ** 2).astype(int)
    expected = np.rint(curve[GREY] / 65535 * 255)
    data = dicom(GREY, VOILUTSequence=[table(curve, 0, 16)], WindowCenter=5, WindowWidth=2)
    np.testing.assert_array_equal(grey(data), expected)
    short = dicom(GREY, VOILUTSequence=[table(curve[1000:2000], 1000, 16)])
    np.testing.assert_array_equal(grey(short), np.rint(curve[np.clip(GREY, 1000, 1999)] / 65535 * 255))
    item = table(curve, 0, 16)
    item.ModalityLUTType = "US"
    data = dicom(GREY, ModalityLUTSequence=[item], WindowCenter=32768, WindowWidth=65536)
    np.testing.assert_array_equal(grey(data), expected)


def test_eight_bits_stay_what_they_are() -> None:
    stored = RNG.integers(0, 256, (10, 12)).astype(np.uint8)
    stored[0, :2] = 0, 255
    data = dicom(stored, BitsAllocated=8, BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(grey(data), stored)


def test_values_of_32_bits_and_floats() -> None:
    stored = RNG.integers(0, 2**31, (10, 12)).astype(np.uint32)
    data = dicom(stored, BitsAllocated=32, BitsStored=32, HighBit=31)
    low, high = (float(v) for v in (stored.min(), stored.max()))
    np.testing.assert_array_equal(grey(data), np.rint((stored - low) / (high - low) * 255))


def test_of_several_frames_the_middle_one() -> None:
    frames = np.stack([np.roll(GREY, k, 1) for k in range(5)])
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_array_equal(grey(dicom(frames, **window)), grey(dicom(frames[2], **window)))
    np.testing.assert_array_equal(grey(dicom(frames[:2], **window)), grey(dicom(frames[1], **window)))


# Transfer syntaxes

LOSSLESS = {
    uid.JPEGLossless: lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=12, predictor=4),
    uid.JPEGLosslessSV1: lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=12),
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, reversible=True, codecformat="J2K"),
    uid.JPEG2000: lambda a: imagecodecs.jpeg2k_encode(a, reversible=True, codecformat="JP2"),
    uid.HTJ2KLossless: imagecodecs.htj2k_encode,
}


def compressed(syntax: uid.UID) -> bytes:
    return dicom(GREY, syntax, LOSSLESS[syntax](GREY), WindowCenter=2048, WindowWidth=4096)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_lossless_syntaxes_hold_the_same_pixels(syntax: uid.UID) -> None:
    np.testing.assert_array_equal(grey(compressed(syntax)), np.rint(GREY / 4095 * 255))


def test_pydicoms_sample_in_every_syntax() -> None:
    """One MR of signed values by seven ways of storing it, with the window that it has."""
    ds = pydicom.dcmread(io.BytesIO(sample("MR_small.dcm")))
    x = ds.pixel_array.astype(float)
    expected = np.rint(np.clip((x - (ds.WindowCenter - 0.5)) / (ds.WindowWidth - 1) + 0.5, 0, 1) * 255)
    for kind in ("", "_implicit", "_bigendian", "_expb", "_RLE", "_jpeg_ls_lossless", "_jp2klossless", "_padded"):
        np.testing.assert_array_equal(grey(sample(f"MR_small{kind}.dcm")), expected, err_msg=kind)


def test_twelve_bit_jpeg_extended_with_pixels_of_its_reference() -> None:
    """Values at these places that pydicom's own tests state (420, 140: 244; 230, 120: 95)."""
    pixels = grey(sample("JPEG-lossy.dcm"))
    stored = np.array([244, 95, 0, 264])  # of which 0 and 264 are the picture's range
    assert pixels[[420, 230], [140, 120]].tolist() == np.rint(stored / 264 * 255)[:2].tolist()


COLOURS = [
    (255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255), (0, 0, 0), (64, 64, 64),
    (192, 192, 192), (255, 255, 255),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "drift"),
    [
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_rle_32bit.dcm", 0),
        ("SC_rgb_rle_2frame.dcm", 255),  # the second frame is the first one's negative
        ("SC_rgb_jpeg_gdcm.dcm", 0),
        ("SC_rgb_gdcm_KY.dcm", 1),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 3),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 5),
        ("SC_rgb_jpeg_dcmtk.dcm", 5),
        ("SC_rgb_jls_lossy_line.dcm", 3),
        ("SC_rgb_jls_lossy_sample.dcm", 3),
        ("SC_ybr_full_422_uncompressed.dcm", 5),
    ],
)
def test_colours(name: str, drift: int) -> None:
    found = shown(sample(name))[5::10, 50].astype(int)
    if drift == 255:
        found = 255 - found
        drift = 0
    assert np.abs(found - COLOURS).max() <= drift


def test_a_palette_is_looked_up() -> None:
    """The reference is pydicom's own lookup, high byte of 16."""
    data = sample("examples_palette.dcm")
    ds = pydicom.dcmread(io.BytesIO(data))
    colours = pydicom.pixels.apply_color_lut(ds.pixel_array, ds)
    assert np.abs(shown(data) - colours / 257).max() <= 0.5


# What is refused


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (lambda: dicom(GREY, BurnedInAnnotation="YES"), "burned-in annotation", "burned_in: true"),
        (lambda: dicom(GREY * 0 + 77), "zero contrast", "every pixel"),
        (lambda: dicom(GREY, WindowCenter=9000, WindowWidth=10), "zero contrast", "shown as 0"),
        (lambda: dicom(GREY, WindowCenter=10, WindowWidth=0), "broken image", "without a width"),
        (lambda: dicom(GREY, WindowCenter=1, WindowWidth=2, VOILUTFunction="MAGIC"), "unsupported image", "VOI LUT"),
        (lambda: dicom(GREY, Rows=0), "broken image", "0 pixels"),
        (lambda: dicom(GREY, Rows=21), "broken image", "ends before its pixels do"),
        (lambda: dicom(GREY, NumberOfFrames=2), "broken image", "ends before its pixels do"),
        (lambda: dicom(GREY, NumberOfFrames=-1), "over pixel limit", "frames"),
        (lambda: dicom(GREY, PhotometricInterpretation="XYZ"), "broken image", "cannot be read"),
        (lambda: dicom(GREY, uid.MPEG4HP41, b"\0" * 64), "unsupported transfer syntax", "gdcmconv"),
        (lambda: dicom(GREY, SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6"), "unsupported image", "`slides`"),
        (lambda: sample("rtplan.dcm"), "unsupported image", "without pixels"),
        (lambda: sample("MR_truncated.dcm"), "broken image", "ends before its pixels do"),
    ],
)
def test_refused(data: Any, reason: str, detail: str) -> None:
    with pytest.raises(BadSample, match=re.escape(detail)) as caught:
        shown(data())
    assert caught.value.reason == reason


def test_burned_in_annotation_may_be_wanted() -> None:
    assert shown(dicom(GREY, BurnedInAnnotation="YES"), burned_in=True).any()
    assert shown(dicom(GREY, BurnedInAnnotation="NO")).any()


def test_the_limit_holds_before_anything_is_decoded() -> None:
    for elements in ({"Rows": 20_000, "Columns": 20_000}, {"NumberOfFrames": 10**9}):
        with pytest.raises(BadSample, match="over pixel limit"):
            open_picture(dicom(GREY, **elements), LIMIT)
    assert shown(dicom(GREY), limit=600).any()
    with pytest.raises(BadSample, match="over pixel limit"):
        open_picture(dicom(GREY), 599)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_a_frame_larger_than_its_header_says_is_not_decoded(syntax: uid.UID) -> None:
    large = np.zeros((2000, 3000), np.uint16)
    frame = LOSSLESS[syntax](large)
    assert codestream_size(frame) == (2000, 3000)
    with pytest.raises(BadSample, match="not of the size"):
        shown(dicom(GREY, syntax, frame))


def test_a_deflated_bomb_is_not_unpacked() -> None:
    plain = dicom(GREY)
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = plain[:start].replace(uid.ExplicitVRLittleEndian.encode() + b"\0", b"1.2.840.10008.1.2.1.99")
    grown = len(meta) - start
    meta = meta[:140] + (int.from_bytes(meta[140:144], "little") + grown).to_bytes(4, "little") + meta[144:]
    at = meta.index(b"1.2.840.10008.1.2.1.99")
    meta = meta[: at - 2] + (22).to_bytes(2, "little") + meta[at:]

    def deflated(body: bytes) -> bytes:
        pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return meta + pack.compress(body) + pack.flush()

    np.testing.assert_array_equal(grey(deflated(plain[start:])), grey(plain))
    with pytest.raises(BadSample, match="unpacks to more"):
        open_picture(deflated(plain[start:] + bytes(70 << 20)), 1000)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *LOSSLESS], ids=lambda syntax: syntax.keyword)
def test_a_file_that_ends_early_is_never_half_a_picture(syntax: uid.UID) -> None:
    whole = compressed(syntax) if syntax in LOSSLESS else dicom(GREY)
    first = len(whole) - (len(LOSSLESS[syntax](GREY)) if syntax in LOSSLESS else GREY.nbytes) + 8
    for length in np.linspace(10, len(whole) - 12, 25).astype(int):
        with pytest.raises(BadSample) as caught:
            shown(whole[:length])
        assert length < first or caught.value.reason == "broken image"


def test_rle_that_ends_early() -> None:
    whole = sample("MR_small_RLE.dcm")
    for length in np.linspace(1800, 7640, 10).astype(int):
        with pytest.raises(BadSample):
            shown(whole[:length])


# Patients stay unnamed


@pytest.mark.filterwarnings("error")
def test_nothing_that_names_a_patient_is_told(caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """Not when a file is whole, nor for any damage: bytes overwritten, cut out, or put in."""
    caplog.set_level(logging.DEBUG)
    whole = [dicom(GREY), compressed(uid.JPEGLSLossless), dicom(GREY, NumberOfFrames=3)]
    rng = np.random.default_rng(0)
    told = []
    for n in range(300):
        data = bytearray(whole[n % 3])
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(132, 700))
            match int(rng.integers(3)):
                case 0:
                    data[at : at + 2] = rng.bytes(2)
                case 1:
                    del data[at : at + int(rng.integers(1, 9))]
                case 2:
                    data[at:at] = rng.bytes(3)
        try:
            shown(bytes(data), 10_000)
        except BadSample as failure:
            told.append(str(failure))
    out, err = capfd.readouterr()
    everything = " ".join([*told, caplog.text, out, err])
    assert len(set(told)) > 4
    assert not re.search("secret|jane|4711|19001224", everything, re.IGNORECASE)


def test_the_parser_passes_over_all_but_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    shown(dicom(GREY))
    assert "PixelData" in seen[0] and not [e.keyword for e in seen[0] if e.keyword.startswith("Patient")]


# Real files


@pytest.mark.skipif(not VOLUMES.is_dir(), reason="the sample data is not beside the checkout")
def test_real_files() -> None:
    """CT in JPEG 2000 within its window, an MR of 16 frames, a file without preamble, two slices."""
    heart = pydicom.dcmread(VOLUMES / "MR-MONO2-8-16x-heart.dcm").pixel_array[8].astype(int)
    found = grey((VOLUMES / "MR-MONO2-8-16x-heart.dcm").read_bytes())
    np.testing.assert_array_equal(found, np.rint((heart - heart.min()) / (heart.max() - heart.min()) * 255))
    colon = (VOLUMES / "OT-MONO2-8-colon.dcm").read_bytes()
    assert colon[128:132] != b"DICM" and grey(colon).std() > 20
    for name in ("CT1_J2KI.dcm", "0.dcm", "1.dcm"):
        assert shown((VOLUMES / name).read_bytes()).std() > 20
