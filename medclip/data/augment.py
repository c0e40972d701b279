"""What fine-tuning a vision model adds to the crop: a mirror, and timm's RandAugment.

RandAugment (Cubuk et al. 2020, arXiv:1909.13719) is timm's own, on Pillow images, with the arguments that timm's
training transform passes. It draws from Python's and numpy's global generators, so these are seeded from the sample's
generator for the time of the call and set back afterwards: the pixels depend on the sample alone, whatever process or
order it is read in.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from medclip.data.crop import Augment, Flip, RandomCrop
from medclip.types import Preprocess, UserError


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment.

    Args:
        spec: as timm writes it: `rand-m6-mstd0.5-inc1` is magnitude 6 with noise 0.5, the set whose severity increases.
        size: pixels of the image, which shifts are a share of.
        mean: mean colour on a 0..1 scale, which shows where the picture was moved away.
    """

    spec: str
    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        try:
            _transform(self.spec, self.size, self.mean)
        except (AssertionError, ValueError, TypeError, KeyError):
            raise UserError(f"data.randaug is {self.spec!r}: write timm's form, e.g. rand-m6-mstd0.5-inc1") from None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        seed = int(rng.integers(2**32))
        python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # timm draws from these
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            augmented = _transform(self.spec, self.size, self.mean)(Image.fromarray(np.ascontiguousarray(image)))
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
        return np.asarray(augmented)


@lru_cache(maxsize=8)
def _transform(spec: str, size: int, mean: tuple[float, ...]) -> Callable[[Any], Any]:
    # Here: a reader process without RandAugment does not pay for timm's import.
    from timm.data.auto_augment import rand_augment_transform

    # As in timm.data.transforms_factory.transforms_imagenet_train.
    hparams = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * x)) for x in mean)}
    hparams["interpolation"] = Image.Resampling.BICUBIC
    return rand_augment_transform(spec, hparams)


def augmented(crop: RandomCrop | None, flip: float, randaug: str | None, preprocess: Preprocess) -> RandomCrop | None:
    """The crop of a training with what comes after it: its own `then`, the mirror, RandAugment.

    Args:
        crop: of the config.
        flip: probability of the mirror.
        randaug: timm's RandAugment, or None.
        preprocess: the model's.

    Raises:
        UserError: there is no crop to come after, or a bad value.
    """
    if isinstance(flip, bool) or not isinstance(flip, int | float) or not 0 <= flip <= 1:
        raise UserError(f"data.flip is {flip!r}: give a probability from 0 to 1")
    then: list[Augment] = [Flip(flip)] if flip else []
    if randaug is not None:
        then.append(RandAugment(str(randaug), min(preprocess.size), preprocess.mean))
    if not then:
        return crop
    if crop is None:
        raise UserError("data.flip and data.randaug come after a random crop, but data.crop is null: set one")
    return replace(crop, then=(*crop.then, *then))
