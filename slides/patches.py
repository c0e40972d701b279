"""Patches of a slide, in order, decoded by several threads, each stored tile once.

The patches of a run are cut into chunks of sixteen. A tile belongs to the first chunk that needs it; later chunks wait
for it, and the last to use it drops it. Chunks are handed to the threads in order, so a chunk only ever waits for one
that was begun before it. Memory holds the tiles that are still needed, not a cache of a guessed size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import cv2
import numpy as np

from slides.assemble import paste
from slides.errors import TileError
from slides.geometry import Geometry
from slides.reader import Slide

OK, CORRUPT, SPARSE = 0, 1, 2
STATUS = ("ok", "corrupt", "sparse")  # sparse: part of it was not scanned and is white
CHUNK = 16
_STRIP = 16_384  # level pixels; a row of full tiles of so many is 12 MB

T = TypeVar("T")
_Key = tuple[int, int]  # column, row of a tile
Pixels = np.ndarray  # uint8 (n, size, size, 3)


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """Consecutive patches.

    Args:
        first: number of the first one in the run.
        status: uint8 (n,), numbers of `STATUS`. The pixels of a corrupt patch mean nothing.
        value: what `then` made of the pixels.
        broken: what is wrong with corrupt ones, a line each.
    """

    first: int
    status: np.ndarray
    value: T
    broken: tuple[str, ...]


def reading_order(coords: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Numbers that sort patches so that neighbours are read together: strips of columns, rows in them, left to right.

    Strips bound the memory on wide slides; a tile on the border of two strips is decoded for each.

    Args:
        coords: int64 (n, 2), level-0 (x, y).
        geometry: of the patches.
    """
    strip = max(1.0, _STRIP * geometry.side / geometry.read)
    return np.lexsort((coords[:, 0], coords[:, 1], (coords[:, 0] // strip).astype(np.int64)))


def read_patches(
    slide: Slide,
    geometry: Geometry,
    coords: np.ndarray,
    then: Callable[[Pixels, np.ndarray], T],
    *,
    exact: bool = False,
    threads: int = 1,
    chunk: int = CHUNK,
) -> Iterator[Chunk[T]]:
    """Read patches and hand them on in the order of `coords`.

    Args:
        slide: open; stays so until the iterator is done.
        geometry: of `geometry.geometry`.
        coords: int64 (n, 2), level-0 (x, y), multiples of `geometry.snap`; in `reading_order` for speed.
        then: called in the reading thread with uint8 (n, size, size, 3), which it may keep, and the status (n,).
        exact: decode whole pixels and average areas, as openslide and `cv2.INTER_AREA` do, to the bit; else JPEG tiles
            are decoded at reduced scale where less is wanted.
        threads: that decode.
        chunk: patches handed on at a time.
    """
    reader = _Reader(slide, geometry, coords, exact, chunk)
    if threads <= 1:
        yield from (reader.run(number, then) for number in range(reader.chunks))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="patches") as pool:
        ahead: deque[Future[Chunk[T]]] = deque()
        try:
            for number in range(reader.chunks):
                ahead.append(pool.submit(reader.run, number, then))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # the consumer may stop early
            for future in ahead:
                future.cancel()
            reader.release()


class _Reader:
    def __init__(self, slide: Slide, geometry: Geometry, coords: np.ndarray, exact: bool, chunk: int) -> None:
        self.slide, self.geometry = slide, geometry
        self.level = slide.levels[geometry.level]
        self.reduce = 1 if exact else geometry.reduce
        grain = geometry.reduce  # origins and sides are the same in both ways
        places = np.rint(coords / (self.level.downsample * grain)).astype(np.int64) * grain
        self.places = places
        self.chunk = chunk
        self.chunks = -(-len(places) // chunk)
        self.own: list[list[_Key]] = [[] for _ in range(self.chunks)]  # tiles that only this chunk needs, and twice
        self.first: list[list[_Key]] = [[] for _ in range(self.chunks)]  # tiles that it decodes for others too
        self.shared: list[list[_Key]] = [[] for _ in range(self.chunks)]  # tiles of others', and those
        self.tiles: dict[_Key, _Tile] = {}
        self.lock = threading.Lock()
        if self.level.tile is not None:
            self._share()

    def _share(self) -> None:
        """Give each tile to the first chunk that needs it, and count the others."""
        assert self.level.tile is not None
        wide, high = self.level.tile
        columns, rows = -(-self.level.width // wide), -(-self.level.height // high)
        low = np.maximum(self.places // (wide, high), 0)
        end = np.minimum(-(-(self.places + self.geometry.read) // (wide, high)), (columns, rows))
        users: dict[_Key, list[int]] = {}  # numbers of chunks, once for each patch
        for number in range(self.chunks):
            part = slice(number * self.chunk, (number + 1) * self.chunk)
            for (x0, y0), (x1, y1) in zip(low[part].tolist(), end[part].tolist(), strict=True):
                for row in range(y0, y1):
                    for column in range(x0, x1):
                        users.setdefault((column, row), []).append(number)
        for key, numbers in users.items():
            if len(numbers) == 1:
                continue  # decoded when it is pasted: kept tiles cost page faults, a tenth of the time
            if numbers[0] == numbers[-1]:
                self.own[numbers[0]].append(key)
                continue
            chunks = set(numbers)
            self.tiles[key] = _Tile(len(chunks))
            self.first[numbers[0]].append(key)
            for number in chunks:
                self.shared[number].append(key)

    def run(self, number: int, then: Callable[[Pixels, np.ndarray], T]) -> Chunk[T]:
        places = self.places[number * self.chunk : (number + 1) * self.chunk]
        size, read, reduce = self.geometry.size, self.geometry.read, self.reduce
        out = np.empty((len(places), size, size, 3), np.uint8)
        status = np.zeros(len(places), np.uint8)
        broken: list[str] = []
        # What others wait for goes first.
        for key in self.first[number]:
            self.tiles[key].pixels.set_result(self._decode(key))
        own = {key: self._decode(key) for key in self.own[number]}
        shared = set(self.shared[number])

        def tile(column: int, row: int) -> np.ndarray | None:
            key = (column, row)
            if key in own:
                pixels = own[key]
            elif key in shared:
                pixels = self.tiles[key].pixels.result()
            else:
                pixels = self._decode(key)
            if isinstance(pixels, TileError):
                raise pixels
            return pixels

        side = read // reduce
        scratch = np.empty((side, side, 3), np.uint8)
        for k, (x, y) in enumerate(places.tolist()):
            target = out[k] if side == size else scratch
            try:
                if self.level.tile is not None:
                    status[k] = OK if paste(target, x, y, self.level, tile, reduce) else SPARSE
                else:
                    target = self.slide.read(self.geometry.level, x, y, read, read)
                    if side == size:
                        out[k] = target
            except TileError as error:
                status[k] = CORRUPT
                out[k].fill(255)
                broken.append(str(error))
                continue
            if side != size:
                # Area averaging going down; going up it would repeat pixels.
                how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
                cv2.resize(target, (size, size), dst=out[k], interpolation=how)
        with self.lock:
            for key in self.shared[number]:
                self.tiles[key].users -= 1
                if not self.tiles[key].users:
                    del self.tiles[key]
        return Chunk(number * self.chunk, status, then(out, status), tuple(dict.fromkeys(broken)))

    def _decode(self, key: _Key) -> np.ndarray | TileError | None:
        try:
            return self.slide.read_tile(self.geometry.level, *key, self.reduce)
        except TileError as error:
            return error

    def release(self) -> None:
        """Wake whoever waits for a tile of a chunk that will not run any more."""
        for tile in list(self.tiles.values()):
            tile.pixels.cancel()


class _Tile:
    """A decoded tile that several chunks need: a slot to wait for, and how many have not used it yet."""

    __slots__ = ("pixels", "users")

    def __init__(self, users: int) -> None:
        self.pixels: Future[np.ndarray | TileError | None] = Future()
        self.users = users
