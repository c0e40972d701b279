"""Image towers as encoders of slide patches: uint8 arrays in, features out, preprocessing on the model's device.

What `slides.features` calls: any CLIP that `load_clip` loads (features of the joint space, unit norm, so that texts can
be compared with them later), or any timm model (pooled features before its classifier, as the model gives them).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from medclip.models.load import load_clip
from medclip.models.weights import SUFFIXES, read_state
from medclip.types import Preprocess, UserError

_MODES = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
Precision = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PatchEncoder:
    """A model as `slides.features.Encoder`.

    Args:
        name: of the folder that its features go to.
        model: in evaluation mode, on its device.
        features: normalised images (b, 3, h, w) to features (b, d).
        preprocess: of the model's images.
        crop: share of the resized patch that the model sees (timm's crop_pct).
        precision: of the activations; auto: bf16 on a GPU, fp32 on a CPU.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        features: Callable[[Tensor], Tensor],
        preprocess: Preprocess,
        *,
        crop: float = 1.0,
        precision: Precision = "auto",
    ) -> None:
        if precision not in ("auto", "fp32", *_TYPES):
            raise UserError(f"precision={precision} is unknown: one of auto, fp32, bf16, fp16")
        self.name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "encoder"
        self.model, self.features, self.preprocess, self.crop = (
            model.eval().requires_grad_(False),
            features,
            preprocess,
            crop,
        )
        self.device = next(model.parameters()).device
        wanted = ("bf16" if self.device.type == "cuda" else "fp32") if precision == "auto" else precision
        self.type = _TYPES.get(wanted)
        self._mean = torch.tensor(preprocess.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(preprocess.std, device=self.device).view(1, 3, 1, 1) * 255

    @torch.inference_mode()
    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """uint8 (b, s, s, 3) to float32 (b, d)."""
        pixels = torch.from_numpy(patches)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        images = self.fit(pixels.permute(0, 3, 1, 2))
        images = (images.float() - self._mean) / self._std
        with torch.autocast(self.device.type, self.type or torch.bfloat16, enabled=self.type is not None):
            features = self.features(images)
        return features.float().cpu().numpy()

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights: two models of one name must not share a folder of features."""
        return fingerprint(self.model, self.preprocess, self.crop)

    def fit(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, s, s) to uint8 (b, 3, h, w): resized with antialiasing as Pillow does, then the middle of it."""
        height, width = self.preprocess.size
        if self.preprocess.resize_mode == "squash" and self.crop == 1:
            target = [height, width]
        else:
            pick = min if self.preprocess.resize_mode == "longest" else max
            side = math.floor(pick(height, width) / self.crop)  # as timm rounds
            target = [side, side]
        if list(images.shape[-2:]) != target:
            images = transforms.resize(images, target, _MODES[self.preprocess.interpolation], antialias=True)
        if list(images.shape[-2:]) != [height, width]:
            images = transforms.center_crop(images, [height, width])
        return images


def fingerprint(model: nn.Module, preprocess: Preprocess, crop: float = 1.0) -> str:
    """16 hexadecimal digits that change with a model's weights, and with how its images are made.

    Features carry it (attribute `weights`), so that texts are compared with features of their own model alone.

    Args:
        model: whose `state_dict` counts.
        preprocess: of its images.
        crop: see `PatchEncoder`.
    """
    found = hashlib.blake2b(repr((preprocess, crop)).encode(), digest_size=8)
    for key, value in model.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def clip_encoder(
    checkpoint: str,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "auto",
    **options: Any,
) -> PatchEncoder:
    """The image tower of a CLIP; features are unit-norm and live in the space of its texts.

    Args:
        checkpoint: what `load_clip` takes as `pretrained`: our checkpoint, an open_clip folder, hf-hub:org/name; a tag
            together with `architecture`.
        name: of the features; by default the checkpoint's folder or file.
        device: to run on.
        precision: see `PatchEncoder`.
        **options: of `load_clip`.

    Raises:
        UserError: see `load_clip`.
    """
    clip = load_clip(pretrained=checkpoint, device=device, **options).eval()
    return PatchEncoder(name or short_name(checkpoint), clip, clip.encode_image, clip.preprocess, precision=precision)


def timm_encoder(
    model: str,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    name: str | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "auto",
    **options: Any,
) -> PatchEncoder:
    """A timm model without its classifier, with its own preprocessing.

    Args:
        model: timm's name, e.g. `vit_small_patch16_224` or `hf-hub:org/name`.
        pretrained: download timm's weights.
        weights: a file of weights (.safetensors, .pt, .bin, .pth; loaded without pickle's code) instead.
        name: of the features; by default the model's.
        device: to run on.
        precision: see `PatchEncoder`.
        **options: of `timm.create_model`.

    Raises:
        UserError: timm knows no such model, or the weights do not fit.
    """
    try:
        net = timm.create_model(model, pretrained=pretrained and weights is None, num_classes=0, **options)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"timm cannot make {model} ({' '.join(str(error).split())[:200]})") from error
    if weights is not None:
        _load(net, weights)
    config = resolve_model_data_config(net)
    _, height, width = config["input_size"]
    preprocess = Preprocess(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
    net = net.to(device)
    return PatchEncoder(
        name or model.rpartition("/")[2], net, net, preprocess, crop=float(config["crop_pct"]), precision=precision
    )


def _load(net: nn.Module, weights: str) -> None:
    """Weights of a file, whose classifier is not wanted."""
    state, own = read_state(Path(weights).expanduser()), net.state_dict()
    if missing := [key for key in own if key not in state]:
        raise UserError(
            f"{weights} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}: is it another model's?"
        )
    if unlike := [key for key in own if own[key].shape != state[key].shape]:
        key = unlike[0]
        shapes = f"{tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        raise UserError(f"{weights}: {key} is {shapes}: is it another model's, or of another image size?")
    net.load_state_dict({key: state[key] for key in own})


def short_name(checkpoint: str) -> str:
    """`runs/mine/checkpoints/last.ckpt` to mine-last; a folder or repository to its last part."""
    path = Path(checkpoint.partition(":")[2] or checkpoint)
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem if path.suffix in SUFFIXES and not path.is_dir() else path.name
