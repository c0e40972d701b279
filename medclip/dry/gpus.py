"""What GPUs can do at most, as their makers say: dense products (no sparsity), float32 accumulation.

Sources, all NVIDIA's: data sheets of V100, T4, A100, A10, L4, L40S, H100 and H200, and the architectures' white papers
(for H100 to the digit; for RTX 3090 and 4090 their appendices, whose rate with float32 accumulation is half of that
with float16). Where a data sheet gives the figure with sparsity, half of it stands here. Each is multiprocessors x
FLOPs a clock x boost clock (tests/test_dry_run.py). No training reaches these: multiply by a model FLOP utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medclip.types import UserError

Arithmetic = Literal["half", "tf32", "fp32"]


@dataclass(frozen=True)
class Gpu:
    """Peak TFLOP/s (`half` is bfloat16 where `bf16`, else float16; `tf32` is `fp32` where there is none) and GiB.

    Of the GDDR memory of servers' cards error correction takes a sixteenth; it is not in `memory`.
    """

    name: str
    memory: float
    half: float
    tf32: float
    fp32: float
    bf16: bool = True

    def peak(self, arithmetic: Arithmetic) -> float:
        """FLOP/s in matrix products."""
        return {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[arithmetic] * 1e12


GPUS = {
    "t4": Gpu("T4 16 GB", 15, 65, 8.1, 8.1, bf16=False),
    "v100": Gpu("V100 SXM2 32 GB", 32, 125, 15.7, 15.7, bf16=False),
    "rtx3090": Gpu("RTX 3090", 24, 71, 35.6, 35.6),
    "rtx4090": Gpu("RTX 4090", 24, 165.2, 82.6, 82.6),
    "a10": Gpu("A10 24 GB", 22.5, 125, 62.5, 31.2),
    "l4": Gpu("L4 24 GB", 22.5, 121, 60, 30.3),
    "l40s": Gpu("L40S 48 GB", 45, 362, 183, 91.6),
    "a100_40": Gpu("A100 SXM 40 GB", 40, 312, 156, 19.5),
    "a100": Gpu("A100 SXM 80 GB", 80, 312, 156, 19.5),
    "h100": Gpu("H100 SXM 80 GB", 80, 989.4, 494.7, 67),
    "h200": Gpu("H200 SXM 141 GB", 141, 989.4, 494.7, 67),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, however it is spelt.

    Raises:
        UserError: it is not in the table.
    """
    key = str(name).lower().replace(" ", "").replace("-", "_")
    if key not in GPUS:
        raise UserError(f"dry.gpu={name} is unknown: choose one of {', '.join(GPUS)}")
    return GPUS[key]
