"""What `agent doctor` says of safe execution and background work: policy, channels, mail, sandbox, application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from agent.commands.doctor_finding import Finding
from agent.errors import ConfigurationError, LearningError

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile
    from agent.settings import Settings

_WAIT_SECONDS = 30.0


async def safety_findings(chosen: Settings) -> AsyncIterator[Finding]:
    """Policy file, channels, mail, sandbox, the application's database, learner, monitor and alerts, in this order."""
    from agent.approval.policy_file import load_policy

    try:
        policy = load_policy(chosen.policy_file)
    except ConfigurationError as error:
        yield Finding(
            name="policy",
            status="problem",
            message=str(error),
            what_to_do="Correct the file; until then servers do not start and nothing is approved.",
        )
    else:
        yield _policy(chosen, policy)
        yield _slack(chosen, policy)
        yield _telegram(chosen, policy)
        yield _mail(chosen, policy)
        if (elsewhere := _sql_elsewhere(chosen, policy)) is not None:
            yield elsewhere
    yield await _sandbox()
    yield await _application(chosen)
    yield _background(chosen)
    yield _alerts(chosen)


def _policy(chosen: Settings, policy: PolicyFile) -> Finding:
    from agent.approval.policy_file import DEFAULT_NAME, PolicyFile
    from agent.approval.risk import Risk

    if policy.version == PolicyFile().version:
        return Finding(
            name="policy",
            status="note",
            message=f"there is no {DEFAULT_NAME} in this folder and LEARNING_POLICY_FILE is not set: nobody may "
            "approve anything, and agents' SQL may read no table",
            what_to_do=f"Write {DEFAULT_NAME} with at least one [[reviewer]]; docs/reference/policy-file.md shows one.",
        )
    place = str(chosen.policy_file or DEFAULT_NAME)
    names = [reviewer.name for reviewer in policy.reviewers]
    message = (
        f"{place!r} is valid: {_number(len(names), 'reviewer')}, {_number(len(policy.rules), 'rule')}, "
        f"{_number(len(policy.grants), 'grant')}, {_number(len(policy.tables), 'table')}"
    )
    for risk in (Risk.WRITE, Risk.DESTRUCTIVE):
        able, needed = policy.reviewers.allowed(chosen.tenant, risk), policy.approval.votes(risk)
        if len(able) < needed:
            return Finding(
                name="policy",
                status="problem" if not able else "note",
                message=f"{message}; {risk} calls in tenant {chosen.tenant!r} need {needed} who approve, and "
                f"{len(able)} may, so all of them are denied",
                what_to_do="Name enough people as [[reviewer]], or lower the votes in [approval].",
            )
    return Finding(name="policy", status="ok", message=message)


def _slack(chosen: Settings, policy: PolicyFile) -> Finding:
    wanted = {
        "SLACK_BOT_TOKEN": chosen.slack_bot_token is not None,
        "SLACK_SIGNING_SECRET or SLACK_APP_TOKEN": (
            chosen.slack_signing_secret is not None or chosen.slack_app_token is not None
        ),
        "slack_channel in the policy file": policy.approval.slack_channel is not None,
        "a reviewer with slack in the policy file": any(one.slack for one in policy.reviewers),
    }
    return _channel("slack", "Slack", wanted, "docs/howto/slack.md")


def _telegram(chosen: Settings, policy: PolicyFile) -> Finding:
    wanted = {
        "TELEGRAM_BOT_TOKEN": chosen.telegram_bot_token is not None,
        "TELEGRAM_SECRET": chosen.telegram_secret is not None,
        "telegram_chat in the policy file": policy.approval.telegram_chat is not None,
        "a reviewer with telegram in the policy file": any(one.telegram for one in policy.reviewers),
    }
    return _channel("telegram", "Telegram", wanted, "docs/howto/telegram.md")


def _channel(name: str, title: str, wanted: dict[str, bool], guide: str) -> Finding:
    missing = [what for what, is_there in wanted.items() if not is_there]
    if not missing:
        return Finding(name=name, status="ok", message=f"{title} is set up: cards go there")
    if len(missing) == len(wanted):
        return Finding(name=name, status="ok", message=f"{title} is not used")
    return Finding(
        name=name,
        status="problem",
        message=f"{title} is set up in part, so nobody can decide there; missing: {', '.join(missing)}",
        what_to_do=f"Set what is missing, or take the rest away; {guide} goes step by step.",
    )


def _mail(chosen: Settings, policy: PolicyFile) -> Finding:
    wanted = {
        "LEARNING_SMTP_URL": chosen.smtp_url is not None,
        "LEARNING_MAIL_FROM": chosen.mail_from is not None,
    }
    missing = [name for name, is_there in wanted.items() if not is_there]
    if not missing:
        sends = any(not part.dry_run for part in policy.mail)
        how = "sends what is approved" if sends else "only rehearses: dry_run holds for every [[mail]]"
        return Finding(name="mail", status="ok", message=f"a mail server is set; send_email {how}")
    if len(missing) == 1 or any(not part.dry_run for part in policy.mail):
        return Finding(
            name="mail",
            status="problem",
            message=f"mail cannot be sent: {' and '.join(missing)} not set",
            what_to_do="Set both LEARNING_SMTP_URL and LEARNING_MAIL_FROM, or leave dry_run = true in the policy file.",
        )
    return Finding(name="mail", status="ok", message="no mail server is set; send_email only rehearses")


def _sql_elsewhere(chosen: Settings, policy: PolicyFile) -> Finding | None:
    """Says that agents' SQL does not go to the application's database; `None` where there is no other."""
    if chosen.app_database_url is None or chosen.app_database_url == chosen.database_url:
        return None
    tables = (
        f", where the {_number(len(policy.tables), 'table')} of the policy file must be"
        if policy.tables
        else ""
    )
    return Finding(
        name="sql",
        status="note",
        message="agents' SQL (execute_sql, query_data, update_client_status) does NOT run in the database of "
        f"APP_DATABASE_URL: discovery and the monitor read that one, and SQL runs in this layer's own{tables}",
        what_to_do="To let agents query the application, keep this layer in the application's database (DATABASE_URL), "
        "or give them tools of your own that connect there.",
    )


async def _sandbox() -> Finding:
    """Starts one helper process of the sandbox and stops it."""
    from agent.execution.tool_sandbox import ToolSandbox

    sandbox = ToolSandbox()
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            is_confined = await sandbox.is_confined()
    except LearningError as error:
        return Finding(
            name="sandbox",
            status="problem",
            message=f"tools that agents write cannot run: {error}",
            what_to_do="Install the package's dependencies again.",
        )
    except TimeoutError:
        return Finding(
            name="sandbox",
            status="problem",
            message=f"the sandbox did not start in {_WAIT_SECONDS:g} seconds",
            what_to_do="Is this machine short of memory or processor time?",
        )
    finally:
        await sandbox.close()
    if is_confined:
        return Finding(name="sandbox", status="ok", message="tools that agents write run behind bubblewrap")
    return Finding(
        name="sandbox",
        status="note",
        message="tools that agents write run in the interpreter's sandbox alone, without bubblewrap around it: what "
        "breaks out of the interpreter would have this user's rights",
        what_to_do="Install bubblewrap (Debian, Ubuntu: `apt install bubblewrap`) and allow user namespaces; see "
        "docs/howto/agent-written-tools.md.",
    )


async def _application(chosen: Settings) -> Finding:
    """Connects to the application's database and asks for nothing but an answer."""
    from agent.discovery.structure import app_name, open_app_database

    if chosen.app_database_url is None:
        return Finding(
            name="application",
            status="ok",
            message="APP_DATABASE_URL is not set: what is discovered is this layer's own database",
        )
    try:
        async with asyncio.timeout(_WAIT_SECONDS), open_app_database(chosen) as connection:
            await connection.execute("SELECT 1")
    except (LearningError, TimeoutError) as error:
        return Finding(
            name="application",
            status="problem",
            message=f"the application's database {app_name(chosen)} cannot be reached: {error or 'no answer'}",
            what_to_do="Start it or correct APP_DATABASE_URL; nothing is discovered and monitored there until then.",
        )
    return Finding(
        name="application", status="ok", message=f"the application's database {app_name(chosen)} answers"
    )


def _background(chosen: Settings) -> Finding:
    told = [
        f"{title} on, every {interval.total_seconds() / 60:g} minutes"
        if is_on
        else f"{title} off ({variable}=false)"
        for title, is_on, interval, variable in (
            ("learner", chosen.learner, chosen.learner_interval, "LEARNING_LEARNER"),
            ("monitor", chosen.monitor, chosen.monitor_interval, "LEARNING_MONITOR"),
        )
    ]
    return Finding(
        name="background", status="ok", message=f"in servers of this configuration: {'; '.join(told)}"
    )


def _alerts(chosen: Settings) -> Finding:
    from agent.monitoring.alert_sinks import configured_sinks

    try:
        names = [sink.name for sink in configured_sinks(chosen)]
    except ConfigurationError as error:
        return Finding(
            name="alerts",
            status="problem",
            message=str(error),
            what_to_do="Set it, or unset the other; until then nobody is told of alerts. See docs/howto/alerts.md.",
        )
    return Finding(name="alerts", status="ok", message=f"alerts are told to: {', '.join(names)}")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
