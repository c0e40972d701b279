"""A step with a NaN changes nothing: the run is, to the bit, the one whose data never had that batch."""

from __future__ import annotations

import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medclip.callbacks.nonfinite import NonFiniteGuard
from medclip.types import UserError

NAN = float("nan")
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


class Net(pl.LightningModule):
    """A linear layer after a batch norm; a row's value is in every feature."""

    def __init__(self, optimizer: Any = OPTIMIZERS["fused"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.net(batch["rows"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Rows:
    """Batches of four rows, by number; those in `broken` have one NaN."""

    def __init__(self, numbers: range | list[int], broken: tuple[int, ...] = ()) -> None:
        self.numbers, self.broken = list(numbers), broken

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self):
        for number in self.numbers:
            rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            if number in self.broken:
                rows[1, 2] = NAN
            yield {"rows": rows, "key": [f"{number}-{row}" for row in range(4)]}


def fit(folder: Path, data: Rows, *callbacks: pl.Callback, model: Net | None = None, **options: Any) -> pl.Trainer:
    torch.set_num_threads(1)
    options = {"accelerator": "cpu", "gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm", **options}
    trainer = pl.Trainer(
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        **options,
    )
    trainer.fit(model or Net(), data)
    return trainer


def state(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Everything that training carries: weights, batch norm, moments, and the optimiser's own count of steps."""
    found = dict(trainer.lightning_module.state_dict())
    for number, own in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in own.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_the_one_without_that_batch(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Moments and decay too: had any been applied in that step, the later ones would differ."""
    options = {"gradient_clip_val": None} if name == "fused" else {}
    guard = NonFiniteGuard(keys=2)
    broken = fit(tmp_path, Rows(range(6), broken=(3,)), guard, model=Net(OPTIMIZERS[name]), **options)
    without = fit(tmp_path, Rows([0, 1, 2, 4, 5]), model=Net(OPTIMIZERS[name]), **options)
    assert same(state(broken), state(without))
    assert guard.skipped == 1 and guard.in_a_row == 0
    assert capfd.readouterr().err.count("step 3 skipped") == 1


def test_the_guard_is_what_saves_the_run(tmp_path: Path) -> None:
    lost = fit(tmp_path, Rows(range(6), broken=(3,)), gradient_clip_val=None)
    assert dict(lost.lightning_module.named_parameters())["net.1.weight"].isnan().all()


def test_a_sound_run_is_the_same_with_and_without_the_guard(tmp_path: Path) -> None:
    options = {"gradient_clip_val": None}
    assert same(*(state(fit(tmp_path, Rows(range(4)), *with_, **options)) for with_ in ([], [NonFiniteGuard()])))


def test_under_accumulation_the_whole_step_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Batches 2 and 3 are one step; 3 is sound, but what it would be added to is not."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": None}
    broken = fit(tmp_path, Rows(range(6), broken=(2,)), NonFiniteGuard(keys=5), **options)
    assert same(state(broken), state(fit(tmp_path, Rows([0, 1, 4, 5]), **options)))
    assert "samples: 2-0, 2-1, 2-2, 2-3, 3-0 and 3 more" in capfd.readouterr().err


def test_an_infinite_loss_with_sound_gradients_counts_too(tmp_path: Path) -> None:
    class Jump(Net):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + float("inf") if batch_idx == 1 else loss

    options = {"gradient_clip_val": None}
    jumped = fit(tmp_path, Rows(range(4)), NonFiniteGuard(), model=Jump(), **options)
    assert same(state(jumped), state(fit(tmp_path, Rows([0, 2, 3]), **options)))


def test_patience_is_of_steps_in_a_row(tmp_path: Path) -> None:
    options = {"gradient_clip_val": None}
    guard = NonFiniteGuard(patience=3)
    trainer = fit(tmp_path, Rows(range(9), broken=(0, 1, 3, 4, 7)), guard, **options)
    assert guard.skipped == 5 and trainer.callback_metrics["train/skipped_steps"] == 5
    with pytest.raises(UserError, match=r"3 steps in a row .*optim\.lr"):
        fit(tmp_path, Rows(range(9), broken=(2, 4, 5, 6)), NonFiniteGuard(patience=3), **options)
    with pytest.raises(UserError, match="3 steps in a row"):  # known only when the run ends
        fit(tmp_path, Rows(range(5), broken=(2, 3, 4)), NonFiniteGuard(patience=3), **options)


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    """Two in a row before the kill and one after it are three."""
    first = fit(tmp_path, Rows(range(3), broken=(1, 2)), NonFiniteGuard(patience=9), gradient_clip_val=None)
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["NonFiniteGuard"]
    assert saved == {"skipped": 2, "in_a_row": 2}
    again = NonFiniteGuard(patience=3)
    again.load_state_dict(saved)
    with pytest.raises(UserError, match="3 steps in a row"):
        fit(tmp_path, Rows([3, 4], broken=(3,)), again, gradient_clip_val=None)


def test_a_gradient_scaler_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), NAN)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    guard = NonFiniteGuard()
    trainer: Any = SimpleNamespace(scaler=object(), global_step=0)
    guard.on_before_optimizer_step(trainer, Net(), optimizer)
    assert guard._pending is None and not hasattr(optimizer, "found_inf")


def rank_with(rank: int, port: int, folder: Path, broken: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "t"},
    }
    numbers = [rank, 10 + rank, 20 + rank, 30 + rank] if broken else [rank, 20 + rank, 30 + rank]
    guard = NonFiniteGuard()
    # Only rank 1 has the NaN.
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "gradient_clip_val": None}
    trainer = fit(folder, Rows(numbers, broken=(11,) if broken else ()), guard, **options)
    torch.save({**state(trainer), "skipped": torch.tensor(guard.skipped)}, folder / f"{broken}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_skip_together_where_one_has_the_nan(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for broken in (True, False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=rank_with, args=(rank, port, tmp_path, broken)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0, 0]
    found = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert found["True-0"].pop("skipped") == found["True-1"].pop("skipped") == 1
    assert found["False-0"].pop("skipped") == found["False-1"].pop("skipped") == 0
    for rank in (0, 1):  # each rank's batch norm saw rows of its own
        assert same(found[f"True-{rank}"], found[f"False-{rank}"])
    assert torch.equal(found["True-0"]["net.1.weight"], found["True-1"]["net.1.weight"])
