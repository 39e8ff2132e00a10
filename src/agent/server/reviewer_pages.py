"""What all pages for reviewers share: who is at the door, what a browser sent, how a page is made.

They are for the reviewers of the policy file only. Programs send `Authorization: Bearer` with a reviewer's token or a
Supabase access token; browsers log in and have a session.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl, quote, urlencode

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from agent.approval.card import visible
from agent.approval.human_approval import HumanApprovalQueue, human_approval_queue
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
from agent.server.argument_form import read_json
from agent.server.reviewer_login import COOKIE, ReviewerLogin, Session

if TYPE_CHECKING:
    from agent.approval.reviewers import Reviewer
    from agent.settings import Settings

BODY_MAX = 1_000_000
_FIELDS_MAX = 500
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
SAID = {
    "approved": "Your approval is recorded.",
    "rejected": "Your rejection is recorded. It will not run.",
    "repeated": "You had decided this before; it counts once.",
    "edited": "The edited call is a request of its own, with a hash of its own. This is it.",
    "allowed": "The standing rule is made: calls of this shape run without being asked for, as far as it goes.",
    "silenced": "The silence is made. What it covers is recorded and not told until it ends.",
    "unsilenced": "The silence is over. What it covered and still lasts is told at the next check.",
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


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """A reviewer, and the session where they come by a browser."""

    reviewer: Reviewer
    session: Session | None


async def visitor_of(request: Request, desk: ApprovalDesk) -> Visitor | None:
    """Who asks. A header of a program wins over a cookie, so that a wrong token never passes for a session."""
    login = await desk.login()
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, credential = header.partition(" ")
        reviewer = login.by_credential(credential) if scheme.lower() == "bearer" else None
        return None if reviewer is None else Visitor(reviewer=reviewer, session=None)
    session = login.by_cookie(request.cookies.get(COOKIE))
    return None if session is None else Visitor(reviewer=session.reviewer, session=session)


async def program_of(request: Request, desk: ApprovalDesk) -> Visitor:
    """Who asks, where somebody must.

    Raises:
        HTTPException: nobody who may; 401.
    """
    visitor = await visitor_of(request, desk)
    if visitor is None:
        if "authorization" in request.headers or COOKIE in request.cookies:
            emit("web_request_refused", reason="no reviewer's token, or a session that is over")
        raise HTTPException(
            401,
            "No reviewer has this token. Send `Authorization: Bearer` with a reviewer's token or access token.",
            {"WWW-Authenticate": "Bearer"},
        )
    return visitor


def sees_tenant(reviewer: Reviewer, tenant_id: str) -> bool:
    """Whether the policy file lets this reviewer look into a tenant."""
    return "*" in reviewer.tenants or tenant_id in reviewer.tenants


def tenants_of(desk: ApprovalDesk, reviewer: Reviewer, named: str | None) -> list[Identity]:
    """The tenants to look in: the one that is named, else all that the policy names for this reviewer."""
    if named is not None:
        tenants = [named] if sees_tenant(reviewer, named) else []
    elif "*" in reviewer.tenants:
        tenants = [desk.settings.tenant, *(name for name in reviewer.tenants if name != "*")]
    else:
        tenants = list(reviewer.tenants)
    try:
        return [Identity(tenant_id=name) for name in dict.fromkeys(tenants)]
    except IdentityError:
        return []


def json_answer(content: Any, status: int = 200) -> Response:
    """A document for a program, which nobody keeps."""
    return JSONResponse(content, status, {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})


def status_of(error: HTTPException | LearningError) -> tuple[int, str]:
    """The status and the words for an error; an operator's errors are told in the log and not to browsers."""
    match error:
        case HTTPException():
            return error.status_code, str(error.detail)
        case NotFound():
            return 404, "There is nothing of that id, or it is not yours to see."
        case ConflictError() | Refused():
            return 409, f"Not recorded: {error}."
        case CallerError():
            return 422, f"Not recorded: {error}."
        case DatabaseUnavailable():
            return 503, "The database cannot be reached, so nothing is decided. Try again."
        case _:
            return 500, "It could not be done, and nothing is decided. The server's log says why."


def refusal(error: HTTPException | LearningError) -> Response:
    """An error for a program."""
    status, why = status_of(error)
    if status >= 500:
        report_failure(error)
    response = json_answer({"error": why}, status)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


def report_failure(error: Exception) -> None:
    """Tell the operator what the visitor is not told."""
    emit("approval_page_failed", reason=str(error))


def is_form(request: Request) -> bool:
    """Whether a browser sent a form."""
    return _media_type(request) == "application/x-www-form-urlencoded"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def given_by(
    request: Request, desk: ApprovalDesk, visitor: Visitor
) -> tuple[Mapping[str, Any], Mapping[str, str] | None]:
    """What was sent, and the form where a browser sent one, once it is certain that it comes from where it seems to."""
    body = await body_of(request)
    form: Mapping[str, str] | None = None
    given: Mapping[str, Any]
    if is_form(request):
        given = form = form_fields(body)
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
        await check_own(request, desk, visitor.session, form)
    return given, form


async def check_own(
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


async def body_of(request: Request) -> bytes:
    """The whole body, where it is not too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX:
            raise HTTPException(413, f"More than {BODY_MAX:,} bytes.")
    return body


def form_fields(body: bytes) -> dict[str, str]:
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


def door(
    request: Request,
    *,
    said: str | None = None,
    problem: str | None = None,
    goes_to: str | None = None,
    status: int = 401,
) -> Response:
    """The log-in page; before it, for who follows a link from elsewhere, a step that lets the cookie come along."""
    here = own_path(goes_to) if goes_to else request.url.path.removeprefix(root_of(request))
    if goes_to is None and request.url.query and said is None:
        here += f"?{request.url.query}"
    if (
        request.method == "GET"
        and request.headers.get("sec-fetch-site") == "cross-site"
        and COOKIE not in request.cookies
    ):
        # A strict cookie does not come with a link from another site, but with the page's own step it does.
        return render_page(request, "step.html", title="Approvals", goes_to=root_of(request) + own_path(here))
    return render_page(
        request, "login.html", title="Log in", status=status, said=SAID.get(said or ""), problem=problem,
        goes_to=own_path(here), status_of_login=status,
    )  # fmt: skip


def render_page(request: Request, template: str, *, title: str, status: int = 200, **shown: Any) -> Response:
    """A page from its template; `visitor` among what is shown is who looks at it."""
    visitor: Visitor | None = shown.pop("visitor", None)
    text = (
        _templates()
        .get_template(template)
        .render(
            title=title,
            area="alerts" if request.url.path.startswith(f"{root_of(request)}/alerts") else "approvals",
            root=root_of(request),
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
def style_sheet() -> str:
    """The style sheet of all pages."""
    return resources.files("agent.server").joinpath("pages/style.css").read_text(encoding="utf-8")


def _shown_moment(moment: datetime | str | None) -> str:
    """A moment with how far away it is, since a server does not know the reader's clock."""
    found = moment_of(moment)
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
    found = moment_of(moment)
    return "" if found is None else found.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def moment_of(moment: datetime | str | None) -> datetime | None:
    if moment is None or isinstance(moment, datetime):
        return moment
    try:
        return datetime.fromisoformat(moment)
    except ValueError:
        return None


def one_line(text: str, width: int) -> str:
    """The text with all white space made single spaces, cut to a width."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def root_of(request: Request) -> str:
    """Where this application is mounted."""
    return str(request.scope.get("root_path") or "").rstrip("/")


def own_path(path: str | None) -> str:
    """The path of one of our pages, whatever was sent; never another site."""
    if path and re.fullmatch(r"/(approvals|alerts)(/[0-9a-fA-F-]{32,36})?(\?[\w%=&.~+-]*)?", path):
        return path
    return "/approvals"


def cookie_paths(request: Request) -> list[str]:
    """Where a session counts: on our pages, and not for the rest of what runs on this server."""
    return [f"{quote(root_of(request))}{path}" for path in ("/approvals", "/alerts")]


def is_secure(request: Request, settings: Settings) -> bool:
    addresses = (settings.public_url, request.headers.get("origin"))
    return request.url.scheme == "https" or any(
        (address or "").startswith("https://") for address in addresses
    )


def go_to(request: Request, path: str, **query: str) -> RedirectResponse:
    """A page to go to after a form."""
    address = f"{root_of(request)}{path}" + (f"?{urlencode(query)}" if query else "")
    return RedirectResponse(address, 303, _HEADERS)
