"""`agent telegram`: where Telegram sends what reviewers press."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands.options import EXIT_CODES, settings
from agent.commands.output import say

if TYPE_CHECKING:
    from agent.approval.telegram import TelegramChannel

app = typer.Typer(name="telegram", help="Approvals in Telegram.", no_args_is_help=True)


@app.command("set-webhook", epilog=EXIT_CODES)
def set_webhook(
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Address of this server; by default LEARNING_PUBLIC_URL."),
    ] = None,
) -> None:
    """Tell Telegram to send presses to this server, with the secret of the settings. What waited is dropped."""
    from agent.errors import ConfigurationError

    base = url or settings().public_url
    if base is None:
        raise ConfigurationError(
            "under which address is the server reached? Set LEARNING_PUBLIC_URL or give --url https://…"
        )
    address = f"{base.rstrip('/')}/approvals/telegram"
    asyncio.run(_channel().set_webhook(address))
    say(f"Telegram sends presses to {address}.")


@app.command("delete-webhook", epilog=EXIT_CODES)
def delete_webhook() -> None:
    """Tell Telegram to send nothing any more."""
    asyncio.run(_channel().delete_webhook())
    say("Telegram sends nothing any more.")


def _channel() -> TelegramChannel:
    from agent.approval.human_approval import HumanApprovalQueue
    from agent.approval.telegram import TelegramChannel

    return TelegramChannel(HumanApprovalQueue(settings=settings()))
