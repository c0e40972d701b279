"""What sees the image for a VQA model: a CLIP, a ViT, MEVF's two small nets, or several side by side.

Each is a module `Batch -> objects (b, v, dim)`: one object (v = 1) for the whole image, or one for each place
(`tokens`). With the denoising auto-encoder, while it is trained, the mean squared error of what it draws comes along,
(b,). As in PubMedCLIP (arXiv:2112.13906) and MEVF (arXiv:1909.11867) their features are laid side by side: 512 + 64 =
576 with a ViT-B/32, 1088 with an RN50, 704 with an RN50x4, and 128 for MAML and auto-encoder.

All take `batch["image"]` as the data module makes it for the first one that says how (`preprocess`). What is `frozen`
stays as it is, in evaluation mode, and its features are remembered (see `remembered`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm.models.vision_transformer
import torch
from jaxtyping import Float
from timm.layers import get_act_layer
from torch import Tensor, nn

from medclip.models.attention import choose_path
from medclip.models.build import build_clip
from medclip.models.clip import Clip
from medclip.models.dae import CODE, Dae, load_dae, squared_error
from medclip.models.encoder import DECODER, read_vit, refuse_unlike
from medclip.models.eye import Eye, Seen
from medclip.models.grey import Grey
from medclip.models.load import load_clip
from medclip.models.maml import SIZE as MAML_SIZE
from medclip.models.maml import WIDTH, MamlNet, load_maml
from medclip.models.parts import rebuild
from medclip.models.pixels import IMAGENET, Pixels
from medclip.models.tokens import freeze_unused, place_tokens, trunk_tokens
from medclip.models.vit import VitShape
from medclip.types import Batch, Preprocess, UserError


class ClipImages(Eye):
    """The image tower of a CLIP: its features before they are made unit-norm, or its patch tokens.

    Args:
        clip: its text tower is given up.
        frozen: see `Eye`, as is `remember`.
        tokens: an object for each place, as wide as the tower, instead of one for the image.
        remember: GB.
    """

    def __init__(self, clip: Clip, *, frozen: bool = False, tokens: bool = False, remember: float = 1.0) -> None:
        super().__init__(frozen=frozen, remember=remember)
        self._about = {k: v for k, v in clip.description.items() if k not in ("lora", "locked")}
        self.tokens = tokens
        self.preprocess = clip.preprocess
        self.pixels = Pixels(clip.preprocess)
        self.net: nn.Module = clip.net.visual
        self.memory_format = clip.memory_format
        self._settle()
        height, width = clip.preprocess.size
        self.eval()  # a batch norm would count the blank
        blank = torch.zeros(1, 3, height, width, device=clip.device)
        with torch.set_grad_enabled(tokens and not frozen):
            found = self.see({"image": blank})
        if tokens and not frozen:
            freeze_unused(list(self.net.parameters()), found)
        self.dim = found.shape[-1]
        self.train()

    @property
    def description(self) -> dict[str, Any]:
        return {**super().description, "clip": self._about, "tokens": self.tokens}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> ClipImages:
        options = dict(fields)
        return cls(build_clip(options.pop("clip")), **options)

    def see(self, batch: Batch) -> Float[Tensor, "b v dim"]:
        kind = next(self.net.parameters()).dtype
        image = self.pixels.normalise_image(batch).to(kind, memory_format=self.memory_format)
        return place_tokens(self.net, image) if self.tokens else self.net(image).unsqueeze(1)


class VitImages(Eye):
    """A ViT of a masked autoencoder or a classifier: the mean of its patches, as it is fine-tuned, or the patches.

    Args:
        shape: of the ViT.
        fed: how its images are made.
        own_norm: the norm is a classifier's, of the mean; else an autoencoder's, of each token.
        frozen: see `Eye`, as is `remember`.
        tokens: an object for each patch.
        remember: GB.
    """

    def __init__(
        self,
        shape: VitShape,
        fed: Preprocess,
        *,
        own_norm: bool,
        frozen: bool = False,
        tokens: bool = False,
        remember: float = 1.0,
    ) -> None:
        super().__init__(frozen=frozen, remember=remember)
        self.shape, self.own_norm, self.tokens = shape, own_norm, tokens
        self.fed = self.preprocess = fed
        self.pixels = Pixels(fed)
        self.net = timm.models.vision_transformer.VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            num_classes=0,
            global_pool="avg",
            fc_norm=own_norm,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            pre_norm=shape.pre_norm,
            norm_layer=partial(nn.LayerNorm, eps=shape.eps),  # pyright: ignore[reportArgumentType]
            act_layer=get_act_layer("quick_gelu" if shape.quick_gelu else "gelu"),
        )
        self.dim = shape.dim
        self._settle()

    @property
    def description(self) -> dict[str, Any]:
        about = {"shape": asdict(self.shape), "preprocess_cfg": self.fed.as_dict()}
        return {**super().description, **about, "own_norm": self.own_norm, "tokens": self.tokens}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> VitImages:
        options = dict(fields)
        shape, fed = VitShape(**options.pop("shape")), Preprocess.from_dict(options.pop("preprocess_cfg"))
        return cls(shape, fed, **options)

    def see(self, batch: Batch) -> Float[Tensor, "b v dim"]:
        image = self.pixels.normalise_image(batch)
        choose_path(self.net, image)
        if self.tokens:
            return self.net.fc_norm(trunk_tokens(self.net, image))
        return self.net(image).unsqueeze(1)


class MamlImages(Eye):
    """The meta-learned net on a grey picture of 84 x 84 pixels; 64 numbers.

    Args:
        frozen: see `Eye`, as is `remember`.
        remember: GB.
    """

    dim = WIDTH

    def __init__(self, *, frozen: bool = False, remember: float = 1.0) -> None:
        super().__init__(frozen=frozen, remember=remember)
        self.grey = Grey(MAML_SIZE)
        self.net = MamlNet()
        self._settle()

    def see(self, batch: Batch) -> Float[Tensor, "b 1 64"]:
        return self.net(self.grey(batch)).unsqueeze(1)


class DaeImages(Eye):
    """The denoising auto-encoder's code of a grey picture of 128 x 128 pixels, made 64 numbers by a linear layer.

    The layer is trained in any case. While the auto-encoder is trained too, it draws the picture (without noise, as
    published), and the mean squared error of it comes along.

    Args:
        frozen: the auto-encoder stays as it is, and its codes are remembered.
        remember: GB.
    """

    dim = 64

    def __init__(self, *, frozen: bool = False, remember: float = 1.0) -> None:
        super().__init__(frozen=frozen, remember=remember)
        self.net = Dae()
        self._settle()
        self.convert = nn.Linear(CODE, self.dim)

    def see(self, batch: Batch) -> Float[Tensor, "b 1 code"]:
        return self.net.encode(self.net.grey(batch)).flatten(1).unsqueeze(1)

    def forward(self, batch: Batch) -> Seen:
        if self.frozen:
            code = self.seen(batch)
            return self.convert(code), torch.zeros(len(code), device=code.device)
        grey = self.net.grey(batch)
        code = self.net.encode(grey)
        return self.convert(code.flatten(1).unsqueeze(1)), squared_error(self.net.decode(code), grey)


class Joined(nn.Module):
    """Several side by side; what has one object for the image gives it to each place of the others.

    Args:
        parts: in the order of their features.

    Raises:
        UserError: parts that want other images, or have other numbers of places.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not parts:
            raise UserError("model.visual.parts is empty: name what sees the image")
        self.parts = nn.ModuleList(parts)
        each: list[Any] = list(parts)
        self.dim = sum(part.dim for part in each)
        wanted = [part.preprocess for part in each if part.preprocess is not None]
        if any(one != wanted[0] for one in wanted):
            raise UserError("model.visual.parts want different images (size, mean or std): join what wants the same")
        self.preprocess: Preprocess | None = wanted[0] if wanted else None

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `from_description` makes it again, without its weights."""
        each: list[Any] = list(self.parts)
        return {"part": "models.visual.Joined", "parts": [part.description for part in each]}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> Joined:
        return cls([rebuild(part) for part in fields["parts"]])

    def forward(self, batch: Batch) -> Float[Tensor, "b v dim"] | Seen:
        seen = [part(batch) for part in self.parts]
        drawn = [one[1] for one in seen if isinstance(one, tuple)]
        objects = [one[0] if isinstance(one, tuple) else one for one in seen]
        most = max(one.shape[1] for one in objects)
        if any(one.shape[1] not in (1, most) for one in objects):
            raise UserError(
                f"model.visual.parts have {' and '.join(str(one.shape[1]) for one in objects)} objects an image: join "
                "what has as many, or one"
            )
        joined = torch.cat([one.expand(-1, most, -1) for one in objects], 2)
        return (joined, torch.stack(drawn).sum(0)) if drawn else joined


def clip_images(
    pretrained: str | None = None,
    architecture: str | Mapping[str, Any] | None = None,
    *,
    frozen: bool = False,
    tokens: bool = False,
    remember: float = 1.0,
    **options: Any,
) -> ClipImages:
    """The image tower of any CLIP that `load_clip` loads.

    Args:
        pretrained: see `load_clip`, as are `architecture` and the other options.
        architecture: see there.
        frozen: see `ClipImages`, as are `tokens` and `remember`.
        tokens: see there.
        remember: GB.
        **options: of `load_clip`.

    Raises:
        UserError: see `load_clip`; a tower without patch tokens, where these are asked for.
    """
    clip = load_clip(architecture, pretrained, **options)
    return ClipImages(clip, frozen=frozen, tokens=tokens, remember=remember)


def vit_images(
    pretrained: str,
    *,
    heads: int | None = None,
    frozen: bool = False,
    tokens: bool = False,
    remember: float = 1.0,
) -> VitImages:
    """The ViT of a masked autoencoder or a classifier.

    Args:
        pretrained: a checkpoint of `medclip train` (experiment=mae_cxr, thorax), or a file of MAE's keys.
        heads: of a file that does not say; None: one for 64 numbers.
        frozen: see `VitImages`, as are `tokens` and `remember`.
        tokens: see there.
        remember: GB.

    Raises:
        UserError: weights that cannot be read, or are of something else.
    """
    found = read_vit(Path(pretrained).expanduser())
    if found is None:
        raise UserError(
            f"model.visual.pretrained={pretrained} is no ViT with timm's names: give a run of experiment=mae_cxr or "
            "thorax, a file of MAE's, or a CLIP with model/visual=clip"
        )
    state = {key: value for key, value in found.state.items() if not key.startswith(("head.", *DECODER))}
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError) as error:
        raise UserError(f"{pretrained} holds no ViT with positions of a square grid ({error!r})") from error
    shape = VitShape(
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        heads=heads or found.heads or max(1, dim // 64),
        pre_norm="norm_pre.weight" in state,
        quick_gelu=found.quick_gelu,
        eps=found.eps,
    )
    fed = found.preprocess or Preprocess.from_dict(IMAGENET)
    own_norm = "fc_norm.weight" in state
    eye = VitImages(
        shape,
        Preprocess.from_dict(fed.as_dict() | {"size": shape.image_size}),
        own_norm=own_norm,
        frozen=frozen,
        tokens=tokens,
        remember=remember,
    )
    if own_norm:  # a classifier fine-tuned from an autoencoder has no norm of tokens
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    refuse_unlike(eye.net.state_dict(), state, pretrained)
    eye.net.load_state_dict(state)
    return eye


def maml_images(pretrained: str | None = None, *, frozen: bool = False, remember: float = 1.0) -> MamlImages:
    """The meta-learned net.

    Args:
        pretrained: a checkpoint of experiment=medvqa_maml; None: random weights.
        frozen: see `MamlImages`, as is `remember`.
        remember: GB.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    eye = MamlImages(frozen=frozen, remember=remember)
    if pretrained is not None:
        load_maml(eye.net, pretrained)
    return eye


def dae_images(pretrained: str | None = None, *, frozen: bool = False, remember: float = 1.0) -> DaeImages:
    """The denoising auto-encoder.

    Args:
        pretrained: a checkpoint of experiment=medvqa_dae, or a file with the published names; None: random weights.
        frozen: see `DaeImages`, as is `remember`.
        remember: GB.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    eye = DaeImages(frozen=frozen, remember=remember)
    if pretrained is not None:
        load_dae(eye.net, pretrained)
    return eye
