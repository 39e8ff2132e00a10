"""The tools that an agent has: what was said of them, and what code says of their calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from agent.approval.records import Approval
from agent.approval.risk import Risk
from agent.errors import ConfigurationError, InvalidRequest, LearningError
from agent.execution.call_arguments import check_taken
from agent.execution.call_judging import judged
from agent.execution.execution_records import Assessment
from agent.execution.foreign_messages import UNTRUSTED
from agent.execution.gated_turn import Caller
from agent.execution.safe_executor import SafeExecutor
from agent.execution.taint import gives_untrusted
from agent.execution.tool_registry import Appraisal


class AgentTools:
    """Tools of the executor's registry, and any others of LangChain's.

    Args:
        executor: who assesses.
        risks: how dangerous each LangChain tool is, by name; a tool that is not named is WRITE and asks.
        untrusted_tools: names of tools whose results hold text of strangers; `"*"` means all.
    """

    def __init__(
        self,
        executor: SafeExecutor,
        *,
        risks: Mapping[str, Risk | str] | None,
        untrusted_tools: Collection[str],
    ) -> None:
        if risks is not None and not isinstance(risks, Mapping):
            raise ConfigurationError(f"risks={risks!r} must be a mapping of names to risks")
        if (
            isinstance(untrusted_tools, str)
            or not isinstance(untrusted_tools, Collection)
            or not all(isinstance(name, str) for name in untrusted_tools)
        ):
            raise ConfigurationError(f"untrusted_tools={untrusted_tools!r} must be a collection of names")
        self._executor = executor
        try:
            self.risks = {name: Risk.of(str(risk)) for name, risk in (risks or {}).items()}
        except LearningError as error:
            raise ConfigurationError(f"risks: {error}") from None
        self.untrusted_tools = frozenset(untrusted_tools)
        self.by_name: dict[str, BaseTool] = {}
        """Tools seen so far, to check calls and edits by."""
        self.were_seen = False
        """Whether the tools of the agent were seen in this process: a call of another is of none."""

    def unknown_names(self, written: Collection[str] = ()) -> list[str]:
        """Names in `risks` and `untrusted_tools` that no tool has."""
        known = {"*", *self.by_name, *written, *(spec.name for spec in self._executor.registry)}
        return sorted((set(self.risks) | self.untrusted_tools) - known)

    def is_untrusted(self, name: str) -> bool:
        """Whether a tool's results hold text of strangers."""
        return gives_untrusted(name, self._executor.registry.get(name), self.untrusted_tools)

    def taints(self, messages: Sequence[Any]) -> bool:
        """Whether these messages hold the result of an untrusted tool."""
        return any(
            isinstance(message, ToolMessage)
            and (
                message.additional_kwargs.get(UNTRUSTED) is True
                or (message.name is not None and self.is_untrusted(message.name))
            )
            for message in messages
        )

    async def assess(
        self, name: str, arguments: Mapping[str, Any], caller: Caller, call_id: str
    ) -> Assessment:
        """What code says of a call, of a registered tool or of any other of LangChain's.

        Raises:
            InvalidRequest: there is no such tool, or it does not take these arguments as they are.
            LearningError: it cannot be tried.
        """
        if self._executor.registry.get(name) is not None:
            return await self._executor.assess(
                name,
                arguments,
                caller.identity,
                caller.tainted,
                thread_id=caller.thread_id,
                tool_call_id=call_id,
            )
        if name not in caller.written:
            self._check_taken(name, arguments)
        is_written = name in caller.written and name not in self.risks
        return judged(
            self._executor.policy,
            Appraisal(risk=Risk.READ if is_written else self.risks.get(name, Risk.WRITE)),
            tool=name,
            tool_version="1",
            target="",
            kind="action",
            arguments=dict(arguments),
            identity=caller.identity,
            tainted=caller.tainted and not is_written,
            thread_id=caller.thread_id,
            tool_call_id=call_id,
            rights=()
            if name in caller.written
            else None,  # those of what its code calls, checked when it runs
        )

    def _check_taken(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse a call of a tool that there is not, or with arguments that it would not get as they are."""
        tool = self.by_name.get(name)
        if tool is not None:
            check_taken(tool, arguments)
        elif self.were_seen:
            known = {*self.by_name, *(spec.name for spec in self._executor.registry)}
            raise InvalidRequest(f"there is no tool {name!r}; known are {', '.join(sorted(known))}")

    def normal(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as they are bound: those of registered tools with their defaults."""
        spec = self._executor.registry.get(name)
        if spec is None:
            return dict(arguments)
        try:
            return spec.checked(arguments).model_dump(mode="json")
        except InvalidRequest:
            return dict(arguments)

    def schema(self, name: str) -> dict[str, Any]:
        """JSON schema of the arguments of a tool; empty where it is not known."""
        spec = self._executor.registry.get(name)
        if spec is not None:
            return spec.arguments.model_json_schema()
        model = _model_of(self.by_name.get(name))
        return model.model_json_schema() if model is not None else {}

    def check_edit(self, approval: Approval, arguments: Mapping[str, Any]) -> None:
        """Refuse edited arguments that a LangChain tool seen by this process does not take.

        Raises:
            InvalidRequest: they do not fit.
        """
        tool = self.by_name.get(approval.tool)
        if tool is not None and self._executor.registry.get(approval.tool) is None:
            check_taken(tool, arguments)


def _model_of(tool: BaseTool | None) -> type[BaseModel] | None:
    """The type of a tool's arguments, as the model is told of them; `None` where there is none."""
    schema = tool.tool_call_schema if tool is not None else None
    return schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
