"""Samples that cannot be used: the exception that readers raise, with a short reason that is counted and listed."""

from __future__ import annotations


class BadSample(Exception):
    """One sample cannot be used; the run skips it, counts it and lists it in `skipped.jsonl`.

    `reason` is a short stable class ("broken image", "over pixel limit", "missing image", "missing caption",
    "empty caption", "truncated tar", "read error"…), `detail` what a person needs to mend it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args, so that the exception crosses process borders
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
