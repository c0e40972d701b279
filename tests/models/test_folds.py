"""Models of folds: found in the order of their folds, refused where they are not; and together their mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from medclip.heads.abmil import Abmil
from medclip.models.any import load_any
from medclip.models.folds import MilFolds, fold_checkpoints
from medclip.models.mil import MilModel
from medclip.types import UserError


def model(seed: int, dim: int = 4) -> MilModel:
    torch.manual_seed(seed)
    return MilModel(partial(Abmil, hidden=8, attention=4), dim, ["a", "b"], "classes", "toy").eval()


def save(folder: Path, own: MilModel, name: str = "best", fold: int | None = None) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"model.{key}": value for key, value in own.state_dict().items()}
    torch.save({"medclip": own.description, "state_dict": state}, folder / "checkpoints" / f"{name}.ckpt")
    if fold is not None:
        (folder / "config.yaml").write_text(f"data: {{fold: {fold}, seed: '${{seed}}'}}\n")


def test_folds_are_found_by_what_their_runs_say(tmp_path: Path) -> None:
    for number, fold in enumerate([2, 0, 1]):
        save(tmp_path / str(number), model(10 + fold), fold=fold)
    assert [path.parent.parent.name for path in fold_checkpoints(tmp_path)] == ["1", "2", "0"]
    found = load_any(pretrained=f"folds:{tmp_path}")
    assert isinstance(found, MilFolds) and len(found.members) == 3
    bag = torch.randn(1, 5, 4)
    for fold, member in enumerate(found.members):
        torch.testing.assert_close(member.eval().predict(bag).scores, model(10 + fold).predict(bag).scores)
    together = found.eval().predict(bag).scores
    torch.testing.assert_close(together, sum(model(10 + k).predict(bag).scores for k in range(3)) / 3)
    fresh = load_any(pretrained=f"random:folds:{tmp_path}")
    assert isinstance(fresh, MilFolds) and not torch.equal(fresh.eval().predict(bag).scores, together)


def test_names_count_where_a_run_does_not_say(tmp_path: Path) -> None:
    for number in (9, 10, 2):
        save(tmp_path / f"fold{number}", model(number), name="last")
    assert [path.parent.parent.name for path in fold_checkpoints(tmp_path)] == ["fold2", "fold9", "fold10"]


def test_runs_that_are_no_folds_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        fold_checkpoints(tmp_path)
    save(tmp_path / "a", model(0), fold=0)
    save(tmp_path / "b", model(1), fold=0)
    with pytest.raises(UserError, match="are both of fold 0"):
        fold_checkpoints(tmp_path)
    (tmp_path / "b" / "config.yaml").write_text("data: {fold: 2}")
    with pytest.raises(UserError, match="lacks fold 1 of 3"):
        fold_checkpoints(tmp_path)
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint"):
        fold_checkpoints(tmp_path)
    with pytest.raises(UserError, match="models of another shape"):
        MilFolds([model(0), model(0, dim=5)])
