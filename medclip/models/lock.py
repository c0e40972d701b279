"""A tower frozen, all of it or all but its last blocks: locked-image tuning and its kin.

Zhai et al. 2022, arXiv:2111.07991 (LiT) lock a whole image tower. open_clip 3.3 locks the last groups of its own and
timm's towers, no part of a ResNet or a BERT; here any tower of `medclip.models.layers` can be. What is locked has no
gradient, so that autograd keeps none of its activations: as the embeddings are always locked first, the graph begins at
the first free block. Its batch norms and dropouts stay in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from medclip.models.clip import Clip
from medclip.models.layers import Tower, places
from medclip.types import UserError


def lock(clip: Clip, tower: Tower, blocks: int = 0, head: bool | None = None) -> Clip:
    """Freeze one tower of `clip`, in place.

    Args:
        clip: its other tower, the logit scale and bias stay as they are.
        tower: "image" or "text".
        blocks: the last blocks that are left free, with the head that follows them. Embeddings are frozen always.
        head: leave the head (final norm, pooling, projection) free too; None: where a block is free. True with no block
            trains the head alone, for a tower whose projection is new.

    Raises:
        UserError: the tower has no such blocks, or `head` is false above a free block.
    """
    where = f"adapt.lock_{tower}"
    if blocks < 0:
        raise UserError(f"{where}.blocks is {blocks}: give the last blocks to be left free, 0 or more")
    if blocks and head is False:
        raise UserError(f"{where}.head=false freezes what follows {blocks} free blocks: leave it out, or blocks=0")
    named = dict(clip.net.named_parameters())
    own = {name: place for name, place in places(named).items() if place.tower == tower}
    there = len({place.depth for place in own.values() if place.part == "block"})
    known = there and any(place.part == "embeddings" for place in own.values())
    if (blocks or head) and not known:
        raise UserError(f"{where}: the blocks of this {tower} tower are not known: freeze it whole, blocks=0 head=null")
    if blocks > there:
        raise UserError(f"{where}.blocks is {blocks}, but the {tower} tower has {there}: give 0 to {there}")
    free = blocks if blocks or head else -1
    for name, place in own.items():
        if place.depth > free:
            named[name].requires_grad_(False)
    hold(clip)
    locked = {**clip.description.get("locked", {}), tower: {"blocks": blocks, "head": head}}
    clip.description = {**clip.description, "locked": locked}  # a run is resumed with the same parts free, or refused
    return clip


def hold(clip: Clip) -> None:
    """Keep in eval mode whatever of `clip` is frozen now: no dropout within, no batch norm that moves."""
    clip.still = list(_frozen(clip.net))
    clip.train(clip.training)


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that hold parameters, frozen ones alone."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from _frozen(child)
