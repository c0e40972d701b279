"""A part of a model as plain data, `{"part": "heads.mevf.Mevf", option: value, …}`, and back.

Heads come from the config as functions that lack their sizes (Hydra's `_partial_`); what they are is written to the
checkpoint and read from there again. A checkpoint may come from anywhere: it can name modules (nn.Module) of
medclip.heads and medclip.models, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from medclip.types import UserError

_NAME = re.compile(r"((?:heads|models)\.[a-z_0-9]+)\.([A-Za-z_0-9]+)")


def describe(part: Any) -> Any:
    """A partial module as plain data; anything else is handed back."""
    if not isinstance(part, partial):
        return part
    return {"part": name_of(part.func), **{key: describe(value) for key, value in part.keywords.items()}}


def find(description: Any) -> Any:
    """The inverse of `describe`.

    Raises:
        UserError: a name that is no module of medclip.heads or medclip.models.
    """
    if not isinstance(description, Mapping) or "part" not in description:
        return description
    options = {str(key): find(value) for key, value in description.items() if key != "part"}
    return partial(named(description["part"]), **options)


def rebuild(description: Mapping[str, Any]) -> nn.Module:
    """A whole part, by its class's `from_description`.

    Raises:
        UserError: see `find`.
    """
    made: Any = named(description["part"])
    return made.from_description({key: value for key, value in description.items() if key != "part"})


def name_of(made: Any) -> str:
    """What `named` finds a class by."""
    return f"{made.__module__.removeprefix('medclip.')}.{made.__qualname__}"


def named(name: Any) -> type[nn.Module]:
    """The class of that name.

    Raises:
        UserError: see `find`.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    try:
        found = getattr(import_module(f"medclip.{match[1]}"), match[2]) if match else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("medclip.")):
        raise UserError(f"the checkpoint names a part {name!r}, which this version of medclip does not have")
    return found
