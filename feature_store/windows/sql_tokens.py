"""The words of a windowed definition's SQL, each with its place in the text, and the error that names that place.

Not sqlglot's: it knows neither the table functions TUMBLE, HOP and SESSION nor where in the text an expression stood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from feature_store.errors import DefinitionError

MAX_TOKENS = 20_000

_TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n]*|/\*.*?\*/)
    |(?P<string>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")+"|`(?:[^`]|``)+`)
    |(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<name>[^\W\d]\w*)
    |(?P<op><>|!=|<=|>=|==|=>|\|\||::|/(?!\*)|[-+*%=<>(),.;])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class At:
    """A place in the user's text; both numbers begin with 1."""

    line: int
    column: int


class SqlError(DefinitionError):
    """What a definition's SQL may not say: where it stands, why, and the nearest form that is supported."""

    def __init__(
        self,
        at: At,
        what: str,
        *,
        value: object = None,
        valid: Iterable[object] | None = None,
        nearest: str | None = None,
    ) -> None:
        self.at = at
        super().__init__(
            f"SQL line {at.line}, column {at.column}: {what}",
            value=value,
            valid=valid,
            next_step=f"write {nearest}" if nearest else None,
        )


Kind = Literal["name", "quoted", "number", "string", "op", "end"]


@dataclass(frozen=True)
class Token:
    """A word: `text` without quotes; `upper` is set for unquoted names alone, which may be keywords."""

    kind: Kind
    text: str
    at: At
    upper: str = ""


def tokens(text: str) -> list[Token]:
    """The words of a text, an `end` after them. SqlError for a character that no word begins with."""
    found: list[Token] = []
    position = start_of_line = 0
    line = 1
    while position < len(text):
        at = At(line, position - start_of_line + 1)
        match = _TOKEN.match(text, position)
        if match is None:
            raise _unreadable(text[position:], at)
        kind, word = str(match.lastgroup), match.group()
        if kind == "name":
            found.append(Token("name", word, at, word.upper()))
        elif kind == "string":
            if re.search("[\x00\ud800-\udfff]", word):
                raise SqlError(at, "a string with a character that no text has", value=word[:20])
            found.append(Token("string", word[1:-1].replace("''", "'"), at))
        elif kind == "quoted":
            found.append(Token("quoted", word[1:-1].replace(word[0] * 2, word[0]), at))
        elif kind == "number":
            found.append(Token("number", word, at))
        elif kind == "op":
            found.append(Token("op", word, at))
        if len(found) > MAX_TOKENS:
            raise SqlError(at, f"more than {MAX_TOKENS:,} words", nearest="several views")
        position = match.end()
        if "\n" in word:
            line += word.count("\n")
            start_of_line = match.start() + word.rindex("\n") + 1
    return [*found, Token("end", "", At(line, len(text) - start_of_line + 1))]


def _unreadable(rest: str, at: At) -> SqlError:
    if rest.startswith("/*"):
        return SqlError(at, "a comment that never ends", nearest="*/ after it")
    if rest[0] in "'\"`":
        return SqlError(at, "a quote that never ends", value=rest[:20], nearest=f"{rest[0]} after it")
    return SqlError(at, "a character that has no meaning here", value=rest[0])
