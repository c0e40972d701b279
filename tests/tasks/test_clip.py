"""The contrastive task on a real, tiny open_clip model under a real Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import pytorch_lightning as pl
import torch

from medclip.callbacks.storage import AtomicCheckpointIO
from medclip.losses.clip import ClipLoss
from medclip.losses.siglip import SiglipLoss
from medclip.models.clip import Clip
from medclip.optim.adamw import adamw
from medclip.optim.schedule import warmup_cosine
from medclip.tasks.base import first_difference
from medclip.tasks.clip import ClipTask
from medclip.types import Preprocess, UserError

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "patch_dropout": 0.5}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def tiny_task(description: dict[str, Any] | None = None, **options: Any) -> ClipTask:
    torch.manual_seed(0)
    net = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, init_logit_bias=-1.0)
    model = Clip(net, Preprocess(size=(32, 32)), tokenizer=None, description=description or {"architecture": "tiny"})
    options = {"losses": {"contrastive": ClipLoss()}, **options}
    return ClipTask(
        model,
        optimizer=lambda named: adamw(named, lr=1e-2),
        schedule=lambda optimizer, total: warmup_cosine(optimizer, total, warmup=2),
        **options,
    )


def batch(number: int, n: int = 6, rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 64, (rows, 8), generator=generator)
    image[n:] = 0
    text[n:] = 0
    return {"image": image, "text": text, "key": [f"{number}-{row}" for row in range(n)]}


class Loader:
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Stream(pl.LightningDataModule):
    """Numbered batches whose position is in the checkpoint, as the real data module's is."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        super().__init__()
        self.batches, self.position = batches, 0

    def train_dataloader(self) -> Stream:
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "gradient_clip_val": 1.0, "logger": False, **quiet, **options}
    plugins = [AtomicCheckpointIO()]
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), plugins=plugins, **options)


class SaveAndDie(pl.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_exact(tmp_path, precision):
    """Patch dropout, warm-up, clipping, fused AdamW: a resumed run ends with the uninterrupted run's bits."""
    batches = [batch(number) for number in range(6)]
    whole = tiny_task()
    trainer(tmp_path, precision=precision).fit(whole, Stream(batches))

    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, SaveAndDie(path, 3), precision=precision).fit(tiny_task(), Stream(batches))
    torch.manual_seed(12345)
    resumed = tiny_task()
    trainer(tmp_path, precision=precision).fit(resumed, Stream(batches), ckpt_path=str(path))

    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(whole.model.net.visual.proj, tiny_task().model.net.visual.proj)


def test_random_draws_differ_between_steps_not_between_runs():
    task = tiny_task()
    task.train()
    task.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    task.log_dict = lambda *args, **kwargs: None  # logging wants a running loop
    first, again, other = (task.training_step(batch(0), step).item() for step in (0, 0, 1))
    assert first == again != other


def test_learns(tmp_path):
    """Twelve pairs seen thirty times are told apart."""
    task = tiny_task()
    pairs = batch(1, 12, 12)
    task.eval()
    before = task.score(pairs)[2].item()
    trainer(tmp_path).fit(task, Stream([pairs] * 40))
    task.eval()
    assert before > 2.0 > 0.7 > task.score(pairs)[2].item()


def test_padding_changes_nothing():
    task = tiny_task(losses={"contrastive": ClipLoss(), "sigmoid": SiglipLoss()}).eval()
    padded, real = batch(3, 4, 6), batch(3, 4, 6)
    real["image"], real["text"] = real["image"][:4], real["text"][:4]
    torch.testing.assert_close(task.score(padded)[2], task.score(real)[2])


def test_weights():
    pairs = batch(4)
    both = {"contrastive": ClipLoss(), "sigmoid": SiglipLoss()}
    _, terms, total = tiny_task(losses=both, weights={"sigmoid": 0.25}).eval().score(pairs)
    assert total.item() == pytest.approx(terms["contrastive"].item() + 0.25 * terms["sigmoid"].item(), rel=1e-6)
    with pytest.raises(UserError, match=r"\['typo'\].*\['contrastive', 'sigmoid'\]"):
        tiny_task(losses=both, weights={"typo": 1.0})
    with pytest.raises(UserError, match="no loss term"):
        tiny_task(losses={})


def test_wholly_bad_batch_teaches_nothing_and_breaks_nothing(tmp_path):
    task = tiny_task()
    trainer(tmp_path).fit(task, Stream([batch(0), batch(1, 0, 6), batch(2)]))
    assert all(p.isfinite().all() for p in task.parameters())
    out, terms, total = task.score(batch(1, 0, 6))
    assert (len(out.image_features), terms, total.item()) == (0, {}, 0.0)
    task.zero_grad()
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters())


def test_logit_scale_is_clamped_in_the_checkpoint_too(tmp_path):
    task = tiny_task()
    with torch.no_grad():
        task.model.logit_scale.fill_(10.0)
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, SaveAndDie(path, 1)).fit(task, Stream([batch(0), batch(1)]))
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"]["model.net.logit_scale"].item() == pytest.approx(math.log(100))
    assert saved["medclip"] == {"architecture": "tiny"}


def test_resume_with_another_model_is_refused_in_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, SaveAndDie(path, 1)).fit(tiny_task(), Stream([batch(0), batch(1)]))
    other = tiny_task(description={"architecture": "ViT-B-16"})
    with pytest.raises(UserError, match=r"architecture: 'tiny' there, 'ViT-B-16' here") as error:
        trainer(tmp_path).fit(other, Stream([batch(0), batch(1)]), ckpt_path=str(path))
    assert "\n" not in str(error.value)


def test_validation_scores_what_training_scores(tmp_path):
    task = tiny_task().eval()
    pairs = batch(5, 5, 6)
    found = trainer(tmp_path).validate(task, Loader([pairs]), verbose=False)[0]
    out, _, total = task.score(pairs)
    assert found["val/loss"] == pytest.approx(total.item(), rel=1e-5)
    nearest = (out.image_features @ out.text_features.T).argmax(1)
    assert found["val/image_to_text_r1"] == pytest.approx((nearest == torch.arange(5)).float().mean().item())


def test_endless_training_is_refused(tmp_path):
    with pytest.raises(UserError, match="never end"):
        trainer(tmp_path, max_epochs=-1).fit(tiny_task(), Stream([batch(0)]))


def test_first_difference():
    assert first_difference({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == ""
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b: 1 there, 2 here"
    assert len(first_difference({"files": "x" * 10**6}, {"files": "y" * 10**6})) < 200  # a whole tokenizer.json
    assert first_difference(None, {"a": 1}) == "description: None there, {'a': 1} here"


def test_a_checkpoint_is_judged_by_its_model_not_by_the_path_it_came_from():
    task = tiny_task({"origin": "models/x", "model_cfg": {"embed_dim": 16}})
    task.on_load_checkpoint({"medclip": {"origin": "/mount/models/x", "model_cfg": {"embed_dim": 16}}})
    with pytest.raises(UserError, match="embed_dim: 32 there, 16 here"):
        task.on_load_checkpoint({"medclip": {"origin": "models/x", "model_cfg": {"embed_dim": 32}}})
    with pytest.raises(UserError, match="another model"):
        task.on_load_checkpoint({})
