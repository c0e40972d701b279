"""`medclip train dry_run=true` against numbers counted by hand and memory measured on real steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from medclip.config import CONF, build
from medclip.dry.gpus import GPUS, find_gpu
from medclip.dry.step import make_batch
from medclip.dry_run import dry_run, plan_run
from medclip.train import train
from medclip.types import UserError

SMALL = ["model=tiny_vit", "model.architecture.text_cfg.layers=2", "data.batch_size=16", "trainer.precision=32-true"]
PHANTOMS = "data.sources=[{phantoms: {kind: xray, samples: 50, size: 64, seed: 0}}]"
FINDINGS = [
    "data.labels={names: [pneumothorax, cardiomegaly], from: class, field: phantom.label, other: zeros}",
    "data.group=phantom.patient",
]


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(words))


def planned(*words: str):
    return plan_run(composed(*words))


def test_vit_b16_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched; parameters, MACs, memory and hours follow from the architecture."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run fetches no weights")

    monkeypatch.setattr("medclip.models.source.download_pretrained", refused)
    monkeypatch.setattr("medclip.models.source.read_state", refused)
    words = ["model=clip_b16", "data.batch_size=8", "dry.samples=1000000", "dry.gpu=A100", "trainer.devices=4"]
    plan = planned(*words, "epochs=2", "trainer.accumulate_grad_batches=2")
    d, n, t, width, context = 768, 197, 12, 512, 77
    block = lambda w: 12 * w * w + 13 * w  # noqa: E731  # qkv, out, two of the MLP, with biases and two norms
    image = 3 * 16 * 16 * d + d + n * d + 2 * 2 * d + t * block(d) + d * 512
    text = 49408 * width + context * width + t * block(width) + 2 * width + width * 512
    assert {part.name: part.parameters for part in plan.parts} == {
        "image tower": image,
        "text tower": text,
        "logit scale and bias": 1,
    }
    assert image + text + 1 == 149_620_737
    macs = {part.name: part.macs for part in plan.parts}
    assert macs["image tower"] == 196 * 768 * d + t * (n * 12 * d * d + 2 * n * n * d) + d * 512
    assert macs["text tower"] == t * (context * 12 * width**2 + 2 * context**2 * width) + width * 512
    assert plan.memory.weights == plan.memory.gradients == plan.memory.buckets == 4 * 149_620_737
    assert plan.memory.optimiser == 2 * 4 * 149_620_737
    assert plan.memory.batch == 8 * (3 * 224 * 224 + 8 * 77)
    # Backward is twice forward, but for the pixels, which need no gradient; flash attention makes its scores again.
    attention = 2 * t * (n * n * d + context * context * width)
    expected = 6 * plan.macs - 2 * 196 * 768 * d + attention
    assert plan.flops == pytest.approx(expected, rel=2e-3)
    assert (plan.precision, plan.peak) == ("bf16-mixed", 312e12)
    assert plan.run.steps == 2 * -(-1_000_000 // 32) // 2 and plan.run.samples == 2_000_000
    assert plan.hours == pytest.approx(2_000_000 * plan.flops / (4 * 312e12 * 0.4) / 3600)


def test_what_is_locked_is_neither_trained_nor_kept() -> None:
    every, locked, lora = (planned(*SMALL, *words) for words in ([], ["adapt=[lock_text]"], ["adapt=[lora]"]))
    text = next(part for part in locked.parts if part.name == "text tower")
    assert text.trainable == 0 < text.parameters
    image = sum(part.parameters for part in every.parts if part.name != "text tower")
    assert locked.memory.gradients == 4 * image and locked.memory.optimiser == 8 * image
    assert locked.memory.activations < every.memory.activations and locked.flops < every.flops
    added = sum(part.parameters for part in lora.parts) - sum(part.parameters for part in every.parts)
    assert sum(part.trainable for part in lora.parts) == added + 1  # the logit scale


@pytest.mark.parametrize(
    "adapt",
    [
        [],
        pytest.param(["adapt=[checkpointing]"], marks=pytest.mark.slow),
        pytest.param(["adapt=[chunked]", "adapt.chunked.rows=4"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_is_what_a_real_step_takes(adapt: list[str]) -> None:
    """The same step on real tensors, its allocations added up by torch's profiler."""
    words = [*SMALL, "data.batch_size=32", *adapt]
    plan = planned(*words)
    torch.manual_seed(0)
    task: Any = build(composed(*words).task)
    task.train()
    batch = make_batch(task.model, 32, 0)

    def step() -> None:
        task.weigh(task.model(batch), batch)[1].backward()

    step()  # gradients are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # missing in torch's stubs
        peak = max(peak, now)
    assert plan.memory.activations == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
def test_chunks_are_counted_by_chunks() -> None:
    """A batch of many chunks is reached by a line through two short steps."""
    line = planned(*SMALL, "adapt=[chunked]", "adapt.chunked.rows=4", "data.batch_size=256")
    whole = planned(*SMALL, "data.batch_size=256")
    assert line.memory.activations < whole.memory.activations / 4
    # All chunks but the last go forwards twice.
    assert line.flops == pytest.approx(whole.flops + 63 / 64 * 2 * whole.macs, rel=0.02)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=mae_cxr", "model=mae_tiny", "data.group=null"],
        ["experiment=thorax", "model=vit_tiny", "task.lr_batch=null", *FINDINGS],
        SMALL,
    ],
    ids=["mae", "thorax", "clip"],
)
def test_every_task_and_the_steps_it_really_takes(words: list[str], tmp_path: Path) -> None:
    words = [*words, PHANTOMS, "data.val_sources=[]", "data.batch_size=8", "data.workers=0", "epochs=2"]
    words += ["trainer.accumulate_grad_batches=3", f"output={tmp_path / 'run'}", "trainer=cpu"]
    plan = planned(*words)
    assert not (tmp_path / "run").exists()
    trainer = train(composed(*words, "callbacks=[default]", "logger=[csv]"))
    assert plan.run.steps == trainer.global_step
    assert plan.run.samples_per_epoch == 50 and plan.run.samples == 100
    model: Any = trainer.lightning_module.model
    assert sum(part.parameters for part in plan.parts) == sum(p.numel() for p in model.parameters())
    state = trainer.optimizers[0].state.values()
    moments = sum(v.numel() * v.element_size() for s in state for k, v in s.items() if k != "step")
    assert plan.memory.optimiser == moments


def test_a_run_on_a_checkpoint_of_ours_is_that_model(tmp_path: Path) -> None:
    words = [*SMALL, PHANTOMS, "data.workers=0", "trainer=cpu", f"output={tmp_path / 'run'}"]
    trainer = train(composed(*words, "max_steps=1"))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    plan = planned("model=local", f"model.pretrained={path}")
    assert sum(part.parameters for part in plan.parts) == sum(p.numel() for p in trainer.model.parameters())  # type: ignore


def test_json_is_the_plan_and_remote_data_are_not_asked(capsys: pytest.CaptureFixture) -> None:
    plan = dry_run(composed(*SMALL, "data.sources=[{urls: 'https://nowhere.invalid/{0..9}.tar'}]", "dry_run=json"))
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(part.parameters for part in plan.parts)
    assert found["hours"] is None and "nowhere.invalid" in found["notes"][0]
    dry_run(composed(*SMALL, "max_steps=10", "dry_run=true"))
    assert "not known" in capsys.readouterr().out


def test_what_does_not_fit_is_said() -> None:
    plan = planned(*SMALL, "data.batch_size=100000", "dry.gpu=t4")
    assert not plan.fits and plan.memory.total > find_gpu("T4").memory * 2**30
    assert plan.precision == "32-true" and plan.peak == 8.1e12


# Multiprocessors, FLOPs a clock of each in half precision (dense, float32 accumulation), boost clock in GHz; from the
# architectures' white papers. A tensor core of Turing does 128, of GA102 as sold to players 128, for servers 256.
CHIPS = {
    "t4": (40, 1024, 1.59),
    "v100": (80, 1024, 1.53),
    "rtx3090": (82, 512, 1.695),
    "rtx4090": (128, 512, 2.52),
    "a10": (72, 1024, 1.695),
    "l4": (58, 1024, 2.04),
    "l40s": (142, 1024, 2.52),
    "a100_40": (108, 2048, 1.41),
    "a100": (108, 2048, 1.41),
    "h100": (132, 4096, 1.83),
    "h200": (132, 4096, 1.83),
}


@pytest.mark.parametrize("name", GPUS)
def test_peaks_follow_from_the_chips(name: str) -> None:
    units, flops, clock = CHIPS[name]
    assert GPUS[name].half == pytest.approx(units * flops * clock / 1e3, rel=0.015)
    ratio = GPUS[name].half / GPUS[name].tf32
    assert ratio == pytest.approx(2, rel=0.02) if GPUS[name].bf16 else ratio == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dry.gpu=abacus"], "choose one of t4"),
        (["dry.mfu=40"], "e.g. 0.4"),
        (["data.batch_size=0"], "data.batch_size"),
        (["dry_run=maybe"], "choose true"),
        (["model.architecture=ViT-B-17"], "did you mean"),
        (["experiment=medvqa_mevf"], "not this model"),
    ],
)
def test_what_cannot_be_counted_is_one_line(words: list[str], message: str) -> None:
    base = ["model=clip_b16"] if "architecture" in words[0] else [] if "experiment" in words[0] else SMALL
    with pytest.raises(UserError, match=message):
        dry_run(composed(*base, "dry_run=true", *words) if "dry_run" not in words[0] else composed(*base, *words))


def test_evaluations_that_nobody_runs_are_refused(tmp_path: Path) -> None:
    words = ["eval=[zeroshot]", "evals.zeroshot.data.sources=[{folder: x}]", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"callbacks=\[default,online\]"):
        train(composed(*SMALL, PHANTOMS, *words))
    assert not (tmp_path / "run").exists()
