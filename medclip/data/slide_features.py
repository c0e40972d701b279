"""Slides of an evaluation, as features that `medclip extract` has written: one at a time, with what is known of each.

    SlideFeatures("runs/extract", "slides.csv", label="label", group="patient")

A slide that the table names and the folder has not, or whose file is broken, is listed in `bad`; so is a file that the
table does not name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from medclip.data.bad import BadSample
from medclip.data.bag_files import find_bags, open_bag
from medclip.data.bag_table import file_names
from medclip.data.ledger import Bad
from medclip.data.slide_labels import SlideLabels, Truth
from medclip.types import Batch, Preprocess, UserError
from slides.belongs import level0_size


class SlideFeatures:
    """Features of slides, for any number of checkpoints.

    Args:
        features: the folder (or several) that `medclip extract`, TRIDENT or CLAM has written; see `find_bags`.
        table: see `SlideLabels`; it may name slides with the ending of their picture.
        slide: likewise.
        label: likewise.
        group: likewise.
        captions: likewise.
        header: likewise.
        filter: likewise.
        truth: where masks of a region are, keys of `slide_labels.Truth`; None without.
        limit: at most this many slides, drawn evenly over the table, the same every time.

    Raises:
        UserError: no folder, no table, or no slide of the table in the folder.
    """

    def __init__(
        self,
        features: str | Sequence[str],
        table: str | Path,
        *,
        slide: str | None = None,
        label: str | Mapping[str, Any] | None = "label",
        group: str | Mapping[str, Any] | None = None,
        captions: str | Sequence[str] | None = None,
        header: Sequence[str] | None = None,
        filter: str | None = None,
        truth: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        found = find_bags(features)
        self.labels = SlideLabels(
            table, slide=slide, label=label, group=group, captions=captions, header=header, filter=filter
        )
        own = {name: next((file for file in file_names(name) if file in found), name) for name in self.labels}
        self.files = {name: found[file] for name, file in own.items() if file in found}
        try:
            self.truth = Truth(**truth) if truth is not None else None
        except TypeError as error:
            raise UserError(
                f"truth is {dict(truth or {})}: write {{masks: FOLDER, classes: [tumour]}} ({error})"
            ) from None
        self.names = list(self.files)
        stray = set(found) - set(own.values())
        self.problems: list[Bad] = [
            *((name, "no features", str(features)) for name in self.labels if name not in self.files),
            *((name, "not in the table", str(self.labels.path)) for name in found if name in stray),
        ]
        if not self.names:
            raise UserError(
                f"no slide of {self.labels.path} has features in {features}: {_some(self.labels)} there, "
                f"{_some(found)} here"
            )
        if limit is not None and limit < len(self.names):
            kept = np.sort(np.random.default_rng(0).permutation(len(self.names))[:limit])
            self.names = [self.names[i] for i in kept]
        self.bad: list[Bad] = []

    def __len__(self) -> int:
        """Slides, of which some may turn out unusable."""
        return len(self.names)

    def all_captions(self) -> list[str]:
        """The texts of all slides: asked of each slide as it passes by."""
        return [text for name in self.names for text in self.labels.texts(name)]

    def batches(self, preprocess: Preprocess, batch_size: int = 64, workers: int = 0) -> Iterator[Batch]:
        """One slide a batch, whatever `batch_size`.

        Yields:
            `bag` float32 (1, n, d), `real` bool (1, n), `coords` int64 (1, n, 2) level-0 pixels, `key`, and `meta`:
            label, group, captions, raw; `side` of a patch in level-0 pixels, `encoder` and `weights` of the features
            ("" where the file does not say); with truth, `share` float32 (n,) of each patch inside the region and the
            region's `area` in patches. `self.bad` lists what was left out once the iteration is over.

        Raises:
            UserError: no slide could be used.
        """
        self.bad = list(self.problems)
        used = 0
        for name in self.names:
            try:
                batch = self._read(name)
            except BadSample as error:
                self.bad.append((name, error.reason, error.detail))
                continue
            used += 1
            yield batch
        if not used:
            key, reason, detail = self.bad[-1]
            raise UserError(f"none of {len(self)} slides can be used, the last ({key}) for {reason} {detail}: mend it")

    def _read(self, name: str) -> Batch:
        about = self.labels.about(name)
        bag = open_bag(self.files[name])
        if not bag.patches:
            raise BadSample("no patches", bag.path)
        features = np.empty((bag.patches, bag.dim), np.float32)
        bag.read(features)
        if not np.isfinite(features).all():
            raise BadSample("bad features", f"{bag.path}: some are not finite")
        known = bag.about()
        if "coords" not in known or "side" not in known:
            raise BadSample("no coordinates", f"{bag.path}: maps and neighbours need coords and a patch's side")
        coords, side = known["coords"], float(known["side"])
        weights, size = provenance(bag.path)
        about |= {"side": side, "encoder": bag.encoder or "", "weights": weights}
        if self.truth is not None:
            if size is None:
                raise BadSample(
                    "no slide size", f"{bag.path}: its coords do not say level 0's, which masks are laid over"
                )
            about |= self.truth(Path(bag.path).stem, coords, side, size)
        return Batch(
            bag=torch.from_numpy(features)[None],
            real=torch.ones(1, len(features), dtype=torch.bool),
            coords=torch.from_numpy(coords)[None],
            key=[name],
            meta=[about],
        )


def provenance(path: str | Path) -> tuple[str, tuple[int, int] | None]:
    """The fingerprint of the weights that made a file's features, "" where it does not say, and level 0's size.

    The size is (width, height) by the attributes of our, TRIDENT's or CLAM's coordinates; None where they lack.
    """
    with h5py.File(path) as file:
        weights = file["features"].attrs.get("weights", "")
        own: dict[str, Any] = dict(file["coords"].attrs)
    size = level0_size(own)
    return (weights if isinstance(weights, str) else ""), size and (round(size[0][0]), round(size[0][1]))


def _some(names: SlideLabels | Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:3]) + ("…" if len(names) > 3 else "")
