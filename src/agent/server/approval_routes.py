"""The pages and the REST interface on which reviewers see what agents ask for, and decide.

Both are for the reviewers of the policy file only. Programs send `Authorization: Bearer` with a reviewer's token or a
Supabase access token; browsers log in and have a session. Which decision counts is for the rows to say: here nobody is
let through who is not a reviewer, and nothing is decided that was not shown.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl, quote, urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from agent.approval.card import Card, make_card, visible
from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
from agent.approval.records import Approval
from agent.approval.standing_rules import LONGEST, make_rule, no_rule_because
from agent.errors import (
    CallerError,
    ConflictError,
    DatabaseUnavailable,
    IdentityError,
    LearningError,
    NotFound,
    Refused,
)
from agent.events import emit
from agent.identity import Identity
from agent.server.argument_form import fields_of, read_form, read_json
from agent.server.reviewer_login import COOKIE, ReviewerLogin, Session

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer
    from agent.settings import Settings

CHANNEL = "web"
_BODY_MAX = 1_000_000
_FIELDS_MAX = 500
_LIST_MAX = 500
_PAGE = 100
_NOTE_MAX = 2_000
_STATES = frozenset(
    {"pending", "approved", "rejected", "expired", "cancelled", "executing", "executed", "failed", "unknown"}
)
_HASH = re.compile(r"[0-9a-f]{16,64}")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with less, browsers send no origin with forms
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_SAID = {
    "approved": "Your approval is recorded.",
    "rejected": "Your rejection is recorded. It will not run.",
    "repeated": "You had decided this before; it counts once.",
    "edited": "The edited call is a request of its own, with a hash of its own. This is it.",
    "allowed": "The standing rule is made: calls of this shape run without being asked for, as far as it goes.",
    "out": "You are logged out.",
}


class ApprovalDesk:
    """What the routes work with: the queue, its policy, and the log-in."""

    def __init__(self, queue: HumanApprovalQueue) -> None:
        self.queue = queue
        self._login: ReviewerLogin | None = None
        self._making: asyncio.Lock | None = None

    @property
    def settings(self) -> Settings:
        """The settings of the queue."""
        return self.queue.settings

    async def login(self) -> ReviewerLogin:
        """Made once, when the database's secret is known."""
        if self._login is None:
            self._making = self._making or asyncio.Lock()
            async with self._making:
                if self._login is None:
                    await self.queue.database.prepare()
                    self._login = ReviewerLogin(
                        self.queue.policy.reviewers, self.settings, self.queue.database.secret()
                    )
        return self._login


@functools.cache
def approval_desk() -> ApprovalDesk:
    """The desk of this process; tests put another in its place as a FastAPI dependency."""
    return ApprovalDesk(human_approval_queue)


Desk = Annotated[ApprovalDesk, Depends(approval_desk)]
router = APIRouter(tags=["approvals"])


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """A reviewer, and the session where they come by a browser."""

    reviewer: Reviewer
    session: Session | None


# --- who ---------------------------------------------------------------------------------------------------------


async def _visitor(request: Request, desk: ApprovalDesk) -> Visitor | None:
    """Who asks. A header of a program wins over a cookie, so that a wrong token never passes for a session."""
    login = await desk.login()
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, credential = header.partition(" ")
        reviewer = login.by_credential(credential) if scheme.lower() == "bearer" else None
        return None if reviewer is None else Visitor(reviewer=reviewer, session=None)
    session = login.by_cookie(request.cookies.get(COOKIE))
    return None if session is None else Visitor(reviewer=session.reviewer, session=session)


async def _program(request: Request, desk: ApprovalDesk) -> Visitor:
    visitor = await _visitor(request, desk)
    if visitor is None:
        if "authorization" in request.headers or COOKIE in request.cookies:
            emit("web_request_refused", reason="no reviewer's token, or a session that is over")
        raise HTTPException(
            401,
            "No reviewer has this token. Send `Authorization: Bearer` with a reviewer's token or access token.",
            {"WWW-Authenticate": "Bearer"},
        )
    return visitor


def _sees(reviewer: Reviewer, tenant_id: str) -> bool:
    return "*" in reviewer.tenants or tenant_id in reviewer.tenants


def _tenants(desk: ApprovalDesk, reviewer: Reviewer, named: str | None) -> list[Identity]:
    """The tenants to look in: the one that is named, else all that the policy names for this reviewer."""
    if named is not None:
        tenants = [named] if _sees(reviewer, named) else []
    elif "*" in reviewer.tenants:
        tenants = [desk.settings.tenant, *(name for name in reviewer.tenants if name != "*")]
    else:
        tenants = list(reviewer.tenants)
    try:
        return [Identity(tenant_id=name) for name in dict.fromkeys(tenants)]
    except IdentityError:
        return []


async def _find(
    desk: ApprovalDesk, reviewer: Reviewer, approval_id: str, tenant: str | None
) -> tuple[Approval, Identity]:
    """An approval that this reviewer may see.

    Raises:
        NotFound: there is none; the same whether it does not exist or is another tenant's.
    """
    with suppress(ValueError):  # no UUID is nobody's
        wanted = str(UUID(approval_id))
        for identity in _tenants(desk, reviewer, tenant):
            with suppress(NotFound):
                return await desk.queue.get(wanted, identity), identity
    raise NotFound(f"there is no approval {approval_id[:80]!r} that {reviewer.name!r} may see")


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
        visitor = await _program(request, desk)
        if state is not None and state not in _STATES:
            raise HTTPException(422, f"state={state[:40]!r} is none of {', '.join(sorted(_STATES))}.")
        if not 1 <= limit <= _LIST_MAX:
            raise HTTPException(422, f"limit={limit} must be from 1 to {_LIST_MAX}.")
        if order not in {"newest", "oldest"}:
            raise HTTPException(422, f"order={order[:40]!r} must be newest or oldest.")
        wanted = ({"state": state} if state else {}) | {"oldest_first": order == "oldest"}
        found, more = await _listed(desk, visitor.reviewer, tenant, wanted, limit, after=after)
        return _json({"approvals": [_document(approval) for approval, _ in found], "next": more})
    except (HTTPException, LearningError) as error:
        return _refusal(error)


@router.get("/approvals/{approval_id}.json")
async def get_approval(request: Request, desk: Desk, approval_id: str, tenant: str | None = None) -> Response:
    """One approval: what is asked, by whom, its votes and its state."""
    try:
        visitor = await _program(request, desk)
        approval, _ = await _find(desk, visitor.reviewer, approval_id, tenant)
        return _json(_document(approval))
    except (HTTPException, LearningError) as error:
        return _refusal(error)


async def _listed(
    desk: ApprovalDesk,
    reviewer: Reviewer,
    tenant: str | None,
    wanted: Mapping[str, Any],
    limit: int,
    *,
    after: str | None = None,
) -> tuple[list[tuple[Approval, Identity]], str | None]:
    """At most so many approvals, and what comes after them, where there are more."""
    asked = {**wanted, "limit": limit + 1}
    if after is not None:
        asked["after"] = _place(after)
    found: list[tuple[Approval, Identity]] = []
    for identity in _tenants(desk, reviewer, tenant):
        rows = await desk.queue.database.call("list_approvals", identity, wanted=asked)
        found += [(Approval.from_row(row), identity) for row in rows]
    found.sort(key=lambda pair: pair[0].approval_id)
    found.sort(key=lambda pair: pair[0].requested_at, reverse=not wanted.get("oldest_first"))
    if len(found) <= limit:
        return found, None
    last = found[limit - 1][0]
    return found[:limit], f"{last.requested_at.isoformat()}~{last.approval_id}"


def _place(after: str) -> dict[str, str]:
    """The approval after which a list goes on."""
    moment, _, approval_id = after.partition("~")
    try:
        found = datetime.fromisoformat(moment)
        if found.tzinfo is None:
            raise ValueError
        return {"requested_at": found.isoformat(), "approval_id": str(UUID(approval_id))}
    except ValueError:
        raise HTTPException(422, f"after={after[:80]!r} is not the `next` of a list.") from None


def _document(approval: Approval) -> dict[str, Any]:
    """What programs are given: the approval without where its messages and its thread are."""
    document = approval.as_json()
    for name in ("messages", "interrupt"):
        document.pop(name, None)
    return document


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})


def _status_of(error: HTTPException | LearningError) -> tuple[int, str]:
    """The status and the words for an error; an operator's errors are told in the log and not to browsers."""
    match error:
        case HTTPException():
            return error.status_code, str(error.detail)
        case NotFound():
            return 404, "There is no such approval, or it is not yours to see."
        case ConflictError() | Refused():
            return 409, f"Not recorded: {error}."
        case CallerError():
            return 422, f"Not recorded: {error}."
        case DatabaseUnavailable():
            return 503, "The database cannot be reached, so nothing is decided. Try again."
        case _:
            return 500, "It could not be done, and nothing is decided. The server's log says why."


def _refusal(error: HTTPException | LearningError) -> Response:
    status, why = _status_of(error)
    if status >= 500:
        _report(error)
    response = _json({"error": why}, status)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


def _report(error: Exception) -> None:
    emit("approval_page_failed", reason=str(error))


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
    wants_page = _is_form(request)
    visitor: Visitor | None = None
    try:
        visitor = await _program(request, desk)
        sent = await _sent(request, desk, visitor)
        approval, identity = await _find(desk, visitor.reviewer, approval_id, tenant)
        if sent.verdict == "edit":
            return await _edit(request, desk, visitor, approval, identity, sent)
        is_unconfirmed = sent.form is not None and sent.form.get("confirmed") != "yes"
        if is_unconfirmed and sent.verdict == "approve" and _needs_confirming(approval):
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
            return _to(request, f"/approvals/{approval.approval_id}", tenant=identity.tenant_id, said=said)
        return _json(
            {
                "outcome": outcome.outcome,
                "why": outcome.why,
                "approval": next(
                    (_document(one) for one in outcome.approvals if one.approval_id == approval.approval_id),
                    None,
                ),
            }
        )
    except (HTTPException, LearningError) as error:
        if not wants_page:
            return _refusal(error)
        return await _problem_page(request, desk, visitor, error, approval_id, tenant)


@router.post("/approvals/{approval_id}/allow")
async def allow_calls(request: Request, desk: Desk, approval_id: str, tenant: str | None = None) -> Response:
    """Make a standing rule from this call; the call itself stays as it is.

    JSON: `{"args_hash": …, "max_rows": …, "hours": …, "max_uses": …}`; without `max_uses` any number of calls.
    """
    wants_page = _is_form(request)
    visitor: Visitor | None = None
    try:
        visitor = await _program(request, desk)
        given, form = await _given(request, desk, visitor)
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
        approval, identity = await _find(desk, visitor.reviewer, approval_id, tenant)
        rule = await make_rule(
            desk.queue, approval.approval_id, visitor.reviewer, identity_tenant=identity.tenant_id,
            max_rows=max_rows, max_uses=numbers["max_uses"], lasts=timedelta(hours=hours), args_hash=args_hash,
        )  # fmt: skip
        if wants_page:
            return _to(
                request, f"/approvals/{approval.approval_id}", tenant=identity.tenant_id, said="allowed"
            )
        return _json(
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
            return _refusal(error)
        return await _problem_page(request, desk, visitor, error, approval_id, tenant)


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


def _needs_confirming(approval: Approval) -> bool:
    return str(approval.risk) == "DESTRUCTIVE"


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
    if sent.form is not None:
        arguments, fields = read_form(_schema_of(desk, approval), approval.arguments, sent.form)
        if arguments is None:
            return await _show(
                request, desk, visitor, approval, identity, status=422, fields=fields,
                problem="Not recorded: some arguments cannot be read. They are marked below.",
            )  # fmt: skip
    if arguments is None:
        raise HTTPException(422, "Not recorded: an edit needs `arguments`.")
    if arguments == approval.arguments:
        raise HTTPException(422, "Not recorded: nothing was changed. Approve it as it is, or reject it.")
    edited = await desk.queue.edit(
        approval.approval_id,
        arguments,
        visitor.reviewer,
        channel=CHANNEL,
        identity_tenant=identity.tenant_id,
        note=sent.note,
    )
    if sent.form is not None:
        return _to(request, f"/approvals/{edited.approval_id}", tenant=identity.tenant_id, said="edited")
    return _json({"outcome": "edited", "why": "", "approval": _document(edited)})


def _is_form(request: Request) -> bool:
    return _media_type(request) == "application/x-www-form-urlencoded"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _given(
    request: Request, desk: ApprovalDesk, visitor: Visitor
) -> tuple[Mapping[str, Any], Mapping[str, str] | None]:
    """What was sent, and the form where a browser sent one, once it is certain that it comes from where it seems to."""
    body = await _body(request)
    form: Mapping[str, str] | None = None
    given: Mapping[str, Any]
    if _is_form(request):
        given = form = _form(body)
    elif _media_type(request) == "application/json":
        try:
            given = read_json(body.decode())
        except ValueError:
            raise HTTPException(422, "Not recorded: the body is not JSON.") from None
        if not isinstance(given, Mapping):
            raise HTTPException(422, "Not recorded: the body must be a JSON object.")
    else:
        raise HTTPException(415, "Send JSON, or the form of the page.")
    if visitor.session is not None:
        await _check_own(request, desk, visitor.session, form)
    return given, form


async def _sent(request: Request, desk: ApprovalDesk, visitor: Visitor) -> Sent:
    """The decision as it was sent."""
    given, form = await _given(request, desk, visitor)
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


async def _check_own(
    request: Request, desk: ApprovalDesk, session: Session, form: Mapping[str, str] | None
) -> None:
    """Refuse what another site made this browser send."""
    login = await desk.login()
    token = form.get("csrf_token") if form is not None else request.headers.get("x-csrf-token")
    if not login.is_own_origin(request.headers) or not login.is_own_form(session, token):
        emit("web_request_refused", reason="a form of another origin or session")
        raise HTTPException(
            403,
            "Not recorded: this was not sent by a page of this session. Open the page again and decide there.",
        )


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_MAX:
            raise HTTPException(413, f"More than {_BODY_MAX:,} bytes.")
    return body


def _form(body: bytes) -> dict[str, str]:
    """The fields of a form; a name that is given twice means that it cannot be read."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=_FIELDS_MAX, errors="strict"
        )
    except ValueError:
        raise HTTPException(422, "Not recorded: the form cannot be read.") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise HTTPException(422, "Not recorded: the form names a field twice.")
    return form


def _schema_of(desk: ApprovalDesk, approval: Approval) -> Mapping[str, Any] | None:
    """The JSON schema of the call's arguments: as the paused run gave it, else as this process knows the tool."""
    schemas = (approval.interrupt or {}).get("schemas")
    schema = schemas.get(approval.approval_id) if isinstance(schemas, Mapping) else None
    return schema if isinstance(schema, Mapping) else desk.queue.schema_of(approval)


# --- pages -------------------------------------------------------------------------------------------------------


@router.get("/approvals", response_class=HTMLResponse, include_in_schema=False)
async def approvals_page(
    request: Request, desk: Desk, tenant: str | None = None, said: str | None = None, after: str | None = None
) -> Response:
    """What waits for a decision, what waits longest first, and what was decided lately."""
    visitor = None
    try:
        visitor = await _visitor(request, desk)
        if visitor is None:
            return _door(request, said=said)
        reviewer = visitor.reviewer
        waits = {"state": "pending", "oldest_first": True}
        pending, more = await _listed(desk, reviewer, tenant, waits, _PAGE, after=after)
        decided = {"states": sorted(_STATES - {"pending"})}
        recent = [] if after else (await _listed(desk, reviewer, tenant, decided, 30))[0]
        looked_in = [identity.tenant_id for identity in _tenants(desk, reviewer, tenant)]
        here = {} if tenant is None else {"tenant": tenant}
        return _page(
            request, "list.html", visitor=visitor, title="Approvals", said=_SAID.get(said or ""),
            pending=[_row(request, approval, identity, visitor) for approval, identity in pending],
            recent=[_row(request, approval, identity, visitor) for approval, identity in recent],
            tenant=tenant, has_tenants="*" in reviewer.tenants or len(reviewer.tenants) > 1,
            looked_in=[visible(name) for name in looked_in],
            elsewhere=await _elsewhere(request, desk, reviewer, looked_in), is_continued=after is not None,
            first=f"{_root(request)}/approvals?{urlencode(here)}",
            more=None if more is None else f"{_root(request)}/approvals?{urlencode({**here, 'after': more})}",
        )  # fmt: skip
    except (HTTPException, LearningError) as error:
        return await _problem_page(request, desk, visitor, error, None, tenant)


async def _elsewhere(
    request: Request, desk: ApprovalDesk, reviewer: Reviewer, looked_in: Sequence[str]
) -> list[dict[str, Any]]:
    """Other tenants of this reviewer in which something waits."""
    if "*" not in reviewer.tenants and set(reviewer.tenants) <= set(looked_in):
        return []
    tenants = None if "*" in reviewer.tenants else [*reviewer.tenants]
    counts: dict[str, int] = await desk.queue.database.call("count_waiting", tenants=tenants)
    return [
        {
            "href": f"{_root(request)}/approvals?{urlencode({'tenant': name})}",
            "tenant": visible(name),
            "count": count,
        }
        for name, count in sorted(counts.items())
        if _sees(reviewer, name) and name not in looked_in
    ]


@router.get("/approvals/style.css", include_in_schema=False)
async def style() -> Response:
    """The pages' style sheet."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=300"}
    return Response(_style(), media_type="text/css", headers=headers)


@router.post("/approvals/login", include_in_schema=False)
async def log_in(request: Request, desk: Desk) -> Response:
    """A session for whom the token names."""
    try:
        login = await desk.login()
        form = _form(await _body(request))
        if not login.is_own_origin(request.headers):
            emit("web_request_refused", reason="log-in from another origin")
            raise HTTPException(403, "Not logged in: the form was not sent by a page of this server.")
        given = login.log_in(form.get("credential", ""))
        if given is None:
            emit("web_request_refused", reason="log-in with a token of nobody")
            return _door(
                request, problem="No reviewer has this token.", goes_to=form.get("goes_to"), status=401
            )
        response = _to(request, _own_path(form.get("goes_to")))
        response.set_cookie(
            COOKIE, given.cookie, max_age=int(given.lasts.total_seconds()), path=_cookie_path(request),
            httponly=True, samesite="strict", secure=_is_secure(request, desk.settings),
        )  # fmt: skip
        return response
    except (HTTPException, LearningError) as error:
        return await _problem_page(request, desk, None, error, None, None)


@router.post("/approvals/logout", include_in_schema=False)
async def log_out(request: Request, desk: Desk) -> Response:
    """The end of a session."""
    try:
        login = await desk.login()
        session = login.by_cookie(request.cookies.get(COOKIE))
        if session is not None:
            await _check_own(request, desk, session, _form(await _body(request)))
        response = _to(request, "/approvals", said="out")
        response.delete_cookie(COOKIE, path=_cookie_path(request), httponly=True, samesite="strict")
        return response
    except (HTTPException, LearningError) as error:
        return await _problem_page(request, desk, None, error, None, None)


@router.get("/approvals/{approval_id}", response_class=HTMLResponse, include_in_schema=False)
async def approval_page(
    request: Request, desk: Desk, approval_id: str, tenant: str | None = None, said: str | None = None
) -> Response:
    """One approval: the whole call, what it would do, and the forms to decide."""
    visitor = None
    try:
        visitor = await _visitor(request, desk)
        if visitor is None:
            return _door(request)
        approval, identity = await _find(desk, visitor.reviewer, approval_id, tenant)
        return await _show(request, desk, visitor, approval, identity, said=_SAID.get(said or ""))
    except LearningError as error:
        return await _problem_page(request, desk, visitor, error, None, tenant)


async def _show(
    request: Request,
    desk: ApprovalDesk,
    visitor: Visitor,
    approval: Approval,
    identity: Identity,
    *,
    status: int = 200,
    said: str | None = None,
    problem: str | None = None,
    fields: Sequence[Any] | None = None,
) -> Response:
    together = await desk.queue.list(identity, batch_id=approval.batch_id, limit=_LIST_MAX)
    reviewer = visitor.reviewer
    hindrance = _hindrance(approval, reviewer)
    query = urlencode({"tenant": identity.tenant_id})
    return _page(
        request, "approval.html", status=status, visitor=visitor, title=visible(approval.tool), said=said,
        problem=problem, approval=approval, card=_card(approval, identity), hindrance=hindrance,
        has_approved=_has_approved(approval, reviewer), can_edit=hindrance is None and desk.queue.can_edit(approval),
        fields=fields if fields is not None else fields_of(_schema_of(desk, approval), approval.arguments),
        is_editing=fields is not None, confirms=_needs_confirming(approval),
        votes=approval.votes or (),
        action=f"{_root(request)}/approvals/{approval.approval_id}/decide?{query}",
        others=[
            _row(request, one, identity, visitor)
            for one in sorted(together, key=lambda one: (str(one.requested_at), one.approval_id))
            if one.approval_id != approval.approval_id
        ],
        replaced_by=_replaced_by(request, approval, identity, together),
        rule=_rule_form(request, desk, approval, identity, reviewer),
    )  # fmt: skip


def _rule_form(
    request: Request, desk: ApprovalDesk, approval: Approval, identity: Identity, reviewer: Reviewer
) -> dict[str, Any] | None:
    """What the form for a standing rule shows; `None` where this reviewer makes none from this call."""
    if approval.state in {"rejected", "cancelled"} or no_rule_because(desk.queue, approval, reviewer):
        return None
    query = urlencode({"tenant": identity.tenant_id})
    return {
        "action": f"{_root(request)}/approvals/{approval.approval_id}/allow?{query}",
        "tables": ", ".join(visible(name) for name in approval.tables) or "no table",
        "rows": approval.rows,
        "longest_hours": int(LONGEST.total_seconds() // 3_600),
    }


def _card(approval: Approval, identity: Identity) -> Card:
    """The card with nothing left out: this is where the whole is seen."""
    return make_card([approval], tenant_id=identity.tenant_id, text_limit=_BODY_MAX, line_limit=_BODY_MAX)


def _hindrance(approval: Approval, reviewer: Reviewer) -> str | None:
    """Why this reviewer has nothing to decide here, as far as is known; the database has the last word."""
    if approval.state != "pending":
        return "This is decided."
    if (expires := _moment(approval.expires_at)) is not None and expires <= datetime.now(UTC):
        return "This has expired, so it is a no."
    if approval.requested_by in {reviewer.name, *reviewer.user_ids}:
        return "You asked for this yourself, so somebody else decides."
    if reviewer.name not in (approval.approvers or ()):
        return "You are not among those who may decide this."
    return None


def _has_approved(approval: Approval, reviewer: Reviewer) -> bool:
    return any(vote.get("voter") == reviewer.name for vote in approval.votes or ())


def _row(request: Request, approval: Approval, identity: Identity, visitor: Visitor) -> dict[str, Any]:
    votes = sum(vote.get("verdict") == "approve" for vote in approval.votes or ())
    return {
        "href": f"{_root(request)}/approvals/{approval.approval_id}?{urlencode({'tenant': identity.tenant_id})}",
        "tool": visible(approval.tool),
        "risk": str(approval.risk),
        "state": str(approval.state),
        "summary": _cut(visible(approval.summary or ""), 200),
        "requested_by": visible(approval.requested_by or "nobody who is known"),
        "requested_at": _moment(approval.requested_at),
        "expires_at": _moment(approval.expires_at),
        "decided_at": _moment(approval.decided_at),
        "decided_by": ", ".join(visible(name) for name in approval.decided_by or ()),
        "votes": f"{votes} of {approval.required_votes}" if (approval.required_votes or 1) > 1 else "",
        "tenant": visible(identity.tenant_id),
        "is_mine": _hindrance(approval, visitor.reviewer) is None
        and not _has_approved(approval, visitor.reviewer),
    }


def _replaced_by(
    request: Request, approval: Approval, identity: Identity, together: Sequence[Approval]
) -> str | None:
    for one in together:
        if one.replaces == approval.approval_id:
            return f"{_root(request)}/approvals/{one.approval_id}?{urlencode({'tenant': identity.tenant_id})}"
    return None


def _door(
    request: Request,
    *,
    said: str | None = None,
    problem: str | None = None,
    goes_to: str | None = None,
    status: int = 401,
) -> Response:
    """The log-in page; before it, for who follows a link from elsewhere, a step that lets the cookie come along."""
    here = _own_path(goes_to) if goes_to else request.url.path.removeprefix(_root(request))
    if goes_to is None and request.url.query and said is None:
        here += f"?{request.url.query}"
    if (
        request.method == "GET"
        and request.headers.get("sec-fetch-site") == "cross-site"
        and COOKIE not in request.cookies
    ):
        # A strict cookie does not come with a link from another site, but with the page's own step it does.
        return _page(request, "step.html", title="Approvals", goes_to=_root(request) + _own_path(here))
    return _page(
        request, "login.html", title="Log in", status=status, said=_SAID.get(said or ""), problem=problem,
        goes_to=_own_path(here), status_of_login=status,
    )  # fmt: skip


async def _problem_page(
    request: Request,
    desk: ApprovalDesk,
    visitor: Visitor | None,
    error: HTTPException | LearningError,
    approval_id: str | None,
    tenant: str | None,
) -> Response:
    """What went wrong, on the page of the approval where there is one."""
    status, why = _status_of(error)
    if status >= 500:
        _report(error)
    if status == 401:
        return _door(request, problem="Your session is over. Log in and decide again.", goes_to="/approvals")
    if visitor is not None and approval_id is not None and status in {403, 409, 422}:
        try:
            approval, identity = await _find(desk, visitor.reviewer, approval_id, tenant)
            return await _show(request, desk, visitor, approval, identity, status=status, problem=why)
        except LearningError:  # what is told is why the decision failed, not why its page did
            pass
    title = {404: "Not found", 403: "Refused"}.get(status, "Not done")
    return _page(request, "problem.html", status=status, visitor=visitor, title=title, problem=why)


def _page(request: Request, template: str, *, title: str, status: int = 200, **shown: Any) -> Response:
    visitor: Visitor | None = shown.pop("visitor", None)
    text = (
        _templates()
        .get_template(template)
        .render(
            title=title,
            root=_root(request),
            reviewer=None if visitor is None else visitor.reviewer.name,
            csrf_token=None if visitor is None or visitor.session is None else visitor.session.csrf_token,
            **shown,
        )
    )
    return HTMLResponse(text, status, _HEADERS)


@functools.cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("agent.server", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(said=None, problem=None, is_editing=False)
    environment.filters.update(moment=_shown_moment, iso=_iso, visible=visible)
    return environment


@functools.cache
def _style() -> str:
    return resources.files("agent.server").joinpath("pages/style.css").read_text(encoding="utf-8")


def _shown_moment(moment: datetime | str | None) -> str:
    """A moment with how far away it is, since a server does not know the reader's clock."""
    found = _moment(moment)
    if found is None:
        return ""
    seconds = (found - datetime.now(UTC)).total_seconds()
    size = abs(seconds)
    units = ((86_400, "day"), (3_600, "hour"), (60, "minute"))
    length, unit = next((one for one in units if size >= one[0]), (1, "second"))
    number = int(size // length)
    told = f"{number} {unit}{'' if number == 1 else 's'}"
    return f"in {told}" if seconds > 0 else f"{told} ago"


def _iso(moment: datetime | str | None) -> str:
    found = _moment(moment)
    return "" if found is None else found.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _moment(moment: datetime | str | None) -> datetime | None:
    if moment is None or isinstance(moment, datetime):
        return moment
    try:
        return datetime.fromisoformat(moment)
    except ValueError:
        return None


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _root(request: Request) -> str:
    """Where this application is mounted."""
    return str(request.scope.get("root_path") or "").rstrip("/")


def _own_path(path: str | None) -> str:
    """The path of one of our pages, whatever was sent; never another site."""
    if path and re.fullmatch(r"/approvals(/[0-9a-fA-F-]{32,36})?(\?[\w%=&.~+-]*)?", path):
        return path
    return "/approvals"


def _cookie_path(request: Request) -> str:
    return f"{quote(_root(request))}/approvals"


def _is_secure(request: Request, settings: Settings) -> bool:
    addresses = (settings.public_url, request.headers.get("origin"))
    return request.url.scheme == "https" or any(
        (address or "").startswith("https://") for address in addresses
    )


def _to(request: Request, path: str, **query: str) -> RedirectResponse:
    """A page to go to after a form."""
    address = f"{_root(request)}{path}" + (f"?{urlencode(query)}" if query else "")
    return RedirectResponse(address, 303, _HEADERS)
