"""The arithmetic that a machine does best: bfloat16 autocast where the GPU has it, float32 elsewhere."""

from __future__ import annotations

from typing import Literal

import torch


def best_precision() -> Literal["bf16-mixed", "32-true"]:
    """Lightning's `precision`. float16 is not chosen on older GPUs: contrastive logits overflow it too easily."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if bf16 else "32-true"
