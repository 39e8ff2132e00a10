"""Whether code runs after somebody read untrusted text: what calls hand in to agents inside them, and get back."""

from __future__ import annotations

from contextvars import ContextVar

read_untrusted: ContextVar[list[bool] | None] = ContextVar("agent_read_untrusted", default=None)
"""Whether the call around this code has read untrusted text: a list of one, which agents inside it set."""

around_tainted: ContextVar[bool] = ContextVar("agent_around_tainted", default=False)
"""Whether the agent whose call is around this code had read untrusted text before it made the call."""
