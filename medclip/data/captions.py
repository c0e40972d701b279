"""Which text a sample is trained or asked with: a field, a random one of several, or sentences that fit the context.

Long captions lose their end at the context length, always the same end. `fit: random` shows another contiguous run of
whole sentences each time instead; `fit: lead` keeps the first whole sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.filters import lookup
from medclip.data.raw import RawSample
from medclip.types import UserError

_TEXT = "txt"  # as a field: the text member (shards), caption column (tables) or .txt file (folders)
_NONE = "no caption found"  # what BIOMEDICA's extraction wrote where a figure had none
# After a full stop that is no decimal point or initial, before something that begins a sentence.
_SENTENCE = re.compile(r"(?<=[.!?;])(?<!\b[A-Z]\.)(?<!\bFig\.)(?<!\bet al\.)\s+(?=[\"'(\[]?[A-Z0-9])")


class Counter(Protocol):
    """The part of a tokenizer that fitting needs."""

    context_length: int

    def count(self, text: str) -> int: ...  # tokens with start and end, uncut


@dataclass(frozen=True)
class CaptionRule:
    """How a source's captions are made.

    Args:
        fields: metadata fields (dots reach into nested ones), or `txt`; a field may hold a list of texts.
        choose: `random` one of those present, the `first`, or `all` joined by a space.
        fit: cut to whole sentences that fit the tokenizer's context: `lead` or `random`; None leaves cutting to it.
        wanted: False where captions are not needed (labelled sets).
        lines: every line of a text is a caption of its own, as in CLIP_benchmark's retrieval sets.
    """

    fields: tuple[str, ...] = (_TEXT,)
    choose: str = "first"
    fit: str | None = None
    wanted: bool = True
    lines: bool = False

    def __post_init__(self) -> None:
        if self.choose not in ("random", "first", "all"):
            raise UserError(f"caption.choose is {self.choose!r}: use random, first or all")
        if self.fit not in (None, "lead", "random"):
            raise UserError(f"caption.fit is {self.fit!r}: use lead or random")
        if not self.fields:
            raise UserError("caption.fields is empty: name at least one field")

    @classmethod
    def parse(cls, config: CaptionRule | Mapping[str, Any] | Sequence[str] | str | bool | None) -> CaptionRule:
        """From a config: a field's name, several, `{field | fields, choose, fit, lines}`, or False for none.

        Raises:
            UserError: an unknown key or value.
        """
        if isinstance(config, CaptionRule):
            return config
        if config is None or config is True:
            return cls()
        if config is False:
            return cls(wanted=False)
        if isinstance(config, str):
            return cls((config,))
        if not isinstance(config, Mapping | Sequence):
            raise UserError(f"caption is {config!r}: give a field's name, several, or false for none")
        if not isinstance(config, Mapping):
            config = {"fields": config}
        if unknown := set(config) - {"field", "fields", "choose", "fit", "lines"}:
            raise UserError(f"caption has unknown keys {sorted(unknown)}: use field, fields, choose, fit and lines")
        given = config.get("fields", config.get("field", _TEXT))
        fields = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        fit = {True: "random", False: None}.get(config["fit"], config["fit"]) if "fit" in config else None
        lines = bool(config.get("lines", False))
        choose = config.get("choose", "random" if len(fields) > 1 or lines else "first")
        return cls(tuple(map(str, fields)), choose, fit, lines=lines)

    @property
    def needs_text(self) -> bool:
        """Whether the text member alone decides if there is a caption."""
        return self.wanted and self.fields == (_TEXT,)

    @property
    def takes_text(self) -> bool:
        """Whether the text member is one of the texts."""
        return _TEXT in self.fields

    @property
    def needs_meta(self) -> bool:
        return self.wanted and self.fields != (_TEXT,)

    def all(self, raw: RawSample) -> list[str]:
        """Every caption of a sample, cleaned, in the order of `fields`; doubles are left out."""
        texts: dict[str, None] = {}
        for field in self.fields:
            value = raw.text if field == _TEXT else lookup(raw.meta or {}, field)
            for item in value if isinstance(value, list) else [value]:
                for part in str(item).splitlines() if self.lines else [str(item)]:
                    if item is not None and (text := clean(part)):
                        texts[text] = None
        return list(texts)

    def pick(self, raw: RawSample, rng: np.random.Generator, tokenizer: Counter | Any | None = None) -> str:
        """The caption to train with this time.

        Raises:
            BadSample: the sample has none.
        """
        texts = self.all(raw)
        if not texts:
            where = ", ".join(self.fields)
            if raw.text is None and self.needs_text:
                raise BadSample("missing caption", f"no {where}")
            raise BadSample("empty caption", f"nothing in {where}")
        if self.choose == "all":
            text = " ".join(texts)
        else:
            text = texts[int(rng.integers(len(texts)))] if self.choose == "random" and len(texts) > 1 else texts[0]
        if self.fit is None or tokenizer is None:
            return text
        return fit_sentences(text, tokenizer.count, tokenizer.context_length, rng if self.fit == "random" else None)


def clean(text: str) -> str:
    """White space collapsed; empty if the text only says that there is none."""
    text = " ".join(text.split())
    return "" if text.lower().rstrip(".") == _NONE else text


def sentences(text: str) -> list[str]:
    return _SENTENCE.split(text)


def fit_sentences(text: str, count: Callable[[str], int], limit: int, rng: np.random.Generator | None = None) -> str:
    """Whole sentences of `text` in a row, as many as `limit` tokens hold.

    Args:
        text: cleaned caption.
        count: tokens of a text.
        limit: most tokens allowed.
        rng: draws the sentence to begin with, uniformly; None begins with the first. Room left after the last sentence
            is filled with those before.

    Returns:
        The run; a single sentence that is too long comes whole, to be cut by the tokenizer.
    """
    if count(text) <= limit:
        return text
    pieces = sentences(text)
    first = int(rng.integers(len(pieces))) if rng is not None else 0
    last = first + 1
    while last < len(pieces) and count(" ".join(pieces[first : last + 1])) <= limit:
        last += 1
    while last == len(pieces) and first > 0 and count(" ".join(pieces[first - 1 : last])) <= limit:
        first -= 1
    return " ".join(pieces[first:last])
