"""Evaluation sets: images in file order with their label, captions and group, from any source.

    EvalSet([{urls: "test/*.tar"}], label="phantom.label", captions="txt", group="patient")

Fields are paths into the metadata. A folder of class folders and a CLIP_benchmark set (`cls` + `classnames.txt`) have
the field `label`. Samples that cannot be used are skipped and listed; a set of which none can be used is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch.utils.data import DataLoader

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.declared import Declared, Rows, classes, declarations
from medclip.data.decode import read_image
from medclip.data.ledger import Bad
from medclip.data.pick import Pick
from medclip.data.raw import Source
from medclip.data.selection import missing_fields, there_are
from medclip.data.sources import open_sources
from medclip.data.workers import as_is, one_thread
from medclip.types import Batch, Preprocess, UserError


class EvalSet:
    """Samples of an evaluation, for any number of models.

    Args:
        sources: configs as in `data.sources`; their `caption` is set from `captions`.
        label: field of the class name, or how it is found (see `pick`); None for sets without classes.
        captions: field, or rule as in `CaptionRule`, all of whose texts belong to the image; True for the text member.
        group: what the bootstrap draws (patient, case), as `label`; None takes every sample by itself.
        limit: at most this many samples, drawn evenly over the set, the same every time.
        labels: how a vector of labels is made of each sample's metadata (see `labels`); `classes` are its names.
        eval_resize: pixels of the shorter side before the centre crop; None for the model's own transform.
        exact: decode as open_clip's PIL transform does, bit for bit.
        max_pixels: larger images are refused before they are decoded.
        storage: `index`, `cache` and retry settings, as in `data.storage`.
        index: folder for tar indexes; None for that of `storage`, else the user's cache folder.

    Raises:
        UserError: a field that no sample has, a bad source, or an empty set.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        *,
        label: str | Mapping[str, Any] | None = None,
        captions: str | bool | Mapping[str, Any] | None = None,
        group: str | Mapping[str, Any] | None = None,
        limit: int | None = None,
        labels: Mapping[str, Any] | None = None,
        eval_resize: int | None = None,
        exact: bool = True,
        max_pixels: int = 89_000_000,
        storage: Mapping[str, Any] | None = None,
        index: str | Path | None = None,
    ) -> None:
        rule = CaptionRule.parse(captions if captions is not None else False)
        configs = [{**source, "caption": rule} for source in sources]
        declared = declarations(configs, labels)
        self.classes = classes(declared)
        of_label, of_group = Pick.parse("label", label), Pick.parse("group", group)
        options = dict(storage or {})
        index = options.pop("index", None) if index is None else index
        self.sources = open_sources(configs, index=index, **options)
        self.problems = [problem for source in self.sources for problem in source.problems]
        for source, own in zip(self.sources, declared, strict=True):
            if own.labels is not None:
                own.labels.check(source)
            fields = [(f"the {pick.role}", field) for pick in (of_label, of_group) if pick for field in pick.fields]
            if rule.needs_meta and not rule.takes_text:
                # Of several caption fields one may be enough: only where none is there something is wrong.
                fields += [("the captions", f) for f in rule.fields] if len(rule.fields) == 1 else []
            for role, field in fields:
                _check_field(source, role, field)
        starts = np.cumsum([0, *(len(source) for source in self.sources)])
        places = np.arange(starts[-1])
        if limit is not None and limit < len(places):
            places = np.sort(np.random.default_rng(0).permutation(len(places))[:limit])
        if not len(places):
            raise UserError("evaluation set is empty: give it at least one source")
        self._reader = _Reader(
            self.sources, declared, starts, places, rule, of_label, of_group, exact, max_pixels, eval_resize
        )
        self.bad: list[Bad] = []

    def __len__(self) -> int:
        """Samples, of which some may turn out unusable."""
        return len(self._reader.places)

    def batches(self, preprocess: Preprocess, batch_size: int = 64, workers: int = 0) -> Iterator[Batch]:
        """All samples in order, as the model wants its pixels.

        Yields:
            Batches with `image` uint8 (batch_size, 3, h, w), `key`, and `meta`: a dict a sample of label (str or None),
            captions (list), group (str) and raw (the metadata); with `labels`, `label` float32 (batch_size, c), NaN
            where not known; `mean` and `std` float32 (batch_size, 3) where sources declare `statistics`. Image rows
            from `len(key)` on are zeros. `self.bad` lists what was left out once the iteration is over.

        Raises:
            UserError: no sample could be used.
        """
        self.bad = list(self.problems)
        slots = [np.arange(first, min(first + batch_size, len(self))) for first in range(0, len(self), batch_size)]
        loader = DataLoader(
            _Slots(self._reader, slots, preprocess, batch_size),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=workers,
            collate_fn=as_is,
            worker_init_fn=one_thread,
        )
        used = 0
        for batch, bad in loader:
            self.bad += bad
            used += len(batch["key"])
            if batch["key"]:
                yield batch
        if not used:
            key, reason, detail = self.bad[0]
            names = ", ".join(source.name for source in self.sources)
            raise UserError(
                f"evaluation set {names} is empty: all {len(self)} samples were skipped, the first ({key}) for "
                f"{reason} {detail}: mend the source"
            )


@dataclass(frozen=True)
class _Reader:
    sources: Sequence[Source]
    declared: Sequence[Declared]
    starts: np.ndarray
    places: np.ndarray
    rule: CaptionRule
    label: Pick | None
    group: Pick | None
    exact: bool
    max_pixels: int
    resize: int | None

    def read(
        self, i: int, preprocess: Preprocess
    ) -> tuple[np.ndarray, dict[str, Any], Float32[np.ndarray, " c"] | None]:
        source, index = self.locate(i)
        declared = self.of(i)
        raw = source.read(index, want_meta=True)
        meta = raw.meta or {}
        captions = self.rule.all(raw) if self.rule.wanted else []
        if self.rule.wanted and not captions:
            raise BadSample("empty caption", f"nothing in {', '.join(self.rule.fields)}")
        fields = {"key": raw.key} | meta
        about = {
            "label": self.label(fields) if self.label is not None else None,
            "captions": captions,
            # Keys repeat between sources, and in some sets between shards.
            "group": f"{i}:{raw.key}" if self.group is None else self.group(fields),
            "raw": meta,
        }
        vector = declared.labels.vector(fields) if declared.labels is not None else None
        options = {"exact": self.exact, "max_pixels": self.max_pixels, "resize": self.resize}
        return read_image(raw.image, preprocess, burned_in=declared.burned_in, **options), about, vector

    def of(self, i: int) -> Declared:
        """What the source of sample i declares."""
        return self.declared[int(np.searchsorted(self.starts, int(self.places[i]), side="right")) - 1]

    def locate(self, i: int) -> tuple[Source, int]:
        place = int(self.places[i])
        source = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.sources[source], place - int(self.starts[source])


@dataclass(frozen=True)
class _Slots:
    """Batch number -> batch and what was skipped for it, in whatever process asks."""

    reader: _Reader
    slots: Sequence[np.ndarray]
    preprocess: Preprocess
    batch_size: int

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, slot: int) -> tuple[Batch, list[Bad]]:
        images = np.zeros((self.batch_size, *self.preprocess.size, 3), dtype=np.uint8)
        rows = Rows(self.batch_size, self.reader.declared, self.preprocess)
        keys: list[str] = []
        metas: list[dict[str, Any]] = []
        bad: list[Bad] = []
        for i in self.slots[slot]:
            source, index = self.reader.locate(int(i))
            key = source.key(index)
            try:
                image, meta, label = self.reader.read(int(i), self.preprocess)
            except BadSample as failure:
                bad.append((key, failure.reason, failure.detail))
                continue
            images[len(keys)] = image
            rows.set(len(keys), label, self.reader.of(int(i)))
            keys.append(key)
            metas.append(meta)
        batch = Batch(image=torch.from_numpy(images).permute(0, 3, 1, 2), key=keys, meta=metas)
        rows.into(batch)
        return batch, bad


def _check_field(source: Source, role: str, field: str) -> None:
    if missing_fields(source, [field]):
        raise UserError(f"evaluation set {source.name}: no field {field!r} for {role}; {there_are(source)}")
