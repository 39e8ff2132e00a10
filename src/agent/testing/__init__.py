"""For tests of agents that learn: a scripted model and a throw-away database.

`agent.testing.openai_server` has a server that speaks OpenAI's protocol, for tests of everything down to the wire.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.testing.scripted_chat import RecordedCall, ScriptedChat, tool_call
    from agent.testing.throwaway import learning_database, throwaway_database

_HOMES = {
    "RecordedCall": "agent.testing.scripted_chat",
    "ScriptedChat": "agent.testing.scripted_chat",
    "learning_database": "agent.testing.throwaway",
    "throwaway_database": "agent.testing.throwaway",
    "tool_call": "agent.testing.scripted_chat",
}

__all__ = ["RecordedCall", "ScriptedChat", "learning_database", "throwaway_database", "tool_call"]


def __getattr__(name: str) -> Any:
    """Loaded when first used: the throw-away database needs pytest, the scripted model does not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'agent.testing' has no attribute {name!r}")
