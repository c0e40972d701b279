"""Profiles written here byte by byte, so that what they mean is known; LittleCMS against the formulas."""

from __future__ import annotations

import io
import logging
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from slides.errors import SlideError
from slides.icc import MAX_BYTES, Profile, profile_of

DATA = Path(__file__).parents[3] / "shared" / "data" / "wsi"
# sRGB's primaries adapted to D50 (columns red, green, blue; IEC 61966-2-1 by Bradford), and D50 itself.
SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
D50 = (0.9642, 1.0, 0.8249)


def matrix_profile(
    primaries: np.ndarray = SRGB_D50, gamma: float = 2.2, space: bytes = b"RGB ", white: tuple[float, ...] = D50
) -> bytes:
    """A version 2 scanner profile of three primaries (columns of XYZ under D50) and one power curve."""

    def xyz(values: object) -> bytes:
        fixed = [round(float(v) * 65536) for v in np.asarray(values)]
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *fixed)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67 + 2)
    tags = {b"desc": desc, b"cprt": text, b"wtpt": xyz(white)}
    tags |= {name: xyz(primaries[:, k]) for k, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"\0" * 4, 0x02100000, b"scnr", space, b"XYZ ")
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


def to_srgb(image: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """What such a profile means, in float64; colours outside sRGB cut off."""
    linear = (image / 255) ** gamma @ primaries.T @ np.linalg.inv(SRGB_D50).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_srgb_is_left_as_it_is() -> None:
    image = noise(64, 50)
    assert np.abs(Profile(srgb()).to_srgb(image).astype(int) - image).max() <= 1


@pytest.mark.parametrize("intent", ["relative", "perceptual"])
@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_a_curve_is_the_formula(gamma: float, intent: str) -> None:
    image = noise(64, 50)
    ours = Profile(matrix_profile(gamma=gamma), intent=intent).to_srgb(image)  # pyright: ignore[reportArgumentType]
    bright = image > 8  # near black the steps of 8 bits are coarser than the rounding of the profile's figures
    assert np.abs(ours - to_srgb(image, SRGB_D50, gamma))[bright].max() < 1.5


def test_swapped_primaries_swap_the_channels() -> None:
    image = noise(20, 20)
    plain = Profile(matrix_profile()).to_srgb(image)
    swapped = Profile(matrix_profile(SRGB_D50[:, [1, 0, 2]])).to_srgb(image)
    assert np.abs(swapped.astype(int) - Profile(matrix_profile()).to_srgb(image[..., [1, 0, 2]])).max() <= 1
    assert np.abs(swapped.astype(int) - plain).mean() > 20


def test_wider_primaries_are_the_formula_within_srgb_and_cut_off_outside() -> None:
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    image = noise(64, 50)
    profile = Profile(matrix_profile(adobe))
    assert np.abs(profile.to_srgb(image) - to_srgb(image, adobe, 2.2))[image > 8].max() < 2
    # Adobe's full green lies outside sRGB; its grey is the same grey.
    assert profile.to_srgb(np.array([[0, 255, 0]], np.uint8)).tolist() == [[0, 255, 0]]
    grey = np.full((1, 3), 128, np.uint8)
    assert np.ptp(profile.to_srgb(grey)) <= 1


def test_white_stays_white_so_glass_does() -> None:
    # Also where the profile says that its medium is yellowish, which only absolute colorimetry takes into account.
    for white in (D50, (0.9, 0.95, 0.6)):
        profile = Profile(matrix_profile(gamma=1.8, white=white))
        assert (profile.to_srgb(np.full((4, 4, 3), 255, np.uint8)) == 255).all()


def test_any_shape_and_view_and_the_input_stays() -> None:
    profile = Profile(matrix_profile(gamma=1.8))
    image = noise(3, 40, 30)
    image.flags.writeable = False
    whole = profile.to_srgb(image)
    assert whole.shape == image.shape and whole.flags.writeable
    assert (whole[1] == profile.to_srgb(image[1])).all()
    assert (whole[:, ::2, ::-1] == profile.to_srgb(image[:, ::2, ::-1])).all()
    assert (whole.reshape(-1, 3) == profile.to_srgb(image.reshape(-1, 3))).all()
    assert profile.to_srgb(image[:0]).shape == (0, 40, 30, 3)


def test_threads_may_share_a_profile() -> None:
    profile = Profile(matrix_profile(gamma=1.8))
    images = [np.full((97, 101, 3), k * 8, np.uint8) ^ noise(97, 101) for k in range(32)]
    alone = [Profile(matrix_profile(gamma=1.8)).to_srgb(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(profile.to_srgb, images * 4))
    assert all((a == b).all() for a, b in zip(alone * 4, together, strict=True))


def test_a_profile_embedded_by_pillow_is_read_back() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(file, "PNG", icc_profile=matrix_profile(gamma=1.0))
    icc = Image.open(file).info["icc_profile"]
    assert Profile(icc).to_srgb(np.full((1, 3), 128, np.uint8)).tolist() == [[188, 188, 188]]  # half of the light


@pytest.mark.parametrize(
    ("icc", "words"),
    [
        (b"no profile", "broken"),
        (matrix_profile()[:200], "broken"),
        (matrix_profile(space=b"CMYK"), "'CMYK' pixels"),
        (matrix_profile(space=b"GRAY"), "'GRAY' pixels"),
        (matrix_profile().replace(b"rTRC", b"xTRC"), "broken"),
        (bytes(MAX_BYTES + 1), "16,777,217 bytes"),
    ],
    ids=["text", "truncated", "cmyk", "grey", "no curve", "large"],
)
def test_broken_profiles_are_one_line_or_ignored(icc: bytes, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SlideError, match=words) as error:
        Profile(icc, "a b.svs")
    assert str(error.value).startswith("a b.svs: ") and "\n" not in str(error.value)
    with pytest.raises(SlideError, match=words):
        profile_of(icc, "a b.svs")
    with caplog.at_level(logging.WARNING):
        assert profile_of(icc, "a b.svs", ignore_broken=True) is None
    assert len(caplog.messages) == 1 and words in caplog.messages[0] and "ignored" in caplog.messages[0]


def test_no_profile_is_none_and_a_good_one_is_used() -> None:
    assert profile_of(None) is None and profile_of(b"") is None
    assert isinstance(profile_of(srgb(), ignore_broken=True), Profile)


def test_an_intent_that_is_none_is_one_line() -> None:
    with pytest.raises(SlideError, match="relative, perceptual"):
        Profile(srgb(), intent="vivid")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros(3, np.uint8)]
)
def test_pixels_that_are_no_rgb_are_one_line(image: np.ndarray) -> None:
    with pytest.raises(SlideError, match="uint8 RGB"):
        Profile(srgb()).to_srgb(image)


@given(st.integers(0, 10**6), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_a_damaged_profile_works_or_is_one_line(seed: int, how: int) -> None:
    rng = np.random.default_rng(seed)
    icc = bytearray(matrix_profile())
    if how == 0:
        icc = icc[: int(rng.integers(len(icc)))]
    else:
        for place in rng.integers(0, len(icc), 1 + 9 * how):
            icc[place] = int(rng.integers(256))
    try:
        out = Profile(bytes(icc)).to_srgb(noise(4, 4))
    except SlideError as error:
        assert "\n" not in str(error)
    else:
        assert out.shape == (4, 4, 3) and out.dtype == np.uint8


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
@pytest.mark.parametrize("name", ["boxes.tiff", "boxes_0.dcm"])
def test_profiles_of_real_slides_are_read_and_agree_with_openslides_way(name: str) -> None:
    with openslide.OpenSlide(DATA / name) as slide:
        profile, image = slide.color_profile, slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
    assert profile is not None
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    theirs = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), intent)
    assert theirs is not None and np.ptp(np.asarray(image)) > 100
    assert (Profile(profile.tobytes(), name).to_srgb(np.asarray(image)) == np.asarray(theirs)).all()
