"""The weights of a ViT from a file of MAE's, Medical MAE's or ours, in timm's names, which are the published ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from medclip.models.positions import fit_positions
from medclip.models.weights import read_checkpoint
from medclip.types import Preprocess, UserError

DECODER = ("mask_token", "decoder_")  # how the names of what only a masked autoencoder has begin


@dataclass(frozen=True)
class Weights:
    """A ViT's state dict with timm's names, and what else its source knows.

    `preprocess` and `heads` are None where the source does not say them; `quick_gelu` and `eps` (of the norms) are what
    the weights were trained with.
    """

    state: dict[str, Tensor]
    preprocess: Preprocess | None = None
    heads: int | None = None
    quick_gelu: bool = False
    eps: float = 1e-6

    def on_grid(self, grid: tuple[int, int], where: str) -> Weights:
        """The same for another (rows, columns) of patches, see `fit_positions`.

        Raises:
            UserError: this is no ViT with a class token and positions.
        """
        try:
            positions = fit_positions(self.state["pos_embed"], grid)
        except (KeyError, RuntimeError, AttributeError) as error:
            raise UserError(f"{where} holds no ViT with positions of a square grid ({error!r})") from error
        return replace(self, state=self.state | {"pos_embed": positions})


def read_vit(path: Path) -> Weights | None:
    """The ViT in a file: `{"model": state}` as MAE's, a bare state dict, or a checkpoint of ours (MAE or classifier).

    None where the file holds something else, a CLIP for one.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a checkpoint of `medclip train`, or a file of MAE weights")
    # MAE's code saves the Namespace of its command line beside the weights: a bag of names, which runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = read_checkpoint(path)
    about = content.get("medclip")
    if isinstance(about, Mapping):
        if about.get("kind") not in ("mae", "classifier"):
            return None
        prefix = "model." if about["kind"] == "mae" else "model.net."
        state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        fed = Preprocess.from_dict(about["preprocess_cfg"])
        shape = about["shape"]
        return Weights(state, fed, shape["heads"], shape.get("quick_gelu", False), shape.get("eps", 1e-6))
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, Mapping) or "patch_embed.proj.weight" not in (
        state := {str(key).removeprefix("module."): value for key, value in state.items()}
    ):
        return None
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds no plain state dict: `{strange[0]}` is no tensor")
    return Weights(state)


def refuse_unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a state dict whose keys or shapes are not those of `own`; the first few are named.

    Raises:
        UserError: keys are missing, left over, or of another shape.
    """
    wrong = [f"lacks {key}" for key in own if key not in state]
    wrong += [f"has a surplus {key}" for key in state if key not in own]
    wrong += [
        f"has {key} of {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"weights do not fit the model: {where} {', '.join(wrong[:4])}{more}: choose the sizes of it (model.dim, "
            "model.depth, model.patch_size, …)"
        )
