"""Slides: what validation measures, by other means than the task's; balance, refusals, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medclip.losses.bag_classes import BagClassesLoss
from medclip.tasks.cindex import cindex
from medclip.tasks.mil_metrics import classes_metrics, grades, ordinal_metrics, risk_of
from medclip.types import UserError
from tests.tasks.bags import GRADES, bags, mil_task
from tests.tasks.rows import Loader, Stream, trainer

TARGETS = ["classes", "ordinal", "multilabel", "survival", "cox"]
JUDGED = {"classes": "auroc", "ordinal": "kappa", "multilabel": "auroc", "survival": "cindex", "cox": "cindex"}


def pairwise_order(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Harrell's index pair by pair."""
    good = of = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                of += 1
                good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return good / of


def test_concordance_is_harrells_pair_by_pair_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        risk, time = rng.integers(0, 5, 40).astype(float), rng.integers(1, 9, 40).astype(float)
        event = (rng.random(40) < 0.6).astype(float)
        assert cindex(risk, time, event) == pytest.approx(pairwise_order(risk, time, event), rel=1e-12)
    assert cindex(-time, time, np.ones(40)) == 1 and cindex(time, time, np.ones(40)) == 0
    assert cindex(risk, time, np.zeros(40)) is None


def test_concordance_is_lifelines_and_scikit_survivals() -> None:
    """Of these numbers lifelines 0.30.3 (`concordance_index(time, -risk, event)`) and scikit-survival
    (`concordance_index_censored(event, time, risk)`) say the same."""
    rng = np.random.default_rng(7)
    time, event = rng.integers(1, 30, 50).astype(float), (rng.random(50) < 0.6).astype(float)
    risk = np.round(-time / 10 + rng.normal(size=50), 1)
    assert cindex(risk, time, event) == pytest.approx(0.7078877005347594, rel=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_validation_measures_all_bags_together(target: str, tmp_path: Path) -> None:
    task = mil_task(target).eval()
    parts: list[dict[str, Any]] = [bags(0, target), bags(1, target, n=4), bags(2, target)]
    found = trainer(tmp_path).validate(task, Loader(parts), verbose=False)[0]
    with torch.no_grad():
        logits = torch.cat([task.model(p).logits[: len(p["key"])] for p in parts]).double()
    known = {
        k: torch.cat([p[k][: len(p["key"])] for p in parts]).numpy()
        for k in ("label", "time", "event")
        if k in parts[0]
    }
    label = known["label"]
    if target == "classes":
        shares = logits.softmax(1).numpy()
        assert found["val/auroc"] == pytest.approx(roc_auc_score(label, shares, average="macro"))
        expected = balanced_accuracy_score(label.argmax(1), shares.argmax(1))
        assert found["val/balanced_accuracy"] == pytest.approx(expected)
        assert found["val/accuracy"] == pytest.approx((label.argmax(1) == shares.argmax(1)).mean())
    elif target == "ordinal":
        truth = label.sum(1).astype(int)
        above = torch.cat([torch.ones(len(logits), 1), logits.sigmoid(), torch.zeros(len(logits), 1)], 1)
        said = (above[:, :-1] - above[:, 1:]).argmax(1).numpy()
        assert found["val/kappa"] == pytest.approx(kappa_by_hand(truth, said, 3))
    elif target == "multilabel":
        assert found["val/auroc"] == pytest.approx(roc_auc_score(label, logits.numpy(), average="macro"))
    else:
        hazards = logits.sigmoid()
        lived = [(1 - hazards[:, : k + 1]).prod(1) for k in range(3)] if target == "survival" else [-logits[:, 0]]
        risk = -torch.stack(lived).sum(0).numpy()
        assert found["val/cindex"] == pytest.approx(pairwise_order(risk, known["time"], known["event"]))
    losses, rows = [task.score(part)[2].item() for part in parts], [len(part["key"]) for part in parts]
    assert found["val/loss"] == pytest.approx(np.average(losses, weights=rows), rel=1e-5)


def kappa_by_hand(truth: np.ndarray, said: np.ndarray, classes: int) -> float:
    """1 - observed over expected squared distance of two independent raters."""
    observed = np.mean((truth - said) ** 2)
    share = [np.bincount(x, minlength=classes) / len(x) for x in (truth, said)]
    expected = sum(share[0][i] * share[1][j] * (i - j) ** 2 for i in range(classes) for j in range(classes))
    return 1 - observed / expected


def test_grades_are_differences_and_kappa_punishes_distance() -> None:
    above = np.array([[0.9, 0.3], [0.5, 0.5]])
    np.testing.assert_allclose(grades(above), [[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]])
    label = np.array([[0, 0], [1, 0], [1, 1], [0, 0], [1, 1]], dtype=float)
    sure = lambda truth: np.where(truth > 0, 9.0, -9.0)  # noqa: E731
    near, far = label.copy(), label.copy()
    near[0], far[0] = [1, 0], [1, 1]
    kappas = [ordinal_metrics(sure(x), label)["kappa"] for x in (label, near, far)]
    assert kappas[0] == 1 and kappas[0] > kappas[1] > kappas[2]


def test_hazards_that_rise_are_a_higher_risk() -> None:
    risk = risk_of(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]]))
    assert risk[1] > risk[2] > risk[0] > risk[3]  # early danger is worse than late danger
    assert risk_of(np.array([[0.3], [-2.0]])).tolist() == [0.3, -2.0]


def test_macro_auroc_is_of_probabilities_not_of_logits() -> None:
    """A bag whose logits all lie higher is not surer of any class."""
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(40, 3)), np.eye(3)[rng.integers(0, 3, 40)]
    shifted = logits + 100 * rng.normal(size=(40, 1))
    assert classes_metrics(logits, label, GRADES) == pytest.approx(classes_metrics(shifted, label, GRADES))


def test_slides_without_a_label_are_left_out_of_what_is_measured(tmp_path: Path) -> None:
    task = mil_task("classes").eval()
    part = bags(0, "classes", n=6)
    part["label"][2] = torch.nan
    found = trainer(tmp_path).validate(task, Loader([part]), verbose=False)[0]
    kept = [0, 1, 3, 4, 5]
    short = {k: v[kept] if isinstance(v, torch.Tensor) else v for k, v in part.items()} | {"key": list("abcde")}
    again = trainer(tmp_path).validate(task, Loader([short]), verbose=False)[0]
    assert found["val/auroc"] == pytest.approx(again["val/auroc"])
    assert found["val/accuracy"] == pytest.approx(again["val/accuracy"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_validation_set_that_measures_nothing_is_one_line(target: str, tmp_path: Path) -> None:
    part = bags(0, target)
    if target in ("survival", "cox"):
        part["event"][:] = 0
    else:
        part["label"][:] = part["label"][0]
    with pytest.raises(UserError, match=f"has no {JUDGED[target]}: .*another split"):
        trainer(tmp_path).validate(mil_task(target), Loader([part]), verbose=False)


def test_a_loss_that_compares_bags_needs_several(tmp_path: Path) -> None:
    data = Stream([bags(0, "cox", n=1, rows=1)])
    data.batch_size = 1
    with pytest.raises(UserError, match=r"compares the slides of a batch.*data\.batch_size=16"):
        trainer(tmp_path).fit(mil_task("cox"), data)
    data = Stream([bags(0, "survival", n=1, rows=1)])
    data.batch_size = 1
    trainer(tmp_path).fit(mil_task("survival"), data)


def test_a_balanced_loss_gets_the_slides_of_each_class(tmp_path: Path) -> None:
    class Counted(Stream):
        def label_counts(self) -> dict[str, tuple[int, int]]:
            return {"high": (2, 22), "none": (20, 4), "low": (2, 22)}  # in another order than the model's

    task = mil_task("classes")
    task.losses["classes"] = BagClassesLoss("balanced")
    trainer(tmp_path).fit(task, Counted([bags(0, "classes")]))
    assert task.losses["classes"].weight.tolist() == pytest.approx([24 / 60, 4, 4])


@pytest.mark.parametrize("target", TARGETS)
def test_learns_each_target(target: str, tmp_path: Path) -> None:
    task = mil_task(target)
    run = trainer(tmp_path)
    run.fit(task, Stream([bags(number, target) for number in range(150)]))
    assert {"train/loss", f"train/{target}", "train/extra", "train/size"} <= set(run.callback_metrics)
    held = [bags(1000 + number, target) for number in range(5)]
    found = trainer(tmp_path).validate(task, Loader(held), verbose=False)[0]
    # Within a grade times are drawn by chance, so that no risk orders them all.
    assert found[f"val/{JUDGED[target]}"] > (0.8 if "event" in held[0] else 0.9)
