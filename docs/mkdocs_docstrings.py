"""Docstrings as the API reference shows them: a line that begins `name: ..` says a new thing, so it begins a new line."""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMED = re.compile(r"(?<=\S)\n(?=[A-Za-z_]\w*(?:, \w+|/\w+| \[[^\]]*\])*: )")


class Lines(griffe.Extension):
    """Marks where such a line begins."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of every object that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = NAMED.sub("  \n", obj.docstring.value)
