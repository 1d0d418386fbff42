"""Dates in many languages, with their ISO 8601 dates.

Babel writes the texts from the Unicode CLDR locale data: "Sunday, 4 October 1987", "4. lis 1987.", "1987年10月4日(日)".
Every text names exactly one date: a form has the month in letters or begins with the year, so "04/10/1987" (April in
the United States, October in Britain) does not occur. A calendar date is either for training or held out in all
languages, so training does not see a held-out answer in another language.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Locales with the Gregorian calendar. Thai, Persian and Amharic are excluded: Babel writes Gregorian dates in these
# languages, whose readers use other calendars.
LOCALES = (
    "ar bg bn ca cs cy da de el en en_GB es et fi fr ga he hi hr hu hy id"
    " is it ja ka ko lt lv nb nl pl pt ro ru sk sl sv sw tr uk vi zh"
).split()
NAMED_FORMATS = ("medium", "long", "full")
SKELETONS = ("yMMMd", "yMMMEd", "yMMMMd", "yMMMMEEEEd")  # with or without a weekday, in the order of the locale
FIRST_DATE, LAST_DATE = datetime.date(1600, 1, 1), datetime.date(2399, 12, 31)  # two cycles of 400 years
HELD_OUT_DATES = 20_000  # of 292,194

PADDING, UNKNOWN = 0, 1  # codes without a character
ISO_CHARACTERS = "0123456789-"
ISO_LENGTH = len("1987-10-04")


@dataclass(frozen=True)
class Form:
    """One way to write a date: a CLDR pattern such as ``EEEE, d MMMM y`` in one locale."""

    locale: str
    pattern: str

    def write(self, date: datetime.date) -> str:
        """Returns `date` written in this form."""
        from babel.dates import parse_pattern

        return parse_pattern(self.pattern).apply(date, self.locale)


class Example(NamedTuple):
    """A written date, its form, and the calendar date."""

    source: str
    form: Form
    date: datetime.date

    @property
    def iso(self) -> str:
        """The date in ISO 8601."""
        return self.date.isoformat()


def names_one_date(pattern: str) -> bool:
    """Returns whether a CLDR pattern is unambiguous: it has the month in letters or begins with the year."""
    return "MMM" in pattern or pattern.find("y") < pattern.find("M")


def written_forms() -> list[Form]:
    """Returns all forms of the demo, in a fixed order."""
    from babel import Locale

    forms: dict[Form, None] = {}  # a dict has an order and no duplicates
    for name in LOCALES:
        locale = Locale.parse(name)
        patterns = [locale.date_formats[style].pattern for style in NAMED_FORMATS]
        skeletons = locale.datetime_skeletons
        patterns += [skeletons[style].pattern for style in SKELETONS if style in skeletons]
        forms |= {Form(name, pattern): None for pattern in patterns if names_one_date(pattern)}
    return list(forms)


def split_dates(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training dates and the held-out dates, disjoint, as ordinals (`datetime.date.toordinal`)."""
    ordinals = np.arange(FIRST_DATE.toordinal(), LAST_DATE.toordinal() + 1)
    shuffled = np.random.default_rng([seed, 0]).permutation(ordinals)
    return shuffled[HELD_OUT_DATES:], shuffled[:HELD_OUT_DATES]


def write_examples(ordinals: np.ndarray, forms: Sequence[Form], rng: np.random.Generator) -> list[Example]:
    """Returns one example for each date (an ordinal), in a random form."""
    chosen = rng.integers(len(forms), size=len(ordinals))
    return [write_example(int(ordinal), forms[form]) for ordinal, form in zip(ordinals, chosen, strict=True)]


def write_example(ordinal: int, form: Form) -> Example:
    """Returns the example of a date (an ordinal) in a form."""
    date = datetime.date.fromordinal(ordinal)
    return Example(form.write(date), form, date)


def language(locale: str) -> str:
    """Returns the English name of a locale."""
    from babel import Locale

    return Locale.parse(locale).get_display_name("en") or locale


class Alphabet:
    """The characters of texts with codes from 2 on. Code 0 is padding, code 1 any other character."""

    def __init__(self, texts: Sequence[str]):
        self._codes = {character: code for code, character in enumerate(sorted(set("".join(texts))), start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self._codes) + UNKNOWN + 1

    def encode(self, texts: Sequence[str], width: int) -> np.ndarray:
        """Returns the codes of `texts`, int32 of shape (texts, width), padded at the end."""
        codes = np.full((len(texts), width), PADDING, np.int32)
        for row, text in zip(codes, texts, strict=True):
            row[: len(text)] = [self._codes.get(character, UNKNOWN) for character in text]
        return codes


def encode_iso(dates: Sequence[datetime.date]) -> np.ndarray:
    """Returns the ISO texts of `dates` as indices into `ISO_CHARACTERS`, int32 of shape (dates, 10)."""
    return np.array([[ISO_CHARACTERS.index(character) for character in date.isoformat()] for date in dates], np.int32)


def decode_iso(codes: np.ndarray) -> str:
    """Returns the text of one row of indices into `ISO_CHARACTERS`."""
    return "".join(ISO_CHARACTERS[code] for code in codes)
