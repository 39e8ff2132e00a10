"""The language model that extracts and the embedder, from what the user named."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel

from agent.errors import ConfigurationError
from agent.learning.run_record import describe_error
from agent.settings import Settings


def chat_model(named: str | BaseChatModel, settings: Settings) -> BaseChatModel:
    """A chat model by LangChain's `provider:model`, or the object itself. May import and block: call it in a thread.

    Raises:
        ConfigurationError: the provider is unknown, its package is missing, or its key is.
    """
    if isinstance(named, BaseChatModel):
        return named
    from langchain.chat_models import init_chat_model

    try:
        made = init_chat_model(named, **_openai_options(named, settings))
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"LEARNING_MODEL={named!r} cannot be used: {error}") from None
    except Exception as error:  # each provider's client has errors of its own for a missing key
        raise ConfigurationError(
            f"LEARNING_MODEL={named!r} cannot be used: {describe_error(error)}"
        ) from error
    if not isinstance(made, BaseChatModel):
        raise ConfigurationError(f"LEARNING_MODEL={named!r} names no chat model")
    return made


def embedder(named: str | Embeddings, settings: Settings) -> Embeddings:
    """An embedder by LangChain's `provider:model`, or the object itself. May import and block: call it in a thread.

    Raises:
        ConfigurationError: as in `chat_model`.
    """
    if isinstance(named, Embeddings):
        return named
    from langchain.embeddings import init_embeddings

    options = _openai_options(named, settings)
    if named.startswith("openai:"):
        # Lengths are cut by us; the client's own check would send token numbers, which local servers do not take.
        options["check_embedding_ctx_length"] = False
    try:
        made = init_embeddings(named, **options)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"LEARNING_EMBEDDINGS={named!r} cannot be used: {error}") from None
    except Exception as error:  # each provider's client has errors of its own for a missing key
        raise ConfigurationError(
            f"LEARNING_EMBEDDINGS={named!r} cannot be used: {describe_error(error)}"
        ) from error
    if not isinstance(made, Embeddings):
        raise ConfigurationError(f"LEARNING_EMBEDDINGS={named!r} names no embedder")
    return made


def _openai_options(named: str, settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if named.startswith(("openai:", "gpt-", "text-embedding-")):
        if settings.openai_api_key is not None:
            options["api_key"] = settings.openai_api_key.get_secret_value()
        if settings.openai_base_url is not None:
            options["base_url"] = settings.openai_base_url
    return options
