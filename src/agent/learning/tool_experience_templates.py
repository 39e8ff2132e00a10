"""Templates of error messages: what stays of a message when ids, numbers and quoted values are masked.

One pass over a bounded text and no state: the same message gives the same template whatever came before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TEMPLATE_CHARACTERS_MAX = 300
"""A template is cut here; so is what is looked at of a message, at ten times as much."""

_WORDS_KEPT = frozenset(
    """
    all and any are but call can could did does error failed for from get has have her his into invalid is its missing
    must no none not null off one our out she should than that the them then there this too true use was were what when
    where which will with without yes you your
    """.split()  # noqa: SIM905 - a list of them would fill a page
)
_PREFIX = re.compile(r"(?:error|exception)\s{0,3}:\s{0,3}(?=\S)", re.IGNORECASE)
_MASKED = re.compile(
    r"""
    (?P<kept> \b(?:http|status|code|error)\b[\ :=(]{1,3}[45]\d\d(?!\w) )  # a status says what is wrong
    | (?P<value> (?<!\w)(?:"[^"]{0,300}"|'[^'\n]{0,300}'(?!\w)|`[^`]{0,300}`|“[^”]{0,300}”))
    | (?P<url> \b[a-z][a-z0-9+.-]{1,15}://[^\s"'<>]{1,500} )
    | (?P<email> (?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8} )
    | (?P<uuid> \b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b )
    | (?P<date> \b\d{4}-\d{2}-\d{2}(?:[T\ ]\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:Z|[+-]\d{2}:?\d{2})?)?(?!\w)
              | \b\d{1,2}/\d{1,2}/\d{4}\b )
    | (?P<time> \b\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?\b )
    | (?P<path> (?<![\w.])(?:~|\.{1,2}|[a-z]:)?[/\\][\w.@~+-]{1,100}(?:[/\\][\w.@~+-]{1,100}){0,30}[/\\]? )
    | (?P<number> (?<![\w.])[-+]?[$€£¥]?\d{1,15}(?:[.,]\d{1,15}){0,9}(?:e[-+]?\d{1,3})?
                (?:%|[\ ]?(?:[kmgt]i?b|bytes|[mun]?s|sec|seconds|min|minutes|h|hours|d|days|px)\b)?(?!\w) )
    | (?P<id> [#@]?\b\w{0,100}\d[\w]{0,100}(?:-\w{1,100}){0,10} )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LONG = 20  # characters from which on a value is a text of somebody's, and not a word
_SPACE = re.compile(r"\s+")


def error_template(message: object, arguments: Iterable[object] = (), *, names: Iterable[str] = ()) -> str:
    """What is left of a message once what changes from call to call is masked; at most 300 characters, never empty.

    Args:
        message: the error; what is no text is taken as the text it prints.
        arguments: values of the call; where the message repeats one it is masked as `<argument>`, such as a name.
        names: of the tool and its parameters; a value that is one of their words is the message's own and stays.
    """
    text = _telling_part(message if isinstance(message, str) else repr(message))
    text = _mask_arguments(text, arguments, names)
    text = _MASKED.sub(_mask, text)
    return _SPACE.sub(" ", text).strip()[:TEMPLATE_CHARACTERS_MAX] or "(no message)"


def shape_of(value: str) -> str:
    """The shape of a text: words stay, numbers and ids are masked: `certificate_<n>`, `HAT<n>`, `<id>`."""
    masked = _MASKED.fullmatch(value[:200])
    kind = masked.lastgroup if masked else None
    if kind and kind not in ("id", "value"):
        return f"<{kind}>"
    return _SHAPED.sub(_shape_of_token, value[:200])


_SHAPED = re.compile(r"[^\W_]+")
_NUMBERED = re.compile(r"([^\W\d_]{0,4})\d+")


def _shape_of_token(token: re.Match[str]) -> str:
    if token[0].isalpha():
        return token[0]
    numbered = _NUMBERED.fullmatch(token[0])
    return f"{numbered[1]}<n>" if numbered else "<id>"


def _mask(found: re.Match[str]) -> str:
    return found[0] if found.lastgroup == "kept" else f"<{found.lastgroup}>"


def _telling_part(text: str) -> str:
    """The last line of a traceback, else the beginning; without the word that says that it is an error."""
    text = text[: 10 * TEMPLATE_CHARACTERS_MAX].replace("\0", " ").strip()
    if text.startswith("Traceback (most recent"):
        text = text.rsplit("\n", 1)[-1].strip()
    prefix = _PREFIX.match(text)
    return text[prefix.end() :] if prefix else text


def _mask_arguments(text: str, arguments: Iterable[object], names: Iterable[str]) -> str:
    own_words = _WORDS_KEPT.union(*(re.split(r"[\W_]+", name.lower()) for name in names))
    values = {
        value
        for value in arguments
        if isinstance(value, str) and 3 <= len(value) <= 10 * TEMPLATE_CHARACTERS_MAX
        and value.lower() not in own_words and not value.isdigit()
        and not _MASKED.fullmatch(value)
    }  # fmt: skip
    for value in sorted(values, key=lambda v: (-len(v), v)):
        if len(value.strip()) >= _LONG:
            text = _mask_beginning(text, value.strip())
        if value in text:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "<argument>", text)
    return text


def _mask_beginning(text: str, value: str) -> str:
    """Mask a long value also where it is cut or in other letters: what somebody wrote is no part of an error."""
    while (found := re.search(re.escape(value[:_LONG]), text, re.IGNORECASE)) is not None:
        end = found.start()
        for said, given in zip(text[found.start() :], value, strict=False):
            if end >= found.end() and said.lower() != given.lower():
                break
            end += 1
        text = f"{text[: found.start()]}<argument>{text[end:]}"
    return text
