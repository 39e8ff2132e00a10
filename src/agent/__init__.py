"""The public names, loaded when they are first used; importing `agent` does no I/O."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.approval.graph_resume import ApprovalPause
    from agent.errors import ConfigurationError, LearningError
    from agent.events import Event, listening
    from agent.execution.safe_executor import SafeExecutor
    from agent.execution.safe_tools_middleware import SafeToolsMiddleware
    from agent.execution.safe_tools_node import safe_tools
    from agent.identity import Identity
    from agent.learning.learning_graph import current_knowledge, with_learning
    from agent.learning.learning_middleware import LearningMiddleware
    from agent.learning.machine import LearningMachine
    from agent.settings import Settings
    from agent.stores.base import LearningMode
    from agent.stores.conversation import ConversationConfig
    from agent.stores.session_context import SessionContextConfig
    from agent.stores.user_memory import UserMemoryConfig
    from agent.stores.user_profile import UserProfile, UserProfileConfig

_HOMES = {
    "ApprovalPause": "agent.approval.graph_resume",
    "ConfigurationError": "agent.errors",
    "ConversationConfig": "agent.stores.conversation",
    "Event": "agent.events",
    "Identity": "agent.identity",
    "LearningError": "agent.errors",
    "LearningMachine": "agent.learning.machine",
    "LearningMiddleware": "agent.learning.learning_middleware",
    "LearningMode": "agent.stores.base",
    "SafeExecutor": "agent.execution.safe_executor",
    "SafeToolsMiddleware": "agent.execution.safe_tools_middleware",
    "SessionContextConfig": "agent.stores.session_context",
    "Settings": "agent.settings",
    "UserMemoryConfig": "agent.stores.user_memory",
    "UserProfile": "agent.stores.user_profile",
    "UserProfileConfig": "agent.stores.user_profile",
    "current_knowledge": "agent.learning.learning_graph",
    "listening": "agent.events",
    "safe_tools": "agent.execution.safe_tools_node",
    "with_learning": "agent.learning.learning_graph",
}

__all__ = [
    "ApprovalPause",
    "ConfigurationError",
    "ConversationConfig",
    "Event",
    "Identity",
    "LearningError",
    "LearningMachine",
    "LearningMiddleware",
    "LearningMode",
    "SafeExecutor",
    "SafeToolsMiddleware",
    "SessionContextConfig",
    "Settings",
    "UserMemoryConfig",
    "UserProfile",
    "UserProfileConfig",
    "current_knowledge",
    "listening",
    "safe_tools",
    "with_learning",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'agent' has no attribute {name!r}")
