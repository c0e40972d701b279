"""Gradient checkpointing: the blocks' activations are computed again in the backward pass instead of being kept.

Chen et al. 2016, arXiv:1604.06174. Dropout draws the same again; a batch norm sees its batch twice, and moves its
running statistics twice a step. Always torch's non-reentrant kind: the other gives no gradient at all to what follows a
frozen part, and is Hugging Face's default in older versions.
"""

from __future__ import annotations

import warnings

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel

from medclip.models.clip import Clip, OpenClip
from medclip.types import UserError


def checkpointing(clip: Clip, image: bool = True, text: bool = True) -> Clip:
    """Switch it on in the towers that are named, in place.

    Raises:
        UserError: a tower cannot.
    """
    if image:
        _image(clip.net)
    if text:
        _text(clip.net)
    return clip


def _image(net: OpenClip) -> None:
    visual = net.visual
    if isinstance(visual, ModifiedResNet):
        raise _cannot("image", visual)
    try:
        if isinstance(visual, TimmModel):
            visual.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        else:
            visual.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:  # timm asserts where it has none
        raise _cannot("image", visual.trunk if isinstance(visual, TimmModel) else visual) from error


def _text(net: OpenClip) -> None:
    text = getattr(net, "text", None)
    if not isinstance(text, HFTextEncoder):
        (net if text is None else text).transformer.grad_checkpointing = True  # type: ignore[union-attr]
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has another name too in transformers 5
            text.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise _cannot("text", text.transformer) from error


def _cannot(tower: str, module: object) -> UserError:
    return UserError(
        f"adapt.checkpointing: the {tower} tower ({type(module).__name__}) cannot recompute its activations: say "
        f"adapt.checkpointing.{tower}=false"
    )
