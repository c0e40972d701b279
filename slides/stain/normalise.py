"""A whole cohort to one slide's colours: estimate a slide once, on an overview, and change all of its patches alike.

    normaliser = Normaliser.fit(Macenko(), target_pixels)
    change = normaliser.slide(overview)
    patches = [change(patch) for patch in patches]

Estimating each patch by itself (what most code does) gives neighbouring patches different colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np

S = TypeVar("S")


class Method(Protocol[S]):
    """Macenko, Vahadane or Reinhard."""

    def estimate(self, pixels: np.ndarray) -> S: ...

    def transfer(self, image: np.ndarray, source: S, target: S) -> np.ndarray: ...


@dataclass(frozen=True)
class Normaliser(Generic[S]):
    """A method, and the colours that every slide is to have."""

    method: Method[S]
    target: S

    @classmethod
    def fit(cls, method: Method[S], pixels: np.ndarray) -> Normaliser[S]:
        """The target is what `pixels`, uint8 (..., 3), show.

        Raises:
            SlideError: see the method's `estimate`.
        """
        return cls(method, method.estimate(pixels))

    def slide(self, pixels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What changes any uint8 (..., 3) of the slide of which `pixels` is an overview or some patches.

        Raises:
            SlideError: see the method's `estimate`.
        """
        return partial(self.method.transfer, source=self.method.estimate(pixels), target=self.target)
