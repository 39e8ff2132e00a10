"""Whom a run is for, from what LangGraph and its caller say at its start (D5)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from langchain_core.runnables import RunnableConfig

from agent.identity import Identity
from agent.settings import Settings

DEFAULT_AGENT = "agent"


def resolve_identity(
    settings: Settings,
    config: RunnableConfig,
    runtime: Any,
    *,
    agent_id: str | None,
    claimed: Identity | None = None,
    use_default: bool = True,
) -> Identity:
    """The identity of a run that starts now.

    The user is, in this order: whom the database knows by a user's access token (`claimed`), whom the LangGraph server
    authenticated, `user_id` of the runtime context, `user_id` of `configurable`, the default user of the settings,
    nobody. The tenant comes from the same place as the user, else it is the settings' tenant: an authenticated user
    cannot choose another. On a LangGraph server the agent is not named by the metadata, which clients write there.

    Raises:
        IdentityError: an id that cannot be, such as one with a NUL.
    """
    configurable: Mapping[str, Any] = config.get("configurable") or {}
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    session = configurable.get("thread_id") or getattr(
        getattr(runtime, "execution_info", None), "thread_id", None
    )
    rest = {
        "session_id": str(session) if session else f"run-{uuid.uuid4()}",
        "agent_id": agent_id
        or (_text(metadata.get("lc_agent_name")) if getattr(runtime, "server_info", None) is None else None)
        or graph_of(runtime, config)
        or DEFAULT_AGENT,
    }
    if claimed is not None:
        return claimed.with_(**rest)
    server = getattr(runtime, "server_info", None)
    user = getattr(server, "user", None)
    if user is not None:
        user_id = _text(_read(user, "identity"))
        tenant = _text(_read(user, "tenant_id")) or _text(_read(user, "tenant"))
    else:
        context = getattr(runtime, "context", None)
        if (user_id := _text(_read(context, "user_id"))) is not None:
            tenant = _text(_read(context, "tenant_id"))
        elif (user_id := _text(configurable.get("user_id"))) is not None:
            tenant = _text(configurable.get("tenant_id"))
        else:
            user_id, tenant = settings.default_user if use_default else None, None
    return Identity(tenant_id=tenant or settings.tenant, user_id=user_id, **rest)


def graph_of(runtime: Any, config: RunnableConfig) -> Any:
    """The graph's name on its server, which sets it in each run; `None` elsewhere."""
    server = getattr(runtime, "server_info", None)
    return _text(getattr(server, "graph_id", None)) or _text((config.get("metadata") or {}).get("graph_id"))


def _read(source: Any, name: str) -> Any:
    if source is None:
        return None
    if isinstance(source, Mapping):
        return source.get(name)
    value = getattr(source, name, None)
    if value is None and hasattr(source, "__getitem__"):
        try:
            value = source[name]
        except (KeyError, TypeError, AttributeError):
            return None
    return value


def _text(value: Any) -> Any:
    """The value as text; `None` for none. What is no single value stays as it is, and `Identity` refuses it by name."""
    if value is None or value == "":
        return None
    return (
        value
        if isinstance(value, bool | bytes | bytearray | Mapping | AbstractSet | Sequence)
        else str(value)
    )
