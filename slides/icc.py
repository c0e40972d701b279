"""A scanner's colour profile, applied: what it calls (r, g, b), as sRGB.

Readers hand pixels over as stored (openslide applies no profile either); whoever wants colours that compare between
scanners passes `Slide.icc` here. LittleCMS does the arithmetic, through Pillow.
"""

from __future__ import annotations

import io
import logging
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from slides.errors import SlideError

_log = logging.getLogger(__name__)
MAX_BYTES = 16 << 20  # scanners' profiles have 0.5 kB to about 2 MB
_INTENTS = {"relative": ImageCms.Intent.RELATIVE_COLORIMETRIC, "perceptual": ImageCms.Intent.PERCEPTUAL}


class Profile:
    """The transform from one profile to sRGB, built once. Safe to use from several threads at once.

    (`ImageCmsTransform.apply` lets go of the interpreter lock and only reads the transform: all that LittleCMS asks of
    a shared one is that its one-pixel cache is off.)

    Args:
        icc: bytes of the profile.
        name: of the slide, for messages.
        intent: "relative" (colorimetric: white to white, every colour that sRGB has stays what it was, those outside
            are cut off at its edge) or "perceptual" (the profile's own table where it has one, which may shift all
            colours to fit; the same as relative for profiles of three primaries and curves).

    Raises:
        SlideError: it is no profile of RGB pixels, it is broken, or larger than `MAX_BYTES`.
    """

    def __init__(self, icc: bytes, name: str = "slide", intent: Literal["relative", "perceptual"] = "relative") -> None:
        remedy = "leave its colours as they are, or ignore broken profiles"
        if intent not in _INTENTS:
            raise SlideError(f"{name}: rendering intent {intent!r} is not known: give one of {', '.join(_INTENTS)}")
        if len(icc) > MAX_BYTES:
            raise SlideError(f"{name}: its colour profile has {len(icc):,} bytes, {MAX_BYTES:,} at most: {remedy}")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            space = profile.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
            if space != "RGB":
                raise SlideError(f"{name}: its colour profile is for {space!a} pixels, not RGB: {remedy}")
            # ImageCmsTransform itself: `buildTransform` admits fewer flags.
            self._transform = ImageCms.ImageCmsTransform(
                profile,
                ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
                "RGB",
                "RGB",
                _INTENTS[intent],
                flags=ImageCms.Flags.NOCACHE,
            )
        except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
            raise SlideError(
                f"{name}: its colour profile is broken ({' '.join(str(error).split())}): {remedy}"
            ) from None

    def to_srgb(self, image: np.ndarray) -> np.ndarray:
        """uint8 (..., 3) in sRGB, of uint8 (..., 3) as the scanner wrote them; a new array.

        Raises:
            SlideError: another type or shape.
        """
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[-1] != 3:
            raise SlideError(f"icc: pixels of type {image.dtype}, shape {image.shape}: give uint8 RGB, (..., 3)")
        if not image.size:
            return image.copy()
        rows = image.reshape(-1, image.shape[-2], 3)  # a batch is one tall image
        return np.array(self._transform.apply(Image.fromarray(rows))).reshape(image.shape)


def profile_of(icc: bytes | None, name: str = "slide", *, ignore_broken: bool = False) -> Profile | None:
    """The profile of a slide, or None where it has none; where it is broken and may be ignored, None and a warning.

    Raises:
        SlideError: it is broken and may not be ignored.
    """
    if not icc:
        return None
    try:
        return Profile(icc, name)
    except SlideError as error:
        if not ignore_broken:
            raise
        _log.warning("%s; ignored", error)
        return None
