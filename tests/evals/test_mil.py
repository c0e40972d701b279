"""Slide models: metrics under weights against libraries and by repetition, folds, regions, refusals, the report."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, cohen_kappa_score, roc_auc_score
from torch import Tensor

from medclip.data.bags import BagSet
from medclip.data.fold_sets import FoldSets
from medclip.evals.bootstrap import Bootstrap
from medclip.evals.cindex import concordance, kaplan_meier
from medclip.evals.mil import Mil
from medclip.evals.mil_details import MilDetails
from medclip.evals.mil_outcomes import LOCATED, MilOutcomes, quadratic_kappa
from medclip.evals.mil_predictions import table
from medclip.evals.records import records
from medclip.evals.report import write_report
from medclip.evals.result import Result
from medclip.evals.run import kind_of, make_report
from medclip.phantoms.bags import CLASSES, make_bag
from medclip.tasks.cindex import cindex
from medclip.types import UserError

RNG = np.random.default_rng(3)
FEW = Bootstrap(samples=100)


class Said(NamedTuple):
    scores: Tensor
    attention: Tensor
    slide: Tensor


class Toy:
    """Knows the direction of generated findings: a slide is as planted as its patch that lies furthest along it."""

    device = torch.device("cpu")

    def __init__(self, data: BagSet | FoldSets, *, sign: float = 1.0, classes: list[str] | None = None) -> None:
        first = data.sets[0] if isinstance(data, FoldSets) else data
        recipe = first.bags[0].files[0].recipe  # pyright: ignore[reportAttributeAccessIssue]
        pure, none = (make_bag(type(recipe)(**(vars(recipe) | {"signal": s})), 2).features for s in (1e3, 0.0))
        away = (pure - none)[np.abs(pure - none).sum(1).argmax()]
        self.direction = torch.from_numpy(away / np.linalg.norm(away)).float()
        self.sign, self.target, self.dim = sign, data.target, first.dim
        self.classes = list(data.classes) if classes is None else classes
        self.asked = 0
        self.description = {"kind": "mil"}

    def refuse(self, width: int, encoder: str | None, where: str = "the features") -> None:
        if width != self.dim:
            raise UserError(f"{where} have {width} numbers, not {self.dim}")

    def predict(self, bag: Tensor, real: Tensor | None = None) -> Said:
        self.asked += 1
        along = bag @ self.direction
        best = self.sign * (along.amax(1) - 4)
        shares = (5 * along).softmax(1)[:, None]
        if self.target == "survival":
            return Said(best, shares, bag.mean(1))
        chance = best.sigmoid()[:, None]
        return Said(torch.cat([1 - chance, chance], 1), shares, bag.mean(1))


def phantoms(target: str = "classes", slides: int = 60) -> dict[str, Any]:
    return {"slides": slides, "patches": 40, "dim": 12, "rare": 0.1, "signal": 9.0, "seed": 1, "target": target}


def bag_set(target: str = "classes", **options: Any) -> BagSet:
    names = {"bins": 1} if target == "survival" else {"names": list(CLASSES[target])}
    return BagSet(phantoms=phantoms(target), target=target, labels=names, **options)


def details(result: Result) -> MilDetails:
    assert isinstance(result.details, MilDetails)
    return result.details


def outcomes(target: str, n: int = 60, c: int = 3, folds: int = 1) -> MilOutcomes:
    scores = RNG.dirichlet(np.ones(c), n) if target != "survival" else RNG.normal(size=(n, 1)).round(1)
    labels = np.eye(c)[RNG.integers(0, c, n)] if target != "survival" else np.zeros((n, 0))
    time = RNG.integers(1, 12, n).astype(float) if target == "survival" else np.full(n, math.nan)
    event = (RNG.random(n) < 0.6).astype(float) if target == "survival" else np.full(n, math.nan)
    return MilOutcomes(
        keys=[f"s{i}" for i in range(n)],
        groups=[f"p{i // 2}" for i in range(n)],
        target=target,
        classes=[] if target == "survival" else [f"c{k}" for k in range(c)],
        labels=labels,
        scores=scores,
        time=time,
        event=event,
        located=np.full(n, math.nan),
        fold=np.arange(n) % folds,
    )


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_concordance_is_the_libraries_and_weights_are_repetitions() -> None:
    """lifelines 0.30.3 and scikit-survival both give 0.7078877005347594 for these numbers."""
    rng = np.random.default_rng(7)
    time, event = rng.integers(1, 30, 50).astype(float), (rng.random(50) < 0.6).astype(float)
    risk = np.round(-time / 10 + rng.normal(size=50), 1)
    weights = np.vstack([np.ones(50), rng.integers(0, 4, (6, 50))])
    found = concordance(risk, time, event, weights)
    assert found[0] == pytest.approx(0.7078877005347594, rel=1e-12)
    for row, value in zip(weights.astype(int), found, strict=True):
        drawn = np.repeat(np.arange(50), row)
        assert value == pytest.approx(cindex(risk[drawn], time[drawn], event[drawn]), rel=1e-12)
    assert np.isnan(concordance(risk, time, np.zeros(50), weights)).all()


def test_kaplan_meier_by_hand() -> None:
    """Five people: an event at 2 (of 5), one censored at 3, two events at 4 (of 3), one alive at 9."""
    curve = kaplan_meier(np.array([2.0, 3, 4, 4, 9]), np.array([1.0, 0, 1, 1, 0]))
    assert curve == [(0, 1), (2, pytest.approx(0.8)), (4, pytest.approx(0.8 / 3)), (9, pytest.approx(0.8 / 3))]


def test_kappa_is_scikit_learns() -> None:
    truth, said = RNG.integers(0, 4, 80), RNG.integers(0, 4, 80)
    counts = np.zeros((1, 4, 4))
    np.add.at(counts[0], (truth, said), 1)
    assert quadratic_kappa(counts)[0] == pytest.approx(cohen_kappa_score(truth, said, weights="quadratic"))
    assert math.isnan(quadratic_kappa(np.diag([5.0, 0, 0])[None])[0])


def test_classes_are_scikit_learns_under_weights() -> None:
    own = outcomes("classes")
    weights = RNG.integers(0, 3, (3, 60)).astype(float)
    found = own.values(weights)
    for i, row in enumerate(weights):
        assert found["mean_per_class_recall"][i] == pytest.approx(
            balanced_accuracy_score(own.truth, own.said, sample_weight=row)
        )
        odds = own.log_odds
        area = [roc_auc_score(own.labels[:, c], odds[:, c], sample_weight=row) for c in range(3)]
        precision = [average_precision_score(own.labels[:, c], odds[:, c], sample_weight=row) for c in range(3)]
        assert found["auroc"][i] == pytest.approx(np.mean(area))
        assert found["mean_average_precision"][i] == pytest.approx(np.mean(precision))
        assert found["auroc:c1"][i] == pytest.approx(area[1])


def test_probabilities_that_round_to_one_still_rank() -> None:
    own = outcomes("classes", n=2, c=2)
    sure = np.array([[1e-12, 1.0], [1e-30, 1.0]])
    odds = MilOutcomes(**(vars(own) | {"scores": sure})).log_odds
    assert odds[1, 1] > odds[0, 1] and np.isfinite(odds).all()


@pytest.mark.parametrize("target", ["classes", "ordinal", "survival"])
def test_folds_are_averaged_and_never_ranked_together(target: str) -> None:
    own = outcomes(target, folds=3)
    one = np.ones((1, 60))
    each = [own.of_fold(fold) for fold in range(3)]
    for name, value in own.values(one).items():
        assert value[0] == pytest.approx(np.nanmean([fold[name] for fold in each]))
    # A model of one fold that gives all its slides a higher risk changes nothing.
    if target == "survival":
        higher = MilOutcomes(**(vars(own) | {"scores": own.scores + 5.0 * own.fold[:, None]})).values(one)
        together = MilOutcomes(**(vars(own) | {"scores": own.scores + 5.0 * own.fold[:, None], "fold": 0 * own.fold}))
        assert higher["cindex"][0] == pytest.approx(own.values(one)["cindex"][0])
        assert together.values(one)["cindex"][0] != pytest.approx(own.values(one)["cindex"][0])


# --- The evaluation ---------------------------------------------------------------------------------------------------


def test_a_model_that_finds_the_planted_patches_is_seen_to() -> None:
    data = bag_set(part="all")
    seeing, blind = (Mil(data, name="m")(Toy(data, sign=sign)) for sign in (1.0, -1.0))
    assert seeing.metrics["auroc"] == 1 and blind.metrics["auroc"] == 0
    assert seeing.metrics["mean_per_class_recall"] > 0.9
    assert seeing.metrics[LOCATED] > 0.95 and details(seeing).regions == 30  # the planted half
    assert len(set(seeing.outcomes.groups)) == 30 and details(seeing).patients == 30
    assert set(details(seeing).shown["Surely right"][0].__dict__) and details(blind).shown["Surely wrong"]


def test_risks_are_judged_by_concordance() -> None:
    data = bag_set("survival", part="all")
    seeing, blind = (Mil(data, name="m")(Toy(data, sign=sign, classes=[])) for sign in (1.0, -1.0))
    assert seeing.metrics["cindex"] > 0.6 and blind.metrics["cindex"] == pytest.approx(1 - seeing.metrics["cindex"])
    high, low = details(seeing).curves
    assert high.name == "higher risk" and high.steps[-1][1] < low.steps[-1][1]


def test_each_fold_is_judged_by_its_own_model() -> None:
    data = FoldSets(partial(bag_set), folds=3)
    members = [Toy(data, sign=sign) for sign in (1.0, -1.0, 1.0)]
    folds = Toy(data)
    folds.members = members  # pyright: ignore[reportAttributeAccessIssue]
    result = Mil(data, name="m")(folds)
    assert [row.values["auroc"] for row in details(result).folds] == [1, 0, 1]
    assert result.metrics["auroc"] == pytest.approx(2 / 3)
    assert sorted(result.outcomes.keys) == sorted(bag.key for bag in bag_set(part="all").bags)
    assert [m.asked for m in members] == [len(own) for own in data.sets] and folds.asked == 0
    for wrong in (Toy(data), *[w for w in [Toy(data)] if setattr(w, "members", members[:2]) is None]):
        with pytest.raises(UserError, match=r"3 folds, which needs the model of each: checkpoint=folds:FOLDER"):
            Mil(data, name="m")(wrong)


def test_regions_come_before_what_the_data_know() -> None:
    data = bag_set(part="all")
    result = Mil(data, name="m", regions=lambda slide, coords, side: None)(Toy(data))
    assert LOCATED not in result.metrics and details(result).regions == 0
    result = Mil(data, name="m", regions=lambda slide, coords, side: coords[:, 0] < 3 * side)(Toy(data))
    assert details(result).regions == 60 and abs(result.metrics[LOCATED] - 0.5) < 0.15


def test_patches_that_are_looked_at_most_are_shown() -> None:
    data = bag_set(part="all")
    seen: list[tuple[str, np.ndarray]] = []

    def pictures(slide: str, coords: np.ndarray, side: float) -> list[np.ndarray]:
        seen.append((slide, coords))
        return [np.full((8, 8, 3), 200, np.uint8)] * len(coords)

    result = Mil(data, name="m", pictures=pictures)(Toy(data))
    best = details(result).shown["Surely right"][0]
    assert len(best.tops) == 6 and best.heat is not None and best.heat[:2] == b"\xff\xd8"
    slide, coords = next(pair for pair in seen if pair[0].endswith("1-0"))  # the first planted patient
    bag = next(b for b in data.bags if b.key == slide)
    about = bag.files[0].about()
    planted = {tuple(xy) for xy in about["coords"][about["planted"]].tolist()}
    assert len(planted & {tuple(xy) for xy in coords.tolist()}) >= min(3, len(planted))


def test_other_models_and_features_are_one_line() -> None:
    data = bag_set(part="all")
    with pytest.raises(UserError, match="the slide model knows a, b, the data have absent, planted"):
        Mil(data, name="m")(Toy(data, classes=["a", "b"]))
    grades = bag_set("ordinal", part="all")
    with pytest.raises(UserError, match="the slide model tells ordinal, the data have classes"):
        Mil(data, name="m")(Toy(grades))
    narrow = Toy(data)
    narrow.dim = 7
    with pytest.raises(UserError, match="its features have 12 numbers, not 7"):
        Mil(data, name="m")(narrow)
    broken = Toy(data)
    broken.direction = broken.direction * math.nan
    with pytest.raises(UserError, match="answers NaN"):
        Mil(data, name="m")(broken)


def test_columns_are_matched_by_name() -> None:
    data = bag_set(part="all")
    swapped = Toy(data, sign=-1.0, classes=["planted", "absent"])  # its first column is the planted one
    assert Mil(data, name="m")(swapped).metrics["auroc"] == 1


def test_the_table_and_the_report(tmp_path: Path) -> None:
    data = FoldSets(partial(bag_set), folds=3)
    results = {}
    for name, sign in (("blind", -1.0), ("seeing", 1.0)):
        model = Toy(data)
        model.members = [Toy(data, sign=sign) for _ in range(3)]  # pyright: ignore[reportAttributeAccessIssue]
        assert kind_of(model) == "mil"
        results[name] = {"slides": Mil(data, name="slides")(model)}
    report = make_report(results, settings=FEW)
    page = write_report(report, tmp_path).read_text()
    for words in ("Fold by fold", "Class by class", "Confusion", "where the model looked", "mean ± sd"):
        assert words in page
    own = results["seeing"]["slides"].outcomes
    assert isinstance(own, MilOutcomes)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "predictions-slides-seeing.csv").read_text())))
    assert rows == list(csv.DictReader(io.StringIO(table(own)))) and len(rows) == 60
    assert {row["fold"] for row in rows} == {"0", "1", "2"} and "patient" not in rows[0]
    assert all(float(row["absent"]) + float(row["planted"]) == pytest.approx(1, abs=1e-5) for row in rows)
    record = records(report)[1]
    assert record["folds"][0]["values"]["auroc"] == 1 and record["per_class"]["planted"]["auroc"]["value"] == 1
    assert record["comparison"]["differences"]["auroc"]["verdict"] == "gain"
    assert json.loads((tmp_path / "results.json").read_text())[1]["target"] == "classes"


def test_survival_and_grades_have_reports(tmp_path: Path) -> None:
    data = bag_set("survival", part="all")
    report = make_report({"m": {"s": Mil(data, name="s")(Toy(data, classes=[]))}}, settings=FEW)
    page = write_report(report, tmp_path / "s").read_text()
    assert "Survival by predicted risk" in page and "Highest risk" in page and "stroke-dasharray" in page
    assert "time,event,risk" in (tmp_path / "s" / "predictions-s-m.csv").read_text()


def test_slides_without_a_label_are_skipped_and_counted() -> None:
    data = bag_set(part="all")

    class Holes:
        """The same set, in which nobody knows every third label."""

        def __getattr__(self, name: str) -> Any:
            return getattr(data, name)

        def __len__(self) -> int:
            return len(data)

        def batches(self, batch_size: int = 1, workers: int = 0) -> Iterator[Any]:
            for number, batch in enumerate(data.batches(batch_size, workers)):
                if number % 3 == 0:
                    batch["label"] = batch["label"] * math.nan  # pyright: ignore[reportTypedDictNotRequiredAccess]
                yield batch

    result = Mil(Holes(), name="m")(Toy(data))
    assert result.skipped == {"no label": 20} and len(result.outcomes.keys) == 40
