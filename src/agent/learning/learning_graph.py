"""`with_learning`: any LangGraph graph as `load_knowledge → execute → learn`."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict, get_type_hints

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.channels import BinaryOperatorAggregate, DeltaChannel
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Overwrite

from agent.errors import ConfigurationError
from agent.learning.machine import LearningMachine
from agent.learning.run_opening import open_run, with_knowledge
from agent.learning.run_record import (
    KNOWLEDGE_MESSAGE_ID,
    OpenRun,
    as_messages,
    messages_of_run,
    run_as_json,
)
from agent.learning.run_watch import ambient_run, inside, status_of
from agent.portal import portal

_ASKED_CHARACTERS_MAX = 20_000


class _Learning(TypedDict):
    """The private part of the state."""

    learning_run: NotRequired[dict[str, Any]]


def current_knowledge() -> str:
    """What is known in the run around this code, rendered for a prompt; empty where nothing is.

    For nodes of a graph inside `with_learning` that make their own messages, and for tools of a learning agent.
    """
    run = ambient_run.get()
    return run.knowledge if run is not None else ""


def with_learning(
    graph: StateGraph[Any, Any, Any, Any] | CompiledStateGraph[Any, Any, Any, Any],
    machine: LearningMachine | None = None,
    *,
    messages_key: str = "messages",
    checkpointer: Any = None,
    store: Any = None,
    **options: Any,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The graph as node `execute` between `load_knowledge` and `learn`, with the same input, output and state.

    Agents inside see what is known as a leading system message, which is in neither the result nor the history of a
    thread; nodes that make their own messages read `current_knowledge()`. A graph without messages is learned from the
    texts in its state.

    Args:
        graph: a `StateGraph`, compiled or not. Checkpointer and store of a compiled one are taken over.
        machine: what to learn and where; `None` makes one of the keywords.
        messages_key: the key of the state that holds the messages.
        checkpointer: for the new graph, instead of that of a compiled one.
        store: likewise.
        **options: the keywords of `LearningMachine`, where no machine is given.

    Raises:
        ConfigurationError: it is no `StateGraph`, its state has no keys, or it has `learning_run` already.
        TypeError: a machine and keywords at once.
    """
    if machine is not None and options:
        raise TypeError(f"with_learning takes a machine or its keywords, not both: {', '.join(options)}")
    inner = graph.compile() if isinstance(graph, StateGraph) else graph
    if not isinstance(inner, CompiledStateGraph):
        raise ConfigurationError(f"with_learning(graph={graph!r}) must be a StateGraph, compiled or not")
    builder = inner.builder
    if "__root__" in builder.channels:
        raise ConfigurationError(
            "with_learning needs a state with keys; this graph's state is a single value"
        )
    if "learning_run" in builder.channels:
        raise ConfigurationError("this graph learns already: its state has the key 'learning_run'")
    if checkpointer is None and not isinstance(
        inner.checkpointer, bool
    ):  # a bool is for graphs inside others
        checkpointer = inner.checkpointer
    store = store if store is not None else inner.store
    steps = _Steps(
        inner.copy(update={"checkpointer": None, "store": None}),
        machine or LearningMachine(**options),
        messages_key=messages_key,
    )
    outer = StateGraph(
        builder.state_schema,
        context_schema=builder.context_schema,
        input_schema=builder.input_schema,
        output_schema=builder.output_schema,
    )
    make_type: Any = TypedDict  # its keys are known only now
    everything = make_type(
        "everything", {**dict.fromkeys(builder.channels, Any), **get_type_hints(_Learning)}, total=False
    )
    run = steps.inner

    # LangGraph finds a subgraph by what a node's function refers to: so Studio can show it and its state.
    def execute(state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        return steps.execute(state, config, run.invoke)

    async def aexecute(state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        return await steps.aexecute(state, config, run.ainvoke)

    for name, sync, asynchronous in (
        ("load_knowledge", steps.load_knowledge, steps.aload_knowledge),
        ("execute", execute, aexecute),
        ("learn", steps.learn, steps.alearn),
    ):
        node: Any = RunnableLambda(sync, afunc=asynchronous, name=name)
        outer.add_node(name, node, input_schema=everything)
    outer.add_edge(START, "load_knowledge")
    outer.add_edge("load_knowledge", "execute")
    outer.add_edge("execute", "learn")
    outer.add_edge("learn", END)
    compiled = outer.compile(checkpointer=checkpointer, store=store, name=inner.name)
    return compiled.with_config(inner.config) if inner.config else compiled


class _Steps:
    """The three nodes, each in both forms."""

    def __init__(
        self, inner: CompiledStateGraph[Any, Any, Any, Any], machine: LearningMachine, *, messages_key: str
    ) -> None:
        self.inner = inner
        self.machine = machine
        self.messages_key = messages_key
        self._channels = inner.builder.channels
        self._has_messages = messages_key in self._channels
        self._keys = list(self._channels)

    # load_knowledge

    def load_knowledge(self, state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        """Resolve who it is and recall what is known."""
        opened = self._open(state, config)
        if opened is None or opened[0].nested:
            return self._not_own(opened)
        known = portal().run_sync(with_knowledge(self.machine, *opened))
        return {"learning_run": known.as_state(self.machine.seal)}

    async def aload_knowledge(self, state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        """The async form of `load_knowledge`."""
        opened = self._open(state, config)
        if opened is not None:
            await self.machine.ready_seal()
        if opened is None or opened[0].nested:
            return self._not_own(opened)
        known = await portal().run(with_knowledge(self.machine, *opened))
        return {"learning_run": known.as_state(self.machine.seal)}

    def _not_own(self, opened: tuple[OpenRun, str] | None) -> dict[str, Any]:
        """The state for nobody's run, or for one that an agent around this one records."""
        return {"learning_run": opened[0].as_state(self.machine.seal) if opened is not None else {}}

    def _open(self, state: Mapping[str, Any], config: RunnableConfig) -> tuple[OpenRun, str] | None:
        """The run that starts and the question for recall."""
        messages = self._history(state)
        name = self.inner.name if self.inner.name != "LangGraph" else None
        opened = open_run(self.machine, messages or [], config, get_runtime(), agent_id=name)
        if opened is None:
            return None
        run, started = opened
        if messages is not None:
            return run, started.question
        # What the run before left in the state was not said by the user now.
        left = (state.get("learning_run") or {}).get("left") or ()
        asked = "\n".join(text for text in self._texts(state) if _digest(text) not in left)
        asked = asked[:_ASKED_CHARACTERS_MAX]
        return replace(run, asked=asked, said=(f"{run.run_id}-input",)), asked

    def _history(self, state: Mapping[str, Any]) -> list[BaseMessage] | None:
        """The messages of a state, or `None` where it has none of LangChain's."""
        return as_messages(state.get(self.messages_key)) if self._has_messages else None

    def _texts(self, state: Mapping[str, Any]) -> list[str]:
        return [text for name in self._keys if isinstance(text := state.get(name), str) and text.strip()]

    # execute

    def execute(
        self, state: dict[str, Any], config: RunnableConfig, invoke: Callable[..., Any]
    ) -> dict[str, Any]:
        """Run the graph with what is known."""
        run = self.machine.run_of(state)
        given = self._given(state, run)
        if run is None:
            return self._changes(state, invoke(given, config, output_keys=self._keys))
        try:
            with inside(run):
                result = invoke(given, config, output_keys=self._keys)
        except BaseException as error:  # recorded as it ended, and raised on, interrupts included
            self._ended_early(state, run, error)
            raise
        return self._changes(state, result)

    async def aexecute(
        self, state: dict[str, Any], config: RunnableConfig, invoke: Callable[..., Awaitable[Any]]
    ) -> dict[str, Any]:
        """The async form of `execute`."""
        run = await self.machine.arun_of(state)
        given = self._given(state, run)
        if run is None:
            return self._changes(state, await invoke(given, config, output_keys=self._keys))
        try:
            with inside(run):
                result = await invoke(given, config, output_keys=self._keys)
        except BaseException as error:  # recorded as it ended, and raised on, interrupts included
            self._ended_early(state, run, error)
            raise
        return self._changes(state, result)

    def _given(self, state: Mapping[str, Any], run: OpenRun | None) -> dict[str, Any]:
        """The state for the graph, with what is known before its messages where these are LangChain's."""
        given = {name: state[name] for name in self._keys if name in state}
        history = given.get(self.messages_key) or []
        if run is not None and run.knowledge and self._has_messages and _are_messages(history):
            given[self.messages_key] = [SystemMessage(run.knowledge, id=KNOWLEDGE_MESSAGE_ID), *history]
        return given

    def _changes(self, state: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """What the graph changed, as updates that make its result of this graph's state."""
        changes: dict[str, Any] = {}
        for name, value in result.items():
            after = _without_knowledge(value) if name == self.messages_key else value
            if name not in state or after != state[name]:
                changes[name] = self._update(name, state.get(name), after)
        return changes

    def _update(self, name: str, before: Any, after: Any) -> Any:
        """An update of one key. What was appended is written as appended, where that is what the reducer does; for all
        else the reducer is passed over."""
        channel = self._channels[name]
        if not isinstance(channel, BinaryOperatorAggregate | DeltaChannel):
            return after
        reducer = getattr(channel, "operator", None)
        if reducer is add_messages and _are_messages(after) and _continues([m.id for m in after], before):
            known = {message.id: message for message in before or []}
            return [message for message in after if known.get(message.id) != message]
        if (
            reducer is operator.add
            and isinstance(after, list)
            and after[: len(before or [])] == (before or [])
        ):
            return after[len(before or []) :]
        return Overwrite(after)

    def _ended_early(self, state: Mapping[str, Any], run: OpenRun, error: BaseException) -> None:
        if run.nested:
            return
        status = status_of(error)
        record = run_as_json(
            run, status, self._messages(state, run), error=None if status == "interrupted" else error
        )
        self.machine.record_later(run.identity, record)

    # learn

    def learn(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Record the finished run; a worker learns from it later."""
        if (ended := self._ended(state, self.machine.run_of(state))) is not None:
            self.machine.finish(*ended)
        return self._left(state)

    async def alearn(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """The async form of `learn`."""
        if (ended := self._ended(state, await self.machine.arun_of(state))) is not None:
            await self.machine.afinish(*ended)
        return self._left(state)

    def _left(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """For a graph without messages: which texts are in the state now, to tell what the next run brings."""
        if self._history(state) is not None:
            return None
        kept = state.get("learning_run") or {}
        return {"learning_run": {**kept, "left": [_digest(text) for text in self._texts(state)]}}

    def _ended(self, state: Mapping[str, Any], run: OpenRun | None) -> tuple[Any, dict[str, Any]] | None:
        if run is None or run.nested:
            return None
        return run.identity, run_as_json(run, "completed", self._messages(state, run, ended=True))

    def _messages(
        self, state: Mapping[str, Any], run: OpenRun, *, ended: bool = False
    ) -> Sequence[BaseMessage]:
        history = self._history(state)
        if history is not None:
            return messages_of_run(history, run)
        said: list[BaseMessage] = [HumanMessage(run.asked, id=f"{run.run_id}-input")]
        answered = [text for text in self._texts(state) if text not in run.asked] if ended else []
        if answered:
            said.append(AIMessage("\n".join(answered), id=f"{run.run_id}-output"))
        return said


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, BaseMessage) for item in value)


def _without_knowledge(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [item for item in value if getattr(item, "id", None) != KNOWLEDGE_MESSAGE_ID]


def _continues(ids: Sequence[str | None], before: Any) -> bool:
    """Whether a list of messages with these ids is the one before with more at its end, perhaps with some replaced."""
    earlier = [message.id for message in before or []]
    return None not in ids and len(set(ids)) == len(ids) and ids[: len(earlier)] == earlier
