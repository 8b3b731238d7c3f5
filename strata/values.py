"""One value at a time: text from the command line to a typed value, and any value to the type a field declares."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from strata.options import describe, split_optional

LARGEST = 2**63 - 1
"""Of an integer option."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A value still in the words of the command line; its field's type decides what it means."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Mismatch(Exception):
    """The value does not fit the type; the message says what was expected."""


def coerce(value: Any, hint: Any) -> Any:
    """Turn `value` into the type `hint`, or raise `Mismatch`.

    Integers may be written `10_000`, `1e3` or `2.0`, but not `1.5`, and have at most 64 bits; a boolean is never taken for
    a number; lists become tuples; None passes only where the field is optional.
    """
    inner, optional = split_optional(hint)
    if isinstance(value, Text):
        if value.text.strip().lower() in ("none", "null") and (optional or inner is not str):
            value = None
        else:
            value = _parse(value.text, inner)
    if value is None:
        if optional:
            return None
        raise Mismatch(f"expected {describe(hint)}, not None")
    if typing.get_origin(inner) is tuple:
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise Mismatch(f"expected {describe(hint)}")
        element = typing.get_args(inner)[0]
        return tuple(coerce(item, element) for item in value)
    if inner is dict:
        if not isinstance(value, Mapping):
            raise Mismatch(f"expected {describe(hint)}")
        return plain(value)
    if inner is bool and isinstance(value, bool):
        return value
    if inner is str and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of a command line or a file name that are not UTF-8
            raise Mismatch("expected text; this has bytes in it that are not UTF-8") from None
        return value
    if inner in (int, float) and not isinstance(value, (bool, str)) and hasattr(value, "__float__"):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if inner is float:
            if not math.isfinite(number):
                raise Mismatch("expected a finite number")
            return number
        if abs(value if isinstance(value, int) else number) > LARGEST:
            raise Mismatch("expected an integer of at most 64 bits")
        if isinstance(value, int):
            return value
        if number.is_integer():
            return int(number)
    raise Mismatch(f"expected {describe(hint)}")


def _parse(text: str, inner: Any) -> Any:
    """Command-line text to a raw value for the type `inner`."""
    stripped = text.strip()
    if inner is str:
        quoted = len(stripped) >= 2 and stripped[0] == stripped[-1] and stripped[0] in "'\""
        return stripped[1:-1] if quoted else text
    if inner is bool:
        known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
        return known.get(stripped.lower(), stripped)
    if inner in (int, float):
        digits = re.sub(r"(?<=\d)_(?=\d)", "", stripped)
        for kind in (int, float):
            try:
                return kind(digits)
            except ValueError:
                continue
        return stripped
    literal = read_literal(stripped)
    if typing.get_origin(inner) is tuple:
        element = typing.get_args(inner)[0]
        if isinstance(literal, str):
            # Not a literal: words without quotes, as in `a,b` or `[a, b]`.
            inside = literal[1:-1] if literal[:1] + literal[-1:] in ("[]", "()") else literal
            literal = [part.strip() for part in inside.split(",") if part.strip()]
        elif not isinstance(literal, (list, tuple)):
            literal = [literal]
        return [Text(item) if isinstance(item, str) and element is not str else item for item in literal]
    return literal


def read_literal(text: str) -> Any:
    """A JSON or Python literal, or the text itself when it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def plain(value: Any) -> Any:
    """Nested dicts, lists and JSON scalars, whatever mapping or sequence types came in."""
    if hasattr(value, "to_dict"):  # ml_collections.ConfigDict, which resolves field references
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, float, str, Text)) or value is None:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return value.item()
    raise Mismatch(f"expected a plain value, not {type(value).__name__}")
