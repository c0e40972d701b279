"""All that the viewer can answer, without a word of HTTP: slides, tiles, maps, neighbours.

Slides are looked up by name among those that were found at the start; nothing that is asked ever becomes a path.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medclip.app import tiles
from medclip.app.downloads import DOWNLOADS
from medclip.app.features import Bag, FeatureStore
from medclip.app.limits import Limits, Refused
from medclip.app.lru import Lru
from medclip.app.maps import Map, SlideModel, Wanted, attention_map, text_map
from medclip.app.neighbours import Cohort, Hit, best, hit
from medclip.app.pool import SlidePool
from medclip.app.texts import Captions, Texts
from slides.entry import Entry
from slides.errors import SlideError

_log = logging.getLogger(__name__)
_THUMBNAIL, _PATCH = 256, 160  # pixels


@dataclass
class _About:
    """What is known of a slide after it was first opened."""

    pyramid: tiles.Pyramid | None = None
    mpp: float = 0.0
    patches: int | None = None
    error: str | None = None
    broken: set[tuple[int, int, int]] = field(default_factory=set)  # tiles with something broken, as they were met


class Viewer:
    """Answers.

    Args:
        entries: the slides.
        store: features by model.
        texts: CLIPs by model.
        slide_models: MIL models by name.
        captions: to compare patches with.
        limits: of all of it.
    """

    def __init__(
        self,
        entries: list[Entry],
        store: FeatureStore,
        texts: Texts,
        slide_models: Mapping[str, SlideModel],
        captions: Captions,
        limits: Limits,
    ) -> None:
        self.entries = {entry.slide: entry for entry in entries}
        self.store, self.texts, self.slide_models, self.captions, self.limits = (
            store,
            texts,
            slide_models,
            captions,
            limits,
        )
        self.pool = SlidePool(self.entries, limits.slides)
        self.cohorts = {name: Cohort(store, name, list(self.entries), limits.index_patches) for name in store.sets}
        self._about: dict[str, _About] = {}
        self._tiles: Lru[tuple[str, int, int, int], tiles.Tile | None] = Lru(
            limits.tile_bytes, lambda tile: 100 + (len(tile.jpeg) if tile is not None else 0)
        )
        self._pictures: Lru[str, np.ndarray] = Lru(limits.tile_bytes, lambda picture: picture.nbytes)
        self._maps: Lru[Wanted, Map] = Lru(limits.tile_bytes, lambda one: one.bytes)
        self._stop = threading.Event()
        self._scan: threading.Thread | None = None

    def start(self) -> None:
        """Look at every slide once, and gather the sample of the cohort's patches, in the background."""
        self._scan = threading.Thread(target=self._look, name="looking", daemon=True)
        self._scan.start()

    def _look(self) -> None:
        for name in self.entries:
            if self._stop.is_set():
                return
            self.about(name)
        for cohort in self.cohorts.values():
            cohort.gather(self._stop)

    def wait(self) -> None:
        """Until all was looked at."""
        if self._scan is not None:
            self._scan.join()

    def close(self) -> None:
        self._stop.set()
        self.wait()
        self.pool.close()

    def about(self, name: str) -> _About:
        """A slide's size and what is wrong with it; the slide is opened the first time.

        Raises:
            Refused: there is none of this name.
        """
        if name not in self.entries:
            raise Refused(404, "no such slide")
        known = self._about.get(name)
        if known is None:
            known = _About(patches=self.store.count(name))
            try:
                with self.pool.use(name) as slide:
                    known.pyramid, known.mpp = tiles.Pyramid.of(slide), slide.mpp
            except SlideError as error:
                known.error = self._said(name, error)
            except Exception as error:  # one bad slide is one bad slide
                _log.warning("%s", name, exc_info=error)
                known.error = f"{name} cannot be opened ({type(error).__name__})"
            self._about[name] = known
        return known

    def _said(self, name: str, error: Exception) -> str:
        """An error's line, without the folders of this machine."""
        said = " ".join(str(error).split())
        folders = [Path(self.entries[name].path).parent, *(one.folder for one in self.store.sets.values())]
        for folder in folders:
            said = said.replace(f"{folder}/", "")
        return said

    def listing(self) -> dict[str, Any]:
        """Every slide with what is known of it so far."""
        return {
            "slides": [self.row(name) for name in self.entries],
            "waiting": len(self.entries) - len(self._about),
        }

    def row(self, name: str) -> dict[str, Any]:
        entry, known = self.entries[name], self._about.get(name)
        row: dict[str, Any] = {
            "name": name,
            "table": {key: str(value)[:200] for key, value in entry.extra.items()},
            "models": [model for model in self.store.sets if self.store.has(model, name)],
        }
        if known is not None:
            row |= {"patches": known.patches, "error": known.error, "broken": len(known.broken)}
        if known is not None and known.pyramid is not None:
            row |= {"width": known.pyramid.width, "height": known.pyramid.height, "mpp": known.mpp}
            row |= {"tile": known.pyramid.side, "first": known.pyramid.first, "last": known.pyramid.last}
        return row

    def detail(self, name: str) -> dict[str, Any]:
        """One slide's row, looked at now.

        Raises:
            Refused: there is none, or it cannot be opened.
        """
        self._pyramid(name)
        return self.row(name)

    def models(self) -> list[dict[str, Any]]:
        """Which models there are, and what they can do."""
        rows = []
        for name, one in self.store.sets.items():
            kind = "text" if name in self.texts.models else "attention" if name in self.slide_models else "features"
            rows.append({"name": name, "kind": kind, "encoder": one.encoder})
        return rows

    def _pyramid(self, name: str) -> tiles.Pyramid:
        known = self.about(name)
        if known.pyramid is None:
            raise Refused(422, known.error or f"{name} cannot be opened")
        return known.pyramid

    def ready_tile(self, name: str, level: int, column: int, row: int) -> tiles.Tile | None:
        """A tile that is in memory already."""
        return self._tiles.peek((name, level, column, row))

    def tile(self, name: str, level: int, column: int, row: int) -> tiles.Tile:
        """A deep-zoom tile.

        Raises:
            Refused: there is no such slide or tile, or the slide cannot be read.
        """
        pyramid = self._pyramid(name)
        if pyramid.extent(level, column, row) is None:
            raise Refused(404, "no such tile")
        key = (name, level, column, row)
        found = self._tiles.get(key, lambda: self._draw(name, pyramid, level, column, row))
        assert found is not None
        if found.broken:
            self.about(name).broken.add(key[1:])
        return found

    def _draw(self, name: str, pyramid: tiles.Pyramid, level: int, column: int, row: int) -> tiles.Tile | None:
        try:
            with self.pool.use(name) as slide:
                if tiles.is_far(slide, pyramid.downsample(level)):
                    whole = self._pictures.get(name, lambda: tiles.picture(slide, tiles.PICTURE))
                    return tiles.cut(whole, pyramid, level, column, row)
                return tiles.tile(slide, pyramid, level, column, row)
        except SlideError as error:
            raise Refused(422, self._said(name, error)) from None

    def thumbnail(self, name: str) -> bytes:
        """JPEG of the whole slide: its coarsest tile, which the deep zoom needs anyway."""
        return self.tile(name, self._pyramid(name).first, 0, 0).jpeg

    def patch(self, name: str, x: int, y: int, side: int) -> bytes:
        """JPEG of a square, at most a few pixels large whatever its side.

        Raises:
            Refused: it lies outside the slide, or is larger than any patch.
        """
        pyramid = self._pyramid(name)
        if not (0 <= x < pyramid.width and 0 <= y < pyramid.height and 1 <= side <= 16384):
            raise Refused(422, "no such patch: it lies outside the slide, or its side is over 16384 pixels")
        try:
            with self.pool.use(name) as slide:
                return tiles.encode(tiles.read(slide, x, y, _PATCH, _PATCH, side / _PATCH)[0])
        except SlideError as error:
            raise Refused(422, self._said(name, error)) from None

    def _bag(self, name: str, model: str) -> tuple[Bag, tuple[int, int]]:
        pyramid = self._pyramid(name)
        if model not in self.store.sets:
            raise Refused(404, "no such model")
        size = (pyramid.width, pyramid.height)
        try:
            return self.store.bag(model, name, lambda: self.pool.use(name)), size
        except SlideError as error:
            raise Refused(422, self._said(name, error)) from None

    def map(self, wanted: Wanted) -> Map:
        """A map, from memory where it was asked for lately.

        Raises:
            Refused: there is no such slide or model, no features, or they belong to another slide.
        """
        bag, size = self._bag(wanted.slide, wanted.model)
        text = wanted.model in self.texts.models
        if text != (wanted.prompt is not None):
            raise Refused(422, "give a text" if text else f"{wanted.model} shows what it attends to, and takes no text")

        def make() -> Map:
            if wanted.prompt is None:
                return attention_map(wanted, bag, size, self.slide_models[wanted.model])
            against = None if wanted.against is None else self.texts.vector(wanted.model, wanted.against)
            return text_map(wanted, bag, size, self.texts.vector(wanted.model, wanted.prompt), against)

        if not text and wanted.model not in self.slide_models:
            raise Refused(422, f"{wanted.model} has features only: there is no map of it")
        return self._maps.get(wanted, make)

    def file(self, wanted: Wanted, kind: str) -> bytes:
        """A map as a file of `DOWNLOADS`.

        Raises:
            Refused: as `map`; or the slide below it cannot be decoded.
        """
        found = self.map(wanted)
        try:
            with self.pool.use(wanted.slide) as slide:
                return DOWNLOADS[kind].make(found, slide)
        except SlideError as error:
            raise Refused(422, self._said(wanted.slide, error)) from None

    def top(self, wanted: Wanted) -> list[Hit]:
        """The patches that match best, none overlapping another."""
        found, (bag, _) = self.map(wanted), self._bag(wanted.slide, wanted.model)
        return best(found.values, bag, wanted.slide, self.limits.gallery, apart=1.0)

    def near(self, name: str, model: str, x: int, y: int) -> dict[str, Any]:
        """The patch at a place, its neighbours in feature space here and in the cohort, and captions near to it.

        Raises:
            Refused: no patch is there.
        """
        bag, _ = self._bag(name, model)
        place = np.array([x, y])
        over = np.flatnonzero(((bag.coords <= place) & (place < bag.coords + bag.side)).all(axis=1))
        if not len(over):
            raise Refused(404, "no patch with features at this place")
        row = int(over[np.abs(bag.coords[over] + bag.side / 2 - place).max(axis=1).argmin()])
        feature, count = bag.unit(row), min(8, self.limits.gallery)
        here = [
            one for one in best(bag.scores(feature), bag, name, count + 1) if (one.x, one.y) != tuple(bag.coords[row])
        ]
        cohort = self.cohorts[model]
        captions = self.captions.nearest(model, feature, 5) if model in self.captions.vectors else []
        return {
            "patch": hit(bag, row, name, 1.0),
            "here": here[:count],
            "cohort": cohort.nearest(feature, count, without=name),
            "searched": cohort.done,
            "of": len(cohort.slides),
            "captions": captions,
        }
