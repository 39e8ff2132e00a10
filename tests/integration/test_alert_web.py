"""The pages of alerts and their REST interface: who sees what, what is silenced, and what is shown how."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.identity import Identity
from agent.testing.throwaway import ThrowawayDatabase
from tests.approval_desk import Desk, open_desk, token_of
from tests.integration.alert_office import AlertOffice, alert_office, finding

ORIGIN = "https://agents.example.com"
EVIL = "<script>alert(1)</script> \u202egnp \"'><img src=x onerror=alert(1)>"
SOME_ID = "00000000-0000-0000-0000-000000000007"


@pytest.fixture
async def office(learning_database: ThrowawayDatabase) -> AsyncIterator[AlertOffice]:
    async with alert_office(learning_database) as opened:
        yield opened


@pytest.fixture
async def desk(learning_database: ThrowawayDatabase, tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(learning_database, tmp_path) as opened:
        yield opened


def program(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token_of(name)}"}


@asynccontextmanager
async def browser(desk: Desk, name: str) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody who has logged in, with a browser's headers."""
    desk.http.headers["origin"] = ORIGIN
    answer = await desk.http.post("/approvals/login", data={"credential": token_of(name)})
    assert answer.status_code == 303
    yield desk.http
    desk.http.cookies.clear()


def form_of(page: httpx.Response, **fields: str) -> tuple[str, dict[str, str]]:
    """Where the page's last form goes, and what a browser sends with it."""
    form = re.findall(r'<form method="post" action="([^"]+)"[^>]*>(.*?)</form>', page.text, re.DOTALL)[-1]
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form[1]))
    return html.unescape(form[0]), {name: html.unescape(value) for name, value in hidden.items()} | fields


async def raised(office: AlertOffice, **changes: Any) -> dict[str, Any]:
    """An alert of the deployment's own tenant."""
    await office.round(finding(**changes))
    return (await office.listed())[0]


# --- who gets in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer nonsense"}, {"cookie": "agent_reviewer=x.y"}]
)
async def test_nobody_sees_an_alert_without_a_token(
    office: AlertOffice, desk: Desk, headers: dict[str, str]
) -> None:
    alert = await raised(office)
    for path in (
        "/alerts",
        "/alerts.json",
        f"/alerts/{alert['alert_id']}",
        f"/alerts/{alert['alert_id']}.json",
    ):
        answer = await desk.http.get(path, headers=headers)
        assert (answer.status_code, "Agent support" in answer.text) == (401, False), path
    answer = await desk.http.post("/alerts/silence", json={"pattern": "*", "hours": 1}, headers=headers)
    assert (answer.status_code, office.count("agent_alert_silence")) == (401, 0)


async def test_who_logs_in_goes_where_they_wanted_to(office: AlertOffice, desk: Desk) -> None:
    alert = await raised(office)
    path = f"/alerts/{alert['alert_id']}?tenant=default"
    door = await desk.http.get(path)
    where, fields = form_of(door, credential=token_of("ada"))
    answer = await desk.http.post(where, data=fields, headers={"origin": ORIGIN})
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    assert "Agent support" in (await desk.http.get(path)).text
    assert "Agent support" in (await desk.http.get("/alerts")).text


async def test_a_reviewer_sees_the_alerts_of_their_tenants_and_no_others(
    office: AlertOffice, desk: Desk
) -> None:
    await office.round(finding(), finding(tenant_id="other", title="Of the other tenant"))
    [own] = await office.listed()
    [other] = await office.database.call("list_alerts", Identity(tenant_id="other"))
    for name, mine, foreign in (("ada", own, other), ("max", other, own)):
        listed = (await desk.http.get("/alerts.json", headers=program(name))).json()["alerts"]
        assert [one["alert_id"] for one in listed] == [mine["alert_id"]]
        page = await desk.http.get("/alerts", headers=program(name))
        assert (mine["alert_id"] in page.text, foreign["alert_id"] in page.text) == (True, False)
    named = await desk.http.get("/alerts.json?tenant=other", headers=program("ada"))
    assert [one["alert_id"] for one in named.json()["alerts"]] == [other["alert_id"]], "ada sees every tenant"

    for query in ("", "?tenant=default"):
        for kind in ("", ".json"):
            path = f"/alerts/{own['alert_id']}{kind}{query}"
            assert (await desk.http.get(path, headers=program("max"))).status_code == 404, path
        given = {"pattern": "*", "hours": 1}
        answer = await desk.http.post(f"/alerts/silence{query}", json=given, headers=program("max"))
        assert (answer.status_code, office.count("agent_alert_silence")) == (404, 0)
    assert (await desk.http.get("/alerts.json?tenant=default", headers=program("max"))).json()["alerts"] == []


# --- what is shown ----------------------------------------------------------------------------------------------


async def test_a_page_reads_nothing_of_an_alert_as_markup(office: AlertOffice, desk: Desk) -> None:
    alert = await raised(
        office, cause=f"error_rate:{EVIL}", title=EVIL, what=EVIL, advice=EVIL, evidence={EVIL: [EVIL]}
    )
    await office.silence(f"nothing{EVIL}")
    async with browser(desk, "ada") as client:
        for path in ("/alerts", f"/alerts/{alert['alert_id']}"):
            page = await client.get(path)
            assert "<script" not in page.text
            assert "<img" not in page.text
            assert "script-src" not in page.headers["content-security-policy"]
            assert "default-src 'none'" in page.headers["content-security-policy"]
            shown = re.sub(r'<option value="[^"]*"', "", page.text)  # sent back as it is
            assert "\u202e" not in shown


async def test_open_alerts_come_first_and_resolved_ones_below(office: AlertOffice, desk: Desk) -> None:
    await office.round(finding(title="It was slow"))
    await office.round(finding("error_rate:x", title="It fails", severity="critical"))
    page = await desk.http.get("/alerts", headers=program("ada"))
    opened, below = page.text.split("Resolved lately")
    assert ("It fails" in opened, "It was slow" in opened, "It was slow" in below) == (True, False, True)


async def test_the_page_of_an_alert_says_what_to_do_the_evidence_and_who_was_told(
    office: AlertOffice, desk: Desk
) -> None:
    alert = await raised(office)
    page = html.unescape((await desk.http.get(f"/alerts/{alert['alert_id']}", headers=program("ada"))).text)
    for part in (
        "12 of 40 runs failed",
        "failed: 12",
        "Look at `agent runs list",
        "2026-11-20 08:00 UTC",
        "recorder: sent",
    ):
        assert part in page


async def test_programs_list_and_filter_and_get_one(office: AlertOffice, desk: Desk) -> None:
    await office.round(finding("error_rate:gone"))
    await office.round(finding())
    for query, causes in (
        ("", ["error_rate:agent=support", "error_rate:gone"]),
        ("?state=open", ["error_rate:agent=support"]),
        ("?state=resolved", ["error_rate:gone"]),
        ("?limit=1", ["error_rate:agent=support"]),
        ("?tenant=nobody", []),
    ):
        listed = (await desk.http.get(f"/alerts.json{query}", headers=program("ada"))).json()["alerts"]
        assert [alert["cause"] for alert in listed] == causes, query
    one = await desk.http.get(
        f"/alerts/{listed[0]['alert_id'] if listed else SOME_ID}.json", headers=program("ada")
    )
    assert one.status_code == 404
    [alert] = await office.listed(state="open")
    one = await desk.http.get(f"/alerts/{alert['alert_id']}.json", headers=program("ada"))
    assert one.json()["notices"][0]["kind"] == "raised"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/alerts.json?state=broken", 422),
        ("/alerts.json?limit=0", 422),
        ("/alerts/nonsense.json", 404),
        (f"/alerts/{SOME_ID}.json", 404),
        (f"/alerts/{SOME_ID}", 404),
        ("/alerts/nonsense", 404),
    ],
)
async def test_what_cannot_be_is_refused(desk: Desk, path: str, status: int) -> None:
    assert (await desk.http.get(path, headers=program("ada"))).status_code == status


# --- silences ---------------------------------------------------------------------------------------------------


async def test_a_browser_silences_an_alert_and_ends_the_silence(office: AlertOffice, desk: Desk) -> None:
    alert = await raised(office)
    path = f"/alerts/{alert['alert_id']}"
    async with browser(desk, "ada") as client:
        where, fields = form_of(await client.get(path), pattern=alert["cause"], hours="4", why="a release")
        answer = await client.post(where, data=fields)
        assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, path)
        page = await client.get(answer.headers["location"])
        assert "The silence is made" in page.text
        [silence] = await office.database.call("list_alert_silences", Identity())
        assert (silence["made_by"], silence["why"], silence["pattern"]) == (
            "ada",
            "a release",
            alert["cause"],
        )

        where, fields = form_of(page)
        assert (await client.post(where, data=fields)).status_code == 303
    [silence] = await office.database.call("list_alert_silences", Identity())
    assert (silence["holds"], silence["ended_by"]) == (False, "ada")


async def test_a_form_of_another_site_or_session_silences_nothing(office: AlertOffice, desk: Desk) -> None:
    alert = await raised(office)
    async with browser(desk, "ada") as client:
        where, fields = form_of(await client.get(f"/alerts/{alert['alert_id']}"), pattern="*", hours="4")
        for headers, changes in (
            ({"origin": "https://evil.example"}, {}),
            ({"sec-fetch-site": "cross-site"}, {}),
            ({}, {"csrf_token": ""}),
            ({}, {"csrf_token": "0" * 48}),
        ):
            answer = await client.post(where, data=fields | changes, headers=headers)
            assert answer.status_code == 403, (headers, changes)
        answer = await client.post("/alerts/silence", json={"pattern": "*", "hours": 1})
        assert answer.status_code == 403, "a script needs the token too"
        silence = await office.silence("*")
        end = f"/alerts/silences/{silence['silence_id']}/end"
        assert (await client.post(end, data={"csrf_token": "x"})).status_code == 403
    [kept] = await office.database.call("list_alert_silences", Identity())
    assert (kept["holds"], kept["pattern"]) == (True, "*")


async def test_a_program_silences_and_ends_it(office: AlertOffice, desk: Desk) -> None:
    made = await desk.http.post(
        "/alerts/silence", json={"pattern": "latency*", "hours": 0.5}, headers=program("eve")
    )
    assert (made.status_code, made.json()["made_by"]) == (200, "eve")
    path = f"/alerts/silences/{made.json()['silence_id']}/end"
    ends = [(await desk.http.post(path, json={}, headers=program("ada"))).json() for _ in range(2)]
    assert ends == [{"ended": True}, {"ended": False}]
    assert (await desk.http.post(path, json={}, headers=program("max"))).status_code == 404


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pattern": "", "hours": 1},
        {"pattern": "  ", "hours": 1},
        {"pattern": "x" * 201, "hours": 1},
        {"pattern": ["x"], "hours": 1},
        {"pattern": "x"},
        {"pattern": "x", "hours": 0},
        {"pattern": "x", "hours": 721},
        {"pattern": "x", "hours": "nan"},
        {"pattern": "x", "hours": True},
        {"pattern": "x", "hours": 1, "why": "y" * 501},
    ],
)
async def test_a_silence_that_cannot_be_is_refused(
    office: AlertOffice, desk: Desk, given: dict[str, Any]
) -> None:
    answer = await desk.http.post("/alerts/silence", json=given, headers=program("ada"))
    assert (answer.status_code, office.count("agent_alert_silence")) == (422, 0)
