"""Words of a report in two languages, from one catalogue, and numbers as text that reads alike in both.

    words.toml      key -> a template in each language, with the same fields in both
    say(key, ..)    the templates filled in -> Words
    Words           a text in each language; in the page both stand side by side and one is shown

Names that come from runs are fields, never keys: they stay as they are in every language.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from taciturn.report.tables import human_bytes, human_seconds

LANGUAGES = ("en", "ja")
NONE = "\u2013"
WIDE = "[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"  # kana, kanji and their punctuation
CATALOGUE: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Words:
    """A text in English and in Japanese."""

    en: str
    ja: str

    def of(self, language: str) -> str:
        """The text in one of `LANGUAGES`."""
        return self.en if language == "en" else self.ja

    def __html__(self) -> str:
        """Both languages, escaped, for the page's style to choose from."""
        if self.en == self.ja:
            return str(escape(self.en))
        pairs = (f'<span lang="{name}">{escape(self.of(name))}</span>' for name in LANGUAGES)
        return Markup("").join(map(Markup, pairs))


COMMA, SEMICOLON = Words(", ", "、"), Words("; ", "\uff1b")
Text = Words | str  # a text of the catalogue, or a name or number that is alike in all languages


def plain(text: str) -> Words:
    """A name or a number as it is."""
    return Words(text, text)


def say(key: str, /, **fields: Text | int) -> Words:
    """The text of a key with its fields filled in; where n is 1, English takes the template `one`, if there is one.

    >>> say("rounds", n=1).en, say("rounds", n=12).ja
    ('1 round', '12 ラウンド')
    """
    templates = CATALOGUE[key]
    english = templates["one"] if "one" in templates and str(fields.get("n")) == "1" else templates["en"]

    words = {name: field for name, field in fields.items() if isinstance(field, Words)}
    japanese = _closed(templates["ja"], words)
    return Words(
        english.format(**fields | {name: each.en for name, each in words.items()}),
        japanese.format(**fields | {name: each.ja for name, each in words.items()}),
    )


def _closed(template: str, words: dict[str, Words]) -> str:
    """The Japanese template without the spaces that set off Latin letters, where a field puts Japanese on both sides."""
    for name, each in words.items():
        field = f"{{{name}}}"
        if re.match(WIDE, each.ja):
            template = re.sub(f"(?<={WIDE}) {field}", field, template)
        if re.search(f"{WIDE}$", each.ja):
            template = re.sub(f"{field} (?={WIDE})", field, template)
    return template


def passage(*sentences: Words | None) -> Words:
    """Sentences one after the other; None is left out. Japanese needs no spaces."""
    told = [each for each in sentences if each is not None]
    return Words(" ".join(each.en for each in told), "".join(each.ja for each in told))


def listed(items: Sequence[Text], between: Words = COMMA) -> Words:
    """Items with commas between them, or with `SEMICOLON` where they have commas of their own."""
    told = [plain(each) if isinstance(each, str) else each for each in items]
    return Words(between.en.join(each.en for each in told), between.ja.join(each.ja for each in told))


def known(kind: str, name: str) -> Text:
    """The words for a fixed name of a record (a kind of message, why a client was left out), or the name itself."""
    key = f"{kind}: {name}"
    return say(key) if key in CATALOGUE else name


# Numbers -------------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal, with an unbreakable space."""
    return f"{100 * value:.1f}\u00a0%"


def metric_value(value: float, fraction: bool) -> str:
    """A value of the metric: a percentage where the metric is a fraction."""
    return percent(value) if fraction else f"{value:.4g}"


def value_text(value: float, metric: str, fraction: bool) -> Words:
    """A value of the metric with its name: "95.0 % accuracy", "loss 0.45"."""
    if fraction:
        return say("percent_of_metric", value=percent(value), metric=known("metric", metric))
    return say("value_of_metric", value=f"{value:.4g}", metric=known("metric", metric))


def size(value: float) -> str:
    """A number of bytes in three digits, with an unbreakable space."""
    return human_bytes(value).replace(" ", "\u00a0")


def duration(seconds: float) -> str:
    """A time in three digits, with an unbreakable space."""
    return human_seconds(seconds).replace(" ", "\u00a0")


def count(value: float) -> str:
    """A count: whole, or with one decimal where it is a mean over seeds."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def exact(value: float) -> str:
    """A whole number with unbreakable thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")
