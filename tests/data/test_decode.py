"""Pixels against open_clip's transform and Pillow; every format against what was written; hostile bytes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import open_clip
import pytest
import tifffile
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode

from medclip.data.bad import BadSample
from medclip.data.crop import RandomCrop
from medclip.data.decode import read_image
from medclip.types import Preprocess

RNG = np.random.default_rng(0)


def photo(height: int, width: int, seed: int = 0, fall: float = 1.2) -> np.ndarray:
    """A generated photograph: amplitudes fall as 1/f, as in natural images, with some colour."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = np.inf
    planes = []
    for exponent, contrast in [(fall, 40), (1.5, 12), (1.5, 12), (1.5, 12)]:
        noise = rng.normal(size=(2, *f.shape))
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) / f**exponent, s=(height, width))
        planes.append(plane / plane.std() * contrast)
    return np.clip(np.stack([120 + planes[0] + colour for colour in planes[1:]], axis=2), 0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def whole(data: bytes, height: int, width: int) -> np.ndarray:
    """The file's own pixels: a squash to its own size is the identity."""
    sizes = Preprocess(size=(height, width), resize_mode="squash")
    exact, fast = (read_image(data, sizes, exact=exact) for exact in (True, False))
    assert np.array_equal(exact, fast)
    return exact


# --- exact against open_clip


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_exact_is_open_clips_evaluation_transform(mode: str, interpolation: str) -> None:
    for k, (height, width) in enumerate([(97, 61), (64, 64), (33, 190), (700, 513), (512, 768), (12, 9), (64, 251)]):
        data = encode(photo(height, width, k), "PNG")
        for size in [(64, 64), (48, 80), (81, 33)]:
            preprocess = Preprocess(size=size, resize_mode=mode, interpolation=interpolation, fill_color=7)  # type: ignore[arg-type]
            transform = open_clip.image_transform(
                size, is_train=False, resize_mode=mode, interpolation=interpolation, fill_color=7
            )
            image = Image.open(io.BytesIO(data))
            for step in transform.transforms[:-2]:  # without ToTensor and Normalize
                image = step(image)
            expected = np.asarray(image)
            assert np.array_equal(read_image(data, preprocess, exact=True), expected), (height, width, size)
            difference = np.abs(read_image(data, preprocess).astype(int) - expected)
            # A PNG is never decoded at reduced scale, so only the rounding of the kernels differs.
            assert difference.max() <= 4 and difference.mean() < 0.3


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"keep_rgb": True}]
)
def test_exact_is_open_clips_training_transform_for_the_same_box(options: dict[str, object]) -> None:
    crop = RandomCrop((0.3, 1.0))
    for seed, (height, width) in enumerate([(90, 300), (480, 640), (513, 1031), (100, 80)]):
        data = encode(photo(height, width, seed), "JPEG", quality=80, **options)
        box = crop.sample(height, width, np.random.default_rng(seed))
        expected = F.resized_crop(Image.open(io.BytesIO(data)), *box, [96, 96], InterpolationMode.BICUBIC)
        ours = read_image(data, Preprocess(size=(96, 96)), crop=crop, rng=np.random.default_rng(seed), exact=True)
        assert np.array_equal(ours, np.asarray(expected))


# --- fast against exact


def drift(data: bytes, seed: int | None) -> float:
    crop = None if seed is None else RandomCrop()
    fast, exact = (
        read_image(
            data, Preprocess(), crop=crop, rng=None if seed is None else np.random.default_rng(seed), exact=exact
        )
        for exact in (False, True)
    )
    return float(np.abs(fast.astype(int) - exact).mean())


@pytest.mark.parametrize(("fall", "quality"), [(1.2, 75), (1.2, 90), (1.35, 85), (1.5, 90)])
def test_fast_drifts_less_than_one_level_on_photographs(fall: float, quality: int) -> None:
    sizes = [(512, 512), (512, 1024), (700, 533), (640, 900), (1024, 1024)]
    files = [encode(photo(h, w, k, fall), "JPEG", quality=quality) for k, (h, w) in enumerate(sizes)]
    assert np.mean([drift(data, seed) for seed, data in enumerate(files)]) <= 1.0
    assert np.mean([drift(data, None) for data in files]) <= 1.0


def test_fast_drifts_less_than_one_level_on_a_smooth_ramp_at_every_scale() -> None:
    # A ramp shows any misplacement: half an output pixel would be a drift of one level or more.
    for height, width in [(449, 513), (899, 1021), (1801, 1999)]:
        y, x = np.mgrid[:height, :width]
        ramp = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256 * 0 + 128], axis=2).astype(np.uint8)
        data = encode(ramp, "JPEG", quality=95, subsampling=0)
        assert max(drift(data, seed) for seed in (None, 0, 1, 2)) < 0.5


def test_fast_drift_on_real_images() -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    files = sorted([*folder.glob("vqa_rad/**/*.jpg"), *folder.glob("endoscopy/**/*.jpg")])[::8]
    if not files:
        pytest.skip("no images under ../shared/data")
    drifts = [drift(file.read_bytes(), seed) for seed, file in enumerate(files)]
    assert np.mean(drifts) <= 1.0


# --- formats

GREY8 = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
RGB8 = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RGBA8 = RNG.integers(0, 256, (13, 17, 4), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (13, 17), dtype=np.uint16)
RGB16 = RNG.integers(0, 65536, (13, 17, 3), dtype=np.uint16)
RGBA16 = RNG.integers(0, 65536, (13, 17, 4), dtype=np.uint16)


def to8(array: np.ndarray, top: float = 65535) -> np.ndarray:
    return np.rint(array / top * 255).astype(np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """A palette picture whose entry 3 is transparent, and what it should look like on white."""
    colours = RNG.integers(0, 256, (8, 3), dtype=np.uint8)
    index = RNG.integers(0, 8, (13, 17), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    expected = colours[index].copy()
    expected[index == 3] = 255
    return image, expected


PALETTE, PALETTE_RGB = palette_image()
BITS = RNG.integers(0, 2, (13, 17)).astype(bool)
PIL_CMYK = Image.fromarray(RGBA8, "CMYK")

STRETCHED = rgb(to8(GREY16.astype(float) - GREY16.min(), float(np.ptp(GREY16))))

LOSSLESS = {
    "png 1 bit": (encode(Image.fromarray(BITS), "PNG"), rgb(BITS * np.uint8(255))),
    "png grey": (encode(GREY8, "PNG"), rgb(GREY8)),
    "png rgb": (encode(RGB8, "PNG"), RGB8),
    "png rgba": (encode(RGBA8, "PNG"), on_white(RGBA8)),
    "png grey alpha": (
        encode(Image.fromarray(RGBA8[..., [0, 3]], "LA"), "PNG"),
        on_white(RGBA8[..., [0, 0, 0, 3]]),
    ),
    "png palette, transparent entry": (encode(PALETTE, "PNG", transparency=3), PALETTE_RGB),
    "png rgb, transparent colour": (
        encode(Image.fromarray(RGB8), "PNG", transparency=tuple(map(int, RGB8[2, 3]))),
        np.where((RGB8[2, 3] == RGB8).all(2, keepdims=True), 255, RGB8),
    ),
    "png grey 16": (encode(GREY16, "PNG"), rgb(to8(GREY16))),
    "png grey 14 in 16": (encode(GREY16 >> 2, "PNG"), rgb(to8(GREY16 >> 2, 16383))),
    "png grey 12 in 16": (encode(GREY16 >> 4, "PNG"), rgb(to8(GREY16 >> 4, 4095))),
    "png grey 10 in 16": (encode(GREY16 >> 6, "PNG"), rgb(to8(GREY16 >> 6, 1023))),
    "png rgb 12 in 16": (imagecodecs.png_encode(RGB16 >> 4), to8(RGB16 >> 4)),  # colours say what they are
    "png rgb 16": (imagecodecs.png_encode(RGB16), to8(RGB16)),
    "png rgba 16": (imagecodecs.png_encode(RGBA16), on_white(to8(RGBA16))),
    "webp": (encode(RGB8, "WEBP", lossless=True), RGB8),
    "webp alpha": (encode(RGBA8, "WEBP", lossless=True, exact=True), on_white(RGBA8)),
    "gif": (encode(PALETTE, "GIF", transparency=3), PALETTE_RGB),
    "gif, first of two": (
        encode(PALETTE, "GIF", transparency=3, save_all=True, append_images=[Image.new("P", (17, 13))]),
        PALETTE_RGB,
    ),
    "bmp": (encode(RGB8, "BMP"), RGB8),
    "bmp grey": (encode(GREY8, "BMP"), rgb(GREY8)),
    "tiff grey": (tiff(GREY8), rgb(GREY8)),
    "tiff rgb lzw": (tiff(RGB8, photometric="rgb", compression="lzw", predictor=2), RGB8),
    "tiff rgb planar": (tiff(RGB8.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB8),
    "tiff tiles, deflate": (tiff(RGB8, photometric="rgb", tile=(16, 16), compression="zlib"), RGB8),
    "tiff grey 16": (tiff(GREY16), rgb(to8(GREY16))),
    "tiff grey 16, big endian": (tiff(GREY16, byteorder=">"), rgb(to8(GREY16))),
    "tiff grey 12 in 16": (tiff(GREY16 >> 4), rgb(to8(GREY16 >> 4, 4095))),
    "tiff white is zero, 12 in 16": (tiff(GREY16 >> 4, photometric="miniswhite"), rgb(255 - to8(GREY16 >> 4, 4095))),
    "tiff rgb 16 lzw": (tiff(RGB16, photometric="rgb", compression="lzw"), to8(RGB16)),
    "tiff grey 12 bits": (tiff(GREY16 >> 4, bitspersample=12), rgb(to8(GREY16 >> 4, 4095))),
    "tiff grey 4 bits": (tiff(GREY8 >> 4, bitspersample=4), rgb(to8(GREY8 >> 4, 15))),
    "tiff white is zero": (tiff(GREY8, photometric="miniswhite"), rgb(255 - GREY8)),
    "tiff bilevel": (encode(Image.fromarray(BITS), "TIFF", compression="group4"), rgb(BITS * np.uint8(255))),
    "tiff palette": (encode(PALETTE, "TIFF"), np.asarray(PALETTE.convert("RGB"))),
    "tiff alpha": (tiff(RGBA8, photometric="rgb", extrasamples=["unassalpha"]), on_white(RGBA8)),
    "tiff cmyk": (tiff(RGBA8, photometric="separated"), np.asarray(PIL_CMYK.convert("RGB"))),
    "tiff float 0..1": (tiff(GREY16.astype(np.float32) / 65535), rgb(to8(GREY16))),
    "tiff float, wider": (tiff(GREY16.astype(np.float32) - 1000), STRETCHED),
    "tiff int16": (tiff((GREY16.astype(int) - 32768).astype(np.int16)), STRETCHED),
    "tiff pages": (tiff(np.stack([GREY8, GREY8[::-1]]), photometric="minisblack"), rgb(GREY8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_formats_are_read_as_they_were_written(name: str) -> None:
    data, expected = LOSSLESS[name]
    assert np.abs(whole(data, 13, 17) - np.asarray(expected, dtype=float)).max() <= 0.51


def test_lossy_formats_are_close_to_what_was_written() -> None:
    image = photo(64, 96, 3, fall=2.0)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    ycbcr = np.asarray(Image.fromarray(image).convert("YCbCr"))
    files = {
        "jpeg": (encode(image, "JPEG", quality=95), image),
        "jpeg grey": (encode(grey, "JPEG", quality=95), rgb(grey)),
        "webp": (encode(image, "WEBP", quality=95), image),
        "tiff jpeg": (tiff(image, photometric="rgb", compression="jpeg", compressionargs={"level": 95}), image),
        "tiff jpeg ycbcr": (
            tiff(ycbcr, photometric="ycbcr", compression="jpeg", compressionargs={"level": 95}, tile=(32, 32)),
            image,
        ),
    }
    for name, (data, expected) in files.items():
        assert np.abs(whole(data, 64, 96).astype(int) - expected).mean() < 4, name


def test_cmyk_jpegs_are_read_as_by_pillow_and_not_inverted() -> None:
    image = photo(600, 640, 1, fall=2.0)
    cmyk = Image.fromarray(image).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    assert np.array_equal(whole(data, 600, 640), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(whole(data, 600, 640).astype(int) - image).mean() < 4
    assert drift(data, 0) < 1.0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(kind: str, orientation: int) -> None:
    image = photo(520, 600, 2, fall=2.0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(image)
    if kind == "TIFF":
        data = tiff(image, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        data = encode(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    methods = (None, *(Image.Transpose(k) for k in (0, 3, 1, 5, 4, 6, 2)))  # by EXIF orientation 1..8
    method = methods[orientation - 1]
    decoded = Image.open(io.BytesIO(data)).convert("RGB") if kind != "TIFF" else stored
    upright = np.asarray(decoded if method is None else decoded.transpose(method))
    height, width = upright.shape[:2]
    assert np.array_equal(whole(data, height, width), upright)
    assert drift(data, 1) < 1.0


# --- hostile bytes


def reason(data: bytes, **options: object) -> str:
    reasons = set()
    for exact in (False, True):
        with pytest.raises(BadSample) as caught:
            read_image(data, Preprocess(size=(32, 32)), exact=exact, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


def png_bomb(height: int, width: int, depth: int = 8) -> bytes:
    """A PNG of a few kilobytes whose header promises very many pixels."""
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    for name, body in [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def jpeg_bomb(height: int, width: int) -> bytes:
    data = bytearray(encode(GREY8, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff_bomb(height: int, width: int) -> bytes:
    data = tiff(GREY8)
    for tag, old, new in [(256, 17, width), (257, 13, height)]:
        for kind in (3, 4):  # tifffile writes sizes as shorts or longs
            data = data.replace(struct.pack("<HHII", tag, kind, 1, old), struct.pack("<HHII", tag, 4, 1, new))
    return data


BOMBS = {
    "jpeg": jpeg_bomb(65000, 65000),
    "png": png_bomb(40000, 40000),
    "png 16": png_bomb(30000, 30000, 16),
    "tiff": tiff_bomb(100_000, 100_000),
    "webp": encode(np.zeros((1200, 1200, 3), np.uint8), "WEBP"),
    "gif": encode(np.zeros((1200, 1200), np.uint8), "GIF"),
    "bmp": encode(np.zeros((1200, 1200), np.uint8), "BMP"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pixel_bombs_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded before the size was checked")

    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    monkeypatch.setattr("tifffile.TiffPage.asarray", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert reason(BOMBS[name], max_pixels=10**6) == "over pixel limit"


def test_the_limit_is_inclusive_and_counts_the_resized_image_too() -> None:
    assert reason(LOSSLESS["png rgb"][0], max_pixels=13 * 17 - 1) == "over pixel limit"
    tiny = Preprocess(size=(8, 8), resize_mode="squash")
    assert read_image(LOSSLESS["png rgb"][0], tiny, max_pixels=13 * 17).shape == (8, 8, 3)
    # 60,000 x 1 pixels are few, but with a short side of 224 they would be three thousand million.
    line = encode(np.zeros((1, 60_000), np.uint8), "PNG")
    with pytest.raises(BadSample, match="too elongated"):
        read_image(line, Preprocess())


FILES = {
    "jpeg": encode(photo(160, 120), "JPEG"),
    "progressive": encode(photo(160, 120), "JPEG", progressive=True),
    "png": LOSSLESS["png palette, transparent entry"][0],
    "png 16": LOSSLESS["png rgb 16"][0],
    "webp": LOSSLESS["webp"][0],
    "tiff": LOSSLESS["tiff grey 16"][0],
    "tiff lzw": LOSSLESS["tiff rgb lzw"][0],
    "tiff jpeg": tiff(photo(64, 64), photometric="rgb", compression="jpeg"),
    "bmp": LOSSLESS["bmp"][0],
    "gif": LOSSLESS["gif"][0],
}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(name: str) -> None:
    data = FILES[name]
    for share in (0.05, 0.3, 0.6, 0.8):
        assert reason(data[: int(len(data) * share)]) == "broken image"


def test_a_jpeg_cut_short_but_ended_is_refused_and_not_half_grey() -> None:
    for name in ("jpeg", "progressive"):
        data = FILES[name]
        cut = data[: len(data) // 2] + b"\xff\xd9"
        assert reason(cut) == "broken image"
    Image.open(io.BytesIO(FILES["jpeg"][:2000] + b"\xff\xd9")).load()  # Pillow alone would have taken it


def test_bytes_too_many_in_a_jpeg_are_forgiven() -> None:
    data = FILES["jpeg"]
    padded = data[:-2] + b"junkjunk" + data[-2:]
    for exact in (False, True):
        options = {"exact": exact}
        assert np.array_equal(read_image(padded, Preprocess(), **options), read_image(data, Preprocess(), **options))
    assert np.array_equal(whole(data + b"trailing", 160, 120), whole(data, 160, 120))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"<html>404</html>", b"II*\0", b"GIF89a", b"%PDF-1.4"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert reason(data) == "broken image"


def test_formats_beyond_the_list_are_not_tried() -> None:
    for kind in ("PPM", "TGA", "ICO", "PCX"):
        assert reason(encode(RGB8, kind)) == "broken image"


@given(st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_mutated_files_raise_nothing_but_bad_sample(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(120, len(content) - 1)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        content = content or bytearray(b"x")
    _only_bad_sample(bytes(content))


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"GIF89a", b"BM", b"RIFF"]),
    st.binary(max_size=200),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_raise_nothing_but_bad_sample(magic: bytes, tail: bytes) -> None:
    _only_bad_sample(magic + tail)


def _only_bad_sample(content: bytes) -> None:
    for exact in (False, True):
        try:
            image = read_image(content, Preprocess(size=(32, 32)), exact=exact, max_pixels=10**6)
        except BadSample:
            continue
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8


def test_nothing_is_said_on_stderr(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    for name, content in FILES.items():
        for k in range(40):
            broken = bytearray(content)
            broken[(k * 37) % len(content)] ^= 0xFF
            _only_bad_sample(bytes(broken))
            _only_bad_sample(content[: len(content) * k // 40])
        assert capfd.readouterr() == ("", ""), name
    assert not [str(warning.message) for warning in recwarn]
