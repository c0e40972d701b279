"""Compressed DICOM frames through imagecodecs, which this project needs anyway: a decoding plugin for pydicom.

Covers what pydicom has no decoder of its own for: JPEG Extended of 12 bits, JPEG Lossless, JPEG-LS, JPEG 2000, HTJ2K;
and RLE, which pydicom's pure Python decodes up to 40 times more slowly. Baseline JPEG is left to pydicom and Pillow.
The usual plugin for the lossless kinds, pylibjpeg-libjpeg, is under the GPL. The same decoder serves on every machine,
whatever else is installed, so that a stream's pixels are the same everywhere.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

_LABEL = "medclip"
_JPEG = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
_HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_CODECS = (
    ((uid.RLELossless,), "DICOMRLE"),
    (_JPEG, "JPEG8"),
    (_JPEG_LS, "JPEGLS"),
    (_JPEG_2000, "JPEG2K"),
    (_HTJ2K, "HTJ2K"),
)
CODESTREAMS = frozenset((uid.JPEGBaseline8Bit, *_JPEG, *_JPEG_LS, *_JPEG_2000, *_HTJ2K))  # with a size of their own
# What pydicom asks of a plugin's module.
DECODER_DEPENDENCIES = {syntax: ("imagecodecs",) for syntaxes, _ in _CODECS for syntax in syntaxes}


def is_available(syntax: str) -> bool:
    """Whether this build of imagecodecs can decode a transfer syntax."""
    return any(syntax in syntaxes and getattr(imagecodecs, codec).available for syntaxes, codec in _CODECS)


def plugin(syntax: uid.UID) -> str | None:
    """The plugin by which pydicom is to decode a transfer syntax; "" for pydicom itself, None where there is none."""
    if not syntax.is_encapsulated:
        return ""
    if syntax == uid.JPEGBaseline8Bit:
        return "pillow"
    if not is_available(syntax):
        return None
    decoder = get_decoder(syntax)
    if _LABEL not in decoder.available_plugins:
        decoder.add_plugin(_LABEL, (__name__, "decode_frame"))
    return _LABEL


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One frame's samples, little-endian, for pydicom's `DecodeRunner`."""
    syntax = runner.transfer_syntax
    if syntax == uid.RLELossless:
        runner.set_option("planar_configuration", 1)
        return np.ascontiguousarray(imagecodecs.dicomrle_decode(src, runner.pixel_dtype.newbyteorder("<"))).tobytes()
    if syntax in _JPEG:
        # As they are stored: pydicom settles what colours they are.
        array = imagecodecs.jpegsof3_decode(src) if runner.samples_per_pixel > 1 else imagecodecs.jpeg8_decode(src)
    elif syntax in _JPEG_LS:
        array = imagecodecs.jpegls_decode(src)
    else:
        array = imagecodecs.jpeg2k_decode(src) if syntax in _JPEG_2000 else imagecodecs.htj2k_decode(src)
        if runner.photometric_interpretation in ("YBR_RCT", "YBR_ICT"):
            runner.set_option("photometric_interpretation", "RGB")  # the codec has turned its transform back
    runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", 8 * array.itemsize)
    return np.ascontiguousarray(array).tobytes()
