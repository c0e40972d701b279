"""Phantoms as a source: generated patients with known truth, drawn when they are read.

`{phantoms: {kind: xray, samples: 2400, seed: 1, size: 128}}` in `data.sources` needs no file; `data/make_shards.py`
writes such a source as shards in BIOMEDICA's layout. The metadata has BIOMEDICA's fields, and under `phantom` what was
drawn. Of the kind `questions` a sample is a question, `per_patient` of them about each drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import simplejpeg

from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.raw import RawSample
from medclip.phantoms.generate import generate
from medclip.phantoms.phantom import KINDS, MAX_SIZE, MIN_SIZE, Phantom, patient_name
from medclip.phantoms.questions import KIND as QUESTIONS
from medclip.phantoms.questions import question_phantom
from medclip.types import UserError

_LABELS = {
    "histology": (["Microscopy"], ["light microscopy"]),
    "xray": (["Clinical Imaging"], ["x-ray radiography"]),
    QUESTIONS: (["Illustrative Diagrams"], ["drawing"]),
}  # BIOMEDICA's primary and secondary labels
_RANGES = {
    "samples": (1, 10**9),
    "seed": (0, 2**63 - 1),
    "size": (MIN_SIZE, MAX_SIZE),
    "per_patient": (1, 10**6),
    "quality": (1, 100),
}


@dataclass(frozen=True)
class Recipe:
    """Which phantoms: `samples` of the endless set (`kind`, `seed`).

    Args:
        kind: histology, xray or questions.
        samples: how many.
        seed: of the set; sets of different seeds share no patient.
        size: pixels, square.
        per_patient: images of each patient; questions about each drawing.
        quality: of the JPEGs.
        masks: put the masks into the metadata, run-length encoded as in COCO (column by column, zeros first).
    """

    kind: str
    samples: int
    seed: int = 0
    size: int = 224
    per_patient: int = 4
    quality: int = 92
    masks: bool = False

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Recipe:
        """From a config.

        Raises:
            UserError: an unknown or missing key, or a value out of range.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(config, Mapping):
            raise UserError(f"phantoms is {config!r}, not a mapping: e.g. {{kind: xray, samples: 1000}}")
        if unknown := set(config) - set(names):
            raise UserError(f"phantoms has unknown keys {sorted(map(str, unknown))}: use {', '.join(names)}")
        if missing := {"kind", "samples"} - set(config):
            raise UserError(f"phantoms lacks {' and '.join(sorted(missing))}: e.g. {{kind: xray, samples: 1000}}")
        recipe = cls(**config)
        if recipe.kind not in (*KINDS, QUESTIONS):
            raise UserError(f"phantoms.kind is {recipe.kind!r}: choose one of {', '.join((*KINDS, QUESTIONS))}")
        for name, (low, high) in _RANGES.items():
            value = getattr(recipe, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"phantoms.{name} is {value!r}: choose {low} to {high}")
        if not isinstance(recipe.masks, bool):
            raise UserError(f"phantoms.masks is {recipe.masks!r}: choose true or false")
        return recipe


@dataclass(frozen=True)
class PhantomSource:
    """Phantoms by number."""

    name: str
    recipe: Recipe
    rows: np.ndarray
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def chunks(self) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.int64)  # each is drawn by itself

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        # BIOMEDICA's form: batch-article-position-file, with dots and dashes.
        index = int(self.rows[i])
        return f"{self.recipe.seed}-{self._patient(index)}-{index % self.recipe.per_patient}-fig.{index}"

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        phantom = self._draw(i)
        jpeg = simplejpeg.encode_jpeg(phantom.image, self.recipe.quality, colorsubsampling="420")
        return RawSample(self.key(i), jpeg, phantom.captions[0], _metadata(phantom, self.recipe))

    def fields(self, i: int) -> dict[str, Any]:
        phantom = self._draw(i)
        return {"key": self.key(i), "caption": phantom.captions[0]} | _metadata(phantom, self.recipe)

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> PhantomSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        return fingerprint([self.recipe, digest(self.rows)])

    def _patient(self, index: int) -> str:
        return patient_name(self.recipe.kind, self.recipe.seed, index // self.recipe.per_patient)

    def _draw(self, i: int) -> Phantom:
        recipe, indices = self.recipe, [int(self.rows[i])]
        if recipe.kind == QUESTIONS:
            drawing, place = divmod(indices[0], recipe.per_patient)
            return question_phantom(recipe.seed, indices[0], drawing, place, recipe.size)
        options = {"per_patient": recipe.per_patient, "masks": recipe.masks}
        return generate(recipe.kind, recipe.seed, indices, recipe.size, **options)[0]


def open_phantoms(name: str, config: Mapping[str, Any], caption: CaptionRule, weight: float = 1.0) -> PhantomSource:
    """The phantoms of a config (see `Recipe`) as a source.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    recipe = Recipe.parse(config)
    return PhantomSource(name, recipe, np.arange(recipe.samples), caption, weight)


def questions_of(config: Any) -> dict[str, str] | None:
    """The key `questions` (see `questions`) of a source of generated questions; None for other phantoms."""
    if not isinstance(config, Mapping) or config.get("kind") != QUESTIONS:
        return None
    fields = {key: f"phantom.attributes.{key}" for key in ("question", "answer", "type", "kind", "modality")}
    return {**fields, "image": "phantom.patient"}


def _metadata(phantom: Phantom, recipe: Recipe) -> dict[str, Any]:
    height, width = phantom.image.shape[:2]
    primary, secondary = _LABELS[phantom.kind]
    truth = {
        "label": phantom.label,
        "captions": phantom.captions,
        "patient": phantom.patient,
        "attributes": phantom.attributes,
        "boxes": [{"name": box[0], "xyxy": list(box[1:])} for box in phantom.boxes],
        "recipe": asdict(recipe),
    }
    if phantom.masks:
        truth["masks"] = {name: run_lengths(mask) for name, mask in phantom.masks.items()}
    return {
        "image_file_name": f"fig.{phantom.index}.jpg",
        "image_panel_type": "Single",
        "image_primary_label": primary,
        "image_secondary_label": secondary,
        "image_size": [width, height],
        "article_accession_id": phantom.patient,
        "article_title": f"Generated {phantom.kind} images",
        "article_license": "CC0",
        "phantom": truth,
    }


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code of a bool (h, w) mask: column by column, the first run is of zeros."""
    flat = cv2.copyMakeBorder(mask.T.reshape(1, -1).astype(np.uint8), 0, 0, 1, 1, cv2.BORDER_CONSTANT, value=2)[0]
    edges = np.flatnonzero(np.diff(flat))  # the frame of twos marks both ends
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[1] == 1 else counts}
