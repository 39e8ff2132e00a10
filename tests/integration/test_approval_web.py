"""The approval pages and their REST interface: who gets in, what is recorded, what is refused."""

from __future__ import annotations

import hashlib
import html
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from agent.approval.binding import binding_hash
from agent.approval.human_approval import HumanApprovalQueue
from agent.approval.policy_file import load_policy
from agent.approval.records import Approval, ApprovalRequest
from agent.approval.risk import Risk
from agent.database import open_database
from agent.errors import Refused
from agent.events import Event, listening
from agent.identity import Identity
from agent.portal import portal
from agent.server.approval_routes import router
from agent.server.reviewer_pages import ApprovalDesk, approval_desk
from agent.testing.throwaway import ThrowawayDatabase

HOST = "http://reviews.test"
BOB = Identity(user_id="bob", session_id="t1", agent_id="shop")
JWT_SECRET = "a-secret-of-the-project-that-is-long-enough-for-hs256"
GRACE_SUBJECT = "7d1c7e4e-9a55-4a54-8f0e-6f1f8c1b2a10"
TOKENS = {"ada": "ada-token-1", "grace": "grace-token-2", "eve": "eve-token-3"}


def policy_text(**tokens: str) -> str:
    tokens = TOKENS | tokens
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in tokens.items()}
    return f"""
[[reviewer]]
name = "ada"
user_ids = ["ada@example.com"]
token_sha256 = "{digests["ada"]}"

[[reviewer]]
name = "grace"
token_sha256 = "{digests["grace"]}"
jwt_subject = "{GRACE_SUBJECT}"

[[reviewer]]
name = "eve"
token_sha256 = "{digests["eve"]}"
tenants = ["elsewhere"]
"""


class Office:
    """The application over a database, with callers of each kind."""

    def __init__(self, database: ThrowawayDatabase, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = database.settings.model_copy(update={"supabase_jwt_secret": None, **settings})
        self.database = open_database(self.settings)
        self.set_policy(policy_text())

    def set_policy(self, text: str) -> None:
        """Another policy file, as after a restart."""
        path = self.folder / "policy.toml"
        path.write_text(text)
        self.queue = HumanApprovalQueue(self.database, self.settings, load_policy(path))
        self.queue.reassess_with("action", self._reassess)
        self.app = FastAPI()
        self.app.include_router(router)
        desk = ApprovalDesk(self.queue)
        self.app.dependency_overrides[approval_desk] = lambda: desk

    async def _reassess(self, approval: Approval, arguments: Any) -> ApprovalRequest:
        return self.request(approval.risk, arguments, identity=Identity(tenant_id=approval.tenant_id))

    def request(self, risk: Risk, arguments: Any, *, identity: Identity, **more: Any) -> ApprovalRequest:
        return ApprovalRequest(
            tool="refund",
            arguments=arguments,
            args_hash=binding_hash("refund", arguments, tenant_id=identity.tenant_id),
            risk=risk,
            approvers=tuple(self.queue.policy.reviewers.allowed(identity.tenant_id, risk)),
            summary="Refund of an order",
            **more,
        )

    async def ask(
        self, risk: Risk = Risk.WRITE, *, identity: Identity = BOB, arguments: Any = None, **more: Any
    ) -> Approval:
        """A request of an agent."""
        arguments = {"order": "A1", "amount": 3.5} if arguments is None else arguments
        return await self.queue.submit(self.request(risk, arguments, identity=identity, **more), identity)

    async def state(self, approval: Approval) -> str:
        found = await self.queue.get(approval.approval_id, Identity(tenant_id=approval.tenant_id))
        return found.state

    @asynccontextmanager
    async def caller(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url=HOST, headers=headers) as client:
            yield client

    @asynccontextmanager
    async def program(self, name: str) -> AsyncIterator[httpx.AsyncClient]:
        async with self.caller(authorization=f"Bearer {TOKENS[name]}") as client:
            yield client

    @asynccontextmanager
    async def browser(self, name: str) -> AsyncIterator[httpx.AsyncClient]:
        """Somebody who has logged in."""
        async with self.caller(origin=HOST) as client:
            answer = await client.post("/approvals/login", data={"credential": TOKENS[name]})
            assert answer.status_code == 303, answer.text
            yield client


@contextmanager
def an_office(database: ThrowawayDatabase, folder: Path, **settings: Any) -> Iterator[Office]:
    office = Office(database, folder, **settings)
    yield office
    portal().run_sync(office.database.close())


@pytest.fixture
def office(learning_database: ThrowawayDatabase, tmp_path: Path) -> Iterator[Office]:
    with an_office(learning_database, tmp_path) as office:
        yield office


def form_of(page: httpx.Response, verdict: str, **fields: str) -> dict[str, str]:
    """What a browser sends when that button is pressed."""
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page.text))
    return {name: html.unescape(value) for name, value in hidden.items()} | {"verdict": verdict} | fields


def path_of(approval: Approval, what: str = "") -> str:
    return f"/approvals/{approval.approval_id}{what}"


def verdict(approval: Approval, said: str = "approve", **more: Any) -> dict[str, Any]:
    return {"verdict": said, "args_hash": approval.args_hash, **more}


def votes(database: ThrowawayDatabase) -> int:
    with psycopg.connect(database.url) as connection:
        row = connection.execute("SELECT count(*) FROM public.approval_vote").fetchone()
    assert row is not None
    return int(row[0])


# --- who gets in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer nonsense"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKENS['ada']}"},
        {"authorization": TOKENS["ada"]},
        {"authorization": "Bearer " + hashlib.sha256(TOKENS["ada"].encode()).hexdigest()},
        {"cookie": "agent_reviewer=x.y"},
        {"cookie": f"agent_reviewer={TOKENS['ada']}"},
    ],
)
async def test_nobody_gets_in_without_a_token(office: Office, headers: dict[str, str]) -> None:
    approval = await office.ask()
    async with office.caller(**headers) as client:
        for path in ("/approvals.json", path_of(approval, ".json"), "/approvals", path_of(approval)):
            answer = await client.get(path)
            assert answer.status_code == 401, path
            assert "refund" not in answer.text
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval))
        assert answer.status_code == 401
    assert await office.state(approval) == "pending"


async def test_a_good_cookie_does_not_help_a_wrong_header(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        assert (await client.get(path_of(approval, ".json"))).status_code == 200
        wrong = {"authorization": "Bearer nonsense"}
        assert (await client.get(path_of(approval, ".json"), headers=wrong)).status_code == 401


async def test_with_no_policy_nobody_is_a_reviewer(office: Office) -> None:
    office.set_policy("")
    async with office.caller(authorization=f"Bearer {TOKENS['ada']}") as client:
        assert (await client.get("/approvals.json")).status_code == 401


async def test_the_cookie_is_strict_hidden_from_scripts_and_holds_no_token(office: Office) -> None:
    async with office.caller(origin=HOST) as client:
        answer = await client.post("/approvals/login", data={"credential": TOKENS["ada"]})
    cookie = answer.headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite=strict" in cookie.lower()
    assert "path=/approvals" in cookie.lower()
    assert TOKENS["ada"] not in cookie
    assert hashlib.sha256(TOKENS["ada"].encode()).hexdigest() not in cookie
    assert "secure" not in cookie.lower(), "there is no TLS here"


async def test_the_cookie_is_secure_where_the_address_is(
    learning_database: ThrowawayDatabase, tmp_path: Path
) -> None:
    address = "https://agents.example.com"
    with an_office(learning_database, tmp_path, public_url=address) as office:
        async with office.caller(origin=address) as client:
            answer = await client.post("/approvals/login", data={"credential": TOKENS["ada"]})
    assert answer.status_code == 303
    assert "; secure" in answer.headers["set-cookie"].lower()


async def test_a_session_is_good_on_every_server_of_the_database(office: Office) -> None:
    async with office.browser("ada") as client:
        cookies = client.cookies
    office.set_policy(policy_text())
    async with office.caller() as client:
        client.cookies = cookies
        assert (await client.get("/approvals")).status_code == 200


async def test_a_session_ends_with_the_token_it_was_begun_with(office: Office) -> None:
    async with office.browser("ada") as client:
        cookies = client.cookies
    office.set_policy(policy_text(ada="another-token"))
    async with office.caller() as client:
        client.cookies = cookies
        assert (await client.get("/approvals")).status_code == 401


def _session_of(client: httpx.AsyncClient) -> str:
    return str(client.cookies.get("agent_reviewer", path="/approvals"))


async def test_a_session_that_was_tampered_with_is_none(office: Office) -> None:
    async with office.browser("ada") as client:
        body, seal = _session_of(client).split(".")
    async with office.browser("grace") as client:
        other, _ = _session_of(client).split(".")
    for cookie in (
        f"{other}.{seal}",
        f"{body}.{seal[:-1]}0x",
        body,
        f"{body}.",
        f".{seal}",
        f"{body}A.{seal}",
    ):
        async with office.caller(cookie=f"agent_reviewer={cookie}") as client:
            assert (await client.get("/approvals")).status_code == 401, cookie


async def test_logging_out_takes_the_cookie_away(office: Office) -> None:
    async with office.browser("ada") as client:
        page = await client.get("/approvals")
        answer = await client.post("/approvals/logout", data=form_of(page, ""))
        assert answer.status_code == 303
        assert (await client.get("/approvals")).status_code == 401


async def test_a_link_from_elsewhere_takes_a_step_that_brings_the_cookie(office: Office) -> None:
    approval = await office.ask()
    async with office.caller(**{"sec-fetch-site": "cross-site"}) as client:
        answer = await client.get(path_of(approval), params={"tenant": "default"})
    assert answer.status_code == 200
    assert f'content="0; url={path_of(approval)}?tenant=default"' in answer.text
    assert "refund" not in answer.text


@pytest.mark.parametrize(
    "there", ["https://evil.test/", "//evil.test", "/approvals/../../x", "/other", "javascript:1"]
)
async def test_after_the_log_in_nobody_is_sent_to_another_site(office: Office, there: str) -> None:
    async with office.caller(origin=HOST) as client:
        answer = await client.post("/approvals/login", data={"credential": TOKENS["ada"], "goes_to": there})
    assert answer.headers["location"] == "/approvals"


# --- Supabase ---------------------------------------------------------------------------------------------------


def access_token(
    secret: str = JWT_SECRET, algorithm: str = "HS256", expires_in: int = 600, **changes: Any
) -> str:
    claims = {
        "sub": GRACE_SUBJECT,
        "aud": "authenticated",
        "exp": int(time.time()) + expires_in,
        "role": "authenticated",
    }
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(claims, secret if algorithm != "none" else "", algorithm=algorithm)


@pytest.fixture
def supabase_office(learning_database: ThrowawayDatabase, tmp_path: Path) -> Iterator[Office]:
    with an_office(learning_database, tmp_path, supabase_jwt_secret=SecretStr(JWT_SECRET)) as office:
        yield office


async def test_an_access_token_of_supabase_is_the_reviewer_it_names(supabase_office: Office) -> None:
    approval = await supabase_office.ask()
    async with supabase_office.caller(authorization=f"Bearer {access_token()}") as client:
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval))
    assert answer.status_code == 200, answer.text
    assert answer.json()["approval"]["decided_by"] == ["grace"]


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_in": -1},
        {"exp": None},
        {"aud": None},
        {"aud": "anon"},
        {"sub": None},
        {"sub": "somebody-else"},
        {"secret": "another-secret-that-is-long-enough-for-hs256"},
        {"algorithm": "none"},
        {"algorithm": "HS512", "secret": JWT_SECRET * 2},
        {"nbf": 2**35},
    ],
    ids=str,
)
async def test_an_access_token_that_does_not_hold_is_nobodys(
    supabase_office: Office, changes: dict[str, Any]
) -> None:
    async with supabase_office.caller(authorization=f"Bearer {access_token(**changes)}") as client:
        assert (await client.get("/approvals.json")).status_code == 401


async def test_without_the_secret_no_access_token_counts(office: Office) -> None:
    for secret in (JWT_SECRET, "None" * 16):
        async with office.caller(authorization=f"Bearer {access_token(secret)}") as client:
            assert (await client.get("/approvals.json")).status_code == 401


async def test_a_session_ends_with_the_access_token(supabase_office: Office) -> None:
    async with supabase_office.caller(origin=HOST) as client:
        answer = await client.post("/approvals/login", data={"credential": access_token(expires_in=100)})
    age = re.search(r"Max-Age=(\d+)", answer.headers["set-cookie"])
    assert age is not None
    assert 0 < int(age[1]) <= 100


# --- REST -------------------------------------------------------------------------------------------------------


async def test_a_program_lists_looks_and_decides(office: Office) -> None:
    approval = await office.ask()
    async with office.program("ada") as client:
        listed = (await client.get("/approvals.json", params={"state": "pending"})).json()["approvals"]
        assert [one["approval_id"] for one in listed] == [approval.approval_id]
        shown = (await client.get(path_of(approval, ".json"))).json()
        assert (shown["arguments"], shown["args_hash"], shown["requested_by"]) == (
            {"order": "A1", "amount": 3.5}, approval.args_hash, "bob",
        )  # fmt: skip
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval, note="as discussed"))
        assert (answer.status_code, answer.json()["outcome"]) == (200, "recorded")
        assert answer.json()["approval"]["state"] == "approved"
        assert (await client.get("/approvals.json", params={"state": "pending"})).json()["approvals"] == []
    found = await office.queue.get(approval.approval_id, BOB)
    assert [(vote["voter"], vote["channel"], vote["note"]) for vote in found.votes] == [
        ("ada", "web", "as discussed")
    ]


async def test_a_rejection_wins(office: Office) -> None:
    approval = await office.ask(Risk.DESTRUCTIVE)
    async with office.program("ada") as client:
        await client.post(path_of(approval, "/decide"), json=verdict(approval))
    assert await office.state(approval) == "pending", "one of two"
    async with office.program("grace") as client:
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval, "reject"))
    assert answer.json()["approval"]["state"] == "rejected"


async def test_the_same_decision_again_counts_once(
    office: Office, learning_database: ThrowawayDatabase
) -> None:
    approval = await office.ask(Risk.DESTRUCTIVE)
    async with office.program("ada") as client:
        outcomes = [
            (await client.post(path_of(approval, "/decide"), json=verdict(approval))).json()["outcome"]
            for _ in range(3)
        ]
    assert outcomes == ["recorded", "repeated", "repeated"]
    assert votes(learning_database) == 1
    assert await office.state(approval) == "pending"


async def test_a_replayed_decision_is_refused(office: Office) -> None:
    approval, other = (
        await office.ask(Risk.DESTRUCTIVE),
        await office.ask(Risk.DESTRUCTIVE, arguments={"order": "B2"}),
    )
    async with office.program("ada") as client:
        first = await client.post(path_of(approval, "/decide"), json=verdict(approval, dedup_key="d1"))
        again = await client.post(path_of(other, "/decide"), json=verdict(other, dedup_key="d1"))
    assert (first.status_code, again.status_code) == (200, 409)
    assert (await office.queue.get(other.approval_id, BOB)).votes == ()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"verdict": "approve"}, 422),
        ({"verdict": "approve", "args_hash": ""}, 422),
        ({"verdict": "approve", "args_hash": "0" * 8}, 422),
        ({"verdict": "approve", "args_hash": "%" * 16}, 422),
        ({"verdict": "approve", "args_hash": ["0" * 64]}, 422),
        ({"verdict": "approve", "args_hash": "0" * 64}, 409),
        ({"verdict": "approve", "args_hash": "0" * 16}, 409),
        ({"verdict": "yes"}, 422),
        ({"verdict": ["approve"]}, 422),
        ({"verdict": None}, 422),
        ([], 422),
        ("approve", 422),
    ],
)
async def test_what_cannot_be_read_or_is_about_another_call_decides_nothing(
    office: Office, body: Any, status: int, learning_database: ThrowawayDatabase
) -> None:
    approval = await office.ask()
    async with office.program("ada") as client:
        answer = await client.post(path_of(approval, "/decide"), json=body)
    assert answer.status_code == status, answer.text
    assert await office.state(approval) == "pending"
    assert votes(learning_database) == 0


async def test_bodies_of_other_kinds_and_too_large_ones_are_refused(office: Office) -> None:
    approval = await office.ask()
    async with office.program("ada") as client:
        decide = path_of(approval, "/decide")
        assert (await client.post(decide, content=b"x")).status_code == 415
        assert (await client.post(decide, files={"verdict": b"approve"})).status_code == 415
        assert (await client.post(decide, json=verdict(approval, note="x" * 2_000_000))).status_code == 413
        assert (await client.post(decide, json=verdict(approval, note="x" * 3_000))).status_code == 422
        twice = f'{{"verdict": "reject", "verdict": "approve", "args_hash": "{approval.args_hash}"}}'
        headers = {"content-type": "application/json"}
        assert (await client.post(decide, content=twice, headers=headers)).status_code == 422
    assert await office.state(approval) == "pending"


async def test_nobody_approves_what_they_asked_for(office: Office) -> None:
    for user in ("ada", "ada@example.com"):
        approval = await office.ask(identity=Identity(user_id=user))
        async with office.program("ada") as client:
            answer = await client.post(path_of(approval, "/decide"), json=verdict(approval))
            assert answer.status_code == 409, user
            page = await client.get(path_of(approval))
            assert "You asked for this yourself" in page.text
        assert await office.state(approval) == "pending"


async def test_what_is_another_tenants_does_not_exist(office: Office) -> None:
    theirs = await office.ask(identity=Identity(tenant_id="elsewhere", user_id="bob"))
    ours = await office.ask(arguments={"order": "ours"})
    async with office.program("eve") as client:
        listed = (await client.get("/approvals.json")).json()["approvals"]
        assert [one["approval_id"] for one in listed] == [theirs.approval_id]
        for path in (path_of(ours, ".json"), path_of(ours), path_of(ours, ".json?tenant=default")):
            assert (await client.get(path)).status_code == 404, path
        assert (await client.get("/approvals.json", params={"tenant": "default"})).json()["approvals"] == []
        for query in ("", "?tenant=default", "?tenant=elsewhere"):
            answer = await client.post(path_of(ours, f"/decide{query}"), json=verdict(ours))
            assert answer.status_code == 404
        answer = await client.post(path_of(theirs, "/decide"), json=verdict(theirs))
        assert answer.status_code == 200
    assert await office.state(ours) == "pending"
    assert await office.state(theirs) == "approved"


async def test_who_is_not_among_the_approvers_is_refused(office: Office) -> None:
    approval = await office.queue.submit(
        replace(office.request(Risk.WRITE, {"order": "A1"}, identity=BOB), approvers=("grace",)), BOB
    )
    async with office.program("ada") as client:
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval))
        assert answer.status_code == 409
        assert "not among those who may decide" in (await client.get(path_of(approval))).text
    assert await office.state(approval) == "pending"


async def test_what_has_expired_is_not_approved_any_more(
    office: Office, learning_database: ThrowawayDatabase
) -> None:
    approval = await office.ask(expires_in_seconds=0.01)
    async with office.program("ada") as client:
        while (await client.get(path_of(approval, ".json"))).json()["state"] == "pending":
            pass
        answer = await client.post(path_of(approval, "/decide"), json=verdict(approval))
    assert answer.status_code == 409
    assert votes(learning_database) == 0


@pytest.mark.parametrize(
    "approval_id", ["x", "00000000-0000-4000-8000-000000000000", "login.json", "%27%20OR%201", "a" * 400]
)
async def test_ids_of_nothing_are_not_found(office: Office, approval_id: str) -> None:
    async with office.program("ada") as client:
        for path in (f"/approvals/{approval_id}.json", f"/approvals/{approval_id}"):
            assert (await client.get(path)).status_code == 404, path
        answer = await client.post(
            f"/approvals/{approval_id}/decide", json={"verdict": "approve", "args_hash": "0" * 64}
        )
        assert answer.status_code == 404


async def test_a_database_that_is_away_decides_nothing_and_says_so(office: Office) -> None:
    away = office.settings.model_copy(
        update={"database_url": SecretStr("postgresql://ada:secret@127.0.0.1:1/away")}
    )
    office.settings, office.database = away, open_database(away)
    office.set_policy(policy_text())
    seen: list[Event] = []
    with listening(seen.append):
        async with office.program("ada") as client:
            answer = await client.post(
                "/approvals/7d1c7e4e-9a55-4a54-8f0e-6f1f8c1b2a10/decide",
                json={"verdict": "approve", "args_hash": "0" * 64},
            )
            page = await client.get("/approvals")
    assert (answer.status_code, page.status_code) == (503, 503)
    assert "secret" not in answer.text + page.text
    assert "approval_page_failed" in {event.name for event in seen}


# --- forms ------------------------------------------------------------------------------------------------------


async def test_a_person_approves_on_the_page(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        listed = await client.get("/approvals")
        assert path_of(approval) in listed.text
        page = await client.get(path_of(approval))
        answer = await client.post(path_of(approval, "/decide"), data=form_of(page, "approve", note="fine"))
        assert answer.status_code == 303, answer.text
        after = await client.get(answer.headers["location"])
    assert "Your approval is recorded" in after.text
    assert await office.state(approval) == "approved"


async def test_a_form_sent_twice_counts_once(office: Office, learning_database: ThrowawayDatabase) -> None:
    approval = await office.ask(Risk.DESTRUCTIVE)
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "approve", confirmed="yes")
        answers = [await client.post(path_of(approval, "/decide"), data=form) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert "said=repeated" in answers[1].headers["location"]
    assert votes(learning_database) == 1
    assert await office.state(approval) == "pending"


async def test_what_destroys_wants_a_tick(office: Office) -> None:
    approval = await office.ask(Risk.DESTRUCTIVE)
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "approve")
        answer = await client.post(path_of(approval, "/decide"), data=form)
    assert answer.status_code == 422
    assert "tick that you have read" in answer.text
    assert (await office.queue.get(approval.approval_id, BOB)).votes == ()


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.test"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": HOST + ".evil.test"},
        {"origin": HOST, "sec-fetch-site": "cross-site"},
        {"origin": HOST, "sec-fetch-site": "same-site"},
        {"origin": "https://evil.test", "referer": HOST},
    ],
    ids=str,
)
async def test_a_form_from_another_site_decides_nothing(
    office: Office, headers: dict[str, str], learning_database: ThrowawayDatabase
) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "approve")
        answer = await client.post(path_of(approval, "/decide"), data=form, headers=headers)
        assert answer.status_code == 403
        answer = await client.post("/approvals/logout", data=form, headers=headers)
        assert answer.status_code == 403
    assert votes(learning_database) == 0


async def test_a_form_needs_the_token_of_its_own_session(
    office: Office, learning_database: ThrowawayDatabase
) -> None:
    approval = await office.ask()
    async with office.browser("grace") as other:
        theirs = form_of(await other.get(path_of(approval)), "approve")["csrf_token"]
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "approve")
        for token in ("", "x", theirs, form["csrf_token"][:-1]):
            answer = await client.post(path_of(approval, "/decide"), data=form | {"csrf_token": token})
            assert answer.status_code == 403, token
        without = {name: value for name, value in form.items() if name != "csrf_token"}
        assert (await client.post(path_of(approval, "/decide"), data=without)).status_code == 403
        # JSON with a cookie is no way round it.
        assert (await client.post(path_of(approval, "/decide"), json=verdict(approval))).status_code == 403
        answer = await client.post(
            path_of(approval, "/decide"), json=verdict(approval), headers={"x-csrf-token": form["csrf_token"]}
        )
        assert answer.status_code == 200
    assert votes(learning_database) == 1


async def test_another_site_cannot_log_a_browser_in(office: Office) -> None:
    async with office.caller(origin="https://evil.test") as client:
        answer = await client.post("/approvals/login", data={"credential": TOKENS["ada"]})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


async def test_the_last_page_of_a_decided_request_cannot_decide_again(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "reject")
        async with office.program("grace") as other:
            await other.post(path_of(approval, "/decide"), json=verdict(approval))
        answer = await client.post(path_of(approval, "/decide"), data=form)
    assert answer.status_code == 409
    assert "Not recorded" in answer.text
    assert await office.state(approval) == "approved"


# --- editing ----------------------------------------------------------------------------------------------------


async def test_an_edit_asks_for_another_call_and_ends_the_old_one(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
        form = form_of(page, "edit", **{"arg.0": "A1", "arg.1": "2.5"})
        answer = await client.post(path_of(approval, "/decide"), data=form)
        assert answer.status_code == 303, answer.text
        after = await client.get(answer.headers["location"])
    edited_id = re.search(r"/approvals/([0-9a-f-]{36})", answer.headers["location"])
    assert edited_id is not None
    edited = await office.queue.get(edited_id[1], BOB)
    assert edited.arguments == {"order": "A1", "amount": 2.5}
    assert edited.args_hash != approval.args_hash
    assert (edited.state, edited.requested_by, edited.edited_by) == ("approved", "bob", "ada")
    assert "request of its own" in after.text
    assert await office.state(approval) == "cancelled"


async def test_who_edits_what_destroys_does_not_approve_it(office: Office) -> None:
    approval = await office.ask(Risk.DESTRUCTIVE)
    async with office.program("ada") as client:
        answer = await client.post(
            path_of(approval, "/decide"),
            json=verdict(approval, "edit", arguments={"order": "A1", "amount": 1.0}),
        )
        assert answer.status_code == 200, answer.text
        edited = await office.queue.get(answer.json()["approval"]["approval_id"], BOB)
        assert edited.state == "pending"
        own = await client.post(path_of(edited, "/decide"), json=verdict(edited))
        assert own.status_code == 409
    assert (await office.queue.get(edited.approval_id, BOB)).votes == ()


async def test_an_edit_that_cannot_be_read_is_shown_again_and_changes_nothing(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
        form = form_of(page, "edit", **{"arg.0": "A1", "arg.1": "lots"})
        answer = await client.post(path_of(approval, "/decide"), data=form)
        unchanged = await client.post(
            path_of(approval, "/decide"), data=form_of(page, "edit", **{"arg.0": "A1", "arg.1": "3.5"})
        )
    assert answer.status_code == 422
    assert "must be a number" in answer.text
    assert 'value="lots"' in answer.text
    assert unchanged.status_code == 422
    assert await office.state(approval) == "pending"


async def test_an_edit_of_another_call_than_was_shown_is_refused(office: Office) -> None:
    approval = await office.ask()
    async with office.program("ada") as client:
        answer = await client.post(
            path_of(approval, "/decide"),
            json={"verdict": "edit", "args_hash": "0" * 64, "arguments": {"order": "X"}},
        )
    assert answer.status_code == 409
    assert await office.state(approval) == "pending"


async def test_nobody_edits_what_they_asked_for(office: Office) -> None:
    approval = await office.ask(identity=Identity(user_id="ada"))
    async with office.program("ada") as client:
        answer = await client.post(
            path_of(approval, "/decide"), json=verdict(approval, "edit", arguments={"order": "X"})
        )
    assert answer.status_code in {403, 409, 422}
    assert await office.state(approval) == "pending"


# --- what pages show --------------------------------------------------------------------------------------------

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}${7*7}</textarea></pre>"


async def test_text_of_an_agent_stays_text(office: Office) -> None:
    arguments = {EVIL: EVIL, "sql": f"SELECT '{EVIL}'\n--", "n": [EVIL], "long": EVIL * 40}
    approval = await office.queue.submit(
        replace(
            office.request(Risk.WRITE, arguments, identity=BOB, reason=EVIL, effects={EVIL: EVIL}, bounds={EVIL: 1}),
            tool=EVIL, summary=EVIL,
        ),
        BOB.with_(user_id=EVIL[:200], agent_id=EVIL[:200]),
    )  # fmt: skip
    async with office.browser("ada") as client:
        for path in ("/approvals", path_of(approval)):
            page = await client.get(path)
            assert page.status_code == 200
            assert "<script" not in page.text
            assert "<img" not in page.text
            assert "{{7*7}}" in page.text
            assert page.text.count("</textarea>") == page.text.count("<textarea")
    answer = None
    async with office.program("ada") as client:
        answer = await client.get(path_of(approval, ".json"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_characters_that_cannot_be_seen_are_shown(office: Office) -> None:
    approval = await office.ask(arguments={"to": "a\u202eb\u200bc@x.org"})
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
    assert "a\\u{202E}b\\u{200B}c@x.org" in page.text


async def test_the_whole_call_is_on_the_page_however_long(office: Office) -> None:
    sql = "\n".join(f"-- line {number} of a long statement" for number in range(3_000))
    approval = await office.ask(arguments={"sql": sql})
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
    assert "line 1500 of" in page.text
    assert "are not shown" not in page.text


async def test_the_reason_of_the_model_is_marked_as_a_claim(office: Office) -> None:
    approval = await office.ask(reason="The boss said yes")
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
    assert page.text.index("claim") < page.text.index("The boss said yes")
    assert page.text.index("A1") < page.text.index("The boss said yes"), "the call comes first"


async def test_pages_allow_no_script_and_no_frame(office: Office) -> None:
    approval = await office.ask()
    async with office.browser("ada") as client:
        pages = [await client.get(path) for path in ("/approvals", path_of(approval), "/approvals/nothing")]
    async with office.caller() as client:
        pages.append(await client.get("/approvals"))
        style = await client.get("/approvals/style.css")
    for page in pages:
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["cache-control"] == "no-store"
        assert " style=" not in page.text
        assert " onclick" not in page.text
    assert style.headers["content-type"].startswith("text/css")
    assert style.status_code == 200


async def test_the_pages_work_where_the_application_is_mounted_elsewhere(office: Office) -> None:
    approval = await office.ask()
    outer = FastAPI()
    outer.mount("/agents", office.app)
    transport = httpx.ASGITransport(app=outer)
    async with httpx.AsyncClient(transport=transport, base_url=HOST, headers={"origin": HOST}) as client:
        answer = await client.post("/agents/approvals/login", data={"credential": TOKENS["ada"]})
        assert answer.headers["location"] == "/agents/approvals"
        assert "path=/agents/approvals" in answer.headers["set-cookie"].lower()
        page = await client.get(f"/agents{path_of(approval)}")
        assert page.status_code == 200
        assert f'action="/agents{path_of(approval)}/decide?tenant=default"' in page.text
        login = await client.get("/agents/approvals", headers={"cookie": ""})
    assert 'name="goes_to" value="/approvals"' in login.text


# --- standing rules and long lists -----------------------------------------------------------------------------------


SHAPE: dict[str, Any] = {"fingerprint": "f", "tables": ("t",), "rows": 3}


async def test_a_reviewer_makes_a_standing_rule_on_the_page(office: Office) -> None:
    approval = await office.ask(**SHAPE)
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
        assert "Allow calls of this shape" in page.text
        form = form_of(page, "", max_rows="4", hours="2", max_uses="1")
        without_tick = await client.post(path_of(approval, "/allow"), data=form)
        assert without_tick.status_code == 422
        answer = await client.post(path_of(approval, "/allow"), data=form | {"confirmed": "yes"})
        assert answer.status_code == 303, answer.text
        assert "standing rule is made" in (await client.get(answer.headers["location"])).text
    assert await office.state(approval) == "pending"
    assert (await office.ask(**SHAPE)).state == "approved"
    assert (await office.ask(**SHAPE)).state == "pending"


async def test_a_forged_form_or_somebody_else_makes_no_standing_rule(office: Office) -> None:
    approval = await office.ask(**SHAPE)
    fine = {"args_hash": approval.args_hash, "max_rows": 4, "hours": 2}
    async with office.browser("ada") as client:
        form = form_of(await client.get(path_of(approval)), "", max_rows="4", hours="2", confirmed="yes")
        forged = await client.post(
            path_of(approval, "/allow"), data=form | {"csrf_token": "x"}, headers={"origin": HOST}
        )
    async with office.program("eve") as client:
        of_another_tenant = await client.post(path_of(approval, "/allow"), json=fine)
    async with office.caller() as client:
        of_nobody = await client.post(path_of(approval, "/allow"), json=fine)
    async with office.program("ada") as client:
        other_call = await client.post(path_of(approval, "/allow"), json=fine | {"args_hash": "0" * 64})
        no_number = await client.post(path_of(approval, "/allow"), json=fine | {"max_rows": "many"})
        destroys = await office.ask(Risk.DESTRUCTIVE, **SHAPE)
        for_destroying = await client.post(
            path_of(destroys, "/allow"), json=fine | {"args_hash": destroys.args_hash}
        )
    answers = (forged, of_another_tenant, of_nobody, other_call, no_number, for_destroying)
    assert [answer.status_code for answer in answers] == [403, 404, 401, 409, 422, 409]
    assert await office.database.call("list_standing_rules", BOB) == []


async def test_however_many_wait_the_oldest_is_on_the_page_and_all_can_be_reached(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.server.approval_routes._PAGE", 2)
    asked = [await office.ask() for _ in range(5)]
    found: list[str] = []
    async with office.browser("ada") as client:
        address: str | None = "/approvals"
        while address is not None:
            page = await client.get(address)
            found += re.findall(r'class="row risk-write" href="/approvals/([0-9a-f-]{36})', page.text)
            more = re.search(r'rel="next" href="([^"]+)"', page.text)
            address = html.unescape(more[1]) if more else None
    assert found == [approval.approval_id for approval in asked]

    async with office.program("ada") as client:
        for order in ("oldest", "newest"):
            listed: list[str] = []
            query = {"state": "pending", "limit": "2", "order": order}
            while True:
                answer = (await client.get("/approvals.json", params=query)).json()
                listed += [one["approval_id"] for one in answer["approvals"]]
                if answer["next"] is None:
                    break
                query["after"] = answer["next"]
            assert listed == (found if order == "oldest" else found[::-1])
        assert (await client.get("/approvals.json", params={"after": "x"})).status_code == 422


async def test_the_page_says_whose_requests_it_shows_and_where_others_wait(office: Office) -> None:
    await office.ask()
    await office.ask(identity=BOB.with_(tenant_id="elsewhere"))
    async with office.browser("ada") as client:
        page = await client.get("/approvals")
        assert "Of tenant default" in page.text
        assert '<a href="/approvals?tenant=elsewhere">elsewhere</a> (1)' in page.text
        assert "Of tenant elsewhere" in (await client.get("/approvals?tenant=elsewhere")).text
    async with office.browser("eve") as client:
        assert "default" not in (await client.get("/approvals")).text


# --- after the policy file was edited ---------------------------------------------------------------------------


async def test_an_edit_that_is_refused_comes_back_with_what_was_typed(office: Office) -> None:
    async def refuse(approval: Approval, arguments: Any) -> ApprovalRequest:
        raise Refused("the policy forbids this amount")

    approval = await office.ask()
    office.queue.reassess_with("action", refuse)
    async with office.browser("ada") as client:
        page = await client.get(path_of(approval))
        form = form_of(page, "edit", **{"arg.0": "typed-order", "arg.1": "2.5"})
        answer = await client.post(path_of(approval, "/decide"), data=form)
    assert answer.status_code == 409
    assert "the policy forbids this amount" in answer.text
    assert 'value="typed-order"' in answer.text
    assert 'value="2.5"' in answer.text
    assert await office.state(approval) == "pending"


async def test_who_decides_is_told_that_the_policy_file_was_edited_meanwhile(office: Office) -> None:
    request = office.request(Risk.WRITE, {"order": "A1", "amount": 3.5}, identity=BOB)
    version = office.queue.policy.version
    edited, current, undated = [
        await office.queue.submit(replace(request, request_key=key, policy_version=of), BOB)
        for key, of in (("old", "0" * 64), ("new", version), ("none", None))
    ]
    async with office.program("ada") as client:
        notices = [
            (await client.post(path_of(one, "/decide"), json=verdict(one))).json()["notice"]
            for one in (edited, current, undated)
        ]
    assert [notice is not None for notice in notices] == [True, False, False]
    async with office.browser("ada") as client:
        assert "policy file was edited" in (await client.get(path_of(edited))).text
        assert "policy file was edited" not in (await client.get(path_of(current))).text
        assert "You may decide in every tenant" in (await client.get("/approvals")).text


async def test_a_refused_decision_says_nothing_of_the_policy_file(office: Office) -> None:
    request = office.request(Risk.WRITE, {"order": "A1", "amount": 3.5}, identity=BOB)
    old = await office.queue.submit(replace(request, policy_version="0" * 64), BOB)
    async with office.program("ada") as client:
        answer = await client.post(path_of(old, "/decide"), json=verdict(old, "reject"))
    assert (answer.status_code, answer.json()["notice"]) == (200, None)
