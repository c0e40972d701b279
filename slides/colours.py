"""What is done to the colours of every patch of a slide: its ICC profile, then one cohort-wide stain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from slides.errors import SlideError
from slides.icc import Profile
from slides.image import read_image
from slides.overview import overview
from slides.patches import CORRUPT, read_patches
from slides.plan import Plan
from slides.reader import Slide
from slides.request import Request
from slides.stain.macenko import Macenko
from slides.stain.normalise import Normaliser
from slides.stain.od import WHITE
from slides.stain.reinhard import Reinhard
from slides.stain.vahadane import Vahadane
from slides.tissue import tissue_mask

_log = logging.getLogger(__name__)
Change = Callable[[np.ndarray], np.ndarray]  # uint8 (..., 3) to the same
_SAMPLE = 24  # patches
_METHODS: dict[str, Callable[..., Any]] = {"macenko": Macenko, "reinhard": Reinhard, "vahadane": Vahadane}


def recolour(slide: Slide, request: Request, plan: Plan) -> Change | None:
    """What changes the colours of this slide's patches as the request has it; None where nothing does.

    Stains are estimated once a slide, on a spread of its patches, so that neighbours stay alike; and at the patches'
    own resolution, since an overview has less contrast, which Reinhard's method would give back twice.

    Raises:
        SlideError: a stain cannot be estimated, or the target image not be read.
    """
    steps: list[Change] = []
    if request.icc:
        if slide.icc is None:
            _log.info("%s: has no colour profile, its pixels are taken as sRGB", slide.path.name)
        else:
            steps.append(Profile(slide.icc).to_srgb)
    if request.stain is not None and request.stain_target is not None and len(plan):
        low = overview(slide, request.tissue_mpp)
        glass, pixels = low.image, _sample(slide, plan)
        for step in steps:
            glass, pixels = step(glass), step(pixels)
        try:
            target = _target(request.stain, request.stain_target)
            steps.append(Normaliser(_method(request.stain, glass, low.mpp), target).slide(pixels))
        except SlideError as error:
            raise SlideError(f"{slide.path.name}: {error}") from None
    if not steps:
        return None

    def change(image: np.ndarray) -> np.ndarray:
        for step in steps:
            image = step(image)
        return image

    return change


def _sample(slide: Slide, plan: Plan) -> np.ndarray:
    """uint8 (n, size, size, 3): patches spread evenly over the plan, those that can be read."""
    rows = np.unique(np.linspace(0, len(plan) - 1, min(_SAMPLE, len(plan))).round().astype(int))
    chunks = read_patches(slide, plan.geometry, plan.coords[rows], lambda pixels, status: pixels[status != CORRUPT])
    return np.concatenate([chunk.value for chunk in chunks])


def _method(name: str, image: np.ndarray, mpp: float) -> Any:
    """The method, told the colour of this slide's glass: on tinted glass a fixed white would be taken for stain."""
    glass = image[~tissue_mask(image, mpp)]
    white = tuple(float(v) for v in np.median(glass, axis=0)) if len(glass) > 0.01 * image[..., 0].size else WHITE
    return _METHODS[name](white=white)


@lru_cache(maxsize=4)
def _target(method: str, path: str) -> Any:
    return _METHODS[method]().estimate(read_image(Path(path).expanduser())[0])
