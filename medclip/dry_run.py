"""`medclip train dry_run=true`: what a training needs and how long it takes, before anything of it is fetched or made.

No weight is read, no image decoded, no run folder made. The model is built without content (on torch's meta device),
adapted as the config says, and taken through a step of shapes alone: so locking, LoRA, chunks and checkpointing are
accounted for by what they do, not by rules of thumb. Samples are counted from the sources where they are local.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from medclip.config import build
from medclip.data.storage import is_local
from medclip.dry.gpus import Arithmetic, find_gpu
from medclip.dry.optimiser import optimiser_bytes
from medclip.dry.plan import DryRun, Memory, Part, Run
from medclip.dry.step import dry_step, forward_flops, make_batch
from medclip.dry.table import tables
from medclip.models.attention import plain_attention
from medclip.models.describe import describe
from medclip.types import UserError

_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
# Steps that change neither shapes nor what is trained, and would fetch weights or compile.
_LEFT_OUT = ("text_tower", "compile")
_COUNTED = ("architecture", "decoder_dim", "classes")  # a key of CLIPs, of masked autoencoders, of classifiers
_SECOND = ("decoder_", "mask_token", "net.head.", "net.fc_norm.")  # what stands behind an encoder


def dry_run(cfg: DictConfig) -> DryRun:
    """Print what a composed config asks for: tables, or JSON with `dry_run=json`.

    Raises:
        UserError: whatever the run itself would refuse about its model, data and numbers; a GPU that is not known.
    """
    if cfg.dry_run not in (True, "json"):
        raise UserError(f"dry_run={cfg.dry_run}: choose true (tables), json or false")
    plan = plan_run(cfg)
    if cfg.dry_run == "json":
        print(json.dumps(plan.as_dict(), indent=2))
        return plan
    console = Console()
    for table in tables(plan):
        console.print(table)
    for note in plan.notes:
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
    return plan


def plan_run(cfg: DictConfig) -> DryRun:
    """All numbers of it; see `dry_run`."""
    gpu = find_gpu(cfg.dry.gpu)
    if not 0 < cfg.dry.mfu <= 1:
        raise UserError(f"dry.mfu={cfg.dry.mfu}: give the share of the GPU's peak that a training reaches, e.g. 0.4")
    size = cfg.data.batch_size
    if not isinstance(size, int) or size < 1:
        raise UserError(f"data.batch_size is {size!r}: give a whole number, 1 or more")
    precision = _precision(cfg, gpu.bf16)
    autocast, whole = _HALF.get(precision), _TRUE.get(precision)
    ranks = _ranks(cfg.trainer)

    task = _task(cfg)
    model = task.model
    if whole is not None:
        model.to(whole)
    classes = len(getattr(model, "description", {}).get("classes") or ())
    for term in task.losses.values():
        if getattr(term, "balanced", False):
            with torch.device("meta"):
                term.balance([1] * classes, [1] * classes)
    run, notes = _length(cfg, task, ranks)

    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in task.parameters())
    gradients = sum(p.numel() * p.element_size() for _, p in named)
    shares = ranks if _sharded(cfg.trainer) else 1
    state = optimiser_bytes(task.optimizer, named)

    # A line through two smaller steps reaches the batch in the config; in chunks, whole chunks of it.
    chunk = _chunk(cfg, size)
    sizes = (size // 2 or 1, size) if chunk is None else (2 * chunk, 3 * chunk)
    steps = [dry_step(task, n, contrasted=size * ranks, classes=classes, autocast=autocast) for n in sizes]
    slope = sizes[1] - sizes[0] or 1
    each, flops_each = ((getattr(steps[1], key) - getattr(steps[0], key)) / slope for key in ("peak", "flops"))
    activations = max(steps[1].peak + each * (size - sizes[1]), 0.0)
    flops = (steps[1].flops + flops_each * (size - sizes[1])) / size

    batch = 3 * size * model.preprocess.size[0] * model.preprocess.size[1]
    batch += 0 if model.tokenizer is None else 8 * size * model.tokenizer.context_length
    memory = Memory(
        weights=weights // shares,
        gradients=gradients // shares,
        optimiser=state // shares,
        averaged_weights=weights // shares if "ema" in cfg.callbacks else 0,
        buckets=gradients if ranks > 1 and shares == 1 else 0,
        batch=batch,
        activations=activations,
        activations_per_sample=each if sizes[0] < sizes[1] else activations,
    )
    arithmetic: Arithmetic = "half" if autocast is not None or whole in (torch.bfloat16, torch.float16) else "fp32"
    if arithmetic == "fp32" and cfg.matmul_precision != "highest" and whole is None:
        arithmetic = "tf32"
    left_out = [name for name in _LEFT_OUT if name in cfg.adapt]
    notes += [
        "activations: of every operation of a step on tensors without content; a GPU's allocator wastes some more",
        f"hours: of the products alone, at an assumed {100 * cfg.dry.mfu:g} % of the peak (dry.mfu); the loader, "
        "evaluations and checkpoints may make it longer",
        *([f"counted without adapt={left_out}: neither changes what is counted"] if left_out else []),
    ]
    parts, macs = _parts(model, classes)
    return DryRun(
        parts=parts,
        macs=macs,
        memory=memory,
        run=run,
        flops=flops,
        gpu=gpu,
        precision=precision,
        peak=gpu.peak(arithmetic),
        mfu=float(cfg.dry.mfu),
        notes=notes,
    )


def _task(cfg: DictConfig) -> Any:
    """The config's task on the meta device: adapted, without weights from anywhere."""
    if not set(_COUNTED) & set(cfg.model):
        raise UserError("dry_run counts CLIPs, masked autoencoders and classifiers, not this model: leave it out")
    cfg = cfg.copy()
    with open_dict(cfg):
        model = cfg.model
        if "architecture" in model:
            model.architecture = describe(model.architecture, model.get("pretrained"), model.get("cache_dir"))
            model.device = "meta"
        for key in ("pretrained", "vision_init", "init"):
            if key in model:
                model[key] = None
        for name in _LEFT_OUT:
            cfg.adapt.pop(name, None)
    with torch.device("meta"):
        return build(cfg.task)


def _parts(model: Any, classes: int) -> tuple[list[Part], float]:
    """Towers of a CLIP, encoder and decoder or head of the others; and multiply-adds of a sample's forward pass."""
    height, width = model.preprocess.size
    visual = getattr(getattr(model, "net", None), "visual", None)
    if visual is None:
        second = "head" if classes else "decoder"
        parts = _grouped(model, lambda name, _: second if name.startswith(_SECOND) else "encoder")
        macs = _macs(model, model, lambda: make_batch(model, 1, classes))
        return [_part(name, found) for name, found in parts.items()], macs
    counted = {
        "image tower": _macs(model, model.encode_image, lambda: torch.zeros((1, 3, height, width), dtype=torch.uint8)),
        "text tower": _macs(
            model, model.encode_text, lambda: torch.zeros((1, model.tokenizer.context_length), dtype=torch.long)
        ),
    }
    own = {id(p) for p in visual.parameters()}
    parts = _grouped(
        model,
        lambda name, p: "logit scale and bias" if "logit_" in name else "image tower" if id(p) in own else "text tower",
    )
    return [_part(name, found, counted.get(name)) for name, found in parts.items()], sum(counted.values())


def _macs(model: Any, encode: Callable[[Any], Any], rows: Callable[[], Any]) -> float:
    with plain_attention():
        return forward_flops(encode, model, rows) / 2


def _grouped(model: Any, group: Callable[[str, Any], str]) -> dict[str, list[Any]]:
    """Parameters by what `group` says of each, the largest group first."""
    groups: dict[str, list[Any]] = {}
    for name, p in model.named_parameters():
        groups.setdefault(group(name, p), []).append(p)
    return dict(sorted(groups.items(), key=lambda item: -sum(p.numel() for p in item[1])))


def _part(name: str, parameters: list[Any], macs: float | None = None) -> Part:
    return Part(name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad), macs)


def _length(cfg: DictConfig, task: Any, ranks: int) -> tuple[Run, list[str]]:
    """Samples and steps: counted from local sources, or as `dry.samples` says; and what to know about it."""
    accumulate = cfg.trainer.accumulate_grad_batches
    samples, batches = cfg.dry.samples, None
    notes = []
    sources = OmegaConf.to_container(cfg.data, resolve=False).get("sources")  # type: ignore[union-attr]
    if samples is not None:
        batches = cfg.epochs * -(-samples // (cfg.data.batch_size * ranks))
    elif why := _not_local(sources) if sources else "data.sources is empty":
        notes.append(f"samples are not known: {why}; say dry.samples=")
    else:
        samples, batches = _count(cfg, task, ranks)
    steps = None if batches is None else -(-batches // accumulate)
    if cfg.trainer.max_steps >= 0:
        steps = cfg.trainer.max_steps if steps is None else min(steps, cfg.trainer.max_steps)
    return Run(cfg.data.batch_size, ranks, accumulate, cfg.epochs, samples, steps), notes


def _not_local(node: Any) -> str:
    """Why a list of sources cannot be counted here; "" if it can."""
    if isinstance(node, dict | list):
        children = node.values() if isinstance(node, dict) else node
        return next((why for child in children if (why := _not_local(child))), "")
    if node == "???":
        return "a source is not named yet"
    return f"{node} is not on this machine" if isinstance(node, str) and not is_local(node) else ""


def _count(cfg: DictConfig, task: Any, ranks: int) -> tuple[int, int]:
    """Samples of a pass, and batches of the whole run on each rank."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.data.val_sources = []
        cfg.data.output = None
    data = build(cfg.data)
    data.trainer = SimpleNamespace(global_rank=0, world_size=ranks, lightning_module=task)
    data.setup()
    loader = data.train_dataloader()
    return len(loader.order), len(loader)


def _precision(cfg: DictConfig, bf16: bool) -> str:
    """Lightning's word for it; what the default chooses on the named GPU, not on this machine."""
    wanted = cfg.trainer.precision
    if isinstance(wanted, DictConfig):
        return "bf16-mixed" if bf16 else "32-true"
    return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(str(wanted), str(wanted))


def _ranks(trainer: DictConfig) -> int:
    devices = trainer.devices
    if OmegaConf.is_list(devices):
        each = len(devices)
    else:
        each = int(devices) if str(devices).isdigit() and int(devices) > 0 else 1  # auto: one GPU until told
    return each * trainer.get("num_nodes", 1)


def _sharded(trainer: DictConfig) -> bool:
    """Whether weights, gradients and the optimiser's state lie in shares on the ranks."""
    text = str(trainer.get("strategy", "")).lower()
    return "fsdp" in text or "modelparallel" in text


def _chunk(cfg: DictConfig, size: int) -> int | None:
    """Rows of a chunk where the batch is cut into more than two."""
    rows = cfg.adapt.chunked.rows if "chunked" in cfg.adapt else size
    count = -(-size // rows)
    return None if count <= 3 else -(-size // count)
