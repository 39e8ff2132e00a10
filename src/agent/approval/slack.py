"""Approvals in Slack, for who opens the channel: posting, cards, answers and Socket Mode are files of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.approval.slack_answers import SlackAnswers, form_fault
from agent.approval.slack_cards import EDIT, blocks, edit_view, summary
from agent.approval.slack_posting import SlackChannel
from agent.approval.slack_socket import SlackSocket

if TYPE_CHECKING:
    from agent.approval.human_approval import HumanApprovalQueue

__all__ = [
    "EDIT", "SlackAnswers", "SlackChannel", "SlackSocket", "blocks", "edit_view", "form_fault", "slack_channel",
    "summary",
]  # fmt: skip


def slack_channel(queue: HumanApprovalQueue) -> SlackChannel | None:
    """The channel of the queue's settings and policy; `None` where token, way back or channel are not set."""
    settings = queue.settings
    is_reachable = settings.slack_signing_secret is not None or settings.slack_app_token is not None
    if settings.slack_bot_token is None or not is_reachable or queue.policy.approval.slack_channel is None:
        return None
    return SlackChannel(queue)
