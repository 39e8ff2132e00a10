"""A chat model that answers from a script, for tests of agents without a real model."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Lock
from typing import Any
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    SystemMessage,
    ToolCall,
    ToolCallChunk,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field, PrivateAttr, field_validator

from agent.errors import ConfigurationError

_CHARACTERS_PER_TOKEN = 4


def tool_call(name: str, /, **args: Any) -> AIMessage:
    """A message that calls one tool. It gets a fresh call id each time the script gives it out."""
    return AIMessage("", tool_calls=[ToolCall(name=name, args=args, id=None)])


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """What the model was sent in one call."""

    messages: tuple[BaseMessage, ...]
    """The prompt, system message included."""
    tools: tuple[str, ...] = ()
    """Names of the tools that were bound, in their order."""
    tool_schemas: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """The same tools in OpenAI's format."""
    tool_choice: Any = None
    """As it was given to `bind_tools`; structured output gives `"any"`."""

    @property
    def system_text(self) -> str:
        """All system messages as one text."""
        return "\n\n".join(message.text for message in self.messages if isinstance(message, SystemMessage))


class _Recording:
    """The calls so far; copies of a model, deep ones too, share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls: list[RecordedCall] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recording:
        return self

    def add(self, call: RecordedCall) -> int:
        """Keep the call; returns how many came before it."""
        with self._lock:
            self._calls.append(call)
            return len(self._calls) - 1

    def all(self) -> list[RecordedCall]:
        with self._lock:
            return list(self._calls)


class ScriptedChat(BaseChatModel):
    """A chat model that gives the items of `script`, one a call, and records what it was sent.

    Works with tools, structured output, token streaming, threads and tasks, sync and async.

    ```python
    model = ScriptedChat(script=[tool_call("find_order", order_id="A1001"), "It is on its way."])
    ```
    """

    script: list[Any] = Field(repr=False)
    """Text, `AIMessage`, a Pydantic object (the tool call of its class, as structured output expects it; JSON text
    where no tool is bound), an exception (raised), or a function of the messages that gives any of these."""
    strict: bool = False
    """`False`: the last item repeats. `True`: a call after the last item raises."""
    delay: timedelta = timedelta(0)
    """Wait before each answer: the thread sleeps in the sync form, the task in the async one."""
    _recording: _Recording = PrivateAttr(default_factory=_Recording)

    @field_validator("script")
    @classmethod
    def _is_playable(cls, script: list[Any]) -> list[Any]:
        if not script:
            raise ValueError("script=[] has nothing to answer; give at least one item")
        for position, item in enumerate(script):
            check_item(item, f"script[{position}]")
        return script

    @field_validator("delay")
    @classmethod
    def _is_not_negative(cls, delay: timedelta) -> timedelta:
        if delay < timedelta(0):
            raise ValueError(f"delay={delay!r} is negative")
        return delay

    @property
    def calls(self) -> list[RecordedCall]:
        """Every call so far, oldest first, from all threads and tasks."""
        return self._recording.all()

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with these tools; they are recorded, and checked by nobody."""
        return self.bind(
            tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        number = self._record(messages, kwargs)
        time.sleep(self.delay.total_seconds())
        return ChatResult(generations=[ChatGeneration(message=self._answer(number, messages, kwargs))])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        number = self._record(messages, kwargs)
        await asyncio.sleep(self.delay.total_seconds())
        return ChatResult(generations=[ChatGeneration(message=self._answer(number, messages, kwargs))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        number = self._record(messages, kwargs)
        time.sleep(self.delay.total_seconds())
        yield from in_chunks(self._answer(number, messages, kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        number = self._record(messages, kwargs)
        await asyncio.sleep(self.delay.total_seconds())
        for chunk in in_chunks(self._answer(number, messages, kwargs)):
            yield chunk

    def _record(self, messages: list[BaseMessage], options: dict[str, Any]) -> int:
        """Before the delay, so that a call that is given up or times out is on record too."""
        schemas = tuple(options.get("tools") or ())
        return self._recording.add(
            RecordedCall(
                messages=tuple(messages),
                tools=tuple(schema.get("function", schema).get("name", "") for schema in schemas),
                tool_schemas=schemas,
                tool_choice=options.get("tool_choice"),
            )
        )

    def _answer(self, number: int, messages: list[BaseMessage], options: dict[str, Any]) -> AIMessage:
        if number >= len(self.script) and self.strict:
            raise ConfigurationError(
                f"ScriptedChat was called {number + 1} times and its script has {len(self.script)} item(s); "
                "add an item for each call, or leave strict=True out to repeat the last one"
            )
        answer = resolve(self.script[min(number, len(self.script) - 1)], messages)
        return as_message(answer, messages, has_tools=bool(options.get("tools")))


def check_item(item: Any, place: str) -> None:
    """Raise `ValueError` for what no call can answer with."""
    is_error_class = isinstance(item, type) and issubclass(item, Exception)
    is_answer = isinstance(item, str | AIMessage | Exception) or (
        isinstance(item, BaseModel) and not isinstance(item, BaseMessage)
    )
    is_function = callable(item) and not isinstance(item, type)
    if not (is_error_class or is_answer or is_function):
        raise ValueError(
            f"{place}={item!r} cannot be answered; use text, an AIMessage, a Pydantic object, an exception, "
            "or a function of the messages that gives one of these"
        )


def resolve(item: Any, messages: Any, *, check: Callable[[Any, str], None] = check_item) -> Any:
    """Call functions of the script until an answer is there; what they give passes `check` too."""
    while callable(item) and not isinstance(item, type | str):  # the text of a message is callable too
        item = item(messages)
        check(item, "what a function of the script gave")
    return item


def as_message(answer: Any, messages: Sequence[BaseMessage], *, has_tools: bool) -> AIMessage:
    """The answer as a message without an id, with usage and fresh ids for tool calls that have none.

    Raises:
        Exception: the answer, where it is one.
    """
    if isinstance(answer, type):
        answer = answer()
    if isinstance(answer, Exception):
        raise answer
    match answer:
        case str():
            message = AIMessage(answer)
        case AIMessage():
            message = answer.model_copy(update={"id": None})
        case BaseModel() if has_tools:
            name = convert_to_openai_tool(type(answer))["function"]["name"]
            message = tool_call(name, **answer.model_dump(mode="json"))
        case _:
            message = AIMessage(answer.model_dump_json())
    calls = [
        call if call["id"] else ToolCall(**{**call, "id": f"call_{uuid4().hex}"})
        for call in message.tool_calls
    ]
    usage = message.usage_metadata or _usage(messages, message)
    return message.model_copy(update={"tool_calls": calls, "usage_metadata": usage})


def in_chunks(message: AIMessage) -> Iterator[ChatGenerationChunk]:
    """The message word by word; tool calls, usage and metadata are on the last chunk."""
    # Content in blocks (images, reasoning) stays whole.
    words = (
        re.findall(r"\S+\s*|\s+", message.content) if isinstance(message.content, str) else [message.content]
    )
    for word in words[:-1]:
        yield ChatGenerationChunk(message=AIMessageChunk(content=word))
    last = AIMessageChunk(
        content=words[-1] if words else "",
        additional_kwargs=message.additional_kwargs,
        response_metadata=message.response_metadata,
        tool_call_chunks=_tool_call_chunks(message),
        usage_metadata=message.usage_metadata,
        name=message.name,
        chunk_position="last",
    )
    yield ChatGenerationChunk(message=last)


def _tool_call_chunks(message: AIMessage) -> list[ToolCallChunk]:
    texts = [(call["name"], json.dumps(call["args"]), call["id"]) for call in message.tool_calls]
    texts += [(call["name"] or "", call["args"] or "", call["id"]) for call in message.invalid_tool_calls]
    return [
        ToolCallChunk(name=name, args=args, id=call_id, index=index)
        for index, (name, args, call_id) in enumerate(texts)
    ]


def _usage(messages: Sequence[BaseMessage], answer: AIMessage) -> UsageMetadata:
    calls = json.dumps(answer.tool_calls) if answer.tool_calls else ""
    asked = sum(_tokens(message.text) for message in messages)
    answered = _tokens(answer.text + calls)
    return UsageMetadata(input_tokens=asked, output_tokens=answered, total_tokens=asked + answered)


def _tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)
