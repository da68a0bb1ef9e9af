"""The exceptions: the tree that is drawn is the tree that is, and messages that help."""

from __future__ import annotations

import re

import pytest

import taciturn  # noqa: F401  (imports the rooms, so that an exception outside of core would show)
from taciturn.core import errors
from taciturn.core.errors import ConfigError, TaciturnError, UnknownName, require, unknown


def drawn() -> dict[str, tuple[str, ...]]:
    """{exception: its bases} as the docstring draws them."""
    bases: dict[str, tuple[str, ...]] = {}
    parents: list[str] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ((?:│   |    )*)(├── |└── )?([A-Z]\w+) *(?:\((\w+)\))?(?:  |$)", line)
        if not found:
            continue
        indent, branch, name, builtin = found.groups()
        depth = len(indent) // 4 + bool(branch)
        parents[depth:] = [name]
        bases[name] = (parents[depth - 1], *([builtin] if builtin else [])) if depth else ("Exception",)
    return bases


def real() -> dict[str, tuple[str, ...]]:
    found, todo = {}, [TaciturnError]
    while todo:
        cls = todo.pop()
        if cls.__module__.startswith("taciturn"):
            found[cls.__name__] = tuple(base.__name__ for base in cls.__bases__)
            todo += cls.__subclasses__()
    return found


def test_the_drawn_tree_is_the_real_tree():
    assert drawn() == real() and len(real()) > 8
    assert all(getattr(errors, name).__doc__ for name in real())


def test_users_can_catch_plain_python_errors():
    with pytest.raises(ValueError):
        raise UnknownName
    with pytest.raises(RuntimeError):
        raise errors.AllClientsFailed


CASES = [
    (("codec", "quantise", ["identity", "quantize"], "method.codec"),
     "method.codec: there is no codec 'quantise'; did you mean 'quantize'? Allowed: identity, quantize"),
    (("engine", "xyz", ["ray", "auto"]), "there is no engine 'xyz'. Allowed: auto, ray"),
    (("part", "sgd", []), "there is no part 'sgd'. Allowed: none"),
    (("part", 7, ["a"], "p"), "p: there is no part 7. Allowed: a"),
    (("solver", "adam", ["adamw", "adams", "sgd"]),
     "there is no solver 'adam'; did you mean 'adamw' or 'adams'? Allowed: adams, adamw, sgd"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[str(case[0][1]) for case in CASES])
def test_unknown_names_say_what_is_near(arguments, message):
    error = unknown(*arguments)
    assert isinstance(error, UnknownName) and str(error) == message


def test_unknown_takes_any_iterable_once():
    assert str(unknown("x", "b", (name for name in ("bb", "a")))).endswith("did you mean 'bb'? Allowed: a, bb")


def test_require():
    require(True, "fine")
    with pytest.raises(ConfigError, match=r"^lr: above 0$"):
        require(False, "lr: above 0")
