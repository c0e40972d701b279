"""Masked autoencoding and classification under a real Trainer: resumes, padding, ranks, scaled learning rates."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from medclip.tasks.base import Task
from medclip.tasks.rows import RowTask
from medclip.types import UserError
from tests.tasks.rows import Loader, Losses, SaveAndDie, Stream, batch, mae_task, multilabel_task, trainer

TASKS: dict[str, Callable[..., RowTask]] = {"mae": mae_task, "multilabel": multilabel_task}
both = pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_in_mid_epoch_has_the_same_losses_and_weights_to_the_bit(make, precision, tmp_path: Path):
    """Masks and drop path are random: a resumed run draws what the uninterrupted one does."""
    batches = [batch(number) for number in range(6)]
    whole, losses = make(), Losses()
    trainer(tmp_path, losses, precision=precision).fit(whole, Stream(batches))
    path, first, rest = tmp_path / "last.ckpt", Losses(), Losses()
    with pytest.raises(SystemExit):
        trainer(tmp_path, first, SaveAndDie(path, 4), precision=precision).fit(make(), Stream(batches))
    torch.manual_seed(12345)
    resumed = make()
    trainer(tmp_path, rest, precision=precision).fit(resumed, Stream(batches), ckpt_path=str(path))
    assert first.seen + rest.seen == losses.seen and len(set(losses.seen)) == 6
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@both
def test_padding_counts_for_nothing(make):
    task = make().eval()
    padded, real = batch(3, 4, 6), batch(3, 4, 6)
    real["image"], real["label"] = real["image"][:4], real["label"][:4]
    torch.manual_seed(0)
    noise = torch.rand(6, 16)
    if make is mae_task:  # the same masks, whatever is behind
        model, forward = task.model, task.model.forward
        model.forward = lambda given: forward(given, noise[: len(given["image"])])
    torch.testing.assert_close(task.score(padded)[2], task.score(real)[2])


@both
def test_wholly_bad_batch_teaches_nothing_and_breaks_nothing(make, tmp_path: Path):
    task = make()
    trainer(tmp_path).fit(task, Stream([batch(0), batch(1, 0), batch(2)]))
    assert all(p.isfinite().all() for p in task.parameters())
    task.zero_grad()
    _, terms, total = task.score(batch(1, 0))
    total.backward()
    assert terms == {} and total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters() if p.requires_grad)


@both
def test_resume_with_another_model_is_refused_in_one_line(make, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, SaveAndDie(path, 1)).fit(make(), Stream([batch(0), batch(1)]))
    assert torch.load(path, weights_only=True)["medclip"] == make().model.description
    other = mae_task(mask_ratio=0.5) if make is mae_task else multilabel_task(drop_path=0.1)
    says = "mask_ratio: 0.75 there, 0.5 here.*model.pretrained" if make is mae_task else "drop_path.*model.init"
    with pytest.raises(UserError, match=says) as error:
        trainer(tmp_path).fit(other, Stream([batch(0), batch(1)]), ckpt_path=str(path))
    assert "\n" not in str(error.value)


def test_the_checkpoint_of_one_task_is_no_checkpoint_of_the_other(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, SaveAndDie(path, 1)).fit(mae_task(), Stream([batch(0), batch(1)]))
    with pytest.raises(UserError, match="another model"):
        trainer(tmp_path).fit(multilabel_task(), Stream([batch(0), batch(1)]), ckpt_path=str(path))


def peaks(task: Task, folder: Path, **options: int) -> list[float]:
    """Learning rates of all groups that training was set up with."""
    made = trainer(folder, max_steps=1, **options)
    made.fit(task, Stream([batch(number) for number in range(4)]))
    return [group["initial_lr"] for group in made.optimizers[0].param_groups]


def test_the_rate_is_scaled_by_all_samples_of_a_step(tmp_path: Path):
    """blr 1.5e-4 is lr 1.2e-3 at 8 x 256, 2.5e-4 is 1e-3 at 8 x 128: lr = blr * batch / 256."""
    assert peaks(mae_task(lr=1.5e-4), tmp_path) == [1.5e-4] * 2
    assert peaks(mae_task(lr=1.5e-4, lr_batch=256), tmp_path) == pytest.approx([1.5e-4 * 6 / 256] * 2)
    found = peaks(mae_task(lr=1.5e-4, lr_batch=256), tmp_path, accumulate_grad_batches=2)
    assert found == pytest.approx([1.5e-4 * 12 / 256] * 2)
    task = mae_task(lr_batch=256)
    for ranks, size, base, expected in ((8, 256, 1.5e-4, 1.2e-3), (8, 128, 2.5e-4, 1e-3)):
        task.trainer = trainer(tmp_path)
        task.trainer.strategy._lightning_module = task
        data = Stream([])
        data.batch_size = size
        task.trainer._data_connector.attach_datamodule(task, data)
        world = pytest.MonkeyPatch()
        world.setattr(pl.Trainer, "world_size", ranks)
        assert base * task.samples_a_step() / 256 == pytest.approx(expected)
        world.undo()


def test_scaling_needs_a_batch_size(tmp_path: Path):
    with pytest.raises(UserError, match=r"task\.lr_batch=null"):
        trainer(tmp_path).fit(mae_task(lr_batch=256), Loader([batch(0)]))
    with pytest.raises(UserError, match="lr_batch is 0"):
        mae_task(lr_batch=0)


def test_masked_autoencoding_learns(tmp_path: Path):
    """Squares on dark noise are drawn from a quarter of their patches: the loss falls by 40 % and more."""
    task, one = mae_task(lr=1e-2), batch(1, 12, 12)
    found = trainer(tmp_path).validate(task, Loader([one]), verbose=False)[0]["val/loss"]
    trainer(tmp_path).fit(task, Stream([one] * 150))
    after = trainer(tmp_path).validate(task, Loader([one]), verbose=False)[0]["val/loss"]
    assert after < 0.6 * found


def test_masks_differ_between_steps_and_not_between_validations(tmp_path: Path):
    task, losses = mae_task(lr=1e-12), Losses()
    trainer(tmp_path, losses).fit(task, Stream([batch(0)] * 3))
    assert len(set(losses.seen)) == 3
    values = [trainer(tmp_path).validate(task, Loader([batch(0)]), verbose=False)[0]["val/loss"] for _ in range(2)]
    assert values[0] == values[1]


# Two ranks of uneven batches: DDP's gradient and the logged validation are those of one process with all rows.
COUNTS = [(6, 2), (6, 0), (1, 6)]


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for number, counts in enumerate(COUNTS):
        task = multilabel_task(drop_path=0.0)
        task.log_dict = lambda values, batch_size, number=number: found.setdefault(("val", number), values)
        rows = batch(10 * number + rank, counts[rank])
        task.log_validation(*task.score(rows)[1:], counts[rank])
        task.log_dict = lambda *args, **kwargs: None
        optimizer = torch.optim.SGD(task.parameters(), lr=1.0)
        task.optimizers = lambda optimizer=optimizer, **kwargs: optimizer
        task.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        ddp = DistributedDataParallel(Step(task))
        ddp(rows, number).backward()
        found["grad", number] = task.model.net.head.weight.grad
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


class Step(torch.nn.Module):
    """A task's training step as what DDP wraps."""

    def __init__(self, task: RowTask) -> None:
        super().__init__()
        self.model = task.model
        self.step = task.training_step

    def forward(self, rows: dict, number: int) -> torch.Tensor:
        return self.step(rows, number)


@pytest.mark.slow  # two processes import everything
def test_uneven_ranks_equal_one_process(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for number, counts in enumerate(COUNTS):
        task = multilabel_task(drop_path=0.0)
        parts = [batch(10 * number + rank, counts[rank]) for rank in range(2)]
        # By the mean over samples of each rank's mean, weighted by rows: labels unknown differ from rank to rank.
        losses = [task.score(part)[2] * n for part, n in zip(parts, counts, strict=True)]
        total = torch.stack(losses).sum() / sum(counts)
        total.backward()
        torch.testing.assert_close(first["grad", number], task.model.net.head.weight.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(first["grad", number], second["grad", number])
        assert first["val", number]["val/loss"].item() == pytest.approx(total.item(), rel=1e-5)
        assert first["val", number] == second["val", number]
