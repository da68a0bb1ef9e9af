"""Parts and values as words: "rotated(codec=quantize4, block=64)" on a command line.

>>> spelled("quantize(bits=4, scale=block)", "--codecs")
{'name': 'quantize', 'bits': 4, 'scale': 'block'}
>>> spelled("0.5", ""), spelled("true", ""), spelled("ptq3", ""), spelled("[ptq3, qat3]", "")
(0.5, True, 'ptq3', ['ptq3', 'qat3'])
"""

from __future__ import annotations

from typing import Any

from taciturn.core.errors import require

_DEEPER = {"(": 1, "[": 1, ")": -1, "]": -1}


def split_list(text: str) -> list[str]:
    """Pieces between the commas that stand outside brackets.

    >>> split_list("a,b(c=1,d=2),[1,2]")
    ['a', 'b(c=1,d=2)', '[1,2]']
    """
    pieces, depth, now = [], 0, ""
    for char in text:
        depth += _DEEPER.get(char, 0)
        if char == "," and depth == 0:
            pieces.append(now)
            now = ""
        else:
            now += char
    return [piece.strip() for piece in (*pieces, now) if piece.strip()]


def spelled(text: str, where: str) -> Any:
    """A part with its fields in brackets -> its table; a list, a number, true, false -> that; else the words. Errors:
    `ConfigError` with the place.
    """
    text = text.strip()
    if text.startswith("["):
        require(text.endswith("]"), f"{where}: {text!r} lacks a closing bracket")
        return [spelled(piece, where) for piece in split_list(text[1:-1])]
    name, bracket, rest = text.partition("(")
    if not bracket:
        return _literal(text)
    require(rest.endswith(")"), f"{where}: {text!r} lacks a closing bracket; write for example quantize(bits=4)")
    table: dict[str, Any] = {"name": name.strip()}
    for piece in split_list(rest[:-1]):
        field, sign, raw = piece.partition("=")
        require(bool(sign), f"{where}: {piece!r} in {text!r}; write field=value, for example quantize(bits=4)")
        table[field.strip()] = spelled(raw, where)
    return table


def _literal(raw: str) -> Any:
    for kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(raw, raw.strip("'\""))
