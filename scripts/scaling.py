"""What a training on many pairs costs: hours, network, storage and money, and what runs out first.

    python scripts/scaling.py                                       # docs/scaling.md's tables
    python scripts/scaling.py --gpu a100 --price 1.8 --mfu 0.3 --cores 12 --network 10
    python scripts/scaling.py --model clip_l14 --batch 1024 --gpus 4 --samples 216e6

Plain formulas on inputs that you can replace by your own; FLOPs, parameters and memory come from the model itself, as
`medclip train dry_run=true` counts them. With N GPUs, batch b on each, B = N b:

    GPU     pairs/s = N * peak * mfu / (FLOPs a pair)            loader  pairs/s = N * cores / (CPU-s a pair)
    network pairs/s = N * MB/s / (MB a pair)                     the slowest of the three is what a run gets
    exchange: a ring passes 2 (N-1)/N of the gradients' bytes a step on each GPU, and (N-1) b rows of features, both
    towers', there and back; its share of a step is given as if nothing of it were hidden behind the backward pass.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache

from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.dry.plan import DryRun
from medclip.dry_run import plan_run
from medclip.types import UserError


@dataclass(frozen=True)
class Inputs:
    """Everything that is not computed.

    Args:
        samples: pairs to see.
        gpu: a name of `medclip.dry.gpus`.
        mfu: share of its peak that training reaches.
        batch: pairs of a GPU a step.
        chunk: rows of a chunk, 0 for none; needed where a batch does not fit.
        cores: of the CPU, for each GPU.
        cpu_ms: CPU-milliseconds of reading, decoding, cropping and tokenising a pair.
        pair_kb: bytes of a pair as it is stored, in kB.
        network: Gbit/s of each GPU from the store of the data.
        link: GB/s of each GPU to the others.
        price: of a GPU-hour, its cores and disk included.
    """

    samples: float = 24_076_288
    gpu: str = "h100"
    mfu: float = 0.4
    batch: int = 512
    chunk: int = 128
    cores: float = 8
    cpu_ms: float = 2.0
    pair_kb: float = 100.0
    network: float = 10.0
    link: float = 50.0
    price: float = 3.0


@dataclass(frozen=True)
class Cost:
    """Of one model on so many GPUs; rates are pairs a second of all of them."""

    model: str
    gpus: int
    rate_gpu: float
    rate_loader: float
    rate_network: float
    exchange: float  # seconds of a step
    step: float  # seconds of a step, without the exchange
    hours: float
    price: float
    cores_needed: float  # for each GPU, to keep it busy
    mb_needed: float  # MB/s for each GPU, likewise
    gather_mb: float  # features received by each GPU a step
    memory_gib: float
    bound: str


@cache
def planned(model: str, gpu: str, batch: int, chunk: int, gpus: int, mfu: float) -> DryRun:
    """The model's step, as a dry run counts it."""
    words = [f"model={model}", f"dry.gpu={gpu}", f"dry.mfu={mfu}", f"data.batch_size={batch}", "trainer=ddp"]
    words += [f"trainer.devices={gpus}", *([f"adapt.chunked.rows={chunk}", "adapt=[chunked]"] if chunk else [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan_run(compose("train", words))


def cost(model: str, gpus: int, inputs: Inputs) -> Cost:
    """All figures of one line of the tables."""
    plan = planned(model, inputs.gpu, inputs.batch, inputs.chunk, gpus, inputs.mfu)
    rates = {
        "GPU": plan.rate,
        "loader": gpus * inputs.cores / (inputs.cpu_ms / 1e3),
        "network": gpus * inputs.network * 1e9 / 8 / (inputs.pair_kb * 1e3),
    }
    bound = min(rates, key=lambda name: rates[name])
    gather = (gpus - 1) * inputs.batch * 2 * embed_dim(model) * 4
    exchanged = 2 * (gpus - 1) / gpus * plan.memory.gradients + 2 * gather
    hours = inputs.samples / rates[bound] / 3600
    each = plan.rate / gpus
    return Cost(
        model=model,
        gpus=gpus,
        rate_gpu=rates["GPU"],
        rate_loader=rates["loader"],
        rate_network=rates["network"],
        exchange=exchanged / (inputs.link * 1e9),
        step=inputs.batch * gpus / rates[bound],
        hours=hours,
        price=hours * gpus * inputs.price,
        cores_needed=each * inputs.cpu_ms / 1e3,
        mb_needed=each * inputs.pair_kb / 1e3,
        gather_mb=gather / 1e6,
        memory_gib=plan.memory.total / 2**30,
        bound=bound,
    )


@cache
def embed_dim(model: str) -> int:
    """Width of its features."""
    from medclip.models.describe import describe

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"model={model}"])
    return int(describe(cfg.model.architecture, cfg.model.pretrained)["embed_dim"])


def tables(models: list[str], gpus: list[int], inputs: Inputs) -> str:
    """Markdown: time and money, what each GPU must be fed, what lies on the disk."""
    costs = [cost(model, n, inputs) for model in models for n in gpus]
    lines = row("model", "GPUs", "pairs/s: GPUs", "loader", "network", "first to run out", "hours", "price", head=True)
    for c in costs:
        rates = (c.rate_gpu, c.rate_loader, c.rate_network)
        lines += row(c.model, c.gpus, *(f"{x:,.0f}" for x in rates), c.bound, f"{c.hours:.2f}", f"{c.price:,.0f}")
    lines += ["", *row("model", "GPUs", "cores/GPU", "MB/s/GPU", "gathered MB", "exchange/step", "GiB/GPU", head=True)]
    for c in costs:
        share = f"{100 * c.exchange / c.step:.1f} %"
        figures = (f"{c.cores_needed:.1f}", f"{c.mb_needed:.0f}", f"{c.gather_mb:.0f}", share, f"{c.memory_gib:.0f}")
        lines += row(c.model, c.gpus, *figures)
    lines += ["", *row("model", "parameters", "GFLOPs/pair", "checkpoint GB", head=True)]
    for model in models:
        plan = planned(model, inputs.gpu, inputs.batch, inputs.chunk, gpus[0], inputs.mfu)
        parameters = sum(part.parameters for part in plan.parts)
        checkpoint = (plan.memory.weights + plan.memory.optimiser) / 1e9
        lines += row(model, f"{parameters / 1e6:.1f} M", f"{plan.flops / 1e9:.0f}", f"{checkpoint:.1f}")
    read = inputs.samples * inputs.pair_kb * 1e3 / 1e12
    lines += ["", f"Bytes read: {inputs.samples / 1e6:.1f} M pairs of {inputs.pair_kb:g} kB, {read:.2f} TB."]
    return "\n".join(lines) + "\n"


def row(*cells: object, head: bool = False) -> list[str]:
    """A row of a table, with the rule below it where it is the head."""
    line = "| " + " | ".join(str(cell) for cell in cells) + " |"
    return [line, "|---|" + "---:|" * (len(cells) - 1)] if head else [line]


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["clip_b16", "clip_l14"], help="names in conf/model")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    for name, kind in Inputs.__annotations__.items():
        value = getattr(Inputs, name)
        parser.add_argument(f"--{name}", type={"float": float, "int": int, "str": str}[kind], default=value)
    options = vars(parser.parse_args(argv))
    models, gpus = options.pop("model"), options.pop("gpus")
    try:
        print(tables(models, gpus, Inputs(**options)), end="")
    except UserError as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
