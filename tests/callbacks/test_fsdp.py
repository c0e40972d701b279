"""`trainer=fsdp` on two gloo ranks, as users run it: DDP's losses and weights, and files like everyone's."""

from __future__ import annotations

import csv
import json
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
Runs = list[tuple[str, str, list[str]]]  # folder, trainer, words; in this order
SHORT: Runs = [
    ("ddp", "ddp", []),
    ("fsdp", "fsdp", []),
    ("chunked", "fsdp", ["adapt=[chunked]", "adapt.chunked.rows=2"]),
    ("killed", "fsdp", KILL),
    ("killed", "fsdp", RESUME),
]
LONG: Runs = [
    ("plain", "fsdp", []),
    ("online", "fsdp", ONLINE),
    ("accumulated_ddp", "ddp", ACCUMULATED),
    ("accumulated_fsdp", "fsdp", ACCUMULATED),
    ("lora_ddp", "ddp", LORA),
    ("lora_fsdp", "fsdp", LORA),
    ("drawn", "fsdp", DRAWN),
    ("drawn_killed", "fsdp", [*DRAWN, *KILL]),
    ("drawn_killed", "fsdp", [*DRAWN, *RESUME]),
    ("from_ddp", "ddp", KILL),
    ("from_ddp", "fsdp", RESUME),
    ("from_fsdp", "fsdp", KILL),
    ("from_fsdp", "ddp", RESUME),
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


def run_rank(rank: int, port: int, folder: Path, runs: Runs) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (names | address).items()})
    for name, trainer, words in runs:
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


def started(folder: Path, runs: Runs) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.callbacks.test_fsdp"])
    torch.multiprocessing.start_processes(run_rank, (port, folder, runs), nprocs=2, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return started(tmp_path_factory.mktemp("short"), SHORT)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return started(tmp_path_factory.mktemp("long"), LONG)


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


def compare_with_ddp(ours: Path, theirs: Path) -> None:
    assert len(set(losses(ours))) == 6
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    norms = metric(ours, "train/grad_norm")
    assert norms == pytest.approx(metric(theirs, "train/grad_norm"), rel=1e-5) and max(norms) > 1  # clipped
    mine, other = last(ours), last(theirs)
    assert list(tensors(mine)) == list(tensors(other))
    for name, value in tensors(mine).items():
        torch.testing.assert_close(value, tensors(other)[name], rtol=1e-4, atol=1e-5)
    assert mine["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]
    assert mine["medclip"] == other["medclip"]


def compare_with_uninterrupted(killed: Path, whole: Path) -> None:
    for rank in (0, 1):
        lines = [(folder / f"stream-{rank}.jsonl").read_text() for folder in (killed, whole)]
        assert lines[0] == lines[1] and lines[0].count("\n") == 6
    resumed, expected = tensors(last(killed)), tensors(last(whole))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    then = tensors(torch.load(killed.with_suffix(".ckpt"), weights_only=True))
    assert not torch.equal(then["model.net.visual.proj"], resumed["model.net.visual.proj"])


def test_losses_norms_weights_and_moments_are_those_of_ddp(short: Path) -> None:
    compare_with_ddp(short / "fsdp", short / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulated", "lora"])
def test_so_are_they_with_accumulation_and_with_adapters(kind: str, long: Path) -> None:
    compare_with_ddp(long / f"{kind}_fsdp", long / f"{kind}_ddp")


def test_each_rank_holds_its_half(short: Path) -> None:
    told = [(short / "fsdp" / f"held-{rank}").read_text().split() for rank in (0, 1)]
    (first, whole), (second, same) = ([int(n) for n in words] for words in told)
    assert whole == same and first + second == whole + 1  # the logit scale is held twice
    assert max(first, second) < 0.52 * whole
    assert (short / "ddp" / "held-0").read_text() == f"{whole} {whole}"


def test_the_logit_scale_is_clamped(short: Path) -> None:
    scales = metric(short / "fsdp", "train/logit_scale")
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-6) and scales[1] == pytest.approx(14.2, rel=1e-6)
    assert last(short / "fsdp")["state_dict"]["model.net.logit_scale"].shape == ()


def test_killed_and_resumed_is_the_same_run_to_the_bit(short: Path) -> None:
    compare_with_uninterrupted(short / "killed", short / "fsdp")


@pytest.mark.slow
def test_so_it_is_in_bfloat16_with_random_patches(long: Path) -> None:
    compare_with_uninterrupted(long / "drawn_killed", long / "drawn")
    assert losses(long / "drawn") != pytest.approx(losses(long / "plain"), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["from_ddp", "from_fsdp"])
def test_either_goes_on_from_the_others_checkpoint(name: str, long: Path) -> None:
    """Moments too: without them the fourth step would be another."""
    assert losses(long / name) == pytest.approx(losses(long / "plain"), abs=1e-5)
    assert len(losses(long / name)) == 6


@pytest.mark.slow
def test_evaluations_in_between_see_the_whole_model_and_change_nothing(long: Path) -> None:
    assert losses(long / "online") == losses(long / "plain")
    found = metric(long / "online", "eval/score")
    assert len(found) == 3 and all(0 <= value <= 1 for value in found)


def test_its_checkpoint_is_a_model_like_any_other(short: Path) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    paths = [*(short / name / "checkpoints" / "last.ckpt" for name in ("fsdp", "ddp")), short / "killed.ckpt"]
    ours, theirs, earlier = (load_clip(pretrained=str(path)).eval().encode_image(image) for path in paths)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - earlier).abs().max() > 1e-3
    assert [path.name for path in (short / "fsdp" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_all_ranks_validate_with_the_first_ones_batch_norms(short: Path) -> None:
    assert torch.load(short / "norm-1.pt").tolist() == [0, 0]


def test_what_it_cannot_do_is_one_line(short: Path) -> None:
    for rank in (0, 1):
        assert "adapt=[chunked] does not work with trainer=fsdp" in (short / f"chunked-{rank}").read_text()
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
