"""What a training would need, as plain numbers: the result of a dry run, and how they follow from one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medclip.dry.gpus import Gpu

CONTEXT = 1 << 30  # bytes: CUDA's context, kernels' work space, rounding of the allocator


@dataclass(frozen=True)
class Part:
    """A part of the model; `macs` are multiply-adds of a forward pass of one sample, None where not counted alone."""

    name: str
    parameters: int
    trainable: int
    macs: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `activations` is the most there is at once, what an operation needs for a moment included.

    The sum is a little too high: gradients and the most activations are seldom there at the same time.
    """

    weights: int
    gradients: int
    optimiser: int
    averaged_weights: int
    buckets: int
    batch: int
    activations: float
    activations_per_sample: float

    @property
    def total(self) -> float:
        """With what CUDA itself takes."""
        held = (self.weights, self.gradients, self.optimiser, self.averaged_weights, self.buckets, self.batch)
        return sum(held) + self.activations + CONTEXT


@dataclass(frozen=True)
class Run:
    """How long it is; None where the data do not say."""

    batch_size: int
    ranks: int
    accumulate: int
    epochs: int
    samples_per_epoch: int | None
    steps: int | None

    @property
    def batch(self) -> int:
        """Samples of one optimiser step."""
        return self.batch_size * self.ranks * self.accumulate

    @property
    def samples(self) -> int | None:
        """Samples that the run sees."""
        if self.steps is None:
            return None
        seen = self.steps * self.batch
        # The last batch of a pass is smaller; max_steps may end the run before the passes are over.
        return seen if self.samples_per_epoch is None else min(seen, self.samples_per_epoch * self.epochs)


@dataclass(frozen=True)
class DryRun:
    """All of it.

    `macs` are multiply-adds of a sample's forward pass, `flops` those of training on one (two a multiply-add); `peak`
    is FLOP/s, of which a share `mfu` is assumed.
    """

    parts: Sequence[Part]
    macs: float
    memory: Memory
    run: Run
    flops: float
    gpu: Gpu
    precision: str
    peak: float
    mfu: float
    notes: Sequence[str]

    @property
    def rate(self) -> float:
        """Samples a second on all ranks."""
        return self.run.ranks * self.peak * self.mfu / self.flops if self.flops else 0.0

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        samples = self.run.samples
        return None if samples is None or not self.rate else samples / self.rate / 3600

    @property
    def fits(self) -> bool:
        """Whether one GPU's memory is enough."""
        return self.memory.total <= self.gpu.memory * 2**30

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, FLOPs, hours."""
        parameters, trainable = (sum(getattr(part, key) for part in self.parts) for key in ("parameters", "trainable"))
        hours = self.hours
        return {
            "parts": [asdict(part) for part in self.parts],
            "parameters": parameters,
            "trainable": trainable,
            "trainable_share": trainable / parameters,
            "memory": {**asdict(self.memory), "context": CONTEXT, "total": self.memory.total, "fits": self.fits},
            "run": {**asdict(self.run), "batch": self.run.batch, "samples": self.run.samples},
            "macs_per_sample": self.macs,
            "flops_per_sample": self.flops,
            "gpu": {"name": self.gpu.name, "memory_gib": self.gpu.memory, "peak_flops": self.peak},
            "precision": self.precision,
            "mfu": self.mfu,
            "samples_per_second": self.rate,
            "hours": hours,
            "gpu_hours": None if hours is None else hours * self.run.ranks,
            "notes": list(self.notes),
        }
