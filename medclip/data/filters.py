"""Filters: small expressions on a sample's metadata, evaluated without ever running Python from a config.

    "Microscopy" in primary_label and license == "commercial" and len(caption) > 20

An expression is parsed to a syntax tree of which only a few node kinds are allowed; names are fields of the metadata
(dots reach into nested ones), so there is nothing to escape to. A missing field is None, and None never errs: it equals
only None, is in nothing and holds nothing, every `<` with it is false, arithmetic with it is None, its `len` is 0. The
same goes for values of unfit types ("a" < 3 is false).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from medclip.types import UserError

Value = Callable[[Mapping[str, Any]], Any]
ALIASES = {
    "primary_label": "image_primary_label",
    "secondary_label": "image_secondary_label",
    "panel_type": "image_panel_type",
    "license": "article_license",
    "licence": "article_license",
    "journal": "article_journal",
    "title": "article_title",
    "date": "article_date",
}
_MAX_LENGTH = 4000
_MAX_NAMES = 50
_MAX_DEPTH = 100  # each level takes a few frames of the stack, and who calls has some already
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDER: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def lookup(meta: Mapping[str, Any], name: str) -> Any:
    """Field `name` of `meta`, or None: as it is written, under its alias, or along its dots."""
    if name in meta:
        return meta[name]
    if name in ALIASES and ALIASES[name] in meta:
        return meta[ALIASES[name]]
    head, dot, rest = name.partition(".")
    inner = meta.get(head) if dot else None
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def has_field(meta: Mapping[str, Any], name: str) -> bool:
    """Whether `lookup` would find the field, be its value None or not."""
    if name in meta or ALIASES.get(name) in meta:
        return True
    head, dot, rest = name.partition(".")
    inner = meta.get(head) if dot else None
    return isinstance(inner, Mapping) and has_field(inner, rest)


class Filter:
    """A compiled expression; `filter(meta)` is True where a sample stays. `names` are the fields it asks for.

    Raises:
        UserError: the expression is not allowed or not an expression; the message points at the place.
    """

    def __init__(self, text: str) -> None:
        self.text = text.replace("\n", " ").strip()  # several lines in a yaml are one expression
        self.names: set[str] = set()
        if len(self.text) > _MAX_LENGTH:
            raise UserError(
                f"filter of {len(self.text)} characters: {_MAX_LENGTH} at most; use `keep` with a list of keys"
            )
        try:
            tree = ast.parse(self.text, mode="eval")
            if _depth(tree) > _MAX_DEPTH:
                raise self._refuse(f"more than {_MAX_DEPTH} levels deep", 0)
            self._value = self._compile(tree.body)
        except SyntaxError as error:
            raise self._refuse(error.msg, (error.offset or 1) - 1) from None
        except (RecursionError, MemoryError, ValueError) as error:
            raise self._refuse(f"too deep or malformed ({type(error).__name__})", 0) from None
        if len(self.names) > _MAX_NAMES:
            raise UserError(f"filter with {len(self.names)} fields: {_MAX_NAMES} at most")

    def __call__(self, meta: Mapping[str, Any]) -> bool:
        return bool(self._value(meta))

    def __reduce__(self) -> tuple[Any, ...]:
        return Filter, (self.text,)

    def _refuse(self, why: str, column: int) -> UserError:
        shown = f"{self.text[:column]}⟨here⟩{self.text[column:]}"
        return UserError(
            f'bad filter: {why}, at {shown!r}: write e.g. "Microscopy" in primary_label and len(caption) > 20'
        )

    def _compile(self, node: ast.expr) -> Value:
        """`node` as a function of the metadata."""
        match node:
            case ast.Constant(value=str() | int() | float() | bool() | None as constant):
                return lambda meta: constant
            case ast.Name() | ast.Attribute():
                return self._field(node)
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                items = [self._compile(element) for element in elements]
                return lambda meta: [item(meta) for item in items]
            case ast.BoolOp(op=op, values=values):
                parts = [self._compile(value) for value in values]
                until = isinstance(op, ast.Or)
                return lambda meta: _either(parts, until, meta)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self._compile(operand)
                return lambda meta: not inner(meta)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self._compile(operand)
                return lambda meta: _arithmetic(operator.sub, 0, inner(meta))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                first, act, second = self._compile(left), _ARITHMETIC[type(op)], self._compile(right)
                return lambda meta: _arithmetic(act, first(meta), second(meta))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                values = [self._compile(value) for value in (left, *comparators)]
                tests = [_TESTS[type(op)] for op in ops]
                return lambda meta: _chain([value(meta) for value in values], tests)
            case ast.Subscript(value=value, slice=slice_) if not isinstance(slice_, ast.Slice):
                inner, place = self._compile(value), self._compile(slice_)
                return lambda meta: _item(inner(meta), place(meta))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                arity, function = _FUNCTIONS[name]
                if len(args) != arity or any(isinstance(arg, ast.Starred) for arg in args):
                    raise self._refuse(f"{name} takes {arity} value{'s' * (arity > 1)}", node.col_offset)
                given = [self._compile(arg) for arg in args]
                return lambda meta: function(*(value(meta) for value in given))
            case ast.Call():
                raise self._refuse(f"only {', '.join(_FUNCTIONS)} may be called", self._column(node))
        raise self._refuse(f"{type(node).__name__} is not allowed", self._column(node))

    def _field(self, node: ast.expr) -> Value:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise self._refuse("dots are only for the names of fields", self._column(node))
        parts.append(inner.id)
        if any(part.startswith("__") for part in parts):
            raise self._refuse("names with __ are not allowed", self._column(node))
        name = ".".join(reversed(parts))
        self.names.add(name)
        return lambda meta: lookup(meta, name)

    def _column(self, node: ast.expr) -> int:
        # ast counts bytes of UTF-8.
        return len(self.text.encode()[: node.col_offset].decode("utf-8", "ignore"))


def _depth(tree: ast.AST) -> int:
    level, depth = [tree], 0
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth


def _arithmetic(act: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    """None unless both are numbers; so no text is multiplied to gigabytes either."""
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return None
    try:
        return act(first, second)
    except (ZeroDivisionError, OverflowError):
        return None


def _either(parts: list[Value], until: bool, meta: Mapping[str, Any]) -> Any:
    """Python's `or` (until=True) and `and`: the first value that decides, so that `(a or b) == "x"` works."""
    value = None
    for part in parts:
        value = part(meta)
        if bool(value) is until:
            break
    return value


def _chain(values: list[Any], tests: list[Callable[[Any, Any], bool]]) -> bool:
    return all(test(values[i], values[i + 1]) for i, test in enumerate(tests))


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def test(first: Any, second: Any) -> bool:
        try:
            return bool(compare(first, second))
        except TypeError:
            return False

    return test


def _within(item: Any, box: Any) -> bool:
    if isinstance(box, str):
        return isinstance(item, str) and item in box
    if isinstance(box, Mapping):
        return isinstance(item, str) and item in box
    return isinstance(box, list) and item in box


def _item(value: Any, place: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get(place) if isinstance(place, str) else None
    if isinstance(value, list | str) and isinstance(place, int) and -len(value) <= place < len(value):
        return value[place]
    return None


def _lower(value: Any) -> Any:
    if isinstance(value, list):
        return [_lower(item) for item in value]
    return value.lower() if isinstance(value, str) else value


def _iterated(function: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: function(value) if isinstance(value, list) else bool(value)


_TESTS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: _within,
    ast.NotIn: lambda a, b: not _within(a, b),
    **{kind: _ordered(compare) for kind, compare in _ORDER.items()},
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, lambda value: len(value) if isinstance(value, str | list | Mapping) else 0),
    "lower": (1, _lower),
    "any": (1, _iterated(any)),
    "all": (1, _iterated(all)),
    "startswith": (2, lambda a, b: isinstance(a, str) and isinstance(b, str) and a.startswith(b)),
    "endswith": (2, lambda a, b: isinstance(a, str) and isinstance(b, str) and a.endswith(b)),
}
