"""Masked autoencoder: a ViT sees a few patches of an image, a small decoder draws the others.

He et al. 2022, arXiv:2111.06377; for chest X-rays Xiao et al. 2023, arXiv:2210.12843 (mask 0.90, decoder of depth 2).
The parameters have the names and shapes of the published weights, which load strictly.

What is computed is the paper's to rounding, and less of it:

- patches are cut out before they are embedded, so that only the visible ones are;
- the decoder needs no order, since positions are added to its tokens: nothing is shuffled back;
- at the decoder's entry a mask token is the same in every sample but for its position, so that its first norm and its
  first query, key and value are computed once a batch;
- the decoder's last block attends from, and its head draws, masked patches only: the loss has no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medclip.models.attention import attend
from medclip.models.encoder import DECODER, read_vit, refuse_unlike
from medclip.models.pixels import IMAGENET, Pixels
from medclip.models.positions import sincos_positions
from medclip.types import Batch, Preprocess, UserError


@dataclass(frozen=True)
class MaeShape:
    """All that a masked autoencoder is but its weights; images and patches in pixels, MLPs 4 x as wide as tokens."""

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        for name in ("", "decoder_"):
            dim, heads = getattr(self, f"{name}dim"), getattr(self, f"{name}heads")
            if dim % heads or dim % 4:
                raise UserError(f"{name}dim={dim} must be a multiple of 4 and of {name}heads={heads}")
        if self.decoder_depth < 1 or self.depth < 1:
            raise UserError("depth and decoder_depth must be 1 or more")
        if not 0 < self.kept < self.patches:
            raise UserError(
                f"mask_ratio={self.mask_ratio} keeps {self.kept} of {self.patches} patches: at least one must be kept, "
                "and one masked"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        """Patches that the encoder sees: 19 of 196 for 0.90, rounded down as published code does."""
        return int(self.patches * (1 - self.mask_ratio))


class MaeOutput(NamedTuple):
    """Masked patches, drawn and true, in the same order; pixels normalised, (row, column, colour) within a patch.

    `mask` (1 where masked) and `ids` (the patches kept, then those masked) say which they are.
    """

    prediction: Float[Tensor, "b m pixels"]
    target: Float[Tensor, "b m pixels"]
    mask: Float[Tensor, "b patches"]
    ids: Int64[Tensor, "b patches"]


class Drawings(NamedTuple):
    """Pictures for people, on a 0..1 scale: the image, what was seen of it, all that was drawn, and both as one."""

    original: Float[Tensor, "b 3 h w"]
    seen: Float[Tensor, "b 3 h w"]
    drawn: Float[Tensor, "b 3 h w"]
    pasted: Float[Tensor, "b 3 h w"]


class Mae(nn.Module):
    """`Batch` -> `MaeOutput`.

    Args:
        shape: sizes of encoder and decoder, and the share of patches that is masked.
        preprocess: how its images are made.
    """

    tokenizer = None

    def __init__(self, shape: MaeShape, preprocess: Preprocess) -> None:
        super().__init__()
        self.shape = shape
        self.preprocess = preprocess
        self.pixels = Pixels(preprocess)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        dim, small = shape.dim, shape.decoder_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, shape.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(shape.image_size, shape.patch_size, 3, dim)
        self.blocks = nn.ModuleList(Block(dim, shape.heads, qkv_bias=True, norm_layer=norm) for _ in range(shape.depth))
        self.norm = norm(dim)
        self.decoder_embed = nn.Linear(dim, small)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, small))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(small, shape.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(small, shape.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = norm(small)
        self.decoder_pred = nn.Linear(small, shape.patch_size**2 * 3)
        self._initialise()

    def _initialise(self) -> None:
        """As published: Xavier for all that is linear, the patch embedding too; tokens normal with std 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `mae_from` makes this model again, without its weights."""
        return {"kind": "mae", "shape": asdict(self.shape), "preprocess_cfg": self.preprocess.as_dict()}

    def forward(
        self, batch: Batch, noise: Float[Tensor, "b patches"] | None = None, *, draw_all: bool = False
    ) -> MaeOutput:
        """Mask, encode, draw.

        Args:
            batch: `image` uint8 or float (b, 3, h, w); `mean` and `std` (b, 3) where its data sets have their own.
            noise: in each sample the patches with the smallest values are kept; random if None.
            draw_all: draw the visible patches too (which no loss has taught it): `prediction` is then (b, patches,
                pixels) in the order of `ids`.
        """
        patches = patchify(batch["image"], self.shape.patch_size)  # pyright: ignore[reportTypedDictNotRequiredAccess]
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=patches.device)
        ids = noise.argsort(dim=1)
        kept, masked = ids[:, : self.shape.kept], ids[:, self.shape.kept :]
        latent = self.encode_patches(self._normalise(take(patches, kept), batch), kept)
        mask = torch.zeros(noise.shape, device=noise.device).scatter_(1, masked, 1.0)
        return MaeOutput(
            self._decode(latent, kept, masked, draw_all), self._normalise(take(patches, masked), batch), mask, ids
        )

    def encode(self, batch: Batch) -> Float[Tensor, "b tokens dim"]:
        """Class token and all patches of whole images, after the last norm."""
        patches = patchify(batch["image"], self.shape.patch_size)  # pyright: ignore[reportTypedDictNotRequiredAccess]
        # `len` would make the batch a constant of an exported graph.
        everything = torch.arange(self.shape.patches, device=patches.device).expand(patches.shape[0], -1)
        return self.encode_patches(self._normalise(patches, batch), everything)

    def encode_patches(
        self, pixels: Float[Tensor, "b k pixels"], ids: Int64[Tensor, "b k"]
    ) -> Float[Tensor, "b k+1 dim"]:
        """Class token and the given patches, which lie at `ids`, after the last norm."""
        kernel = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # as the pixels of a patch are ordered
        tokens = F.linear(pixels, kernel, self.patch_embed.proj.bias)
        tokens = tokens + F.embedding(ids, self.pos_embed[0, 1:])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([first, tokens], dim=1)
        for block in self.blocks:
            x = run_block(block, x)
        return self.norm(x)

    def _decode(self, latent: Tensor, kept: Tensor, masked: Tensor, draw_all: bool) -> Float[Tensor, "b m pixels"]:
        positions = self.decoder_pos_embed[0]
        seen = self.decoder_embed(latent)
        seen = seen + F.embedding(F.pad(kept + 1, (1, 0)), positions)
        blank = self.mask_token[0] + positions[1:]  # (patches, dim): what a mask token is at each place
        block: Any = self.decoder_blocks[0]
        qkv = [block.attn.qkv(block.norm1(x)) for x in (seen, blank)]
        x = torch.cat([seen, F.embedding(masked, blank).to(seen.dtype)], dim=1)
        qkv = torch.cat([qkv[0], F.embedding(masked, qkv[1])], dim=1)
        for block in self.decoder_blocks:
            last = block is self.decoder_blocks[-1]
            x = run_block(block, x, qkv, skip=0 if not last else 1 if draw_all else latent.shape[1])
            qkv = None
        return self.decoder_pred(self.decoder_norm(x))

    def _normalise(self, pixels: Tensor, batch: Batch) -> Tensor:
        return self.pixels.normalise(pixels.unflatten(-1, (-1, 3)), batch).flatten(-2)

    @torch.no_grad()
    def draw(self, batch: Batch, noise: Tensor | None = None, *, normalised: bool = False) -> Drawings:
        """Reconstructions as pictures.

        Args:
            batch: as for `forward`.
            noise: as for `forward`.
            normalised: the model was trained with pixels normalised patch by patch (`MaeLoss.normalise`): each patch
                gets the true one's mean and spread back.
        """
        p = self.shape.patch_size
        out = self(batch, noise, draw_all=True)
        place = out.ids.argsort(dim=1)
        image = batch["image"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        truth = self._normalise(patchify(image, p), batch)
        drawn = take(out.prediction.float(), place)
        if normalised:
            drawn = drawn * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
        hidden = out.mask[..., None]
        mean, std = (x.view(-1, 3, 1, 1) for x in self.pixels.statistics(batch))

        def picture(patches: Tensor) -> Tensor:
            return (unpatchify(patches, p, self.shape.grid) * std + mean).clamp(0, 1)

        grey = torch.zeros_like(truth)  # the mean of the data
        return Drawings(
            picture(truth),
            picture(torch.where(hidden > 0, grey, truth)),
            picture(drawn),
            picture(torch.where(hidden > 0, drawn, truth)),
        )


def run_block(block: Any, x: Float[Tensor, "b n d"], qkv: Tensor | None = None, skip: int = 0) -> Tensor:
    """timm's pre-norm `Block`, (b, n, d) -> (b, n - skip, d).

    Args:
        block: without dropout, drop path or layer scale.
        x: tokens.
        qkv: (b, n, 3 d) where the caller has them already.
        skip: leading tokens that are attended to but not computed further.
    """
    qkv = block.attn.qkv(block.norm1(x)) if qkv is None else qkv
    assert qkv is not None
    q, k, v = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = attend(q[:, :, skip:], k, v).transpose(1, 2).flatten(2)
    x = x[:, skip:] + block.attn.proj(attended)
    return x + block.mlp(block.norm2(x))


def patchify(image: Shaped[Tensor, "b 3 h w"], size: int) -> Shaped[Tensor, "b patches pixels"]:
    """Patches row by row; within one, pixels row by row with the colours together: (row, column, colour)."""
    b, c, h, w = image.shape
    grid = image.view(b, c, h // size, size, w // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches: Shaped[Tensor, "b patches pixels"], size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (b, 3, rows * size, columns * size)."""
    image = patches.view(len(patches), *grid, size, size, 3).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(patches), 3, grid[0] * size, grid[1] * size)


def take(rows: Shaped[Tensor, "b n d"], ids: Int64[Tensor, "b m"]) -> Shaped[Tensor, "b m d"]:
    """`rows[i, ids[i]]` for each sample i."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[-1]))


def build_mae(*, pretrained: str | None = None, preprocess: Mapping[str, Any] | None = None, **shape: Any) -> Mae:
    """A masked autoencoder, random or with published weights.

    Args:
        pretrained: a checkpoint of `medclip train`, or a file with the original's keys (`{"model": …}`, as MAE's and
            Medical MAE's are), which must fit exactly. One without any decoder initialises the encoder alone.
        preprocess: `mean` and `std`, on a 0..1 scale; ImageNet's by default, as in both papers.
        **shape: see `MaeShape`.

    Raises:
        UserError: sizes that do not go together, or weights that cannot be read or do not fit.
    """
    if unknown := set(shape) - {field.name for field in fields(MaeShape)}:
        raise UserError(f"model.{min(unknown)} is unknown: there are {[field.name for field in fields(MaeShape)]}")
    made = MaeShape(**shape)
    fed = Preprocess.from_dict(IMAGENET | dict(preprocess or {}) | {"size": made.image_size})
    model = Mae(made, fed)
    if pretrained is not None:
        load_mae(model, Path(pretrained).expanduser())
    return model


def mae_from(description: Mapping[str, Any]) -> Mae:
    """The described model (`Mae.description`) with random weights."""
    return Mae(MaeShape(**description["shape"]), Preprocess.from_dict(description["preprocess_cfg"]))


def load_mae(model: Mae, path: Path) -> None:
    """Load published or own weights: all of them, or an encoder alone.

    Raises:
        UserError: unreadable weights, missing or surplus keys, or other shapes.
    """
    found = read_vit(path)
    if found is None:
        raise UserError(f"{path} holds no masked autoencoder: expected keys as patch_embed.proj.weight")
    state = found.state
    own = model.state_dict()
    if not any(key.startswith(DECODER) for key in state):
        own = {key: value for key, value in own.items() if not key.startswith(DECODER)}
    refuse_unlike(own, state, str(path))
    model.load_state_dict(state, strict=False)


def save_mae(model: Mae, path: Path, *, encoder_only: bool = False) -> None:
    """Write `{"model": state}` with the original's keys, as its own code and Medical MAE's read it."""
    state = {key: value for key, value in model.state_dict().items() if not (encoder_only and key.startswith(DECODER))}
    torch.save({"model": state}, path)
