"""What is refused before a statement is parsed: the parser is C code that recurses, and must not be what fails.

Lengths and nesting are far above what people write and far below what the parser needs a large stack for. The scanner
that counts them does not recurse.
"""

from __future__ import annotations

import unicodedata
from typing import Final

import postgast

LENGTH_LIMIT: Final = 10_000
"""Bytes of UTF-8. Nested comments cost the scanner time that grows with the square of it."""
TOKEN_LIMIT: Final = 2_000
NESTING_LIMIT: Final = 40
"""Parentheses, brackets and CASE that are open at once."""
CHAIN_LIMIT: Final = 250
"""Tokens of one expression without a comma or a word that starts another: `1 || 1 || …` nests once per operator."""
JOIN_LIMIT: Final = 45
"""Joins, and set operations, of one statement: each nests the ones before."""

_WHITE: Final = frozenset("\t\n\r")
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_PART_OF_TEXT: Final = frozenset({"\u200d", "\u200e"})
"""Parts of emoji and of names in two scripts: fine between quotes."""


class UnreadableSql(Exception):
    """The text is not parsed; the message says why."""


def _token_ids(*names: str) -> frozenset[int]:
    values = postgast.pg_query_pb2.Token
    return frozenset(values.Value(name) for name in names)


_CASE: Final = _token_ids("CASE")
_OPENING: Final = _token_ids("ASCII_40", "ASCII_91") | _CASE
_CLOSING: Final = _token_ids("ASCII_41", "ASCII_93")
_QUOTED: Final = _token_ids("SCONST")
_END: Final = _token_ids("END_P")
_STARTING: Final = _token_ids(
    "AND", "ASCII_44", "ASCII_59", "ELSE", "EXCEPT", "FROM", "GROUP_P", "HAVING", "INTERSECT", "JOIN", "LIMIT",
    "OFFSET", "ON", "OR", "ORDER", "RETURNING", "SELECT", "SET", "THEN", "UNION", "VALUES", "WHEN", "WHERE", "WINDOW",
)  # fmt: skip
_JOINING: Final = _token_ids("JOIN", "UNION", "INTERSECT", "EXCEPT")


def check_text(sql: str) -> None:
    """Raises `UnreadableSql` for what must not reach the parser, and the scanner's own error for what is no SQL."""
    if len(sql) > LENGTH_LIMIT or len(sql.encode("utf-8")) > LENGTH_LIMIT:
        raise UnreadableSql(f"the statement is longer than {LENGTH_LIMIT} bytes; ask for less at once")
    to_be_quoted = []
    for place, character in enumerate(sql):
        if " " <= character < "\x7f" or character in _WHITE:
            continue
        if character in _PART_OF_TEXT:
            to_be_quoted.append(place)
        elif unicodedata.category(character) in _HIDDEN:
            raise _invisible(character)
    tokens = postgast.scan(sql).tokens
    quoted = [(token.start, token.end) for token in tokens if token.token in _QUOTED] if to_be_quoted else []
    for place in to_be_quoted:
        offset = len(sql[:place].encode("utf-8"))
        if not any(start < offset < end for start, end in quoted):
            raise _invisible(sql[place])
    if len(tokens) > TOKEN_LIMIT:
        raise UnreadableSql(
            f"the statement has more than {TOKEN_LIMIT} words and signs; ask for less at once"
        )
    _check_nesting([token.token for token in tokens])


def _invisible(character: str) -> UnreadableSql:
    return UnreadableSql(f"the statement has the invisible character U+{ord(character):04X}; leave it out")


def _check_nesting(tokens: list[int]) -> None:
    """Counts what is open, and how long each expression in it is."""
    opened: list[int] = []
    lengths, joins = [0], 0
    for token in tokens:
        if token in _STARTING:
            lengths[-1] = 0
            joins += token in _JOINING
        else:
            lengths[-1] += 1
        if token in _OPENING:
            opened.append(token)
            lengths.append(0)
        elif token in _CLOSING:
            # `case` and `end` may be names too: a bracket closes what was left open in it.
            while opened and opened[-1] in _CASE:
                opened.pop()
                lengths.pop()
            if opened:
                opened.pop()
                lengths.pop()
        elif token in _END and opened and opened[-1] in _CASE:
            opened.pop()
            lengths.pop()
        if len(opened) > NESTING_LIMIT:
            raise UnreadableSql(
                f"the statement nests deeper than {NESTING_LIMIT}; name parts of it with WITH"
            )
        if lengths[-1] > CHAIN_LIMIT:
            raise UnreadableSql(f"an expression has more than {CHAIN_LIMIT} words and signs in a row")
        if joins > JOIN_LIMIT:
            raise UnreadableSql(f"the statement has more than {JOIN_LIMIT} joins and set operations")
