"""Alerts on a real Postgres: one for each cause, told when there is something to tell, and delivered once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from agent.database import open_database
from agent.errors import ConfigurationError, InvalidLearning
from agent.events import Event, listening
from agent.identity import Identity
from agent.monitoring.alert_sinks import DeliveryFailed
from agent.monitoring.alerts import Alerts
from agent.settings import Settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.alert_office import NOBODY, SINCE, AlertOffice, Recorder, alert_office, finding
from tests.integration.rows import rows, value
from tests.supabase_lite import SupabaseLite

SENDER = """
import asyncio, sys
from pydantic import SecretStr
from agent.database.postgres import PostgresDatabase
from agent.monitoring.alerts import Alerts
from agent.settings import Settings


class Hanging:
    name = "recorder"

    async def send(self, notice):
        print("sending", flush=True)
        await asyncio.sleep(600)


async def main():
    settings = Settings(database_url=SecretStr(sys.argv[1]))
    await Alerts(settings, PostgresDatabase(sys.argv[1]), [Hanging()]).deliver()


asyncio.run(main())
"""


@pytest.fixture
async def office(learning_database: ThrowawayDatabase) -> AsyncIterator[AlertOffice]:
    async with alert_office(learning_database) as opened:
        yield opened


# --- from found to resolved -------------------------------------------------------------------------------------


async def test_a_cause_is_told_once_while_it_lasts_and_once_when_it_is_over(office: AlertOffice) -> None:
    assert await office.round(finding()) == ["raised"]
    assert await office.round(finding(evidence={"failed": 20}, since=SINCE + timedelta(hours=1))) == []
    [alert] = await office.listed()
    assert (alert["state"], alert["times_seen"], alert["evidence"]) == ("open", 2, {"failed": 20})
    assert alert["since"].startswith("2026-11-20T08:00"), "since when does not move on while it lasts"

    assert await office.round() == ["resolved"]
    assert await office.round() == []

    assert office.sink.kinds == ["raised", "resolved"]
    [alert] = await office.listed()
    assert alert["state"] == "resolved"
    assert alert["resolved_at"] is not None


async def test_an_alert_of_a_check_that_was_not_made_stays_open(office: AlertOffice) -> None:
    await office.round(finding())
    assert await office.round(checked=["latency"]) == []
    assert [alert["state"] for alert in await office.listed()] == ["open"]


async def test_a_graver_finding_is_told_at_once_and_a_milder_one_is_not(office: AlertOffice) -> None:
    await office.round(finding(severity="warning"))
    assert await office.round(finding(severity="critical")) == ["worsened"]
    assert await office.round(finding(severity="warning")) == []
    assert await office.round(finding(severity="critical")) == [], "they still believe that it is critical"
    assert [notice.severity for notice in office.sink.notices] == ["warning", "critical"]


async def test_an_alert_that_lasts_is_told_again_after_the_time_of_the_settings(office: AlertOffice) -> None:
    await office.round(finding())
    office.age(3.9)
    assert await office.round(finding()) == []
    office.age(0.2)
    assert await office.round(finding()) == ["reminder"]
    assert await office.round(finding()) == []
    office.age(1)
    assert await office.round(finding(), alert_reminder=timedelta(minutes=30)) == ["reminder"]


async def test_a_cause_that_comes_back_within_the_cooldown_is_the_same_alert_and_not_told(
    office: AlertOffice,
) -> None:
    await office.round(finding())
    await office.round()
    for _ in range(3):
        office.age(0.2)
        assert await office.round(finding()) == []
        assert await office.round() == []
    [alert] = await office.listed()
    assert (alert["times_reopened"], office.sink.kinds) == (3, ["raised", "resolved"])

    office.age(1)
    assert await office.round(finding()) == ["raised"]
    assert len(await office.listed()) == 2


async def test_a_cause_that_came_back_is_told_when_it_lasts_or_is_graver(office: AlertOffice) -> None:
    await office.round(finding())
    await office.round()
    await office.round(finding())
    office.age(0.4)
    assert await office.round(finding()) == []
    office.age(0.2)
    assert await office.round(finding()) == ["reminder"]
    assert office.sink.notices[-1].times_reopened == 1
    assert await office.round() == ["resolved"]
    assert await office.round(finding(severity="critical")) == ["worsened"]


async def test_without_a_cooldown_each_return_is_a_new_alert(office: AlertOffice) -> None:
    for _ in range(2):
        assert await office.round(finding(), alert_cooldown=timedelta(0)) == ["raised"]
        assert await office.round() == ["resolved"]
    assert len(await office.listed()) == 2


async def test_of_two_findings_of_one_cause_the_graver_counts(office: AlertOffice) -> None:
    assert await office.round(finding(severity="info"), finding(severity="critical"), finding()) == ["raised"]
    assert [alert["severity"] for alert in await office.listed()] == ["critical"]


async def test_twenty_monitors_at_once_raise_one_alert_and_resolve_it_once(office: AlertOffice) -> None:
    reporters = [office.alerts() for _ in range(20)]
    told = await asyncio.gather(*(one.report([finding()], {"error_rate"}) for one in reporters))
    assert sorted(len(notices) for notices in told) == [0] * 19 + [1]
    [alert] = await office.listed()
    assert alert["times_seen"] == 20

    sent = await asyncio.gather(*(one.deliver(patience=timedelta(0)) for one in reporters))
    assert (sum(sent), office.sink.kinds) == (1, ["raised"])
    told = await asyncio.gather(*(one.report([], {"error_rate"}) for one in reporters))
    assert sorted(len(notices) for notices in told) == [0] * 19 + [1]


async def test_a_malformed_finding_changes_nothing(office: AlertOffice) -> None:
    await office.round(finding())
    with pytest.raises(InvalidLearning):
        await office.database.call(
            "report_findings", NOBODY, findings=[{"cause": "x", "severity": "dire"}], checked=["error_rate"],
            sinks=[], cooldown_seconds=60.0, reminder_seconds=60.0,
        )  # fmt: skip
    assert [alert["state"] for alert in await office.listed()] == ["open"]


async def test_what_was_resolved_long_ago_is_deleted_with_its_notices(office: AlertOffice) -> None:
    await office.round(finding())
    await office.round()
    await office.round(finding("latency:agent=a"), checked=["latency"])
    office.age(91 * 24)
    await office.round(finding("latency:agent=a"), checked=["latency"])
    assert [alert["cause"] for alert in await office.listed()] == ["latency:agent=a"]
    assert value(office.throwaway.url, "SELECT count(DISTINCT alert_id) FROM agent_alert_notice") == 1
    assert value(office.throwaway.url, "SELECT count(DISTINCT alert_id) FROM agent_alert_delivery") == 1


async def test_evidence_is_stored_no_longer_than_a_page_shows(office: AlertOffice) -> None:
    await office.round(
        finding(evidence={"text": "x" * 5000, "ids": [*range(500)], "deep": {"a": {"b": {"c": {"d": 1}}}}})
    )
    [alert] = await office.listed()
    assert len(alert["evidence"]["text"]) == 300
    assert (len(alert["evidence"]["ids"]), alert["evidence"]["ids"][-1]) == (41, "… 460 more")
    assert alert["evidence"]["deep"] == {"a": {"b": {"c": "…"}}}


# --- silences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["error_rate", "error_rate:agent=support", "error*", "*=suppor?", "*"])
async def test_a_silenced_alert_is_recorded_and_told_when_the_silence_ends(
    office: AlertOffice, pattern: str
) -> None:
    silence = await office.silence(pattern)
    assert await office.round(finding()) == []
    [alert] = await office.listed()
    assert (alert["state"], alert["silence_id"]) == ("open", silence["silence_id"])

    office.age(1.1)
    assert await office.round(finding()) == ["raised"]


@pytest.mark.parametrize(
    "pattern", ["error", "latency*", "error%", "error_rate:agent=suppor", "ERROR_RATE", "errorXrate"]
)
async def test_a_silence_holds_for_its_pattern_alone(office: AlertOffice, pattern: str) -> None:
    await office.silence(pattern)
    assert await office.round(finding()) == ["raised"]


@pytest.mark.parametrize("pattern", ["odd_approvals", "odd_approvals:kind=own,voter=ada", "*"])
async def test_nobody_silences_an_alert_that_is_about_themselves(office: AlertOffice, pattern: str) -> None:
    about_ada = finding("odd_approvals:kind=own,voter=ada", evidence={"voter": "ada", "votes": 1})
    await office.silence(pattern, by="ada")

    assert await office.round(about_ada, checked=["odd_approvals"]) == ["raised"]
    [notice] = office.sink.notices
    told = dict(notice.facts)["Silenced"]
    assert told.startswith("by ada until ")
    assert told.endswith(", whom it is about, so that does not hold: known")

    await office.silence(pattern, by="bob")
    [alert] = await office.listed()
    assert alert["silence_id"] is not None


async def test_a_notice_says_who_had_silenced_the_alert(office: AlertOffice) -> None:
    await office.silence("*", by="bob")
    await office.silence("latency")
    assert await office.round(finding()) == []
    office.age(1.1)

    assert await office.round(finding()) == ["raised"]

    [notice] = office.sink.notices
    told = [text for label, text in notice.facts if label == "Silenced"]
    assert [text.partition(" until ")[0] for text in told] == ["by bob"]
    assert notice.as_json()["silences"][0]["why"] == "known"


async def test_nothing_is_told_of_what_came_and_went_in_a_silence(office: AlertOffice) -> None:
    silence = await office.silence("*")
    await office.round(finding())
    assert await office.database.call(
        "end_alert_silence", NOBODY, the_silence_id=silence["silence_id"], ended_by="ada"
    )
    assert await office.round() == []
    assert office.sink.kinds == []


async def test_a_silence_ends_once_and_is_kept_with_who_and_why(office: AlertOffice) -> None:
    silence = await office.silence("error_rate")
    ends = [
        await office.database.call(
            "end_alert_silence", NOBODY, the_silence_id=silence["silence_id"], ended_by=name
        )
        for name in ("eve", "max")
    ]
    [kept] = await office.database.call("list_alert_silences", NOBODY)
    assert (ends, kept["holds"], kept["made_by"], kept["why"], kept["ended_by"]) == (
        [True, False], False, "ada", "known", "eve",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "seconds"), [("", 60), ("x" * 201, 60), ("x", 0), ("x", 31 * 86_400), ("x", None)]
)
async def test_a_silence_has_a_pattern_and_at_most_thirty_days(
    office: AlertOffice, pattern: str, seconds: Any
) -> None:
    with pytest.raises(InvalidLearning):
        await office.silence(pattern, seconds)


# --- delivering -------------------------------------------------------------------------------------------------


async def test_a_sink_that_fails_holds_up_no_other_and_gets_it_later_in_order(office: AlertOffice) -> None:
    broken, well = Recorder("broken"), Recorder("well")
    alerts = office.alerts(broken, well)
    broken.fails = RuntimeError("secret-token in its words")
    events: list[Event] = []
    with listening(events.append):
        await alerts.report([finding()], {"error_rate"})
        await alerts.deliver(patience=timedelta(0))
        await alerts.report([], {"error_rate"})
        await alerts.deliver(patience=timedelta(0))
    assert (well.kinds, broken.kinds) == (["raised", "resolved"], [])
    assert [event.facts["sink"] for event in events if event.name == "alert_delivery_failed"] == ["broken"]
    assert "secret" not in str(events)
    assert ("broken", "failed", 1) in office.deliveries()
    assert ("broken", "waiting", 0) in office.deliveries(), "the end of it is not told before its beginning"

    broken.fails = None
    office.age(0.1)
    await alerts.deliver(patience=timedelta(0))
    assert broken.kinds == ["raised", "resolved"]
    assert {state for _, state, _ in office.deliveries()} == {"sent"}


async def test_a_failure_of_short_duration_is_waited_for(office: AlertOffice) -> None:
    class Once(Recorder):
        async def send(self, notice: Any) -> None:
            failed, self.fails = self.fails, None
            if failed is not None:
                raise failed
            await super().send(notice)

    sink = Once()
    sink.fails = DeliveryFailed("busy", wait=timedelta(seconds=1))
    alerts = office.alerts(sink)
    await alerts.report([finding()], {"error_rate"})
    rows(office.throwaway.url, "UPDATE agent_alert_delivery SET attempts = 0")
    assert await alerts.deliver(patience=timedelta(seconds=60)) == 1
    assert sink.kinds == ["raised"]


async def test_a_sink_that_asks_to_be_left_alone_is_left_alone(office: AlertOffice) -> None:
    office.sink.fails = DeliveryFailed("too many", wait=timedelta(minutes=20))
    await office.round(finding("error_rate:a"), finding("error_rate:b"))
    assert sorted(office.deliveries()) == [("recorder", "failed", 1), ("recorder", "waiting", 0)]
    wait = value(
        office.throwaway.url,
        "SELECT next_attempt_at - clock_timestamp() FROM agent_alert_delivery WHERE state = 'failed'",
    )
    assert wait > timedelta(minutes=19)


async def test_a_notice_that_no_sink_takes_is_given_up_after_twelve_attempts(office: AlertOffice) -> None:
    office.sink.fails = DeliveryFailed("no")
    await office.round(finding())
    events: list[Event] = []
    with listening(events.append):
        for _ in range(15):
            rows(office.throwaway.url, "UPDATE agent_alert_delivery SET next_attempt_at = clock_timestamp()")
            await office.alerts().deliver(patience=timedelta(0))
    assert office.deliveries() == [("recorder", "given_up", 12)]
    assert [event.facts["given_up"] for event in events] == [False] * 10 + [True]


async def test_a_notice_that_waited_for_a_day_is_given_up(office: AlertOffice) -> None:
    await office.alerts().report([finding()], {"error_rate"})
    office.age(25)
    await office.alerts().deliver(patience=timedelta(0))
    assert (office.deliveries(), office.sink.kinds) == ([("recorder", "given_up", 0)], [])


async def test_a_notice_that_always_fails_holds_up_no_later_one(office: AlertOffice) -> None:
    class Picky(Recorder):
        async def send(self, notice: Any) -> None:
            if notice.cause.endswith("poison"):
                raise DeliveryFailed("invalid_blocks")
            await super().send(notice)

    sink = Picky()
    alerts = office.alerts(sink)
    for number in range(3):
        await alerts.report([finding("error_rate:poison"), finding(f"error_rate:{number}")], set())
        rows(office.throwaway.url, "UPDATE agent_alert_delivery SET next_attempt_at = clock_timestamp()")
        await alerts.deliver(patience=timedelta(0))
    assert [notice.cause for notice in sink.notices] == [f"error_rate:{number}" for number in range(3)]


async def test_with_nothing_to_send_a_sender_is_not_told_to_come_again(office: AlertOffice) -> None:
    taken = await office.database.call("take_alert_delivery", NOBODY, sinks=["recorder"], lease_seconds=60.0)
    assert taken == {"delivery": None, "next_in_seconds": None}


async def test_what_a_killed_sender_held_is_taken_over_when_its_lease_ends_and_its_late_word_is_not_taken(
    office: AlertOffice,
) -> None:
    await office.alerts().report([finding()], {"error_rate"})
    taken = await office.database.call(
        "take_alert_delivery", NOBODY, sinks=["recorder"], lease_seconds=60.0
    )  # and it is killed
    assert taken["delivery"]["attempt"] == 1
    await office.alerts().deliver(patience=timedelta(0))
    assert office.sink.kinds == [], "it is not sent twice while it is held"

    office.age(0.02)
    await office.alerts().deliver(patience=timedelta(0))
    assert (office.sink.kinds, office.deliveries()) == (["raised"], [("recorder", "sent", 2)])
    late = await office.database.call(
        "finish_alert_delivery", NOBODY, the_notice_id=taken["delivery"]["notice_id"], sink="recorder", attempt=1,
        error="late", retry_seconds=None,
    )  # fmt: skip
    assert (late, office.deliveries()) == (None, [("recorder", "sent", 2)])


async def test_a_sender_that_is_killed_loses_no_notice(office: AlertOffice, tmp_path: Path) -> None:
    program = tmp_path / "sender.py"
    program.write_text(SENDER)
    await office.alerts().report([finding()], {"error_rate"})
    sender = await asyncio.create_subprocess_exec(
        sys.executable, str(program), office.throwaway.url, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    try:
        assert sender.stdout is not None
        async with asyncio.timeout(60):
            assert await sender.stdout.readline() == b"sending\n"
    finally:
        sender.kill()
        await sender.wait()
    assert office.deliveries() == [("recorder", "waiting", 1)]
    await office.alerts().deliver(patience=timedelta(0))
    assert office.sink.kinds == []

    office.age(0.02)
    await office.alerts().deliver(patience=timedelta(0))
    assert (office.sink.kinds, office.deliveries()) == (["raised"], [("recorder", "sent", 2)])


async def test_ten_senders_at_once_send_each_notice_once(office: AlertOffice) -> None:
    await office.alerts().report([finding(f"error_rate:{number}") for number in range(30)], set())
    sent = await asyncio.gather(*(office.alerts().deliver(patience=timedelta(0)) for _ in range(10)))
    assert sum(sent) == 30
    assert len({notice.cause for notice in office.sink.notices}) == len(office.sink.notices) == 30


async def test_a_reminder_is_not_added_where_an_earlier_notice_still_waits(office: AlertOffice) -> None:
    alerts = office.alerts()
    await alerts.report([finding()], set())
    office.age(5)
    assert [notice.kind for notice in await alerts.report([finding()], set())] == ["reminder"]
    await alerts.deliver(patience=timedelta(0))
    assert office.sink.kinds == ["raised"]


def test_two_sinks_of_one_name_are_refused(learning_database: ThrowawayDatabase) -> None:
    with pytest.raises(ConfigurationError, match="one name"):
        Alerts(learning_database.settings, None, [Recorder(), Recorder()])  # type: ignore[arg-type]


# --- tenants ----------------------------------------------------------------------------------------------------


async def test_findings_of_other_tenants_are_theirs_to_see_and_the_deployments_to_tell(
    office: AlertOffice,
) -> None:
    own, foreign = finding(), finding(tenant_id="acme", title="Of acme")
    assert await office.round(own, foreign) == ["raised", "raised"]
    assert [alert["tenant_id"] for alert in await office.listed()] == ["default"]
    [theirs] = await office.database.call("list_alerts", Identity(tenant_id="acme"))
    assert theirs["title"] == "Of acme"
    assert await office.database.call("get_alert", NOBODY, the_alert_id=theirs["alert_id"]) is None
    assert await office.database.call(
        "get_alert", Identity(tenant_id="acme"), the_alert_id=theirs["alert_id"]
    )

    assert await office.round(own) == ["resolved"]
    assert [alert["state"] for alert in await office.listed()] == ["open"]


async def test_a_silence_of_one_tenant_is_none_of_another(office: AlertOffice) -> None:
    await office.silence("*")
    assert await office.round(finding(), finding(tenant_id="acme")) == ["raised"]
    assert office.sink.notices[0].tenant_id == "acme"
    assert await office.database.call("list_alert_silences", Identity(tenant_id="acme")) == []
    [silence] = await office.database.call("list_alert_silences", NOBODY)
    assert not await office.database.call(
        "end_alert_silence", Identity(tenant_id="acme"), the_silence_id=silence["silence_id"], ended_by="eve"
    )


async def test_a_deployment_resolves_and_sends_what_its_own_monitor_reported(office: AlertOffice) -> None:
    await office.alerts().report([finding()], {"error_rate"})
    other = office.alerts(tenant="acme")
    assert await other.report([], {"error_rate"}) == []
    assert await other.deliver(patience=timedelta(0)) == 0
    assert [alert["state"] for alert in await office.listed()] == ["open"]
    assert await office.alerts().deliver(patience=timedelta(0)) == 1


async def test_rows_are_seen_by_their_tenant_alone_even_without_our_filters(office: AlertOffice) -> None:
    await office.round(finding(), finding(tenant_id="acme"))
    await office.silence("x")
    with psycopg.connect(office.throwaway.url) as connection:
        connection.execute("SET ROLE agent_app")
        for tenant, reach, expected in (
            ("acme", "tenant", {"acme"}), ("acme", "user", set()), ("", "tenant", set()), ("acme", "", set()),
        ):  # fmt: skip
            connection.execute(
                "SELECT set_config('agent.tenant_id', %s, false), set_config('agent.reach', %s, false)",
                (tenant, reach),
            )
            for table in ("agent_alert", "agent_alert_notice", "agent_alert_delivery"):
                found = connection.execute(f"SELECT DISTINCT tenant_id FROM {table}".encode()).fetchall()
                assert {name for (name,) in found} == expected, (table, tenant, reach)


async def test_a_user_who_is_erased_is_in_no_alert_any_more(office: AlertOffice) -> None:
    await office.round(
        finding("refused:user=ada"),
        finding("refused:voter=ada,tool=pay"),
        finding("refused:values", evidence={"who": [{"user_id": "ada"}]}),
        finding("refused:keys", evidence={"by_user": {"ada": 3}}),
        finding("refused:user=adam", evidence={"by_user": {"adam": 3}}),
        finding("refused:user=ada", tenant_id="acme"),
        checked=["refused"],
    )
    counts = await office.database.call("erase_user", Identity(user_id="ada"))
    assert counts["agent_alert"] == 4
    assert [alert["cause"] for alert in await office.listed()] == ["refused:user=adam"]
    assert len(await office.database.call("list_alerts", Identity(tenant_id="acme"))) == 1


async def test_an_alert_has_what_was_told_of_it_and_where(office: AlertOffice) -> None:
    await office.round(finding())
    office.sink.fails = DeliveryFailed("busy")
    await office.round()
    [alert] = await office.listed()
    whole = await office.database.call("get_alert", NOBODY, the_alert_id=alert["alert_id"])
    assert [
        (notice["kind"], [(one["sink"], one["state"], one["error"]) for one in notice["deliveries"]])
        for notice in whole["notices"]
    ] == [("resolved", [("recorder", "failed", "busy")]), ("raised", [("recorder", "sent", None)])]


async def test_open_alerts_are_listed_first_and_the_gravest_of_them_before_all(office: AlertOffice) -> None:
    await office.round(finding("error_rate:gone"))
    await office.round(
        finding("error_rate:mild", severity="info"),
        finding("error_rate:grave", severity="critical"),
        finding(),
    )
    found = await office.listed()
    assert [alert["cause"].partition(":")[2] for alert in found] == ["grave", "agent=support", "mild", "gone"]
    assert [alert["cause"] for alert in await office.listed(state="resolved")] == ["error_rate:gone"]
    assert [one["cause"] for one in await office.listed(begins=found[1]["alert_id"][:8])] == [
        found[1]["cause"]
    ]
    assert len(await office.listed(limit=2)) == 2


@pytest.mark.node
async def test_over_supabase_alerts_are_the_same(
    learning_database: ThrowawayDatabase, supabase_lite: SupabaseLite
) -> None:
    settings = Settings(
        supabase_url=supabase_lite.url, supabase_service_role_key=SecretStr(supabase_lite.secret_key)
    )
    database = open_database(settings)
    office = AlertOffice(learning_database, database)
    try:
        office.sink.fails = DeliveryFailed("busy", wait=timedelta(seconds=90))
        assert await office.round(finding(), finding("latency:agent=grün")) == ["raised", "raised"]
        assert ("recorder", "failed", 1) in office.deliveries()
        office.sink.fails = None
        office.age(5)
        assert await office.round(finding(severity="critical")) == ["worsened"]
        silence = await office.silence("latency*")
        assert await office.round(checked=["error_rate", "latency"]) == ["resolved"]
        assert sorted(office.sink.kinds) == ["raised", "raised", "resolved", "worsened"]
        [first, _] = await office.listed(state="resolved")
        whole = await database.call("get_alert", NOBODY, the_alert_id=first["alert_id"])
        assert whole["notices"][0]["deliveries"]
        assert await database.call(
            "end_alert_silence", NOBODY, the_silence_id=silence["silence_id"], ended_by="ada"
        )
    finally:
        await database.close()
