"""Evaluations of slides: planted answers that they must find, formulas against pixels, features that are not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score as average_precision_of
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from torch import Tensor, nn

from medclip.data.slide_features import SlideFeatures
from medclip.data.slide_labels import SlideLabels
from medclip.evals.run import run_evaluation
from medclip.evals.slide import SlideDetails, SlideZeroShot
from medclip.evals.slide_map import SlideMap, dice_at, map_outcomes
from medclip.evals.slide_retrieval import SlideRetrieval, average_precision, by_slide, by_text, chance_precision
from medclip.models.patches import fingerprint
from medclip.types import Preprocess, Tokenizer, UserError

DIM, SIDE, GRID = 16, 64, 12
WORDS = ["tumour", "normal", "carcinoma", "benign", "odd"]


class FirstWord:
    context_length = 1

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        words = [next((WORDS.index(w) for w in t.replace(".", "").split() if w in WORDS), 4) for t in texts]
        return torch.tensor(words)[:, None]


class AxisClip(nn.Module):
    """A text is the axis of the first word it knows; names of one thing share an axis, `odd` is another's."""

    def __init__(self, skill: float = 1.0) -> None:
        super().__init__()
        self.preprocess = Preprocess(size=(8, 8))
        self.tokenizer: Tokenizer = FirstWord()
        self.axes = nn.Parameter(torch.eye(DIM)[[0, 1, 0, 1, 1]] * skill + torch.eye(DIM)[2] * (1 - skill))

    @property
    def device(self) -> torch.device:
        return self.axes.device

    def encode_text(self, text: Tensor) -> Tensor:
        return nn.functional.normalize(self.axes[text[:, 0]].detach(), dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        raise AssertionError("features are read, not made")


def write(path: Path, features: np.ndarray, coords: np.ndarray, **about: Any) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features.astype(np.float32), coords
        file["features"].attrs.update(about)
        own = {"patch_size_level0": SIDE, "level0_width": GRID * SIDE, "level0_height": GRID * SIDE}
        file["coords"].attrs.update(own)


@pytest.fixture
def cohort(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Slides of 144 patches; on tumour slides a square of 3 x 3 of them is tumour, masked by a GeoJSON."""

    def make(weights: str | None = None, slides: int = 24) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        folder, masks = tmp_path / "x" / "features_axis", tmp_path / "masks"
        folder.mkdir(parents=True)
        masks.mkdir()
        mark = fingerprint(AxisClip(), AxisClip().preprocess) if weights is None else weights
        rows = []
        for number in range(slides):
            label = "tumour" if number % 2 else "normal"
            coords = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) * SIDE
            features = rng.normal(0, 0.04, (len(coords), DIM))
            features[:, 1] += 0.5
            features[:, 0] += 0.3
            x, y = rng.integers(0, GRID - 3, 2) * SIDE
            box = [[x, y], [x + 3 * SIDE, y], [x + 3 * SIDE, y + 3 * SIDE], [x, y + 3 * SIDE], [x, y]]
            found = []
            if label == "tumour":
                inside = ((coords >= [x, y]) & (coords < [x + 3 * SIDE, y + 3 * SIDE])).all(axis=1)
                features[inside, 0] += 0.8
                found = [
                    {
                        "type": "Feature",
                        "geometry": {"type": "Polygon", "coordinates": np.array([box]).tolist()},
                        "properties": {"classification": {"name": "Tumor"}},
                    }
                ]
            (masks / f"s{number}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": found}))
            write(folder / f"s{number}.h5", features, coords, encoder="axis", weights=mark)
            rows.append(f"s{number},p{number // 4},{label},note of {label}")
        table = tmp_path / "slides.csv"
        table.write_text("slide,patient,label,report\n" + "\n".join([*rows, "gone,p9,normal,nothing"]) + "\n")
        return {"features": str(folder), "table": str(table)}

    return make


CLASSES = {"normal": ["normal", "benign"], "tumour": ["tumour", "carcinoma"]}
TEMPLATES = ["{c}.", "image of {c}."]


def zero_shot(data: Any, **options: Any) -> SlideZeroShot:
    return SlideZeroShot(data, name="z", classes=CLASSES, templates=TEMPLATES, weights=fingerprint, **options)


def test_a_rare_region_is_found_by_few_patches_and_not_by_all(cohort: Callable[..., dict[str, Any]]) -> None:
    data = SlideFeatures(**cohort())
    report = run_evaluation({"base": AxisClip()}, {"z": zero_shot(data, pool=5, draws=20)})
    comparison = report.comparisons["z"]
    result = comparison.any_result
    assert comparison.samples == 24 and comparison.groups == 6 and result.skipped == {"no features": 1}
    values = result.metrics
    assert values["mean_per_class_recall"] == values["balanced_accuracy_top-5"] == 1
    assert values["balanced_accuracy_mean"] == 0.5  # every slide is mostly normal
    assert values["auroc_top-1"] > 0.95
    assert values["lower_quartile_over_prompts"] <= values["median_over_prompts"] == 1
    assert isinstance(result.details, SlideDetails) and len(result.details.draws) == 20


def test_poor_words_spread(cohort: Callable[..., dict[str, Any]]) -> None:
    data = SlideFeatures(**cohort())
    poor = {"normal": ["normal", "benign"], "tumour": ["tumour", "odd"]}  # half of the draws cannot tell
    evaluation = SlideZeroShot(data, name="z", classes=poor, templates=TEMPLATES, weights=fingerprint, pool=5)
    values = run_evaluation({"base": AxisClip()}, {"z": evaluation}).comparisons["z"].any_result.metrics
    assert values["lower_quartile_over_prompts"] == 0.5 and values["upper_quartile_over_prompts"] == 1


def test_values_are_scikit_learns_under_weights(cohort: Callable[..., dict[str, Any]]) -> None:
    outcomes = zero_shot(SlideFeatures(**cohort()), pool=None)(AxisClip()).outcomes
    weights = np.random.default_rng(1).integers(0, 3, (4, 24)).astype(float)
    got = outcomes.values(weights)
    for row, own in enumerate(weights):
        for name in ("top-1", "top-50"):
            logits = outcomes.pooled[name]  # type: ignore[attr-defined]
            want = balanced_accuracy_score(outcomes.labels, logits.argmax(1), sample_weight=own)  # type: ignore[attr-defined]
            assert got[f"balanced_accuracy_{name}"][row] == pytest.approx(want)
            want = roc_auc_score(outcomes.labels, logits[:, 1] - logits[:, 0], sample_weight=own)  # type: ignore[attr-defined]
            assert got[f"auroc_{name}"][row] == pytest.approx(want)


def test_features_of_other_weights_are_refused(cohort: Callable[..., dict[str, Any]]) -> None:
    given = cohort()
    with pytest.raises(UserError, match="made by other weights"):
        zero_shot(SlideFeatures(**given))(AxisClip(0.9))


def test_features_that_say_nothing_need_a_name(cohort: Callable[..., dict[str, Any]]) -> None:
    given = cohort("")
    with pytest.raises(UserError, match="encoder=axis"):
        zero_shot(SlideFeatures(**given))(AxisClip())
    assert zero_shot(SlideFeatures(**given), encoder="axis", pool=5)(AxisClip()).metrics["acc1"] == 1


def test_retrieval_of_planted_slides(cohort: Callable[..., dict[str, Any]]) -> None:
    data = SlideFeatures(**cohort(), captions="report")
    evaluation = SlideRetrieval(data, name="r", weights=fingerprint, classes=CLASSES, templates=TEMPLATES, pool=5)
    comparison = run_evaluation({"base": AxisClip()}, {"r": evaluation}).comparisons["r"]
    values = comparison.any_result.metrics
    chance = comparison.any_result.chance
    # Slides with a tumour are found by name; those without look as normal as the others do where they are so.
    assert values["class_to_slide_map"] > chance["class_to_slide_map"] + 0.15
    assert values["slide_to_slide_map"] > 0.9 > chance["slide_to_slide_map"] + 0.2
    assert values["text_to_slide_recall@1"] >= 0.5 > 10 * chance["text_to_slide_recall@1"]  # those of a tumour do


def test_slide_retrieval_by_hand() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(30, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels, groups = [str(i % 3) for i in range(30)], [str(i // 2) for i in range(30)]
    found, chance = by_slide(vectors, labels, groups)
    for i in range(30):
        others = [j for j in range(30) if groups[j] != groups[i]]
        scores = vectors[others] @ vectors[i]
        right = np.array([labels[j] == labels[i] for j in others])
        assert found["slide_to_slide_map"][i] == pytest.approx(average_precision_of(right, scores))
        first = np.argsort(-scores)[:3]
        assert found["slide_to_slide_recall@3"][i] == right[first].any()
    # Over all orders of five items, two of them right.
    orders = [np.array(order) < 2 for order in permutations(range(5))]
    assert np.mean([average_precision(o) for o in orders]) == pytest.approx(chance_precision(2, 5))
    assert 0.2 < chance["slide_to_slide_map"] < 0.5
    # A class of one patient has no right answer: it is left out, not counted wrong.
    lone, _ = by_slide(vectors[:4], ["a", "a", "b", "b"], ["1", "1", "2", "2"])
    assert all(np.isnan(own).all() for own in lone.values())


def test_a_collapsed_model_finds_nothing() -> None:
    same = np.ones((12, 2)) / np.sqrt(2)
    found, _ = by_slide(same, ["a", "b"] * 6, [str(i) for i in range(12)])
    assert found["slide_to_slide_recall@5"].max() == 0
    ranks = by_text(np.ones((8, 8)), list("abcdefgh"), [[text] for text in "abcdefgh"])
    assert ranks["text_to_slide_recall@5"].max() == 0


def slide_map(data: Any) -> SlideMap:
    return SlideMap(
        data, name="m", region="tumour", classes=CLASSES, templates=TEMPLATES, weights=fingerprint, threshold=0.5
    )


def test_maps_of_a_planted_region(cohort: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = cohort()
    truth = {"masks": str(tmp_path / "masks"), "classes": ["Tumor"]}
    evaluation = slide_map(SlideFeatures(**given, label=None, truth=truth))
    values = run_evaluation({"base": AxisClip()}, {"m": evaluation}).comparisons["m"].any_result.metrics
    assert values["patch_auroc"] > 0.97 and values["pixel_auroc"] == pytest.approx(values["patch_auroc"], abs=1e-6)
    assert values["best_dice"] >= values["dice"] > 0.5
    # The same map against masks of other slides is chance.
    for number in range(1, 24, 2):
        (tmp_path / "masks" / f"s{number}.geojson").rename(tmp_path / f"m{number}")
    for number in range(1, 24, 2):
        (tmp_path / f"m{number}").rename(tmp_path / "masks" / f"s{(number + 2) % 24}.geojson")
    evaluation = slide_map(SlideFeatures(**given, label=None, truth=truth))
    astray = run_evaluation({"base": AxisClip()}, {"m": evaluation}).comparisons["m"].any_result.metrics
    assert astray["patch_auroc"] < 0.75 and astray["best_dice"] < values["best_dice"] / 2


def test_dice_and_pixel_auroc_are_those_of_pixels() -> None:
    """A map drawn pixel by pixel, the mask's border running through patches and beyond them."""
    rng = np.random.default_rng(4)
    side, grid = 8, 6
    mask = np.zeros((side * (grid + 1), side * (grid + 1)), bool)
    mask[5:43, 11:50] = True
    scores = rng.normal(size=grid * grid)
    drawn = np.full(mask.shape, -np.inf)
    share = np.zeros(grid * grid)
    for i in range(grid * grid):
        y, x = side * (i // grid), side * (i % grid)
        drawn[y : y + side, x : x + side] = scores[i]
        share[i] = mask[y : y + side, x : x + side].mean()
    area = mask.sum() / side**2
    cuts = np.array([-1.0, 0.0, scores[3]])
    want = [f1_score(mask.ravel(), (drawn >= cut).ravel()) for cut in cuts]
    np.testing.assert_allclose(dice_at(scores, share, area, cuts), want)
    on = np.isfinite(drawn)
    outcomes = map_outcomes(["s"], ["p"], [scores], [share], [area], 0.0, 0.5)
    assert outcomes.each["pixel_auroc"][0] == pytest.approx(roc_auc_score(mask[on], drawn[on]))
    assert outcomes.each["dice"][0] == pytest.approx(want[1])


def test_pooled_auroc_is_that_of_all_patches() -> None:
    rng = np.random.default_rng(5)
    scores = [rng.normal(size=500) + i for i in range(4)]
    shares = [(rng.random(500) < 0.3).astype(float) for _ in range(4)]
    outcomes = map_outcomes(list("abcd"), list("abcd"), scores, shares, [s.sum() for s in shares], 0.0, 0.5)
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 3]])
    got = outcomes.values(weights)["pooled_patch_auroc"]
    for row, own in enumerate(weights):
        want = roc_auc_score(np.concatenate(shares), np.concatenate(scores), sample_weight=np.repeat(own, 500))
        assert got[row] == pytest.approx(want, abs=1e-3)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("slide_id,dx\n007,a\n008,b\n")
    labels = SlideLabels(path, label="dx")
    assert labels.about("007") == {"label": "a", "group": "007", "captions": [], "raw": labels.rows["007"]}
    for text, said in [
        ("slide,label\nx,a\nx,b\n", "twice"),
        ("slide,dx\nx,a\n", "no column 'label'"),
        ("file,label\nx,a\n", "no column slide"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            SlideLabels(path)
    with pytest.raises(UserError, match="not there"):
        SlideLabels(tmp_path / "none.csv")


def test_slides_that_cannot_be_used_are_named(cohort: Callable[..., dict[str, Any]]) -> None:
    given = cohort()
    folder = Path(given["features"])
    (folder / "s0.h5").write_bytes(b"no HDF5")
    write(folder / "s1.h5", np.full((4, DIM), np.nan), np.zeros((4, 2), int), encoder="axis")
    write(folder / "s2.h5", np.zeros((0, DIM)), np.zeros((0, 2), int), encoder="axis")
    write(folder / "stray.h5", np.ones((4, DIM)), np.zeros((4, 2), int), encoder="axis")
    result = zero_shot(data := SlideFeatures(**given), pool=5)(AxisClip())
    assert len(result.outcomes.keys) == 21
    reasons = {key: reason for key, reason, _ in data.bad}
    assert reasons["s2"] == "no patches" and reasons["s1"] == "bad features" and reasons["s0"] == "read error"
    assert reasons["stray"] == "not in the table" and reasons["gone"] == "no features"
    Path(given["table"]).write_text("slide,label\nother,normal\n")
    with pytest.raises(UserError, match="no slide of"):
        SlideFeatures(**given)
