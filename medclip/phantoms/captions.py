"""A caption grammar: several sentences for one image that differ in wording and never in facts.

Every caption of an image states the same facts: a histology caption the class, the magnification, and stain strength
and artefact where there is something to say; a chest X-ray caption the finding with severity, side and zone, and the
view. `VOCABULARY` is the whole lexicon: no phrase of one value occurs within a phrase of another value of the same
fact, so `facts_stated` can read a caption back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

CAPTIONS = 4

_HISTOLOGY: dict[str, dict[str, tuple[str, ...]]] = {
    "label": {
        "benign glandular epithelium": ("benign glandular epithelium", "normal glandular mucosa", "benign glands"),
        "adenocarcinoma": ("adenocarcinoma", "gland-forming carcinoma", "malignant glands"),
        "squamous cell carcinoma": (
            "squamous cell carcinoma",
            "keratinising squamous carcinoma",
            "epidermoid carcinoma",
        ),
        "lymphoid tissue": ("lymphoid tissue", "a dense lymphocytic infiltrate", "sheets of lymphocytes"),
        "stroma": ("stroma", "collagenous connective tissue", "fibrous tissue"),
        "smooth muscle": ("smooth muscle", "muscularis propria", "fascicles of muscle"),
        "adipose tissue": ("adipose tissue", "mature fat", "adipocytes"),
        "necrosis": ("necrosis", "necrotic debris", "necrotic tissue"),
        "mucin": ("mucin", "extracellular mucus", "mucus pools"),
    },
    "magnification": {
        "10x": ("10x magnification", "low power (10x)", "10x"),
        "20x": ("20x magnification", "medium power (20x)", "20x"),
        "40x": ("40x magnification", "high power (40x)", "40x"),
    },
    "stain": {
        "pale": ("pale staining", "weak staining", "light staining"),
        "strong": ("strong staining", "deep staining", "intense staining"),
    },
    "artefact": {
        "fold": ("a tissue fold", "folding of the section"),
        "blur": ("out-of-focus blur", "poor focus"),
        "pen": ("pen marks", "marker ink"),
        "bubble": ("an air bubble", "a mounting bubble"),
    },
}
_XRAY: dict[str, dict[str, tuple[str, ...]]] = {
    "label": {
        "pleural effusion": ("pleural effusion", "pleural fluid"),
        "lung nodule": ("lung nodule", "pulmonary nodule"),
        "pneumothorax": ("pneumothorax", "pleural air collection"),
        "cardiomegaly": ("cardiomegaly", "enlargement of the heart", "cardiac enlargement"),
        "lung consolidation": ("lung consolidation", "airspace opacity", "airspace consolidation"),
        "no finding": ("no finding", "no acute abnormality", "clear lungs and normal heart size"),
    },
    "severity": {
        "small": ("small", "minor"),
        "moderate": ("moderate", "medium-sized"),
        "large": ("large", "sizeable"),
        "faint": ("faint", "hazy"),
        "dense": ("dense", "confluent"),
        "mild": ("mild", "slight"),
        "marked": ("marked", "severe"),
    },
    "side": {"left": ("left",), "right": ("right",)},
    "zone": {
        "upper": ("upper zone", "upper lung zone"),
        "middle": ("middle zone", "mid lung zone"),
        "lower": ("lower zone", "lower lung zone"),
    },
    "view": {"PA": ("PA", "posteroanterior"), "AP": ("AP", "anteroposterior")},
}
VOCABULARY: Mapping[str, dict[str, dict[str, tuple[str, ...]]]] = MappingProxyType(
    {"histology": _HISTOLOGY, "xray": _XRAY}
)

_HISTOLOGY_SHELLS = (
    "H&E section of {label}, {magnification}{notes}.",
    "{label} in a hematoxylin and eosin stained field at {magnification}{notes}.",
    "Photomicrograph showing {label} (H&E, {magnification}){notes}.",
    "Histology image at {magnification}: {label}{notes}.",
    "Microscopy of {label}, hematoxylin and eosin, {magnification}{notes}.",
    "Light micrograph, {magnification}, H&E: {label}{notes}.",
)
_XRAY_SHELLS = (
    "{view} chest radiograph showing {statement}.",
    "Chest X-ray, {view} view: {statement}.",
    "{statement} on {view} chest film.",
    "Frontal chest radiograph ({view}) with {statement}.",
    "{statement}, {view} projection of the chest.",
    "Frontal {view} chest X-ray demonstrates {statement}.",
)


def histology_captions(rng: np.random.Generator, label: str, attributes: Mapping[str, Any]) -> list[str]:
    """`CAPTIONS` different sentences about an H&E field."""
    pick = random.Random(int(rng.integers(2**62)))  # many small choices: far cheaper than numpy's
    captions = []
    for shell in pick.sample(_HISTOLOGY_SHELLS, CAPTIONS):
        words = _words(pick, _HISTOLOGY, {"label": label, **attributes})
        notes = [words[fact] for fact in ("stain", "artefact") if fact in words]
        pick.shuffle(notes)
        joined = pick.choice((", with ", "; note ")) + " and ".join(notes) if notes else ""
        captions.append(_sentence(shell.format(**words, notes=joined)))
    return captions


def xray_captions(rng: np.random.Generator, label: str, attributes: Mapping[str, Any]) -> list[str]:
    """`CAPTIONS` different sentences about a chest X-ray."""
    pick = random.Random(int(rng.integers(2**62)))
    captions = []
    for shell in pick.sample(_XRAY_SHELLS, CAPTIONS):
        words = _words(pick, _XRAY, {"label": label, **attributes})
        finding = f"{words['severity']} {words['label']}" if "severity" in words else words["label"]
        if "zone" in words:
            place = pick.choice(
                ("in the {side} {zone}", "in the {zone} of the {side} lung", "in the {zone} on the {side}")
            )
            finding = f"{finding} {place.format(**words)}"
        elif "side" in words:
            form = pick.choice(("{0} on the {side}", "{severity} {side}-sided {label}", "{severity} {side} {label}"))
            finding = form.format(finding, **words)
        captions.append(_sentence(shell.format(statement=finding, view=words["view"])))
    return captions


def facts_stated(kind: str, caption: str) -> dict[str, set[str]]:
    """Read a caption back: the values of every fact of `VOCABULARY[kind]` whose phrases occur in it as whole words."""
    return {
        fact: {
            value
            for value, phrases in values.items()
            if any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", caption, re.IGNORECASE) for p in phrases)
        }
        for fact, values in VOCABULARY[kind].items()
    }


def _words(
    pick: random.Random, lexicon: Mapping[str, Mapping[str, tuple[str, ...]]], facts: Mapping[str, Any]
) -> dict[str, str]:
    """One phrase for every fact that has something to say; a value without phrases ("none", "regular") stays unsaid."""
    return {fact: pick.choice(values[facts[fact]]) for fact, values in lexicon.items() if facts.get(fact) in values}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
