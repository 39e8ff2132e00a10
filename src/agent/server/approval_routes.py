"""The pages and the REST interface on which reviewers see what agents ask for, and decide.

Both are for the reviewers of the policy file only. Programs send `Authorization: Bearer` with a reviewer's token or a
Supabase access token; browsers log in and have a session. Which decision counts is for the rows to say: here nobody is
let through who is not a reviewer, and nothing is decided that was not shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from agent.approval.card import visible
from agent.approval.records import Approval
from agent.approval.standing_rules import make_rule
from agent.errors import (
    LearningError,
    Refused,
)
from agent.events import emit
from agent.identity import Identity
from agent.server.approval_lookup import LIST_MAX, document_of, find, listed
from agent.server.approval_pages import (
    needs_confirming,
    problem_page,
    row_of,
    schema_of,
    show,
    waiting_elsewhere,
)
from agent.server.argument_form import read_form
from agent.server.reviewer_login import COOKIE
from agent.server.reviewer_pages import (
    SAID,
    ApprovalDesk,
    Desk,
    Visitor,
    body_of,
    check_own,
    cookie_paths,
    door,
    form_fields,
    given_by,
    go_to,
    is_form,
    is_secure,
    json_answer,
    own_path,
    program_of,
    refusal,
    render_page,
    root_of,
    status_of,
    style_sheet,
    tenants_of,
    visitor_of,
)

CHANNEL = "web"
_PAGE = 100
_NOTE_MAX = 2_000
_STATES = frozenset(
    {"pending", "approved", "rejected", "expired", "cancelled", "executing", "executed", "failed", "unknown"}
)
_HASH = re.compile(r"[0-9a-f]{16,64}")


router = APIRouter(tags=["approvals"])


# --- REST --------------------------------------------------------------------------------------------------------


@router.get("/approvals.json")
async def list_approvals(
    request: Request,
    desk: Desk,
    state: str | None = None,
    tenant: str | None = None,
    limit: int = 100,
    order: str = "newest",
    after: str | None = None,
) -> Response:
    """Approvals of one state or of all, of one tenant or of all that the reviewer names; `order` is `newest` or
    `oldest` first. Where there are more, `next` is what to send as `after`.
    """
    try:
        visitor = await program_of(request, desk)
        if state is not None and state not in _STATES:
            raise HTTPException(422, f"state={state[:40]!r} is none of {', '.join(sorted(_STATES))}.")
        if not 1 <= limit <= LIST_MAX:
            raise HTTPException(422, f"limit={limit} must be from 1 to {LIST_MAX}.")
        if order not in {"newest", "oldest"}:
            raise HTTPException(422, f"order={order[:40]!r} must be newest or oldest.")
        wanted = ({"state": state} if state else {}) | {"oldest_first": order == "oldest"}
        found, more = await listed(desk, visitor.reviewer, tenant, wanted, limit, after=after)
        return json_answer({"approvals": [document_of(approval) for approval, _ in found], "next": more})
    except (HTTPException, LearningError) as error:
        return refusal(error)


@router.get("/approvals/{approval_id}.json")
async def get_approval(request: Request, desk: Desk, approval_id: str, tenant: str | None = None) -> Response:
    """One approval: what is asked, by whom, its votes and its state."""
    try:
        visitor = await program_of(request, desk)
        approval, _ = await find(desk, visitor.reviewer, approval_id, tenant)
        return json_answer(document_of(approval))
    except (HTTPException, LearningError) as error:
        return refusal(error)


# --- deciding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What was sent to decide."""

    verdict: str
    args_hash: str
    """Of what the reviewer saw; at least its first 16 digits."""
    note: str
    dedup_key: str | None
    arguments: dict[str, Any] | None
    """For an edit by a program."""
    form: Mapping[str, str] | None
    """The whole form, where a browser sent one."""


@router.post("/approvals/{approval_id}/decide")
async def decide_approval(
    request: Request, desk: Desk, approval_id: str, tenant: str | None = None
) -> Response:
    """Approve, reject or edit: JSON for programs, a form for browsers.

    JSON: `{"verdict": "approve"|"reject"|"edit", "args_hash": …, "note": …, "dedup_key": …, "arguments": {…}}`.
    """
    wants_page = is_form(request)
    visitor: Visitor | None = None
    try:
        visitor = await program_of(request, desk)
        sent = await _sent(request, desk, visitor)
        approval, identity = await find(desk, visitor.reviewer, approval_id, tenant)
        if sent.verdict == "edit":
            return await _edit(request, desk, visitor, approval, identity, sent)
        is_unconfirmed = sent.form is not None and sent.form.get("confirmed") != "yes"
        if is_unconfirmed and sent.verdict == "approve" and needs_confirming(approval):
            raise HTTPException(422, "Not recorded: tick that you have read what will be destroyed.")
        outcome = await desk.queue.decide(
            [approval.approval_id],
            sent.verdict,
            visitor.reviewer,
            channel=CHANNEL,
            hashes={approval.approval_id: sent.args_hash},
            identity_tenant=identity.tenant_id,
            note=sent.note,
            dedup_key=sent.dedup_key,
        )
        if outcome.outcome == "refused":
            emit(
                "web_answer_refused",
                approval_id=approval.approval_id,
                reviewer=visitor.reviewer.name,
                reason=outcome.why,
            )
            raise Refused(outcome.why)
        if wants_page:
            said = {"approve": "approved", "reject": "rejected"}[sent.verdict]
            said = "repeated" if outcome.outcome == "repeated" else said
            return go_to(request, f"/approvals/{approval.approval_id}", tenant=identity.tenant_id, said=said)
        return json_answer(
            {
                "outcome": outcome.outcome,
                "why": outcome.why,
                "notice": next(filter(None, map(desk.queue.outdated_because, outcome.approvals)), None),
                "approval": next(
                    (
                        document_of(one)
                        for one in outcome.approvals
                        if one.approval_id == approval.approval_id
                    ),
                    None,
                ),
            }
        )
    except (HTTPException, LearningError) as error:
        if not wants_page:
            return refusal(error)
        return await problem_page(request, desk, visitor, error, approval_id, tenant)


@router.post("/approvals/{approval_id}/allow")
async def allow_calls(request: Request, desk: Desk, approval_id: str, tenant: str | None = None) -> Response:
    """Make a standing rule from this call; the call itself stays as it is.

    JSON: `{"args_hash": …, "max_rows": …, "hours": …, "max_uses": …}`; without `max_uses` any number of calls.
    """
    wants_page = is_form(request)
    visitor: Visitor | None = None
    try:
        visitor = await program_of(request, desk)
        given, form = await given_by(request, desk, visitor)
        args_hash = given.get("args_hash")
        if not isinstance(args_hash, str) or not _HASH.fullmatch(args_hash):
            raise HTTPException(
                422, "Not recorded: `args_hash` must be the hash of what was shown, 16 digits or more."
            )
        numbers = {name: _number(given, name) for name in ("max_rows", "hours", "max_uses")}
        max_rows, hours = numbers["max_rows"], numbers["hours"]
        if max_rows is None or hours is None:
            raise HTTPException(422, "Not recorded: a rule needs `max_rows` and `hours`.")
        if form is not None and form.get("confirmed") != "yes":
            raise HTTPException(422, "Not recorded: tick that such calls shall run without being asked for.")
        approval, identity = await find(desk, visitor.reviewer, approval_id, tenant)
        rule = await make_rule(
            desk.queue, approval.approval_id, visitor.reviewer, identity_tenant=identity.tenant_id,
            max_rows=max_rows, max_uses=numbers["max_uses"], lasts=timedelta(hours=hours), args_hash=args_hash,
        )  # fmt: skip
        if wants_page:
            return go_to(
                request, f"/approvals/{approval.approval_id}", tenant=identity.tenant_id, said="allowed"
            )
        return json_answer(
            {
                "rule_id": rule.rule_id,
                "tables": [*rule.tables],
                "max_rows": rule.max_rows,
                "max_uses": rule.max_uses,
                "expires_at": rule.expires_at.isoformat(),
            }
        )
    except (HTTPException, LearningError) as error:
        if not wants_page:
            return refusal(error)
        return await problem_page(request, desk, visitor, error, approval_id, tenant)


def _number(given: Mapping[str, Any], name: str) -> int | None:
    """A whole number that was sent, in a form or as JSON; `None` where there is none."""
    value = given.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value
    raise HTTPException(422, f"Not recorded: `{name}` must be a whole number.")


async def _edit(
    request: Request,
    desk: ApprovalDesk,
    visitor: Visitor,
    approval: Approval,
    identity: Identity,
    sent: Sent,
) -> Response:
    if not str(approval.args_hash).startswith(sent.args_hash):
        raise Refused("the hash is not that of this request; look at it again")
    arguments = sent.arguments
    fields: Sequence[Any] = ()
    if sent.form is not None:
        arguments, fields = read_form(schema_of(desk, approval), approval.arguments, sent.form)
        if arguments is None:
            return await show(
                request, desk, visitor, approval, identity, status=422, fields=fields,
                problem="Not recorded: some arguments cannot be read. They are marked below.",
            )  # fmt: skip
    if arguments is None:
        raise HTTPException(422, "Not recorded: an edit needs `arguments`.")
    if arguments == approval.arguments:
        raise HTTPException(422, "Not recorded: nothing was changed. Approve it as it is, or reject it.")
    try:
        edited = await desk.queue.edit(
            approval.approval_id,
            arguments,
            visitor.reviewer,
            channel=CHANNEL,
            identity_tenant=identity.tenant_id,
            note=sent.note,
        )
    except LearningError as error:
        status, why = status_of(error)
        if sent.form is None or status not in {409, 422}:
            raise
        # With what was typed: who edits need not begin again.
        approval, identity = await find(desk, visitor.reviewer, approval.approval_id, identity.tenant_id)
        return await show(
            request, desk, visitor, approval, identity, status=status, fields=fields, problem=why
        )
    if sent.form is not None:
        return go_to(request, f"/approvals/{edited.approval_id}", tenant=identity.tenant_id, said="edited")
    return json_answer({"outcome": "edited", "why": "", "approval": document_of(edited)})


async def _sent(request: Request, desk: ApprovalDesk, visitor: Visitor) -> Sent:
    """The decision as it was sent."""
    given, form = await given_by(request, desk, visitor)
    args_hash, note, dedup_key = (given.get(name) for name in ("args_hash", "note", "dedup_key"))
    arguments: Any = given.get("arguments")
    verdict = given.get("verdict")
    if not isinstance(verdict, str) or verdict not in {"approve", "reject", "edit"}:
        raise HTTPException(422, "Not recorded: `verdict` must be approve, reject or edit.")
    if not isinstance(args_hash, str) or not _HASH.fullmatch(args_hash):
        raise HTTPException(
            422, "Not recorded: `args_hash` must be the hash of what was shown, 16 digits or more."
        )
    if not isinstance(note, str | None) or not isinstance(dedup_key, str | None):
        raise HTTPException(422, "Not recorded: `note` and `dedup_key` must be text.")
    if form is None and arguments is not None and not isinstance(arguments, dict):
        raise HTTPException(422, "Not recorded: `arguments` must be an object.")
    if len(note or "") > _NOTE_MAX or len(dedup_key or "") > 200:
        raise HTTPException(422, f"Not recorded: a note has at most {_NOTE_MAX} characters, a key 200.")
    return Sent(
        verdict=verdict,
        args_hash=args_hash,
        note=(note or "").strip(),
        dedup_key=f"{CHANNEL}:{visitor.reviewer.name}:{dedup_key}" if dedup_key else None,
        arguments=arguments if form is None else None,
        form=form,
    )


# --- pages -------------------------------------------------------------------------------------------------------


@router.get("/approvals", response_class=HTMLResponse, include_in_schema=False)
async def approvals_page(
    request: Request, desk: Desk, tenant: str | None = None, said: str | None = None, after: str | None = None
) -> Response:
    """What waits for a decision, what waits longest first, and what was decided lately."""
    visitor = None
    try:
        visitor = await visitor_of(request, desk)
        if visitor is None:
            return door(request, said=said)
        reviewer = visitor.reviewer
        waits = {"state": "pending", "oldest_first": True}
        pending, more = await listed(desk, reviewer, tenant, waits, _PAGE, after=after)
        decided = {"states": sorted(_STATES - {"pending"})}
        recent = [] if after else (await listed(desk, reviewer, tenant, decided, 30))[0]
        looked_in = [identity.tenant_id for identity in tenants_of(desk, reviewer, tenant)]
        here = {} if tenant is None else {"tenant": tenant}
        return render_page(
            request, "list.html", visitor=visitor, title="Approvals", said=SAID.get(said or ""),
            pending=[row_of(request, approval, identity, visitor) for approval, identity in pending],
            recent=[row_of(request, approval, identity, visitor) for approval, identity in recent],
            tenant=tenant, has_tenants="*" in reviewer.tenants or len(reviewer.tenants) > 1,
            looked_in=[visible(name) for name in looked_in],
            is_part=tenant is None and "*" in reviewer.tenants,
            elsewhere=await waiting_elsewhere(request, desk, reviewer, looked_in), is_continued=after is not None,
            first=f"{root_of(request)}/approvals?{urlencode(here)}",
            more=None if more is None else f"{root_of(request)}/approvals?{urlencode({**here, 'after': more})}",
        )  # fmt: skip
    except (HTTPException, LearningError) as error:
        return await problem_page(request, desk, visitor, error, None, tenant)


@router.get("/approvals/style.css", include_in_schema=False)
async def style() -> Response:
    """The pages' style sheet."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=300"}
    return Response(style_sheet(), media_type="text/css", headers=headers)


@router.post("/approvals/login", include_in_schema=False)
async def log_in(request: Request, desk: Desk) -> Response:
    """A session for whom the token names."""
    try:
        login = await desk.login()
        form = form_fields(await body_of(request))
        if not login.is_own_origin(request.headers):
            emit("web_request_refused", reason="log-in from another origin")
            raise HTTPException(403, "Not logged in: the form was not sent by a page of this server.")
        given = login.log_in(form.get("credential", ""))
        if given is None:
            emit("web_request_refused", reason="log-in with a token of nobody")
            return door(
                request, problem="No reviewer has this token.", goes_to=form.get("goes_to"), status=401
            )
        response = go_to(request, own_path(form.get("goes_to")))
        for path in cookie_paths(request):
            response.set_cookie(
                COOKIE, given.cookie, max_age=int(given.lasts.total_seconds()), path=path,
                httponly=True, samesite="strict", secure=is_secure(request, desk.settings),
            )  # fmt: skip
        return response
    except (HTTPException, LearningError) as error:
        return await problem_page(request, desk, None, error, None, None)


@router.post("/approvals/logout", include_in_schema=False)
async def log_out(request: Request, desk: Desk) -> Response:
    """The end of a session."""
    try:
        login = await desk.login()
        session = login.by_cookie(request.cookies.get(COOKIE))
        if session is not None:
            await check_own(request, desk, session, form_fields(await body_of(request)))
        response = go_to(request, "/approvals", said="out")
        for path in cookie_paths(request):
            response.delete_cookie(COOKIE, path=path, httponly=True, samesite="strict")
        return response
    except (HTTPException, LearningError) as error:
        return await problem_page(request, desk, None, error, None, None)


@router.get("/approvals/{approval_id}", response_class=HTMLResponse, include_in_schema=False)
async def approval_page(
    request: Request, desk: Desk, approval_id: str, tenant: str | None = None, said: str | None = None
) -> Response:
    """One approval: the whole call, what it would do, and the forms to decide."""
    visitor = None
    try:
        visitor = await visitor_of(request, desk)
        if visitor is None:
            return door(request)
        approval, identity = await find(desk, visitor.reviewer, approval_id, tenant)
        return await show(request, desk, visitor, approval, identity, said=SAID.get(said or ""))
    except LearningError as error:
        return await problem_page(request, desk, visitor, error, None, tenant)
