"""The record of what could not be used: counted, listed by key in `skipped.jsonl`, and limited.

A run that silently loses a third of its data still ends with a plausible loss; so the share of bad samples has a
limit, and past it the run stops with the reasons counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
        self._read = 0  # bytes of the file that are known
        self._whole = True  # whether these end with a line's end
        self._catch_up()

    @property
    def bad(self) -> int:
        return sum(self.reasons.values())

    def add(self, bad: Iterable[Bad], *, seen: int) -> None:
        """Record the bad among `seen` samples just met.

        Raises:
            UserError: more than `max_bad_fraction` of all samples seen is bad.
        """
        self.seen += seen
        bad = list(bad)
        self.reasons.update(reason for _, reason, _ in bad)
        self._list(bad)
        self.check()

    def known(self, bad: Sequence[Bad], *, of: int, list_them: bool = True) -> None:
        """Record what was left out of a source of `of` samples when it was opened; no batch will meet these.

        Raises:
            UserError: that is more than `max_bad_fraction` of them.
        """
        if list_them:
            self._list(bad)
        if len(bad) > self.max_bad_fraction * of:
            raise self._too_many(Counter(reason for _, reason, _ in bad), of)

    def check(self, *, final: bool = False) -> None:
        """Judge the share of bad samples; `final` judges it before `grace` is over too."""
        if (self.seen >= self.grace or final) and self.bad > self.max_bad_fraction * self.seen:
            raise self._too_many(self.reasons, self.seen)

    def _too_many(self, reasons: Counter[str], of: int) -> UserError:
        shown = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(4))
        where = f"; listed in {self.path}" if self.path is not None else ""
        return UserError(
            f"{sum(reasons.values())} of {of} samples are bad ({shown}), more than data.max_bad_fraction="
            f"{self.max_bad_fraction}{where}: mend the source, or raise the limit"
        )

    def _list(self, bad: Sequence[Bad]) -> None:
        if not bad:
            return
        self._catch_up()
        lines = b""
        for key, reason, detail in bad:
            if key not in self.keys:
                self.keys.add(key)
                row = {"key": key, "reason": reason, "detail": detail[:500]}
                # A file's name may hold bytes that are no text, which JSON cannot carry.
                lines += orjson.dumps({k: v.encode("utf-8", "replace").decode() for k, v in row.items()}) + b"\n"
        if lines and self.path is not None:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, lines if self._whole else b"\n" + lines)
            finally:
                os.close(descriptor)

    def _catch_up(self) -> None:
        """Learn what the file says by now: an earlier run's keys, and other ranks'."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            news = file.read()
        if news:
            self._read += len(news)
            self._whole = news.endswith(b"\n")
        for line in news.splitlines():
            # A line that a killed run left unfinished is passed over; its sample is met again.
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                self.keys.add(orjson.loads(line)["key"])
