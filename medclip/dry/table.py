"""A dry run for people."""

from __future__ import annotations

from rich.table import Table

from medclip.dry.plan import CONTEXT, DryRun


def tables(dry: DryRun) -> list[Table]:
    """Parameters, memory, and the run."""
    return [_parts(dry), _memory(dry), _run(dry)]


def _parts(dry: DryRun) -> Table:
    table = _table("model", "parameters", "trained", "share", "GMACs a sample")
    for part in dry.parts:
        macs = "" if part.macs is None else f"{part.macs / 1e9:.3g}"
        table.add_row(part.name, *_counts(part.parameters, part.trainable), macs)
    total, trainable = (sum(getattr(part, key) for part in dry.parts) for key in ("parameters", "trainable"))
    table.add_section()
    table.add_row("all", *_counts(total, trainable), f"{dry.macs / 1e9:.3g}")
    return table


def _counts(parameters: int, trainable: int) -> tuple[str, str, str]:
    share = trainable / parameters if parameters else 0.0
    return f"{parameters:,}", f"{trainable:,}", f"{100 * share:.3g} %"


def _memory(dry: DryRun) -> Table:
    memory, run = dry.memory, dry.run
    table = _table("memory of one GPU", "GiB")
    rows = {
        f"weights ({dry.precision})": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimiser,
        "averaged weights (ema)": memory.averaged_weights,
        "buckets of DDP": memory.buckets,
        "batch": memory.batch,
        f"activations of {run.batch_size} samples ({memory.activations_per_sample / 2**20:.1f} MiB each)": (
            memory.activations
        ),
        "CUDA": CONTEXT,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, f"{value / 2**30:.3f}")
    table.add_section()
    verdict = "fits" if dry.fits else "DOES NOT FIT"
    table.add_row(f"all: {verdict} on {dry.gpu.name} ({dry.gpu.memory} GiB)", f"{memory.total / 2**30:.3f}")
    return table


def _run(dry: DryRun) -> Table:
    run = dry.run
    table = _table("run", "")
    unknown = "not known"
    rows = {
        "samples in the data": unknown if run.samples_per_epoch is None else f"{run.samples_per_epoch:,} a pass",
        "samples to see": unknown if run.samples is None else f"{run.samples:,} ({run.epochs} passes at most)",
        "samples a step": f"{run.batch:,} = {run.batch_size} × {run.ranks} GPUs × {run.accumulate} accumulated",
        "steps": unknown if run.steps is None else f"{run.steps:,}",
        "GFLOPs a sample, training": f"{dry.flops / 1e9:.4g}",
        f"samples/s on {run.ranks} × {dry.gpu.name}": (
            f"{dry.rate:,.0f} at {100 * dry.mfu:g} % of {dry.peak / 1e12:g} TFLOP/s"
        ),
        "hours": unknown if dry.hours is None else f"{dry.hours:.3g}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
