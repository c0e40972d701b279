"""The slide models of k folds as one: `folds:FOLDER`, a folder with a run in it for each fold.

    medclip train -m experiment=mil_abmil data.fold=0,1,2,3,4 …        # runs/mil_abmil/0 … 4
    medclip evaluate checkpoint=folds:runs/mil_abmil eval=[mil_folds] …

An evaluation of folds asks the member that has not seen a slide; on other slides they answer together, by the mean of
what they say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.models.mil import MilModel, MilPrediction
from medclip.types import UserError

FOLDS = "folds:"
_MOST = 1 << 22  # bytes of a config that are read


class MilFolds(nn.Module):
    """Models of the same shape, `members[k]` of fold k.

    Args:
        members: one or more.

    Raises:
        UserError: they differ in more than their weights.
    """

    tokenizer = None
    preprocess = None

    def __init__(self, members: Sequence[MilModel]) -> None:
        super().__init__()
        first, *others = members
        for number, other in enumerate(others, 1):
            if other.description != first.description:
                raise UserError(
                    f"folds 0 and {number} are models of another shape, target or features: train all folds alike"
                )
        self.members: Any = nn.ModuleList(members)
        self.classes, self.target, self.encoder, self.dim = first.classes, first.target, first.encoder, first.dim
        self.refuse = first.refuse

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def description(self) -> dict[str, Any]:
        """Of each member."""
        return self.members[0].description

    def predict(self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"] | None = None) -> MilPrediction:
        """Mean probabilities or risks, attention and slide vectors of all members."""
        found = [member.predict(bag, real) for member in self.members]
        return MilPrediction(*(torch.stack(own).mean(0) for own in zip(*found, strict=True)))


def fold_checkpoints(folder: Path) -> list[Path]:
    """The best checkpoint (else the last) of each run in a folder, in the order of their folds.

    A run's `config.yaml` says which fold was its test part; without one, the folders' names are counted.

    Raises:
        UserError: no run there, or runs that are not folds 0, 1, … of one another.
    """
    runs = sorted((path.parent for path in folder.glob("*/checkpoints")), key=_natural) if folder.is_dir() else []
    found: dict[int, Path] = {}
    for place, run in enumerate(runs):
        there = [run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        path = next((path for path in there if path.is_file()), None)
        if path is None:
            raise UserError(f"{run} has no checkpoint: train this fold to its end, or remove the folder")
        fold = _fold(run / "config.yaml")
        fold = place if fold is None else fold
        if fold in found:
            raise UserError(f"{run} and {found[fold].parent.parent} are both of fold {fold}: remove one of them")
        found[fold] = path
    if not found:
        raise UserError(
            f"{folder} holds no runs: give the folder of the folds, as medclip train -m … data.fold=0,1,2,3,4 makes it"
        )
    if lacking := sorted(set(range(max(found) + 1)) - set(found)):
        raise UserError(f"{folder} lacks fold {', '.join(map(str, lacking))} of {max(found) + 1}: train it, too")
    return [found[fold] for fold in sorted(found)]


def _natural(path: Path) -> list[tuple[int, str]]:
    """fold10 comes after fold9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _fold(config: Path) -> int | None:
    try:
        with config.open("rb") as file:
            content = yaml.safe_load(file.read(_MOST))
        fold = content["data"]["fold"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return fold if isinstance(fold, int) and not isinstance(fold, bool) and 0 <= fold < 1000 else None
