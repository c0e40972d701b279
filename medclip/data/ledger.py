"""The record of what could not be used: counted, listed by key in `skipped.jsonl`, and limited.

A run that silently loses a third of its data still ends with a plausible loss; so the share of bad samples has a
limit, and past it the run stops with the reasons counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import orjson

from medclip.types import UserError

Bad = tuple[str, str, str]  # key, reason, detail


class Ledger:
    """Counts bad samples against good ones; `path=None` keeps the list in memory only.

    Args:
        path: `skipped.jsonl`; appended to by whole lines, so that ranks may share it and a resumed run goes on.
        max_bad_fraction: the run stops once more than this share of the samples seen was bad.
        grace: samples to see before the share is judged, so that one bad sample among the first ten stops nothing.
    """

    def __init__(self, path: Path | None, *, max_bad_fraction: float, grace: int = 500) -> None:
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self.grace = grace
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.keys: set[str] = set()
        if path is not None and path.exists():
            # A line that a killed run left unfinished is passed over; its sample is met again.
            for line in path.read_bytes().splitlines():
                try:
                    self.keys.add(orjson.loads(line)["key"])
                except (orjson.JSONDecodeError, KeyError, TypeError):
                    continue

    @property
    def bad(self) -> int:
        return sum(self.reasons.values())

    def add(self, bad: Iterable[Bad], *, seen: int) -> None:
        """Record the bad among `seen` samples just met.

        Raises:
            UserError: more than `max_bad_fraction` of all samples seen is bad.
        """
        self.seen += seen
        lines = b""
        for key, reason, detail in bad:
            self.reasons[reason] += 1
            if key not in self.keys:
                self.keys.add(key)
                lines += orjson.dumps({"key": key, "reason": reason, "detail": detail[:500]}) + b"\n"
        if lines and self.path is not None:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, lines)
            finally:
                os.close(descriptor)
        self.check()

    def check(self, *, final: bool = False) -> None:
        """Judge the share of bad samples; `final` judges it before `grace` is over too."""
        if (self.seen >= self.grace or final) and self.bad > self.max_bad_fraction * self.seen:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common(4))
            where = f"; listed in {self.path}" if self.path is not None else ""
            raise UserError(
                f"{self.bad} of {self.seen} samples are bad ({reasons}), more than data.max_bad_fraction="
                f"{self.max_bad_fraction}{where}: mend the source, or raise the limit"
            )
