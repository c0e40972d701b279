"""Features of images by what is in the images: each distinct one is seen once by an encoder that does not change.

Questions about one image come many to one, epoch after epoch. What an encoder makes of an image is found again by a
digest of the image itself, wherever it came from: of another reader process, another epoch or another data set.

Images are encoded one by one and outside of autocast. So what is remembered does not depend on which other images
happened to be in the batch (kernels round differently for another number of rows), and a resumed run, another rank or
an evaluation has the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

_log = logging.getLogger(__name__)
_LANES = 2
_FIRST = 64  # rows there are at first


class Remembered:
    """Rows by digest, on the device they were made on.

    Args:
        room: bytes there may be; what comes later is made anew each time.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.made = 0  # images encoded so far
        self.forget()
        self._keys: Tensor | None = None

    def forget(self) -> None:
        """Start again: the encoder has changed."""
        self._places: dict[tuple[int, ...], int] = {}
        self._rows: Tensor | None = None
        self._full = False

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def __call__(self, of: Sequence[Shaped[Tensor, "b ..."]], make: Callable[[int], Tensor]) -> Tensor:
        """The features (b, ...) of a batch.

        Args:
            of: all that they depend on, a row a sample.
            make: features (1, ...) of a row by its number.
        """
        if self._rows is not None and self._rows.device != of[0].device:
            self.forget()
        names = [tuple(name) for name in self._digest(of).tolist()]
        fresh: dict[tuple[int, ...], Tensor] = {}
        device = of[0].device.type
        # Not in inference mode, in which validation runs: what is made there could not be added to later.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            for row, name in enumerate(names):
                if name not in self._places and name not in fresh:
                    made = make(row)
                    self.made += 1
                    if not self._put(name, made):
                        fresh[name] = made[0]
            if not fresh:
                assert self._rows is not None
                places = torch.tensor([self._places[name] for name in names], device=of[0].device)
                return self._rows.index_select(0, places)
            return torch.stack([fresh[n] if n in fresh else self._rows[self._places[n]] for n in names])  # pyright: ignore

    def _put(self, name: tuple[int, ...], row: Tensor) -> bool:
        most = self.room // max(1, row.nbytes)
        place = len(self._places)
        if place >= most:
            if not self._full:
                self._full = True
                _log.warning(
                    "model.visual.remember: there is room for the features of %d images, others are made anew each "
                    "time; raise it (GB), or leave data.crop, flip and randaug out, which make another image each time",
                    place,
                )
            return False
        if self._rows is None or place == len(self._rows):
            count = min(most, _FIRST if self._rows is None else 2 * place)
            rows = row.new_empty((count, *row.shape[1:]))
            if self._rows is not None:
                rows[:place] = self._rows
            self._rows = rows
        self._rows[place] = row[0]
        self._places[name] = place
        return True

    def _digest(self, of: Sequence[Shaped[Tensor, "b ..."]]) -> Int64[Tensor, "b lanes"]:
        flat = torch.cat([_words(rows) for rows in of], 1)
        if self._keys is None or self._keys.shape[1] != flat.shape[1] or self._keys.device != flat.device:
            whole = torch.iinfo(torch.int64)
            dice = torch.Generator().manual_seed(0)
            size = (_LANES, flat.shape[1])
            keys = torch.randint(whole.min, whole.max, size, generator=dice, dtype=torch.int64)
            self._keys = keys.to(flat.device)
        # Multilinear hashing modulo 2^64 of 32-bit words (Lemire and Kaser 2014, arXiv:1202.4961, section 2): two lanes
        # of it agree on different images with a probability of 2^-64 or less. On the device the image never leaves it.
        return torch.stack([(flat * key).sum(1) for key in self._keys], 1)


def _words(rows: Shaped[Tensor, "b ..."]) -> Int64[Tensor, "b words"]:
    raw = rows.detach().reshape(len(rows), -1).contiguous().view(torch.uint8)
    if rest := -raw.shape[1] % 4:
        raw = torch.nn.functional.pad(raw, (0, rest))
    return raw.contiguous().view(torch.int32).long()
