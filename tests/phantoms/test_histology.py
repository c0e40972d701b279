"""Fields show what their truth says: nuclei, structures, colours, magnification, artefacts."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medclip.phantoms.generate import generate
from medclip.phantoms.histology import MICRONS
from medclip.phantoms.phantom import Phantom

COUNT = 240


@pytest.fixture(scope="module")
def fields() -> list[Phantom]:
    return generate("histology", 31, range(COUNT), 128, per_patient=1, masks=True)


def clean(fields: list[Phantom], *labels: str) -> list[Phantom]:
    return [p for p in fields if p.attributes["artefact"] == "none" and (not labels or p.label in labels)]


def test_boxes_and_masks_agree(fields: list[Phantom]) -> None:
    seen = set()
    for p in fields:
        for name, mask in p.masks.items():
            assert mask.shape == (128, 128) and mask.dtype == bool
            if name == "nuclei":
                continue
            seen.add(name)
            boxes = [box[1:] for box in p.boxes if box[0] == name]
            covered = np.zeros_like(mask)
            for x0, y0, x1, y1 in boxes:
                assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
                covered[y0:y1, x0:x1] = True
                if x1 - x0 > 6 and y1 - y0 > 6:
                    inside = mask[y0:y1, x0:x1]
                    edges = inside[:3].any(), inside[-3:].any(), inside[:, :3].any(), inside[:, -3:].any()
                    assert all(edges)  # tight on all four sides
            assert not (mask & ~covered).any()
        assert {box[0] for box in p.boxes} <= set(p.masks)
    assert seen == {"gland", "lumen", "keratin pearl", "fold", "blur", "pen", "bubble"}


def test_every_gland_and_pearl_has_its_own_box(fields: list[Phantom]) -> None:
    for p in clean(fields, "benign glandular epithelium", "squamous cell carcinoma"):
        if p.attributes["magnification"] != "10x":
            continue
        name = "gland" if p.label.startswith("benign") else "keratin pearl"
        parts, _ = cv2.connectedComponents(p.masks[name].astype(np.uint8))
        boxes = [box for box in p.boxes if box[0] == name]
        assert len(boxes) >= parts - 1  # those that touch are one part of the mask
        limit = 85 if name == "gland" else 60  # micrometres: no box spans two of them
        assert all(max(x1 - x0, y1 - y0) * p.attributes["mpp"] < limit for _, x0, y0, x1, y1 in boxes)
    glands = [p for p in fields if p.label.startswith("benign") and p.attributes["magnification"] == "10x"]
    assert np.mean([sum(box[0] == "gland" for box in p.boxes) for p in glands]) > 8


def test_lumens_lie_in_glands_and_are_clear(fields: list[Phantom]) -> None:
    checked = 0
    for p in clean(fields, "benign glandular epithelium"):
        lumen, gland = p.masks["lumen"], p.masks["gland"]
        assert not (lumen & ~gland).any()
        core = cv2.erode(lumen.astype(np.uint8), np.ones((5, 5))) > 0
        if core.sum() > 30:
            checked += 1
            assert p.image[core].mean() > p.image[gland & ~lumen].mean() + 40
    assert checked > 5


def test_nuclei_are_where_their_mask_is(fields: list[Phantom]) -> None:
    scores = []
    for p in clean(fields):
        mask = p.masks["nuclei"]
        if 0.02 < mask.mean() < 0.98:
            scores.append(roc_auc_score(mask.ravel(), -p.image[..., 0].ravel().astype(int)))  # hematoxylin stops red
    assert len(scores) > COUNT / 2 and np.median(scores) > 0.95 and min(scores) > 0.75


def test_the_share_of_nuclei_follows_the_class(fields: list[Phantom]) -> None:
    def share(label: str) -> float:
        return float(np.mean([p.masks["nuclei"].mean() for p in fields if p.label == label]))

    assert share("lymphoid tissue") > 0.35
    assert share("lymphoid tissue") > share("adenocarcinoma") > 2 * share("stroma")
    assert share("squamous cell carcinoma") > share("smooth muscle") > share("adipose tissue")
    assert max(share("mucin"), share("adipose tissue")) < 0.1


def test_classes_have_their_colours(fields: list[Phantom]) -> None:
    def mean(label: str) -> np.ndarray:
        return np.mean([p.image.mean((0, 1)) for p in clean(fields, label)], 0)

    colours = {label: mean(label) for label in {p.label for p in fields}}
    assert colours["adipose tissue"].mean() > 220 and colours["mucin"].mean() > 190
    assert min(colours, key=lambda label: colours[label][0]) == "lymphoid tissue"  # hematoxylin stops red
    red_over_blue = {label: colour[0] - colour[2] for label, colour in colours.items()}
    assert red_over_blue["smooth muscle"] > red_over_blue["lymphoid tissue"] + 30  # eosin against hematoxylin
    assert red_over_blue["stroma"] > red_over_blue["mucin"]


def test_magnification_sets_the_size_of_what_is_seen(fields: list[Phantom]) -> None:
    sizes: dict[str, list[float]] = {name: [] for name in MICRONS}
    for p in clean(fields, "stroma", "smooth muscle", "mucin"):
        assert p.attributes["mpp"] == MICRONS[p.attributes["magnification"]] / 128
        _, _, stats, _ = cv2.connectedComponentsWithStats(p.masks["nuclei"].astype(np.uint8))
        if len(stats) > 2:
            sizes[p.attributes["magnification"]].append(float(np.median(stats[1:, cv2.CC_STAT_AREA])))
    low, middle, high = (np.median(sizes[name]) for name in ("10x", "20x", "40x"))
    assert 2 < middle / low < 7 and 2 < high / middle < 7  # four times the area, but for those cut or touching


def test_staining_strength_shows() -> None:
    phantoms = clean(generate("histology", 8, range(240), 64, per_patient=1), "stroma", "smooth muscle", "necrosis")
    depth = {
        strength: np.mean([255 - p.image.mean() for p in phantoms if p.attributes["stain"] == strength])
        for strength in ("pale", "regular", "strong")
    }
    assert depth["pale"] < 0.87 * depth["regular"] and depth["regular"] < 0.95 * depth["strong"]


def test_artefacts_do_what_they_do(fields: list[Phantom]) -> None:
    found = {
        name: [p for p in fields if p.attributes["artefact"] == name] for name in ("fold", "blur", "pen", "bubble")
    }
    assert all(len(each) > 5 for each in found.values())
    assert 0.2 < sum(map(len, found.values())) / len(fields) < 0.4

    def inside_minus_outside(p: Phantom, name: str) -> float:
        mask = p.masks[name]
        return float(p.image[mask].mean() - p.image[~mask].mean())

    assert np.mean([inside_minus_outside(p, "fold") < 0 for p in found["fold"]]) > 0.9  # two sections thick
    assert np.mean([inside_minus_outside(p, "pen") < -30 for p in found["pen"]]) > 0.9
    centres = []
    for p in found["bubble"]:
        core = cv2.erode(p.masks["bubble"].astype(np.uint8), np.ones((11, 11))) > 0
        outside = cv2.dilate(p.masks["bubble"].astype(np.uint8), np.ones((9, 9))) == 0
        centres.append(p.image[core].mean() - p.image[outside].mean())
    assert np.mean(np.asarray(centres) > 0) > 0.8  # bleached within its dark rim
    sharpness = [
        np.median([cv2.Laplacian(cv2.GaussianBlur(p.image, (0, 0), 1.0), cv2.CV_32F).std() for p in each])
        for each in (found["blur"], clean(fields))
    ]
    assert sharpness[0] < 0.6 * sharpness[1]
