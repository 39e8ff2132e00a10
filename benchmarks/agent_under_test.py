"""What the harness needs from an agent, and the model that all of them are given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

ANSWER = "Here is what you asked for, in two short sentences. Tell me if something is missing."
USER_ID = "benchmark-user"


class ModelScript:
    """How all models of one agent behave, answering or extracting, and what they were asked.

    Every call takes `delay_s` seconds, which may be changed at any time, and gives the same answer.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.calls = 0
        self.longest_prompt_characters = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelScript:
        # Agno copies its model for every extraction; the copies must follow the same script.
        return self

    def play(self, prompt: Sequence[str]) -> None:
        """One call in a thread."""
        self._count(prompt)
        if self.delay_s:
            time.sleep(self.delay_s)

    async def aplay(self, prompt: Sequence[str]) -> None:
        """One call in an event loop."""
        self._count(prompt)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)

    def _count(self, prompt: Sequence[str]) -> None:
        self.calls += 1
        self.longest_prompt_characters = max(self.longest_prompt_characters, sum(map(len, prompt)))


class TimedChat(BaseChatModel):
    """A LangChain chat model on a script, which never finds anything worth saving.

    Bound to tools whose names are in `empty_calls` it calls that tool with those arguments, which is how a
    structured-output extractor is told "nothing new"; bound to others, or to none, it answers in text.
    """

    script: ModelScript
    empty_calls: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Arguments by the name of the tool to call."""

    @property
    def _llm_type(self) -> str:
        return "timed"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        kwargs.pop("tool_choice", None)
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self.script.play([message.text for message in messages])
        return self._answer(kwargs.get("tools", ()))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        await self.script.aplay([message.text for message in messages])
        return self._answer(kwargs.get("tools", ()))

    def _answer(self, tools: Sequence[dict[str, Any]]) -> ChatResult:
        message = AIMessage(ANSWER)
        for name in (tool["function"]["name"] for tool in tools):
            if name in self.empty_calls:
                message = AIMessage(
                    "", tool_calls=[{"name": name, "args": self.empty_calls[name], "id": "call_1"}]
                )
        return ChatResult(generations=[ChatGeneration(message=message)])


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every agent under test is given."""

    database_url: str
    """A database of its own, migrated for ours, on the one server that all of them share."""
    memories: list[str]
    """What is known of the user when measuring begins, one memory each."""
    script: ModelScript
    """To be followed by every model of the agent."""


class AgentUnderTest(Protocol):
    """One agent in two builds that differ by learning only."""

    name: str
    """As printed in the tables."""
    configuration: str
    """How both builds are made, where memories live, what a run waits for."""
    learns_behind: bool
    """Whether this process goes on learning when a run has been answered."""
    degraded: int
    """Learning runs so far that were answered without recall, or not recorded."""

    async def open(self, setup: Setup) -> None:
        """Build both agents and fill the store."""

    async def run_bare(self, question: str, session_id: str) -> str:
        """One run in a new session without learning; the answer."""

    async def run_learning(self, question: str, session_id: str) -> str:
        """The same with learning; returns when a user would have the answer."""

    async def handed_over(self) -> None:
        """Wait until what finished runs handed over has arrived, learning not included; nothing where a run waits."""

    async def settle(self, *, patience_s: float) -> int | None:
        """Wait for learning that goes on behind the answers; runs left unlearned after `patience_s` seconds.

        `None` where nobody learns in this process.
        """

    async def close(self) -> None:
        """Stop everything that was started, whatever is left undone."""
