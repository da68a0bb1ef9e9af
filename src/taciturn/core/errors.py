"""The exceptions of taciturn, and the sentence they speak.

    TaciturnError
    ├── ConfigError (ValueError)      an experiment, a TOML file or an argument is wrong
    │   └── UnknownName               a name that is not in its table; says the nearest valid ones
    ├── MethodError (ValueError)      parts that make no sense together
    ├── ModelError  (ValueError)      a model that cannot be trained as asked, with the remedy
    ├── DataError   (ValueError)      an empty client, a missing file, a column that is not there
    ├── WireError   (ValueError)      bytes that are not a message of ours
    └── RunError    (RuntimeError)    a run folder, a checkpoint or a round that failed
        ├── RunLocked                 another process writes to the run folder
        └── AllClientsFailed          no client of a round returned a finite update

Every message says what was given, what is allowed, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TaciturnError(Exception):
    """Base of all exceptions that taciturn raises on purpose."""


class ConfigError(TaciturnError, ValueError):
    """An experiment, a TOML file or an argument is wrong; the message names the path of the value."""


class UnknownName(ConfigError):
    """A name that is not in its table."""


class MethodError(TaciturnError, ValueError):
    """Parts that make no sense together."""


class ModelError(TaciturnError, ValueError):
    """A model that cannot be trained as asked; the message holds the remedy."""


class DataError(TaciturnError, ValueError):
    """Data that cannot be used: an empty client, a missing file or column."""


class WireError(TaciturnError, ValueError):
    """Bytes that are not a message of this format, version, run or schema."""


class RunError(TaciturnError, RuntimeError):
    """A run folder, a checkpoint or a round that failed."""


class RunLocked(RunError):
    """Another process writes to the run folder."""


class AllClientsFailed(RunError):
    """No client of a round returned a finite update."""


def unknown(what: str, given: object, allowed: Iterable[str], where: str = "") -> UnknownName:
    """The error for a name that is not in its table, with the nearest valid names first.

    >>> str(unknown("codec", "quantise", ["identity", "quantize"], "method.codec"))
    "method.codec: there is no codec 'quantise'; did you mean 'quantize'? Allowed: identity, quantize"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else "."
    place = f"{where}: " if where else ""
    return UnknownName(f"{place}there is no {what} {given!r}{hint} Allowed: {', '.join(names) or 'none'}")


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
