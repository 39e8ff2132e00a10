"""The chat model of the sample graphs."""

from __future__ import annotations

import os
from typing import Any

from dotenv import dotenv_values
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel

from agent.errors import ConfigurationError
from agent.settings import DEFAULT_OPENAI_MODEL, Settings, current_settings
from graphs.rule_chat import RuleChat

_VARIABLE = "GRAPH_MODEL"


def chat_model() -> BaseChatModel:
    """The model that `GRAPH_MODEL` names (`provider:model`), else OpenAI's small one where `OPENAI_API_KEY` is set.

    With neither, or with `GRAPH_MODEL=none`, the rule-based stand-in.

    Raises:
        ConfigurationError: the provider is unknown, or its package or its key is missing.
    """
    settings = current_settings()
    named = os.environ.get(_VARIABLE) or dotenv_values(".env").get(_VARIABLE)
    name = named or (DEFAULT_OPENAI_MODEL if settings.openai_api_key else "none")
    if name == "none":
        return RuleChat()
    try:
        model: BaseChatModel = init_chat_model(name, **_options(name, settings))
    except Exception as error:  # each provider's client has errors of its own for a missing key or package
        raise ConfigurationError(f"{_VARIABLE}={name!r} cannot be used: {error}") from error
    return model


def _options(name: str, settings: Settings) -> dict[str, Any]:
    """What may stand in `.env` only, where OpenAI's client does not look."""
    if not name.startswith("openai:"):
        return {}
    key = settings.openai_api_key
    options = {"api_key": key.get_secret_value() if key else None, "base_url": settings.openai_base_url}
    return {option: value for option, value in options.items() if value is not None}
