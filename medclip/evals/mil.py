"""Slides judged by a model of bags (experiment=mil_…): classes, grades, findings or survival, intervals by patient.

Slides come one at a time, whole. Where regions are known (generated bags, or outlines), the attention of the model is
held against them; where slides are at hand, the patches that it looks at most are shown. A model of several folds
(`folds:FOLDER`) judges each slide by the member that was not trained on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy.stats import rankdata

from medclip.evals import metrics as m
from medclip.evals.calibration import reliability
from medclip.evals.cindex import kaplan_meier
from medclip.evals.collect import thumbnail
from medclip.evals.mil_details import FoldRow, MilDetails, SlideExample, SurvivalCurve
from medclip.evals.mil_gallery import SlideGallery
from medclip.evals.mil_outcomes import HEADLINE, MilOutcomes
from medclip.evals.result import Advance, Result, Role
from medclip.evals.slides import picture
from medclip.infer.mil import BagModel, Reading, looked_at, read_bag
from medclip.types import Batch, UserError

TOP = 6  # patches shown of a slide

Regions = Callable[[str, Int[np.ndarray, "n 2"], float], Bool[np.ndarray, " n"] | None]
Pictures = Callable[[str, Int[np.ndarray, "k 2"], float], Sequence[UInt8[np.ndarray, "h w 3"]]]


class BagsData(Protocol):
    """Bags one at a time, as `medclip.data.bags.BagSet` gives them."""

    @property
    def bad(self) -> Sequence[tuple[str, str, str]]: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def target(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def encoder(self) -> str | None: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int = 1, workers: int = 0) -> Iterator[Batch]: ...


@dataclass
class _Read:
    """What a pass over the set gathers, a row a slide."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    event: list[float] = field(default_factory=list)
    located: list[float] = field(default_factory=list)
    fold: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    regions: int = 0


class Mil:
    """Judge a model of slides.

    Args:
        data: bags with what is known of them.
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        regions: (slide, corners of patches, side) -> which lie inside the slide's region; None where a slide has none.
            Without it, what the data themselves know (`planted` of generated bags).
        pictures: (slide, corners of patches, side) -> pictures of these patches; none for a slide that is not at hand.
        unit: of times, as the report calls it.
    """

    takes = ("mil",)

    def __init__(
        self,
        data: BagsData,
        *,
        name: str,
        role: Role = "domain",
        regions: Regions | None = None,
        pictures: Pictures | None = None,
        unit: str = "months",
    ) -> None:
        self.data = data
        self.name = name
        self.role: Role = role
        self.regions = regions
        self.pictures = pictures
        self.unit = unit

    def __call__(
        self, clip: BagModel, *, batch_size: int = 1, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: a model of another target, of other classes or other features; folds without a model for each,
                or the other way round; no slide that can be used.
        """
        columns = self._columns(clip)
        members = self._members(clip)
        found, gallery, lacking = _Read(), SlideGallery(), 0
        for batch in self.data.batches(1, workers):
            assert "bag" in batch and "real" in batch and "key" in batch and "meta" in batch
            for row, key in enumerate(batch["key"]):
                label, time, event = self._known(batch, row)
                if not self._usable(label, time, event):
                    lacking += 1
                    continue
                meta = batch["meta"][row]
                fold = int(meta.get("fold", 0))
                real = batch["real"][row]
                reading = read_bag(members[fold % len(members)], batch["bag"][row], real)
                if self.data.target != "survival":
                    reading = reading._replace(scores=reading.scores[columns])
                coords = batch["coords"][row][real].numpy() if "coords" in batch else None
                attention = looked_at(reading, self.data.target)
                located = self._located(key, meta, coords, attention)
                found.regions += located == located
                found.keys.append(key)
                found.groups.append(str(meta["group"]))
                found.labels.append(label)
                found.scores.append(reading.scores)
                found.time.append(time)
                found.event.append(event)
                found.located.append(located)
                found.fold.append(fold)
                found.patches.append(int(real.sum()))
                self._show(gallery, found, reading, attention, coords, meta)
            advance(len(batch["key"]))
        skipped = dict(Counter(reason for _, reason, _ in self.data.bad)) | ({"no label": lacking} if lacking else {})
        if not found.keys:
            reasons = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "no slide at all"
            raise UserError(
                f"evaluation {self.name!r} has nothing to evaluate ({reasons}): mend evals.{self.name}.data"
            )
        return self._result(found, gallery, skipped)

    def _columns(self, clip: BagModel) -> list[int]:
        """Where the classes of the data are among the model's."""
        data, mine = self.data, list(map(str, clip.classes))
        if clip.target != data.target:
            raise UserError(
                f"evaluation {self.name!r}: the slide model tells {clip.target}, the data have {data.target}: set "
                f"evals.{self.name}.data.target, or evaluate another checkpoint"
            )
        clip.refuse(data.dim, data.encoder, f"evaluation {self.name!r}: its features")
        if data.target == "survival":  # bins are the model's own affair: both have times
            return []
        theirs = list(map(str, data.classes))
        if set(mine) != set(theirs) or (data.target == "ordinal" and mine != theirs):
            raise UserError(
                f"evaluation {self.name!r}: the slide model knows {', '.join(mine)}, the data have "
                f"{', '.join(theirs)}: set evals.{self.name}.data.labels.names to the model's, in its order"
            )
        return [mine.index(name) for name in theirs]

    def _members(self, clip: BagModel) -> Sequence[BagModel]:
        members: Sequence[BagModel] | None = getattr(clip, "members", None)
        folds: int | None = getattr(self.data, "folds", None)
        if folds is None:
            return [clip]  # of several members all together
        if members is None or len(members) != folds:
            raise UserError(
                f"evaluation {self.name!r} judges the test parts of {folds} folds, which needs the model of each: "
                f"checkpoint=folds:FOLDER with {folds} runs in it (this one has {len(members) if members else 1}); one "
                "model alone: eval=[mil]"
            )
        return members

    def _known(self, batch: Batch, row: int) -> tuple[np.ndarray, float, float]:
        if self.data.target == "survival":
            assert "time" in batch and "event" in batch
            return np.zeros(0), float(batch["time"][row]), float(batch["event"][row])
        assert "label" in batch
        label = batch["label"][row].double().numpy()
        if self.data.target == "ordinal":  # from "above the k-th" to one of them
            label = (
                np.full(len(label) + 1, np.nan) if np.isnan(label).any() else np.eye(len(label) + 1)[int(label.sum())]
            )
        return label, math.nan, math.nan

    def _usable(self, label: np.ndarray, time: float, event: float) -> bool:
        if self.data.target == "survival":
            return time == time and event == event
        unknown = np.isnan(label)
        return not (unknown.all() if self.data.target == "multilabel" else unknown.any())

    def _located(
        self, key: str, meta: dict[str, Any], coords: Int[np.ndarray, "n 2"] | None, attention: Float[np.ndarray, " n"]
    ) -> float:
        """AUROC of attention against the slide's region; NaN where there is none, or nothing else."""
        inside = meta.get("planted")
        if self.regions is not None and coords is not None and "side" in meta:
            parts = []
            for slide, own in pieces(key, meta, len(coords)):
                found = self.regions(slide, coords[own], float(meta["side"]))
                parts.append(np.zeros(own.stop - own.start, dtype=bool) if found is None else found)
            inside = np.concatenate(parts)
        if inside is None or not 0 < np.sum(inside) < len(inside):
            return math.nan
        return float(m.auroc(attention, inside, np.ones((1, len(attention))))[0])

    def _show(
        self,
        gallery: SlideGallery,
        found: _Read,
        reading: Reading,
        attention: Float[np.ndarray, " n"],
        coords: Int[np.ndarray, "n 2"] | None,
        meta: dict[str, Any],
    ) -> None:
        key, names, target = found.keys[-1], list(self.data.classes), self.data.target
        scores, label = reading.scores, found.labels[-1]

        def draw(truth: str, said: str, scored: float) -> SlideExample:
            return self._draw(key, truth, said, scored, found.located[-1], attention, coords, meta)

        if target == "survival":
            when = f"{found.time[-1]:g} {self.unit}, {'event' if found.event[-1] else 'censored'}"
            risk = float(scores[0])
            gallery.see("Highest risk", "", risk, lambda: draw(when, "", risk))
            gallery.see("Lowest risk", "", -risk, lambda: draw(when, "", risk))
        elif target == "multilabel":
            best = int(scores.argmax())
            present = [name for name, value in zip(names, label, strict=True) if value == 1]
            if label[best] == label[best]:
                title = "Surely right" if label[best] == 1 else "Surely wrong"
                sure = float(scores[best])
                gallery.see(title, names[best], sure, lambda: draw(", ".join(present) or "none", names[best], sure))
        else:
            truth, said = int(label.argmax()), int(scores.argmax())
            sure = float(scores[said])
            title = "Surely right" if truth == said else "Surely wrong"
            gallery.see(title, names[truth], sure, lambda: draw(names[truth], names[said], sure))

    def _draw(
        self,
        key: str,
        truth: str,
        said: str,
        scored: float,
        located: float,
        attention: Float[np.ndarray, " n"],
        coords: Int[np.ndarray, "n 2"] | None,
        meta: dict[str, Any],
    ) -> SlideExample:
        best = np.argsort(-attention, kind="stable")[:TOP]
        heat, tops, side = None, [], meta.get("side")
        if coords is not None and side is not None and (coords >= 0).all():
            # Of several slides in a bag the one that is looked at most.
            slide, own = max(pieces(key, meta, len(coords)), key=lambda piece: attention[piece[1]].sum())
            ranks = rankdata(attention[own]) / (own.stop - own.start)
            heat = picture(ranks, coords[own], float(side))
            if self.pictures is not None:
                inside = [i for i in best if own.start <= i < own.stop]
                found = self.pictures(slide, coords[inside], float(side))
                tops = [thumbnail(torch.from_numpy(pixels).permute(2, 0, 1)) for pixels in found]
        share = float(attention[best].sum())
        return SlideExample(key, truth, said, scored, len(attention), heat, tops, share, located)

    def _result(self, found: _Read, gallery: SlideGallery, skipped: dict[str, int]) -> Result:
        target = self.data.target
        outcomes = MilOutcomes(
            keys=found.keys,
            groups=found.groups,
            target=target,
            classes=[] if target == "survival" else list(map(str, self.data.classes)),
            labels=np.stack(found.labels),
            scores=np.stack(found.scores),
            time=np.array(found.time),
            event=np.array(found.event),
            located=np.array(found.located),
            fold=np.array(found.fold, dtype=int),
        )
        undefined = outcomes.undefined
        exclusive = target in ("classes", "ordinal")
        ones = np.ones((1, len(found.keys)))
        table = (
            m.confusion(outcomes.truth, outcomes.said, len(outcomes.classes), ones)[0]
            if exclusive
            else np.zeros((0, 0))
        )
        return Result(
            task="slides",
            role=self.role,
            headline=HEADLINE[target],
            outcomes=outcomes,
            details=MilDetails(
                target=target,
                classes=outcomes.classes,
                support=np.nansum(outcomes.labels, axis=0).astype(int).tolist(),
                slides=len(found.keys),
                patients=len(set(found.groups)),
                patches=(min(found.patches), int(np.median(found.patches)), max(found.patches)),
                unit=self.unit,
                events=int(np.nansum(outcomes.event)),
                confusion=table.astype(int).tolist(),
                folds=fold_rows(outcomes),
                regions=found.regions,
                top=TOP,
                curves=survival_curves(outcomes) if target == "survival" else [],
                shown=gallery.shown(),
            ),
            chance=outcomes.chance(),
            skipped=skipped,
            undefined=dict.fromkeys(("auroc", "mean_average_precision"), undefined) if undefined else {},
            reliability=reliability(outcomes.scores, outcomes.truth) if exclusive else None,
        )


def pieces(key: str, meta: dict[str, Any], patches: int) -> list[tuple[str, slice]]:
    """(slide, its patches) of a bag, which may hold all slides of a patient."""
    found, start = [], 0
    for slide, count in meta.get("slides") or [(key, patches)]:
        found.append((str(slide), slice(start, start + count)))
        start += count
    return found


def fold_rows(outcomes: MilOutcomes) -> list[FoldRow]:
    """Each fold by itself; nothing where there is one."""
    folds = np.unique(outcomes.fold).tolist()
    groups = np.array(outcomes.groups)
    rows = []
    for fold in folds if len(folds) > 1 else []:
        own, values = outcomes.fold == fold, outcomes.of_fold(fold)
        kept = {name: value for name, value in values.items() if ":" not in name}
        rows.append(FoldRow(fold, int(own.sum()), len(set(groups[own].tolist())), kept))
    return rows


def survival_curves(outcomes: MilOutcomes) -> list[SurvivalCurve]:
    """Of the slides whose risk is above the median of their fold, and of the others."""
    risk, high = outcomes.scores[:, 0], np.zeros(len(outcomes.keys), dtype=bool)
    for fold in np.unique(outcomes.fold):
        own = outcomes.fold == fold
        high[own] = risk[own] > np.median(risk[own])
    curves = []
    for name, own in (("higher risk", high), ("lower risk", ~high)):
        if own.any():
            time, event = outcomes.time[own], outcomes.event[own]
            curves.append(SurvivalCurve(name, int(own.sum()), int(event.sum()), kaplan_meier(time, event)))
    return curves
