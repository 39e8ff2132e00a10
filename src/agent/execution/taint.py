"""Whether code runs after somebody read untrusted text: what calls hand in to agents inside them, and get back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from agent.execution.tool_registry import ToolSpec

read_untrusted: ContextVar[list[bool] | None] = ContextVar("agent_read_untrusted", default=None)
"""Whether the call around this code has read untrusted text: a list of one, which agents inside it set."""

around_tainted: ContextVar[bool] = ContextVar("agent_around_tainted", default=False)
"""Whether the agent whose call is around this code had read untrusted text before it made the call."""

untrusted_names: ContextVar[frozenset[str]] = ContextVar("agent_untrusted_names", default=frozenset())
"""Names of the tools whose results the agent around this code takes for text of strangers; `"*"` means all."""


def gives_untrusted(name: str, spec: ToolSpec | None, names: frozenset[str]) -> bool:
    """Whether a tool's results hold text of strangers, by its own word or by that of these names."""
    return bool({"*", name} & names) or (spec is not None and spec.untrusted)


@contextmanager
def call_around(*, tainted: bool, names: frozenset[str]) -> Iterator[list[bool]]:
    """Hand in to the code of one call what its agent knows of taint.

    Args:
        tainted: whether the agent has read untrusted text.
        names: as `untrusted_names`.

    Yields:
        Whether the code has read untrusted text: a list of one.
    """
    inside = [False]
    read = read_untrusted.set(inside)
    around = around_tainted.set(tainted or around_tainted.get())
    known = untrusted_names.set(names | untrusted_names.get())
    try:
        yield inside
    finally:
        untrusted_names.reset(known)
        around_tainted.reset(around)
        read_untrusted.reset(read)
