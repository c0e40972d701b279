"""Any checkpoint that can be evaluated: a CLIP from anywhere, a classifier (experiment=thorax), a VQA model (medvqa_…),
a slide model on bags of features (mil_…).

`random:CHECKPOINT` is the same model with fresh weights: what its architecture reaches without having learnt anything.
`folds:FOLDER` are the slide models of all folds, see `folds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medclip.models.build import build_clip, plain
from medclip.models.clip import Clip
from medclip.models.encoder import refuse_unlike
from medclip.models.folds import FOLDS, MilFolds, fold_checkpoints
from medclip.models.generate import Speaker, speaker_from
from medclip.models.load import load_clip
from medclip.models.mil import MilModel, mil_from
from medclip.models.source import find_source
from medclip.models.vit import Classifier, classifier_from
from medclip.models.vqa import VqaModel, vqa_from
from medclip.models.weights import read_checkpoint
from medclip.types import UserError

RANDOM = "random:"
Described = Classifier | VqaModel | Speaker | MilModel
_KINDS = {"classifier": classifier_from, "vqa": vqa_from, "vqa_text": speaker_from, "mil": mil_from}
_NAMES = {"classifier": "classifier", "vqa": "VQA model", "vqa_text": "VQA model", "mil": "slide model"}
_PARTS = {  # kinds that are the beginning of another model only
    "mae": "a masked autoencoder, which names no findings: fine-tune it first (medclip train experiment=thorax "
    "model.init={})",
    "dae": "a denoising auto-encoder, which answers nothing: train a model that sees by it first (medclip train "
    "experiment=medvqa_mevf model.visual.parts.1.pretrained={})",
    "maml": "a meta-learned net, which answers nothing: train a model that sees by it first (medclip train "
    "experiment=medvqa_mevf model/visual=maml_dae model.visual.parts.0.pretrained={})",
}


def load_any(
    architecture: str | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Clip | Described | MilFolds:
    """Load a checkpoint, whichever kind of model it is of.

    Args:
        architecture: see `load_clip`; not for the others, which describe themselves.
        pretrained: what `load_clip` takes, the .ckpt of any of the others, or any of these after `random:`.
        seed: of the weights after `random:`.
        **options: of `load_clip`, for CLIPs.

    Raises:
        UserError: see `load_clip`; a masked autoencoder or one of MEVF's small nets, which name nothing; a damaged
            checkpoint.
    """
    fresh = pretrained is not None and pretrained.startswith(RANDOM)
    wanted = pretrained.removeprefix(RANDOM) if pretrained is not None else None
    if wanted is not None and wanted.startswith(FOLDS):
        return _folds(Path(wanted.removeprefix(FOLDS)).expanduser(), RANDOM if fresh else "", seed)
    path = Path(wanted).expanduser() if wanted is not None else None
    content = read_checkpoint(path) if path is not None and path.suffix == ".ckpt" and path.is_file() else {}
    description = content.get("medclip")
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if kind in _PARTS:
        raise UserError(f"{wanted} is {_PARTS[kind].format(wanted)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in _KINDS:
            assert isinstance(description, Mapping)
            model = _described(description, str(wanted))
            return model if fresh else _filled(model, content.get("state_dict"), str(wanted))
        if fresh:
            source = find_source(plain(architecture), wanted, None, options.get("cache_dir"))
            return build_clip(source.description)
    return load_clip(architecture, wanted, **options)


def _folds(folder: Path, prefix: str, seed: int) -> MilFolds:
    members = []
    for number, path in enumerate(fold_checkpoints(folder)):
        member = load_any(pretrained=f"{prefix}{path}", seed=seed + number)
        if not isinstance(member, MilModel):
            raise UserError(f"{path} is no slide model (experiment=mil_…): {FOLDS} is for these")
        members.append(member)
    return MilFolds(members)


def _described(description: Mapping[str, Any], where: str) -> Described:
    try:
        return _KINDS[description["kind"]](description)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} does not describe its {_NAMES[description['kind']]} ({error!r}): was it made by another version?"
        ) from error


def _filled(model: Described, state: Any, where: str) -> Described:
    if not isinstance(state, Mapping):
        raise UserError(f"{where} holds no weights: get it again")
    taken = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    refuse_unlike(model.state_dict(), taken, where)
    model.load_state_dict(taken)
    return model
