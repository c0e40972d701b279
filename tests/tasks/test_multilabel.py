"""AUROC on validation: by pairs, with unknown labels, with classes of one value; and a task that learns by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medclip.losses.bce import BceLoss
from medclip.tasks.auroc import auroc_by_class
from medclip.types import UserError
from tests.tasks.rows import CLASSES, Loader, Stream, batch, multilabel_task, trainer


def mann_whitney(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; a tie is half a pair."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])


def test_auroc_is_mann_whitneys_on_known_labels_with_ties():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (60, 3)).astype(float)  # many ties
    labels = rng.integers(0, 2, (60, 3)).astype(float)
    labels[rng.random((60, 3)) < 0.3] = np.nan
    found = auroc_by_class(scores, labels, CLASSES)
    for column, name in enumerate(CLASSES):
        assert found[name] == pytest.approx(mann_whitney(scores[:, column], labels[:, column]))


def test_a_class_with_one_value_is_left_out_and_never_zero():
    scores = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.9, 0.1, 0.2]])
    labels = np.array([[0, 0, np.nan], [1, 0, np.nan], [1, 0, np.nan]], dtype=float)
    assert auroc_by_class(scores, labels, CLASSES) == {"Effusion": 1.0}


def test_validation_logs_each_class_and_their_mean(tmp_path: Path):
    task = multilabel_task().eval()
    parts = [batch(0), batch(1, 4), batch(2)]
    found = trainer(tmp_path).validate(task, Loader(parts), verbose=False)[0]
    with torch.no_grad():
        logits = torch.cat([task.model(part)[: len(part["key"])] for part in parts]).numpy()
    labels = torch.cat([part["label"][: len(part["key"])] for part in parts]).numpy()
    each = [mann_whitney(logits[:, column], labels[:, column]) for column in range(3)]
    assert [found[f"val/auroc/{name}"] for name in CLASSES] == pytest.approx(each)
    assert found["val/auroc"] == pytest.approx(np.mean(each))
    rows = [len(part["key"]) for part in parts]
    losses = [task.score(part)[2].item() for part in parts]
    assert found["val/loss"] == pytest.approx(np.average(losses, weights=rows), rel=1e-5)


def test_left_out_classes_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    part = batch(0)
    part["label"][:, 1] = 0
    task = multilabel_task()
    for _ in range(2):
        found = trainer(tmp_path).validate(task, Loader([part]), verbose=False)[0]
    assert "val/auroc/Hernia" not in found
    assert found["val/auroc"] == pytest.approx((found["val/auroc/Effusion"] + found["val/auroc/Mass"]) / 2)
    said = capsys.readouterr().err
    assert said.count("leaves out Hernia") == 1


def test_no_class_with_both_values_is_one_line(tmp_path: Path):
    part = batch(0)
    part["label"][:] = 1
    with pytest.raises(UserError, match=r"no class of the validation set \(6 samples\) has both values"):
        trainer(tmp_path).validate(multilabel_task(), Loader([part]), verbose=False)


def test_labels_that_are_not_the_models_classes(tmp_path: Path):
    part = batch(0)
    part["label"] = part["label"][:, :2]
    with pytest.raises(UserError, match="2 labels a sample, the model 3 classes"):
        trainer(tmp_path).fit(multilabel_task(), Stream([part]))
    del part["label"]
    with pytest.raises(UserError, match=r"no labels: say data\.labels"):
        trainer(tmp_path).fit(multilabel_task(), Stream([part]))


def test_a_balanced_loss_gets_the_training_datas_counts(tmp_path: Path):
    class Counted(Stream):
        def label_counts(self) -> dict[str, tuple[int, int]]:
            return {"Mass": (2, 6), "Effusion": (4, 4), "Hernia": (1, 9)}  # in another order than the model's

    task = multilabel_task()
    task.losses["bce"] = BceLoss("balanced")
    trainer(tmp_path).fit(task, Counted([batch(0)]))
    assert task.losses["bce"].pos_weight.tolist() == [1.0, 9.0, 3.0]


def test_learns_to_tell_findings_apart(tmp_path: Path):
    task = multilabel_task(lr=1e-2, drop_path=0.0)
    trainer(tmp_path).fit(task, Stream([batch(number) for number in range(300)]))
    found = trainer(tmp_path).validate(task, Loader([batch(1000 + number) for number in range(5)]), verbose=False)[0]
    assert found["val/auroc"] > 0.95
