"""Weights from files that nobody vouches for, fitted to a model: tensors only, and every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn

from medclip.types import UserError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of weights holds, on the CPU. Pickles are read with `weights_only`: no code in them can run.

    Raises:
        UserError: not a file of weights, damaged, or holding more than tensors and plain values.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of weights: expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        # A Lightning checkpoint is mostly optimizer state, which mmap leaves on the disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=path.suffix == ".ckpt")
    except Exception as error:  # the parsers of torch and safetensors raise almost anything on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read weights from {path}: it is damaged, or holds more than tensors, which is refused; "
            f"get it again or save it as .safetensors ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    return content


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of weights; open_clip's training checkpoints (`state_dict`, `module.`) are unwrapped."""
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds no plain state dict: `{strange[0]}` is no tensor")
    return state


def load_state(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into an open_clip model, with the same conversions as open_clip's `load_checkpoint`.

    Older layouts are converted and positional embeddings resized to the model's image size and context length; then
    every key must fit.

    Raises:
        UserError: keys are missing, left over or of another shape; the first few are named.
    """
    state = convert_state_dict(net, dict(state))  # type: ignore[arg-type]
    if "positional_embedding" in state and not hasattr(net, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = net.state_dict()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in own:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    if "logit_bias" in own and "logit_bias" not in state:  # CLIP weights for SigLIP training, open_clip issue 712
        state["logit_bias"] = torch.zeros_like(own["logit_bias"])
    if "text.transformer.embeddings.position_ids" not in own:  # saved by transformers < 4.31
        state.pop("text.transformer.embeddings.position_ids", None)
    try:
        resize_pos_embed(state, net)
        resize_text_pos_embed(state, net)
    except (AttributeError, AssertionError, RuntimeError, IndexError) as error:
        raise UserError(f"weights of {where} do not fit the model: positional embedding ({error})") from error
    wrong = [f"lacks {key}" for key in own if key not in state]
    wrong += [f"has a surplus {key}" for key in state if key not in own]
    wrong += [
        f"has {key} of {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"weights do not fit the model: {where} {', '.join(wrong[:4])}{more}: give the architecture of it"
        )
    net.load_state_dict(state)
