"""Tool calls of a run with what was known before each of them, as conditions that can be counted.

A condition is a statement on a call that holds or not before the call is made: on its arguments (a value, a shape, a
type, a length, a comparison of two), on what the run has shown so far (a value that nobody mentioned, a field of the
record that an argument names), and on earlier calls of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from agent.learning.tool_experience_templates import TEMPLATE_CHARACTERS_MAX, error_template, shape_of
from agent.learning.transcripts import error_in

CONDITIONS_MAX = 250
"""Most conditions of one call."""
_PAIRS_MAX = 60
_SCALARS_MAX = 60
_VALUE_CHARACTERS_MAX = 200
_RESULT_CHARACTERS_MAX = 200_000
_RECORDS_MAX = 20_000
_RECORD_FIELDS_MAX = 30
_TOTALS_MAX = 60
_FORMS_MAX = 4
_TOOL_CHARACTERS_MAX = 200

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that holds of a call before it is made."""

    kind: str
    """One of `KINDS`."""
    text: str
    """What makes it this condition and no other; may hold values of the call."""
    shown: str
    """In words without values of the call, for what is stored and shown."""
    opened: str = ""
    """In words with its value, where one may be shown once several people's runs had it; else empty."""

    def key(self, tenant_id: str = "") -> int:
        """A number of 63 bits that stands for it in storage; of other tenants it says nothing."""
        text = f"{tenant_id}\0{self.kind}\0{self.text}"
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


KINDS = (
    "call", "value", "item", "pair", "shape", "params", "type", "length", "compare", "after", "done", "again", "still",
    "retry", "changed", "heeded", "unheeded", "unseen", "link", "size", "total",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool in a run, with what became of it."""

    tool: str
    arguments: Any
    tool_call_id: str = ""
    message_id: str = ""
    error: str | None = None
    """The message of its failure, `None` where it succeeded."""
    conditions: tuple[Condition, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """Values of its arguments that the error names."""
        error = (self.error or "")[: 10 * TEMPLATE_CHARACTERS_MAX]
        texts = {value for _, value in _scalars(self.arguments) if isinstance(value, str) and len(value) >= 3}
        return tuple(
            sorted(value for value in texts if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", error))
        )

    @property
    def told(self) -> frozenset[float]:
        """Numbers that the error tells and the call has nowhere, not even as a sum: such as what was right."""
        found = _NUMBER.findall((self.error or "")[: 10 * TEMPLATE_CHARACTERS_MAX])
        told = {float(number.replace(",", "")) for number in found[:20]}
        return frozenset(told - _amounts(self.arguments))

    @property
    def template(self) -> str | None:
        """The template of its error, `None` where it succeeded."""
        if self.error is None:
            return None
        values = [value for _, value in _scalars(self.arguments)]
        return error_template(
            self.error, values, names=[self.tool, *(path for path, _ in _scalars(self.arguments))]
        )


@dataclass
class RunSoFar:
    """What a run has shown up to a moment: grows with each message."""

    failed: dict[str, list[tuple[str, ToolCall]]] = field(default_factory=dict)
    """Per tool, its failed calls, each with its template."""
    succeeded: dict[str, list[str]] = field(default_factory=dict)
    """Per tool, the arguments of calls that succeeded, as canonical text."""
    words: list[str] = field(default_factory=list)
    records: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Per value that names something, the objects of tool results that bear it: the last one of each form."""

    def see(self, text: str) -> None:
        """Take in what somebody said, or a tool answered."""
        text = text[:_RESULT_CHARACTERS_MAX]
        self.words.append(text)
        if text[:1] in "{[":
            try:
                self._index(json.loads(text), 0)
            except (ValueError, RecursionError):
                return

    def _index(self, value: Any, level: int) -> None:
        if level > 20 or len(self.records) >= _RECORDS_MAX:
            return
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if isinstance(inner, Mapping):
                    self._keep(name, "", inner)
                elif isinstance(inner, str):
                    self._keep(inner, name, value)
                self._index(inner, level + 1)
        elif isinstance(value, list):
            for inner in value:
                self._index(inner, level + 1)

    def _keep(self, value: str, name: str, record: Mapping[str, Any]) -> None:
        if 3 <= len(value) <= _VALUE_CHARACTERS_MAX and len(self.records) < _RECORDS_MAX:
            forms = self.records.setdefault(value, {})
            form = " ".join([name, *sorted(str(field) for field in record)][:_RECORD_FIELDS_MAX])
            forms.pop(form, None)
            if len(forms) < _FORMS_MAX:
                forms[form] = record

    def has_seen(self, value: str) -> bool:
        """Whether somebody mentioned it."""
        return any(value in text for text in self.words)

    def end_call(self, call: ToolCall) -> None:
        """Take in what became of a call."""
        if call.template is not None:
            self.failed.setdefault(call.tool, []).append((call.template, call))
        else:
            self.succeeded.setdefault(call.tool, []).append(_canonical(call.arguments))


def read_calls(messages: Iterable[Mapping[str, Any]]) -> Iterator[ToolCall]:
    """The calls of a run that were answered, in the order of the answers, each with its conditions.

    Ids that come back in one run belong to the last call that bears them and has no answer yet.
    """
    yield from _follow(messages, RunSoFar())


def conditions_before(
    tool: str, arguments: Any, earlier: Iterable[Mapping[str, Any]] = ()
) -> tuple[Condition, ...]:
    """What holds of a call that would be made now, after these messages of its run."""
    so_far = RunSoFar()
    for _ in _follow(earlier, so_far):
        pass
    return conditions_of(tool, arguments, so_far)


def _follow(messages: Iterable[Mapping[str, Any]], so_far: RunSoFar) -> Iterator[ToolCall]:
    waiting: list[ToolCall] = []
    for message in messages:
        content = message.get("content") or ""
        waiting += [
            ToolCall(
                tool=(call.get("name") or "unknown")[:_TOOL_CHARACTERS_MAX],
                arguments=call.get("args"),
                tool_call_id=_text(call.get("id")),
                message_id=message.get("message_id") or "",
            )
            for call in message.get("tool_calls") or ()
        ]
        called = None
        if message.get("role") == "tool":
            called = _take(waiting, message.get("tool_call_id") or "", message.get("name") or "")
        if called is not None:
            error = error_in(content)
            if error is None and message.get("is_error"):
                error = content
            ended = replace(
                called, error=error, conditions=conditions_of(called.tool, called.arguments, so_far)
            )
            yield ended
            so_far.end_call(ended)
        so_far.see(content)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _take(waiting: list[ToolCall], tool_call_id: str, tool: str) -> ToolCall | None:
    for position in range(len(waiting) - 1, -1, -1):
        if tool_call_id and waiting[position].tool_call_id == tool_call_id:
            return waiting.pop(position)
    for position, call in enumerate(waiting):
        if not tool_call_id and tool in ("", call.tool):
            return waiting.pop(position)
    return None


# --- conditions -------------------------------------------------------------------------------------------------


def conditions_of(tool: str, arguments: Any, so_far: RunSoFar) -> tuple[Condition, ...]:
    """What holds of a call before it is made; at most `CONDITIONS_MAX`, each once."""
    if not isinstance(arguments, Mapping):
        arguments = {"arguments": arguments}
    arguments = {
        str(name): arguments[name] for name in sorted(arguments, key=str)
    }  # storage has an order of its own
    found = dict.fromkeys(
        [
            *_of_history(tool, arguments, so_far),
            *_of_links(arguments, so_far),
            *_of_arguments(arguments),
        ]
    )
    return tuple(found)[:CONDITIONS_MAX]


def _of_arguments(arguments: Mapping[str, Any]) -> Iterator[Condition]:
    yield Condition("call", _canonical(arguments), "the same arguments")
    names = ", ".join(sorted(str(name)[:50] for name in arguments)[:30])
    yield Condition("params", names, f"with {names or 'no arguments'}")
    scalars = list(_scalars(arguments))
    for path, value in scalars:
        yield Condition("type", f"{path}:{_type(value)}", f"{path} is {_type(value)}")
        if isinstance(value, str):
            shape = shape_of(value)
            yield Condition(
                "shape",
                f"{path}~{shape}",
                f"{path} of a certain form",
                _open(shape, f"{path} looks like {shape}"),
            )
        written = _canonical(value)
        yield Condition(
            "value", f"{path}={written}", f"a certain {path}", _open(value, f"{path} is {written}")
        )
    for path, items in _lists(arguments):
        yield Condition("length", f"{path}#{min(len(items), 10)}", f"{path} has {min(len(items), 10)} items")
        for item in items[:20]:
            if isinstance(item, Mapping):
                yield Condition("item", f"{path}[]={_canonical(item)}", f"a certain item of {path}")
    yield from _comparisons(arguments)
    parts = [(name, _canonical(value)) for name, value in arguments.items() if not _is_long(value)]
    parts += [
        (f"{path}[]", _canonical(item))
        for path, items in _lists(arguments)
        for item in items[:6]
        if not _is_long(item)
    ]
    for (one, value), (other, other_value) in list(combinations(parts, 2))[:_PAIRS_MAX]:
        if one != other:
            yield Condition(
                "pair", f"{one}={value} & {other}={other_value}", f"a certain {one} with a certain {other}"
            )


def _open(value: Scalar, told: str) -> str:
    """The words, or nothing where the value looks personal: an address, a number that could be of a phone or a card."""
    text = str(value)
    is_personal = "@" in text or sum(c.isdigit() for c in text) >= 7 or len(text) > 60 or text.count(" ") > 3
    return "" if is_personal and not text.startswith("<") else told


def _comparisons(arguments: Mapping[str, Any]) -> Iterator[Condition]:
    numbers = [(n, v) for n, v in arguments.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    dates = [(n, v) for n, v in arguments.items() if isinstance(v, str) and _DATE.match(v)]
    texts = [(n, v) for n, v in arguments.items() if isinstance(v, str)]
    lists = [(f"length of {n}", len(v)) for n, v in arguments.items() if isinstance(v, list)]
    groups: tuple[list[tuple[str, Any]], ...] = ([*numbers], [*dates], [*lists])
    for group in groups:
        for (one, a), (other, b) in combinations(group[:8], 2):
            sign = "<" if a < b else ">" if a > b else "="
            yield Condition("compare", f"{one}{sign}{other}", f"{one} {sign} {other}")
    for (one, a), (other, b) in combinations(texts[:8], 2):
        if a == b:
            yield Condition("compare", f"{one}={other}", f"{one} = {other}")
    for path, items in _lists(arguments):
        if len({_canonical(item) for item in items}) < len(items):
            yield Condition("compare", f"{path} repeats", f"{path} has an item twice")


def _of_history(tool: str, arguments: Mapping[str, Any], so_far: RunSoFar) -> Iterator[Condition]:
    whole = _canonical(arguments)
    amounts = _amounts(arguments)
    for template, failed in so_far.failed.get(tool, ())[-10:]:
        before = (
            failed.arguments if isinstance(failed.arguments, Mapping) else {"arguments": failed.arguments}
        )
        changed = sorted(
            str(name)
            for name in {*before, *arguments}
            if _canonical(before.get(name)) != _canonical(arguments.get(name))
        )
        if not changed:
            yield Condition("again", template, f"the same call failed in this run: {template}")
        else:
            others = ", ".join(changed)[:200]
            yield Condition("changed", f"{template}|{others}", f"after {template}, with another {others}")
            yield Condition("retry", template, f"after {template} in this run")
            if failed.told:
                kind = "heeded" if failed.told & amounts else "unheeded"
                told = "with" if kind == "heeded" else "without"
                yield Condition(
                    kind, template, f"{told} a number that an earlier call was told by {template}"
                )
            if failed.named and all(_canonical(value) in whole for value in failed.named):
                yield Condition(
                    "still",
                    template,
                    f"with the values of an earlier call that failed in this run: {template}",
                )
    if whole in so_far.succeeded.get(tool, ()):
        yield Condition("done", "", "the same call succeeded in this run")
    for other in list(so_far.succeeded)[:50]:
        yield Condition("after", other[:100], f"after {other[:100]}")


def _of_links(arguments: Mapping[str, Any], so_far: RunSoFar) -> Iterator[Condition]:
    """What the records say that the arguments name: their fields, and what those add up to."""
    scalars = list(_scalars(arguments))
    words = {value: name for name, value in arguments.items() if isinstance(value, str) and len(value) >= 3}
    totals: dict[str, float] = {}
    for path, value in scalars:
        if isinstance(value, int | float) and not isinstance(value, bool):
            totals[path] = totals.get(path, 0) + value
    for path, value in scalars:
        if not isinstance(value, str) or not _is_identifier(value):
            continue
        if not so_far.has_seen(value):
            yield Condition("unseen", path, f"{path} was not mentioned before in the run")
        fields: dict[str, Scalar] = {}
        for form, record in so_far.records.get(value, {}).items():
            where = form.partition(" ")[0]
            of = "" if where in ("", "id") else f"{where}:"
            fields.update((f"{of}{name}", inner) for name, inner in _fields(record, words) if inner != value)
        for name, inner in fields.items():
            linked = f"{path}→{name}"
            if isinstance(inner, bool) or inner is None or (isinstance(inner, str) and _is_word(inner)):
                told = f"{name} of the {path} is {inner}"
                yield Condition(
                    "link", f"{linked}={inner}", f"a certain {name} of the {path}", _open(inner, told)
                )
            elif isinstance(inner, int | float):
                sign = "0" if inner == 0 else "below 0" if inner < 0 else "above 0"
                yield Condition("link", f"{linked} {sign}", f"{name} of the {path} is {sign}")
                for bound in _BOUNDS:
                    if 0 < inner < bound:
                        yield Condition("size", f"{linked}<{bound}", f"{name} of the {path} is below {bound}")
                if "<" in name or "." not in name:
                    totals[linked] = totals.get(linked, 0) + inner
    for (one, a), (other, b) in list(combinations(sorted(totals.items()), 2))[:_TOTALS_MAX]:
        sign = "=" if abs(a - b) < 1e-9 else "<" if a < b else ">"
        yield Condition("total", f"{one}{sign}{other}", f"{one} {sign} {other}")


_NUMBER = re.compile(r"(?<![\w.,:/-])\d{1,12}(?:,\d{3})*(?:\.\d{1,6})?(?![\w:/-])")
_BOUNDS = (3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2})?")


def _is_identifier(value: str) -> bool:
    return any(c.isdigit() for c in value) and not any(c.isspace() for c in value) and not _DATE.match(value)


def _is_word(value: str) -> bool:
    return len(value) <= 40 and not any(c.isdigit() for c in value)


def _fields(
    record: Mapping[str, Any], words: Mapping[str, str], prefix: str = "", level: int = 0
) -> Iterator[tuple[str, Scalar]]:
    for name, value in list(record.items())[:_RECORD_FIELDS_MAX]:
        shown = f"<{words[name]}>" if name in words else name[:50]
        if isinstance(value, Mapping):
            if level < 1:
                yield from _fields(value, words, f"{prefix}{shown}.", level + 1)
        elif not isinstance(value, list):
            yield f"{prefix}{shown}", value


# --- arguments --------------------------------------------------------------------------------------------------


def _scalars(value: Any, path: str = "", level: int = 0) -> Iterator[tuple[str, Scalar]]:
    """Paths and values of what is no list or object, at most 60: `flights[].date`."""
    for number, item in enumerate(_walk(value, path, level)):
        if number >= _SCALARS_MAX:
            return
        yield item


def _walk(value: Any, path: str, level: int) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        if level < 6:
            for name, inner in sorted(value.items(), key=lambda item: str(item[0])):
                yield from _walk(inner, f"{path}.{name}"[:100] if path else str(name)[:100], level + 1)
    elif isinstance(value, list | tuple):
        if level < 6:
            for inner in value:
                yield from _walk(inner, f"{path}[]", level + 1)
    else:
        yield path, value


def _amounts(arguments: Any) -> set[float]:
    """The numbers of a call, and what those of one path add up to."""
    found: set[float] = set()
    totals: dict[str, float] = {}
    for path, value in _scalars(arguments):
        if isinstance(value, int | float) and not isinstance(value, bool):
            totals[path] = totals.get(path, 0.0) + value
            found.add(float(value))
    return found | {round(total, 6) for total in totals.values()}


def _lists(arguments: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(str(name), value) for name, value in arguments.items() if isinstance(value, list)][:10]


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text" if value.strip() else "an empty text"
        case int() | float():
            return "0" if value == 0 else "below 0" if value < 0 else "a number"
        case _:
            return "an object"


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)
    except (RecursionError, ValueError, TypeError):
        return repr(type(value))


def _is_long(value: Any) -> bool:
    return len(_canonical(value)) > _VALUE_CHARACTERS_MAX
