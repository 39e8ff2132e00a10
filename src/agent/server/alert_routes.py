"""The pages and the REST interface on which reviewers see what the monitor found, and silence it for a while.

Behind the log-in of the approvals; a reviewer sees the alerts of the tenants that the policy file names for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from agent.approval.card import visible
from agent.errors import InvalidLearning, LearningError, NotFound
from agent.identity import Identity
from agent.monitoring.notices import evidence_text
from agent.server.reviewer_pages import (
    SAID,
    ApprovalDesk,
    Desk,
    Visitor,
    door,
    given_by,
    go_to,
    is_form,
    json_answer,
    one_line,
    program_of,
    refusal,
    render_page,
    report_failure,
    root_of,
    sees_tenant,
    status_of,
    tenants_of,
    visitor_of,
)

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer

_LIST_MAX = 500
_RESOLVED_SHOWN = 50
_EVIDENCE_MAX = 8_000
_WHY_MAX = 500
_HOURS_MAX = 30 * 24
_LASTS = ((1, "1 hour"), (4, "4 hours"), (24, "1 day"), (24 * 7, "1 week"), (_HOURS_MAX, "30 days"))

router = APIRouter(tags=["alerts"])


# --- REST --------------------------------------------------------------------------------------------------------


@router.get("/alerts.json")
async def list_alerts(
    request: Request, desk: Desk, state: str | None = None, tenant: str | None = None, limit: int = 100
) -> Response:
    """Alerts of one state or of all, open ones first, the gravest first; of one tenant or of all of the reviewer."""
    try:
        visitor = await program_of(request, desk)
        if state not in {None, "open", "resolved"}:
            raise HTTPException(422, f"state={str(state)[:40]!r} must be open or resolved.")
        if not 1 <= limit <= _LIST_MAX:
            raise HTTPException(422, f"limit={limit} must be from 1 to {_LIST_MAX}.")
        return json_answer({"alerts": await _listed(desk, visitor.reviewer, tenant, state, limit)})
    except (HTTPException, LearningError) as error:
        return refusal(error)


@router.get("/alerts/{alert_id}.json")
async def get_alert(request: Request, desk: Desk, alert_id: str, tenant: str | None = None) -> Response:
    """One alert, with what was told of it and where."""
    try:
        visitor = await program_of(request, desk)
        return json_answer(await _find(desk, visitor.reviewer, alert_id, tenant))
    except (HTTPException, LearningError) as error:
        return refusal(error)


@router.post("/alerts/silence")
async def silence_alerts(request: Request, desk: Desk, tenant: str | None = None) -> Response:
    """Make a silence: JSON for programs, a form for browsers.

    JSON: `{"pattern": …, "hours": …, "why": …}`.
    """
    visitor: Visitor | None = None
    try:
        visitor = await program_of(request, desk)
        given, form = await given_by(request, desk, visitor)
        made = await desk.queue.database.call(
            "silence_alerts",
            _one_tenant(desk, visitor.reviewer, tenant),
            silence={
                "pattern": _text(given, "pattern", 200),
                "seconds": _hours(given) * 3_600,
                "made_by": visitor.reviewer.name,
                "why": _text(given, "why", _WHY_MAX, may_be_empty=True),
            },
        )
        if form is None:
            return json_answer(made)
        return go_to(request, _place(form), said="silenced", tenant=made["tenant_id"])
    except (HTTPException, LearningError) as error:
        return _answer(request, visitor, error)


@router.post("/alerts/silences/{silence_id}/end")
async def end_silence(request: Request, desk: Desk, silence_id: str, tenant: str | None = None) -> Response:
    """End a silence before its time; for programs `{"ended": …}`, whether it held until now."""
    visitor: Visitor | None = None
    try:
        visitor = await program_of(request, desk)
        _, form = await given_by(request, desk, visitor)
        identity = _one_tenant(desk, visitor.reviewer, tenant)
        ended = await desk.queue.database.call(
            "end_alert_silence", identity, the_silence_id=_id(silence_id), ended_by=visitor.reviewer.name
        )
        if form is None:
            return json_answer({"ended": ended})
        return go_to(request, "/alerts", said="unsilenced", tenant=identity.tenant_id)
    except (HTTPException, LearningError) as error:
        return _answer(request, visitor, error)


# --- pages -------------------------------------------------------------------------------------------------------


@router.get("/alerts", response_class=HTMLResponse, include_in_schema=False)
async def alerts_page(
    request: Request, desk: Desk, tenant: str | None = None, said: str | None = None
) -> Response:
    """What is open, the gravest first; what is silenced; and what was resolved lately."""
    visitor = None
    try:
        visitor = await visitor_of(request, desk)
        if visitor is None:
            return door(request, said=said)
        reviewer = visitor.reviewer
        looked_in = tenants_of(desk, reviewer, tenant)
        silences = [
            _silence_row(request, silence)
            for identity in looked_in
            for silence in await desk.queue.database.call("list_alert_silences", identity)
            if silence["holds"]
        ]
        opened, resolved = [
            [_row(request, alert) for alert in await _listed(desk, reviewer, tenant, state, limit)]
            for state, limit in (("open", _LIST_MAX), ("resolved", _RESOLVED_SHOWN))
        ]
        return render_page(
            request, "alerts.html", visitor=visitor, title="Alerts", said=SAID.get(said or ""), opened=opened,
            resolved=resolved, silences=silences, tenant=tenant,
            has_tenants="*" in reviewer.tenants or len(reviewer.tenants) > 1,
            looked_in=[visible(identity.tenant_id) for identity in looked_in],
        )  # fmt: skip
    except (HTTPException, LearningError) as error:
        return _answer(request, visitor, error, wants_page=True)


@router.get("/alerts/{alert_id}", response_class=HTMLResponse, include_in_schema=False)
async def alert_page(
    request: Request, desk: Desk, alert_id: str, tenant: str | None = None, said: str | None = None
) -> Response:
    """One alert: what is so, since when, the evidence, what to do, what was told of it, and the form of a silence."""
    visitor = None
    try:
        visitor = await visitor_of(request, desk)
        if visitor is None:
            return door(request)
        alert = await _find(desk, visitor.reviewer, alert_id, tenant)
        query = urlencode({"tenant": alert["tenant_id"]})
        silence = alert["silence"]
        return render_page(
            request, "alert.html", visitor=visitor, title=_row(request, alert)["title"], said=SAID.get(said or ""),
            alert=alert, row=_row(request, alert), evidence=evidence_text(alert["evidence"], characters=_EVIDENCE_MAX),
            silence=None if silence is None else _silence_row(request, silence), lasts=_LASTS,
            action=f"{root_of(request)}/alerts/silence?{query}",
        )  # fmt: skip
    except (HTTPException, LearningError) as error:
        return _answer(request, visitor, error, wants_page=True)


def _answer(
    request: Request,
    visitor: Visitor | None,
    error: HTTPException | LearningError,
    *,
    wants_page: bool = False,
) -> Response:
    """What went wrong, as a page for browsers."""
    if not wants_page and not is_form(request):
        return refusal(error)
    status, why = status_of(error)
    if status >= 500:
        report_failure(error)
    if status == 401:
        return door(request, problem="Your session is over. Log in and try again.", goes_to="/alerts")
    title = {404: "Not found", 403: "Refused"}.get(status, "Not done")
    return render_page(request, "problem.html", status=status, visitor=visitor, title=title, problem=why)


def _row(request: Request, alert: Mapping[str, Any]) -> dict[str, Any]:
    query = urlencode({"tenant": alert["tenant_id"]})
    return {
        "href": f"{root_of(request)}/alerts/{alert['alert_id']}?{query}",
        "severity": alert["severity"],
        "state": alert["state"],
        "title": one_line(visible(alert["title"]), 200),
        "what": one_line(visible(alert["what"]), 300),
        "since": alert["since"],
        "resolved_at": alert["resolved_at"],
        "tenant": visible(alert["tenant_id"]),
        "times_reopened": alert["times_reopened"],
        "is_silenced": alert["silence_id"] is not None,
    }


def _silence_row(request: Request, silence: Mapping[str, Any]) -> dict[str, Any]:
    query = urlencode({"tenant": silence["tenant_id"]})
    return {
        "pattern": visible(silence["pattern"]),
        "until": silence["until"],
        "made_by": visible(silence["made_by"]),
        "why": visible(silence["why"]),
        "tenant": visible(silence["tenant_id"]),
        "end": f"{root_of(request)}/alerts/silences/{silence['silence_id']}/end?{query}",
    }


# --- what is asked for -------------------------------------------------------------------------------------------


async def _listed(
    desk: ApprovalDesk, reviewer: Reviewer, tenant: str | None, state: str | None, limit: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    wanted = ({"state": state} if state else {}) | {"limit": limit}
    for identity in tenants_of(desk, reviewer, tenant):
        found += await desk.queue.database.call("list_alerts", identity, wanted=wanted)
    ranks = ("critical", "warning", "info")
    found.sort(key=lambda one: one["resolved_at"] or one["opened_at"], reverse=True)
    found.sort(key=lambda one: (one["state"], ranks.index(one["severity"]) if one["state"] == "open" else 0))
    return found[:limit]


async def _find(desk: ApprovalDesk, reviewer: Reviewer, alert_id: str, tenant: str | None) -> dict[str, Any]:
    """An alert that this reviewer may see.

    Raises:
        NotFound: there is none; the same whether it does not exist or is another tenant's.
    """
    wanted = _id(alert_id)
    for identity in tenants_of(desk, reviewer, tenant):
        found: dict[str, Any] | None = await desk.queue.database.call(
            "get_alert", identity, the_alert_id=wanted
        )
        if found is not None:
            return found
    raise NotFound(f"there is no alert {wanted} that {reviewer.name!r} may see")


def _id(given: str) -> str:
    with suppress(ValueError):
        return str(UUID(given))
    raise NotFound("that is no id")


def _one_tenant(desk: ApprovalDesk, reviewer: Reviewer, tenant: str | None) -> Identity:
    """The tenant that is named, else the deployment's own.

    Raises:
        NotFound: it is none of this reviewer's.
    """
    name = desk.settings.tenant if tenant is None else tenant
    if not sees_tenant(reviewer, name):
        raise NotFound(f"{reviewer.name!r} does not see that tenant")
    return Identity(tenant_id=name)


def _text(given: Mapping[str, Any], name: str, longest: int, *, may_be_empty: bool = False) -> str:
    text = given.get(name, "" if may_be_empty else None)
    if not isinstance(text, str) or len(text) > longest or not (text.strip() or may_be_empty):
        raise InvalidLearning(f"`{name}` must be text of at most {longest} characters")
    return text.strip()


def _hours(given: Mapping[str, Any]) -> float:
    hours = given.get("hours")
    with suppress(ValueError):
        hours = float(hours) if isinstance(hours, str) else hours
    if not isinstance(hours, int | float) or isinstance(hours, bool) or not 0 < hours <= _HOURS_MAX:
        raise InvalidLearning(f"`hours` must be a number above 0 and at most {_HOURS_MAX}")
    return hours


def _place(form: Mapping[str, str]) -> str:
    """The page on which the form was."""
    with suppress(ValueError):
        return f"/alerts/{UUID(form.get('alert_id', ''))}"
    return "/alerts"
