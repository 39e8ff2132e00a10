"""What people are told of an alert, and its words: the same in every sink. Pure: no I/O, no clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, Self
from urllib.parse import quote, urlencode

from agent.approval.card import cut, shown_time, visible
from agent.monitoring.findings import Severity

NoticeKind = Literal["raised", "worsened", "reminder", "resolved"]

_TITLE_MAX: Final = 200
_TEXT_MAX: Final = 1_200
_EVIDENCE_MAX: Final = 1_500
_EVIDENCE_LINES: Final = 40
_VALUE_MAX: Final = 300
_ENTRIES_MAX: Final = 40
_DEPTH_MAX: Final = 4
_MARKS: Final = {"info": "i", "warning": "⚠", "critical": "‼"}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One thing to be told of an alert, with the alert as it was then."""

    notice_id: str
    kind: NoticeKind
    at: datetime
    tenant_id: str
    alert_id: str
    cause: str
    check: str
    severity: Severity
    title: str
    what: str
    advice: str
    evidence: dict[str, Any]
    since: datetime
    resolved_at: datetime | None
    times_seen: int
    times_reopened: int
    """How often it came back soon after it was resolved."""
    link: str | None
    """Address of its page, where the server's public address is known."""
    silences: Sequence[Mapping[str, Any]] = ()
    """`{made_by, why, until, is_own}` of the last three that covered it while it lasted; one that is its maker's own
    does not hold."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, public_url: str | None) -> Self:
        """A notice as the database hands it out: `{notice_id, kind, at, alert}`."""
        alert = row["alert"]
        return cls(
            notice_id=row["notice_id"],
            kind=row["kind"],
            at=datetime.fromisoformat(row["at"]),
            since=datetime.fromisoformat(alert["since"]),
            resolved_at=datetime.fromisoformat(alert["resolved_at"]) if alert["resolved_at"] else None,
            link=alert_link(public_url, alert["alert_id"], alert["tenant_id"]),
            silences=alert.get("silences", ()),
            **{
                name: alert[name]
                for name in (
                    "tenant_id", "alert_id", "cause", "check", "severity", "title", "what", "advice", "evidence",
                    "times_seen", "times_reopened",
                )
            },
        )  # fmt: skip

    @property
    def headline(self) -> str:
        """One line: what happened to the alert, and its title."""
        begins = {
            "raised": f"{_MARKS[self.severity]} {self.severity.capitalize()}",
            "worsened": f"{_MARKS[self.severity]} Worse, now {self.severity}",
            "reminder": f"{_MARKS[self.severity]} Still {self.severity}",
            "resolved": "✓ Resolved",
        }
        return f"{begins[self.kind]}: {_line(self.title)}"

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Label and text of each thing to know, in order; every character of them can be seen."""
        facts = [("What", _text(self.what)), ("Since", shown_time(self.since))]
        if self.resolved_at is not None:
            facts.append(("Until", shown_time(self.resolved_at)))
        if self.times_reopened:
            facts.append(("Came back", f"{self.times_reopened} times soon after it was resolved"))
        facts += [("Silenced", _silenced(silence)) for silence in self.silences]
        if self.kind != "resolved":
            facts.append(("What to do", _text(self.advice)))
        facts.append(("Cause", f"{_line(self.cause)}, tenant {_line(self.tenant_id)}"))
        return tuple(facts)

    @property
    def evidence_text(self) -> str:
        """The numbers behind it, one line each; empty where there are none or it is over."""
        return "" if self.kind == "resolved" else evidence_text(self.evidence)

    def as_text(self) -> str:
        """The notice as lines of text, for mail."""
        lines = [self.headline, ""]
        for label, text in self.facts:
            lines += [f"{label}: {text}"]
        if self.evidence_text:
            lines += ["", "Evidence:", self.evidence_text]
        if self.link:
            lines += ["", self.link]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The notice as programs are given it."""
        return {
            "notice_id": self.notice_id, "kind": self.kind, "at": self.at.isoformat(), "tenant_id": self.tenant_id,
            "alert_id": self.alert_id, "cause": self.cause, "check": self.check, "severity": self.severity,
            "title": self.title, "what": self.what, "advice": self.advice, "evidence": self.evidence,
            "since": self.since.isoformat(), "resolved_at": self.resolved_at.isoformat() if self.resolved_at else None,
            "times_seen": self.times_seen, "times_reopened": self.times_reopened, "link": self.link,
            "silences": [dict(silence) for silence in self.silences],
        }  # fmt: skip


def _silenced(silence: Mapping[str, Any]) -> str:
    told = f"by {_line(silence['made_by'])} until {shown_time(silence['until'])}"
    if silence["is_own"]:
        told += ", whom it is about, so that does not hold"
    return f"{told}: {_line(silence['why'])}" if silence["why"] else told


def alert_link(public_url: str | None, alert_id: str, tenant_id: str) -> str | None:
    """Address of an alert's page; `None` where the server's public address is not known."""
    if public_url is None:
        return None
    return f"{public_url.rstrip('/')}/alerts/{quote(alert_id)}?{urlencode({'tenant': tenant_id})}"


def evidence_text(evidence: Mapping[str, Any], *, characters: int = _EVIDENCE_MAX) -> str:
    """Evidence as lines of `name: value` in which every character can be seen, cut to so many."""
    lines = [f"{_line(name)}: {_value(value)}" for name, value in evidence.items()]
    return cut("\n".join(lines), characters=characters, lines=_EVIDENCE_LINES)[0] if lines else ""


def bounded(value: Any, depth: int = 0) -> Any:
    """Evidence as it is stored: long texts and long lists are cut, what lies deep is left out."""
    if isinstance(value, str):
        return value if len(value) <= _VALUE_MAX else f"{value[: _VALUE_MAX - 1]}…"
    if isinstance(value, Mapping | list | tuple) and depth == _DEPTH_MAX:
        return "…"
    if isinstance(value, Mapping):
        entries = list(value.items())[:_ENTRIES_MAX]
        kept = {str(bounded(str(name))): bounded(item, depth + 1) for name, item in entries}
        return kept | ({"…": len(value) - _ENTRIES_MAX} if len(value) > _ENTRIES_MAX else {})
    if isinstance(value, list | tuple):
        kept_items = [bounded(item, depth + 1) for item in value[:_ENTRIES_MAX]]
        return kept_items + ([f"… {len(value) - _ENTRIES_MAX} more"] if len(value) > _ENTRIES_MAX else [])
    if value is None or isinstance(value, bool | int | float):
        return value
    return bounded(str(value))


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _line(value, _VALUE_MAX)
    if isinstance(value, float):
        return f"{value:.4g}"
    return _line(json.dumps(value, ensure_ascii=False, default=str), _VALUE_MAX)


def _line(text: str, width: int = _TITLE_MAX) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _text(text: str) -> str:
    return cut(visible(text), characters=_TEXT_MAX, lines=12)[0]
