"""Another CLIP's text tower in place of a model's own: the first half of locked-text tuning.

Chen et al. 2024, arXiv:2404.02132 (ViTamin): a small image tower is trained against the text tower of a large model,
which stays as it is (`lock_text`). The text projection belongs to the tower and is taken with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medclip.models.build import differing_keys
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.types import UserError

_REST = ("visual.", "logit_scale", "logit_bias")


def text_tower(
    clip: Clip, pretrained: str, architecture: str | Mapping[str, Any] | None = None, cache_dir: str | None = None
) -> Clip:
    """`clip` with the text tower, projection included, of `load_clip(architecture, pretrained)`, in place.

    Args:
        clip: its image tower, logit scale and bias stay as they are.
        pretrained: where the text tower is from.
        architecture: of it, where `pretrained` does not say.
        cache_dir: where downloads are kept.

    Raises:
        UserError: the other model cannot be loaded, or its text tower or width of features is another.
    """
    other = load_clip(architecture, pretrained, cache_dir=cache_dir)
    differing = differing_keys(clip.description["model_cfg"], other.description["model_cfg"])
    wrong = [key for key in differing if key == "embed_dim" or key.startswith("text_cfg.")]
    own, theirs = _state(clip), _state(other)
    if wrong or own.keys() != theirs.keys():
        shown = ", ".join(wrong[:4]) or min(own.keys() ^ theirs.keys())
        raise UserError(
            f"adapt.text_tower.pretrained={pretrained} has another text tower than the model ({shown}): choose a model "
            "with its embed_dim and text_cfg, e.g. model.architecture=ViTamin-S-LTT for ViTamin-L's"
        )
    texts = ("chest X-ray: left-sided effusion", "")
    if clip.tokenizer(texts).tolist() != other.tokenizer(texts).tolist():
        raise UserError(
            f"adapt.text_tower.pretrained={pretrained} has another tokenizer than the model: choose its own"
        )
    for key, value in own.items():
        value.copy_(theirs[key])
    return clip


def _state(clip: Clip) -> dict[str, Tensor]:
    """All of the text tower by its names in open_clip's `CustomTextCLIP`; the tensors themselves, detached."""
    state = clip.net.state_dict()
    return {key.removeprefix("text."): value for key, value in state.items() if not key.startswith(_REST)}
