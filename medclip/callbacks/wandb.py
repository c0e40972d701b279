"""Weights & Biases where it can be reached, an offline run in the run folder where not."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from medclip.callbacks.artifacts import checkpoint_artifact, use
from medclip.callbacks.wandb_log import last_step
from medclip.types import UserError


class RunLogger(WandbLogger):
    """A WandbLogger whose steps are the training's, each of them once, however often the run is killed and resumed.

    W&B's own step is set to the training's, so that all that is logged of a step is one row. A row that an earlier leg
    of the run has written is not written again: online the server drops it, offline the earlier legs' files are read.
    The run is finished with the training, so that the next job of a multirun gets a run of its own.
    """

    _step = 0
    _written: int | None = None  # the last step of earlier legs

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers or media of a step; None is the last one that was named."""
        if self._written is None:
            self._written = last_step(Path(str(self.save_dir)), str(self.version)) if self._offline else -1
        self._step = self._step if step is None else step
        if self._step > self._written:
            self.experiment.log({**metrics, "trainer/global_step": self._step}, step=self._step)

    def log_results(self, records: Iterable[Mapping[str, Any]], checkpoints: Mapping[str, str]) -> None:
        """Log what `medclip evaluate` found, and which checkpoints it was found on; no picture, caption or key.

        Args:
            records: one a checkpoint and evaluation, as in `results.json`.
            checkpoints: name -> where it came from.
        """
        import wandb

        run = self.experiment
        for where in dict.fromkeys(where.removeprefix("random:") for where in checkpoints.values()):
            use(run, checkpoint_artifact(where))
        rows = []
        for record in records:
            for metric, value in record["metrics"].items():
                low, high = record["intervals"].get(metric, (None, None))
                rows.append([record["dataset"], record["model"], metric, *map(_number, (value, low, high))])
                if rows[-1][3] is not None:
                    run.summary[f"results/{record['model']}/{record['dataset']}/{metric}"] = value
        run.log(
            {"results": wandb.Table(columns=["evaluation", "checkpoint", "metric", "value", "low", "high"], data=rows)}
        )
        self.finalize("success")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is pending and end this leg."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = self._written = None


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def wandb_logger(save_dir: str, project: str, name: str | None = None, **options: object) -> RunLogger:
    """A logger that never asks for a login, and that a resumed run continues.

    Offline unless there is a key; `wandb sync` sends such a run later. WANDB_MODE, where set, decides instead.

    Args:
        save_dir: run folder; its `wandb_id` names the run.
        project: W&B project.
        name: of the run on the page.
        **options: of `wandb.init`: entity, group, tags, notes, job_type.

    Raises:
        UserError: wandb is not installed.
    """
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return RunLogger(
            save_dir=str(folder),
            project=project,
            name=name,
            id=_run_id(folder / "wandb_id"),
            offline=offline(),
            log_model=False,
            settings=_settings(),
            **{key: value for key, value in options.items() if value is not None},  # type: ignore[arg-type]
        )
    except ModuleNotFoundError as error:
        raise UserError("logger=wandb needs the wandb package: pip install wandb, or choose logger=[csv]") from error


def _settings() -> dict[str, Any]:
    """A killed run has lost at most two seconds of its log, not W&B's fifteen, where this W&B can be told so."""
    import wandb

    name = "x_transaction_log_flush_interval"
    return {name: 2.0} if name in wandb.Settings.model_fields else {}


def offline() -> bool:
    """Whether runs stay on this machine: by WANDB_MODE, else for want of a key."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode != "online"
    return not has_key()


def has_key() -> bool:
    """Whether WANDB_API_KEY or the user's netrc holds a key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    """The folder's run id, made on first use; in a sweep it is the one that its agent has chosen."""
    if not path.is_file():
        if getattr(rank_zero_only, "rank", 0):  # another rank that starts at the same time; only rank 0 logs
            return ""
        path.write_text(os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex())
    return path.read_text().strip()
