"""Messages that hold the text of strangers: marked, and their text fenced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from langchain_core.messages import BaseMessage, RemoveMessage
from langgraph.types import Command, Send

from agent.execution.result_text import fenced

UNTRUSTED: Final = "agent_untrusted"
"""Mark of a tool's message whose text is a stranger's."""

_MEDIA: Final = frozenset({"image", "image_url", "audio", "input_audio", "video"})


def changed_messages(value: Any, change: Callable[[BaseMessage], BaseMessage]) -> Any:
    """An update of the state, or a command with one, with each message in it changed."""
    if isinstance(value, RemoveMessage):
        return value
    if isinstance(value, BaseMessage):
        return change(value)
    if isinstance(value, Command):
        return replace(
            value, update=changed_messages(value.update, change), goto=changed_messages(value.goto, change)
        )
    if isinstance(value, Send):
        return Send(value.node, changed_messages(value.arg, change))
    if type(value) is dict:
        return {name: changed_messages(item, change) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(changed_messages(item, change) for item in value)
    return value


def fenced_content(name: str, content: Any) -> Any:
    """The content of a message with all that is text in it fenced; pictures and sounds stay."""
    if isinstance(content, str):
        return fenced(name, content)
    return [
        block
        if isinstance(block, Mapping) and block.get("type") in _MEDIA and "text" not in block
        else {"type": "text", "text": fenced(name, _text_of(block))}
        for block in content
    ]


def _text_of(block: Any) -> Any:
    is_text = isinstance(block, Mapping) and block.get("type") == "text"
    return block.get("text") if is_text else block
