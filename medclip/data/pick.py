"""One value out of a sample's metadata: its label, or what it is grouped by.

label: dx                                             # a field; dots reach inside
label: {one_of: [NC, G3, G4, G5]}                     # the only one of these columns that holds 1 (SICAPv2)
label: {field: image, pattern: '-\\[(\\d)'}           # what a pattern finds in a field: its first group (WSSS4LUAD)
label: {field: WSI label, values: {N: BT, PB: BT}}    # a field's values by other names, several by one (BRACS)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medclip.data.bad import BadSample
from medclip.data.filters import lookup
from medclip.types import UserError


@dataclass(frozen=True)
class Pick:
    """How a value is found; see above.

    Args:
        role: "label" or "group", in messages.
        fields: that it needs.
        one_of: whether it is the name of the field that holds 1.
        pattern: what is sought in the field; None for all of it.
        values: value in the field -> the value it stands for; None where each stands for itself.
    """

    role: str
    fields: tuple[str, ...]
    one_of: bool = False
    pattern: re.Pattern[str] | None = None
    values: Mapping[str, str] | None = None

    @classmethod
    def parse(cls, role: str, config: str | Mapping[str, Any] | None) -> Pick | None:
        """From a config; None for none.

        Raises:
            UserError: another form, or a pattern that is none.
        """
        if config is None or isinstance(config, str):
            return None if config is None else cls(role, (config,))
        keys = set(config) if isinstance(config, Mapping) else set()
        if keys == {"one_of"} and len(config["one_of"]) > 1:
            return cls(role, tuple(map(str, config["one_of"])), one_of=True)
        if keys == {"field", "values"} and isinstance(config["values"], Mapping) and config["values"]:
            values = {str(value): str(other) for value, other in config["values"].items()}
            return cls(role, (str(config["field"]),), values=values)
        if keys != {"field", "pattern"}:
            raise UserError(
                f"{role} is {config!r}: give a field, {{one_of: [columns]}}, {{field: F, pattern: P}} or {{field: F, "
                "values: {VALUE: OTHER}}"
            )
        try:
            return cls(role, (str(config["field"]),), pattern=re.compile(str(config["pattern"])))
        except re.error as error:
            raise UserError(f"{role}.pattern {config['pattern']!r} is no regular expression: {error}") from None

    def __call__(self, fields: Mapping[str, Any]) -> str:
        """The value in one sample's metadata.

        Raises:
            BadSample: there is none, or more than one.
        """
        if self.one_of:
            found = [name for name in self.fields if str(lookup(fields, name)) in ("1", "1.0", "True", "true")]
            if len(found) != 1:
                raise BadSample(f"missing {self.role}", f"{len(found)} of {', '.join(self.fields)} are 1")
            return found[0]
        value = lookup(fields, self.fields[0])
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or isinstance(value, list | Mapping):
            raise BadSample(f"missing {self.role}", f"{self.fields[0]} is {str(value)[:80]}, not one value")
        if self.values is not None and str(value) not in self.values:
            raise BadSample(f"missing {self.role}", f"{self.fields[0]} is {str(value)[:80]}, none of its values")
        if self.pattern is None:
            return str(value) if self.values is None else self.values[str(value)]
        found = self.pattern.search(str(value))
        if found is None:
            raise BadSample(f"missing {self.role}", f"{self.pattern.pattern!r} is not in {str(value)[:80]!r}")
        return next((group for group in found.groups() if group is not None), found[0])
