"""`torch.compile` on both towers, in place: names in the state dict stay as they are."""

from __future__ import annotations

from open_clip import CustomTextCLIP

from medclip.models.clip import Clip
from medclip.models.tokenizer import first_line
from medclip.types import UserError


def compile(clip: Clip, mode: str | None = None, dynamic: bool | None = None, backend: str = "inductor") -> Clip:
    """Compile the image tower and the text tower's transformer at their first call.

    Args:
        clip: its towers, not its `forward`, are compiled: whoever calls `encode_image` or `encode_text` gains too.
        mode: torch's: "default", "reduce-overhead", "max-autotune" and others.
        dynamic: torch's: whether sizes may change without compiling anew; None: once they have.
        backend: torch's; "eager" traces without compiling, to find what breaks the graph.

    Raises:
        UserError: torch knows no such mode or backend.
    """
    text = clip.net.text if isinstance(clip.net, CustomTextCLIP) else clip.net.transformer
    for tower in (clip.net.visual, text):
        try:
            tower.compile(mode=mode, dynamic=dynamic, backend=backend)
        except RuntimeError as error:
            raise UserError(f"adapt.compile: {first_line(error)}") from error
    return clip
