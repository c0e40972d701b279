"""What every reader process of ours needs: one thread, no ears for signals, batches handed on as they are."""

from __future__ import annotations

import signal
from typing import Any

import cv2
import torch


def as_is(item: Any) -> Any:
    """A `collate_fn` for readers that make whole batches themselves."""
    return item


def one_thread(worker: int) -> None:
    """A `worker_init_fn`. Workers are the parallelism; library threads inside them would only fight.

    Signals are the main process's affair: it finishes its step and saves, for which the workers must live on. They
    leave with it, since torch's worker loop watches its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
