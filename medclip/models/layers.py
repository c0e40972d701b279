"""Which layer of which tower a parameter of a CLIP belongs to, by its name: what locking and layer-wise rates go by.

Names are those of open_clip's ViT, ResNet and text transformer, of timm's towers inside it (ViT, EVA, ViTamin,
ConvNeXt, ResNet, FastViT, Swin) and of Hugging Face encoders (BERT, RoBERTa, DistilBERT, T5, ModernBERT). A tower is
its embeddings, its blocks, and its head: whatever follows the blocks, the projection too. Blocks in stages count on;
what stands before a stage's first block (downsampling) belongs to that block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

Tower = Literal["image", "text"]
Part = Literal["embeddings", "block", "head"]


class Place(NamedTuple):
    """Where a parameter lies in its tower.

    `depth` counts from the output: it is 0 in the head, 1 in the last block, L in the first of L blocks, L + 1 in the
    embeddings. Parameters of neither tower (logit scale and bias) have no tower and depth 0.
    """

    tower: Tower | None
    part: Part
    depth: int


_OWNER = re.compile(r"^(?:.*?\.)??net\.")  # what holds open_clip's model: `model.net.` in a task
_TOWERS: tuple[tuple[re.Pattern[str], Tower], ...] = (
    (re.compile(r"^visual\.(?:trunk\.)?"), "image"),
    (re.compile(r"^text\.(?:transformer\.)?(?:encoder\.)?"), "text"),
    (re.compile(r"^(?=transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection)"), "text"),
)
_EMBEDDINGS = re.compile(
    r"^(?:conv[123]|bn[123]|conv_stem|stem|patch_embed|class_embedding|cls_token|reg_token|cls_emb|pos_embed|"
    r"positional_embedding|token_embedding|ln_pre|norm_pre|embeddings|embed_tokens|shared|rel_pos_bias|"
    r"rel_embeddings|relative_attention_bias)(?:\.|$)"
)
_BLOCK = re.compile(r"(?:^|\.)(?:stages|layers|blocks|resblocks|block|layer)\.?(\d+)\.(?:(?:blocks\.)?(\d+)\.)?")
_HEAD = (1 << 30, 0)
_FIRST = (-1, 0)


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where each of a CLIP's parameters lies; frozen ones may be left out of `names`, from the embeddings up."""
    found = {name: _key(name) for name in names}
    order = {tower: _blocks(key for own, key in found.values() if own == tower) for tower in ("image", "text")}
    return {name: _place(tower, key, order[tower] if tower else []) for name, (tower, key) in found.items()}


def _key(name: str) -> tuple[Tower | None, tuple[int, int]]:
    """Tower and (stage, block), or the first or last key there can be."""
    name = _OWNER.sub("", name)
    for pattern, tower in _TOWERS:
        if start := pattern.match(name):
            rest = name[start.end() :]
            if _EMBEDDINGS.match(rest):
                return tower, _FIRST
            block = _BLOCK.search(rest)
            return tower, (int(block[1]), int(block[2] or 0)) if block else _HEAD
    return None, _HEAD


def _blocks(keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """All blocks of a tower in order, from the first that is named on."""
    last: dict[int, int] = {}
    for stage, block in keys:
        if (stage, block) not in (_FIRST, _HEAD):
            last[stage] = max(block, last.get(stage, 0))
    stages = range(min(last, default=0), max(last, default=-1) + 1)
    return [(stage, block) for stage in stages for block in range(last.get(stage, 0) + 1)]


def _place(tower: Tower | None, key: tuple[int, int], blocks: list[tuple[int, int]]) -> Place:
    if key == _HEAD:
        return Place(tower, "head", 0)
    if key == _FIRST:
        return Place(tower, "embeddings", len(blocks) + 1)
    return Place(tower, "block", len(blocks) - blocks.index(key))
