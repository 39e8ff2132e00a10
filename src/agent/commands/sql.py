"""`agent sql`: inventory, check."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import typer

from agent.commands.operations import KINDS, postgres_url
from agent.commands.options import EXIT_CODES, JsonOption, TenantOption, settings
from agent.commands.output import Column, is_terminal, print_lines, print_table, say, say_json

app = typer.Typer(
    help="The SQL of agents: what could deceive its gate, what its logins may do.", no_args_is_help=True
)


@app.command(epilog=EXIT_CODES)
def inventory(as_json: JsonOption = False) -> None:
    """Code of this database that runs without being called by a name: operators, casts, views, definer functions."""
    from agent.execution.sql_inventory import Finding
    from agent.execution.sql_inventory import inventory as look

    async def work() -> list[Finding]:
        async with postgres_url() as url:
            return await look(url)

    found = asyncio.run(work())
    if as_json:
        say_json([asdict(finding) for finding in found])
        return
    rows = [[finding.kind, finding.name, finding.why, finding.what_to_do] for finding in found]
    if not is_terminal():
        print_lines(rows)
    elif rows:
        print_table(
            [
                Column(title="kind"),
                Column(title="name", is_wide=True),
                Column(title="why", is_wide=True),
                Column(title="what to do", is_wide=True),
            ],
            rows,
        )
    else:
        say("Nothing found: no code of this database runs without being called by a name.")


@app.command(epilog="Exit codes: 0 the logins can do what the policy file lists and no more, 1 they can do more or are "
    "missing, 2 wrong usage.")  # fmt: skip
def check(tenant: TenantOption = None, as_json: JsonOption = False) -> None:
    """Log in as the logins of a tenant and see that they can do no more than the policy file says."""
    found = asyncio.run(_check(settings().tenant if tenant is None else tenant))
    if as_json:
        say_json(found)
    else:
        for login in found:
            for right in login["too_many"]:
                say(f"{login['login']}: {right}")
            for right in login["only_gate"]:
                say(
                    f"{login['login']}: {right}; only the provider can take this away, so the gate alone refuses it"
                )
            if not login["too_many"]:
                say(f"{login['login']}: no right too many")
    if any(login["too_many"] for login in found):
        raise typer.Exit(1)


async def _check(tenant_id: str) -> list[dict[str, Any]]:
    from agent.approval.policy_file import load_policy
    from agent.errors import OperatorError
    from agent.execution.sql_logins import address_of, login_of, logins_file, read_logins
    from agent.execution.sql_rights import excess_rights

    chosen = settings()
    policy = load_policy(chosen.policy_file)
    file = logins_file(chosen)
    entry = read_logins(file).get(tenant_id)
    if entry is None:
        raise OperatorError(
            f"there are no logins of tenant {tenant_id!r} in {str(file)!r}. Make them with "
            f"`agent migrate --roles --tenant {tenant_id}`"
        )
    found = []
    async with postgres_url() as owner_url:
        for kind in KINDS:
            # The embedded server may have another port today.
            url = entry[kind] if chosen.database_url else address_of(owner_url, *login_of(entry[kind]))
            excess = await excess_rights(url, kind, policy, tenant_id)
            found.append(
                {
                    "login": login_of(entry[kind])[0],
                    "too_many": [right for right, is_providers in excess if not is_providers],
                    "only_gate": [right for right, is_providers in excess if is_providers],
                }
            )
    return found
