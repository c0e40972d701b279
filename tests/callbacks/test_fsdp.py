"""`trainer=fsdp` on two gloo ranks, as users run it: DDP's losses and weights, and files like everyone's."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from open_clip import CLIP
from torch import Tensor, nn

from medclip.callbacks.fsdp import FullyShard, blocks
from medclip.config import CONF
from medclip.models.load import load_clip
from medclip.train import train
from medclip.types import UserError

TINY = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=2",
    "model.architecture.vision_cfg.width=64",
    "model.architecture.text_cfg.layers=2",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.context_length=16",
    "data.sources=[{phantoms: {kind: xray, samples: 24, size: 64, seed: 0}}]",
    "data.batch_size=4",
    "data.workers=0",
    "callbacks=[default,stream]",
    "epochs=2",  # 6 steps
    "optim.lr=0.003",
    "task.max_logit_scale=14.2",  # below where it starts, and where the first step takes it
    "+callbacks.held={_target_: tests.callbacks.test_fsdp.Held, output: '${output}'}",
]
DRAWN = ["trainer.precision=bf16-mixed", "+model.architecture.vision_cfg.patch_dropout=0.25"]
ACCUMULATED = ["trainer.accumulate_grad_batches=2"]
LORA = ["adapt=[lora,checkpointing]", "loss=[siglip]"]
ONLINE = [
    "callbacks=[default,stream,online]",
    "eval=[phantom_xray_retrieval]",
    "evals.phantom_xray_retrieval.data.sources=[{phantoms: {kind: xray, samples: 8, size: 64, seed: 1}}]",
    "callbacks.online.every_n_steps=3",
]
KILL = ["+callbacks.kill={_target_: tests.callbacks.test_fsdp.Kill, step: 3}"]
RESUME = ["resume=auto"]
RUNS: list[tuple[str, str, list[str]]] = [  # folder, trainer, words; in this order
    ("ddp", "ddp", []),
    ("fsdp", "fsdp", []),
    ("online", "fsdp", ONLINE),
    ("accumulated_ddp", "ddp", ACCUMULATED),
    ("accumulated_fsdp", "fsdp", ACCUMULATED),
    ("lora_ddp", "ddp", LORA),
    ("lora_fsdp", "fsdp", LORA),
    ("drawn", "fsdp", DRAWN),
    ("killed", "fsdp", [*DRAWN, *KILL]),
    ("killed", "fsdp", [*DRAWN, *RESUME]),
    ("from_ddp", "ddp", KILL),
    ("from_ddp", "fsdp", RESUME),
    ("from_fsdp", "fsdp", KILL),
    ("from_fsdp", "ddp", RESUME),
    ("chunked", "fsdp", ["adapt=[chunked]", "adapt.chunked.rows=2"]),
]


class Held(pl.Callback):
    """Tells how many numbers of the weights a rank holds, of how many."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights: list[Any] = list(pl_module.parameters())
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in weights)
        (self.output / f"held-{trainer.global_rank}").write_text(f"{held} {sum(p.numel() for p in weights)}")


class Kill(pl.Callback):
    """As a cluster does that wants its machine back."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (names | address).items()})
    for name, trainer, words in RUNS:
        ranks = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*TINY, *ranks, f"output={folder / name}", *words])
        try:
            train(cfg)
        except UserError as error:
            (folder / f"{name}-{rank}").write_text(str(error))
        except SystemExit as stop:
            assert stop.code == 128 + signal.SIGTERM
            if rank == 0:
                shutil.copy(folder / name / "checkpoints" / "last.ckpt", folder / f"{name}.ckpt")
    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank  # type: ignore[operator]
    strategy = FullyShard()
    strategy._lightning_module = nn.Sequential(norm)  # type: ignore[assignment]
    strategy.on_validation_start()
    torch.save(norm.running_mean, folder / f"norm-{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.callbacks.test_fsdp"])
    torch.multiprocessing.start_processes(run_rank, (port, folder), nprocs=2, start_method="forkserver")
    return folder


def losses(folder: Path) -> list[float]:
    rows = (folder / "stream-0.jsonl").read_text().splitlines()
    return [float.fromhex(json.loads(row)["loss"]) for row in rows]


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and moments."""
    (optimizer,) = saved["optimizer_states"]
    moments = {f"{i}.{name}": value for i, state in optimizer["state"].items() for name, value in state.items()}
    return saved["state_dict"] | moments


def metric(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("fsdp", "ddp"), ("accumulated_fsdp", "accumulated_ddp"), ("lora_fsdp", "lora_ddp")],
)
def test_losses_norms_and_weights_are_those_of_ddp(ours: str, theirs: str, runs: Path) -> None:
    assert len(set(losses(runs / ours))) == 6
    assert losses(runs / ours) == pytest.approx(losses(runs / theirs), abs=1e-5)
    norms = metric(runs / ours, "train/grad_norm")
    assert norms == pytest.approx(metric(runs / theirs, "train/grad_norm"), rel=1e-5) and max(norms) > 1  # clipped
    mine, other = tensors(last(runs / ours)), tensors(last(runs / theirs))
    assert list(mine) == list(other)
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
    groups = [saved["optimizer_states"][0]["param_groups"] for saved in (last(runs / ours), last(runs / theirs))]
    assert groups[0] == groups[1]


def test_each_rank_holds_its_half(runs: Path) -> None:
    halves, wholes = zip(
        *((int(n) for n in (runs / "fsdp" / f"held-{rank}").read_text().split()) for rank in (0, 1)), strict=True
    )
    assert wholes[0] == wholes[1] and sum(halves) == pytest.approx(wholes[0], rel=1e-4)  # scalars are held twice
    assert max(halves) < 0.52 * wholes[0]
    assert (runs / "ddp" / "held-0").read_text() == f"{wholes[0]} {wholes[0]}"


def test_the_logit_scale_is_clamped(runs: Path) -> None:
    scales = metric(runs / "fsdp", "train/logit_scale")
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-6) and scales[1] == pytest.approx(14.2, rel=1e-6)
    saved = torch.load(runs / "from_fsdp.ckpt", weights_only=True)["state_dict"]["model.net.logit_scale"]
    assert saved.shape == () and saved <= math.log(14.2) + 1e-6


def test_killed_and_resumed_is_the_same_run_to_the_bit(runs: Path) -> None:
    """In bfloat16 and with patch dropout; and the ablation: the weights did move after the kill."""
    for rank in (0, 1):
        lines = [(runs / name / f"stream-{rank}.jsonl").read_text() for name in ("killed", "drawn")]
        assert lines[0] == lines[1] and lines[0].count("\n") == 6
    resumed, whole = tensors(last(runs / "killed")), tensors(last(runs / "drawn"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert not torch.equal(
        torch.load(runs / "killed.ckpt", weights_only=True)["state_dict"]["model.net.visual.proj"],
        resumed["model.net.visual.proj"],
    )
    assert losses(runs / "drawn") != pytest.approx(losses(runs / "fsdp"), abs=1e-4)


@pytest.mark.parametrize("name", ["from_ddp", "from_fsdp"])
def test_either_goes_on_from_the_others_checkpoint(name: str, runs: Path) -> None:
    """Moments too: without them the fourth step would be another."""
    assert losses(runs / name) == pytest.approx(losses(runs / "ddp"), abs=1e-5)
    assert len(losses(runs / name)) == 6


def test_evaluations_in_between_see_the_whole_model_and_change_nothing(runs: Path) -> None:
    assert losses(runs / "online") == losses(runs / "fsdp")
    found = metric(runs / "online", "eval/score")
    assert len(found) == 3 and all(0 <= value <= 1 for value in found)


def test_its_checkpoint_is_a_model_like_any_other(runs: Path) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ours, theirs, start = (
        load_clip(pretrained=str(path)).eval().encode_image(image)
        for path in (*(runs / name / "checkpoints" / "last.ckpt" for name in ("fsdp", "ddp")), runs / "from_ddp.ckpt")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - start).abs().max() > 1e-3
    assert [path.name for path in (runs / "fsdp" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_all_ranks_validate_with_the_first_ones_batch_norms(runs: Path) -> None:
    assert torch.load(runs / "norm-1.pt").tolist() == [0, 0]


def test_what_it_cannot_do_is_one_line(runs: Path) -> None:
    for rank in (0, 1):
        assert "adapt=[chunked] does not work with trainer=fsdp" in (runs / f"chunked-{rank}").read_text()
    strategy = FullyShard()
    strategy._lightning_module = SimpleNamespace(model=nn.Linear(1, 1))  # type: ignore[assignment]
    with pytest.raises(UserError, match="contrastive training of a CLIP: choose trainer=ddp"):
        strategy._shard()


def test_blocks_are_the_layers_of_both_towers() -> None:
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    vit = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
    net = CLIP(embed_dim=16, vision_cfg=vit, text_cfg=text)  # type: ignore[arg-type]
    layers = [*net.visual.transformer.resblocks, *net.transformer.resblocks]  # type: ignore[union-attr]
    assert set(blocks(net)) == set(layers) and len(layers) == 5
    timm = {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear"}
    net = CLIP(embed_dim=16, vision_cfg=timm, text_cfg=text)  # type: ignore[arg-type]
    assert set(blocks(net)) == {*net.visual.trunk.blocks, *net.transformer.resblocks}  # type: ignore[union-attr]
