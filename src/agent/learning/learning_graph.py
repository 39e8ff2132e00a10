"""`with_learning`: any LangGraph graph as `load_knowledge → execute → learn`."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict, get_type_hints

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage, SystemMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Overwrite

from agent.errors import ConfigurationError
from agent.events import emit
from agent.learning.learning_middleware import with_knowledge
from agent.learning.machine import LearningMachine
from agent.learning.run_identity import resolve_identity
from agent.learning.run_record import (
    KNOWLEDGE_MESSAGE_ID,
    OpenRun,
    first_of_input,
    messages_of_run,
    now,
    question_of,
    run_as_json,
)
from agent.learning.run_watch import ambient_run, inside, status_of
from agent.portal import portal


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

    Agents inside see what is known as a leading system message, which never reaches the state; nodes that make their
    own messages read `current_knowledge()`. A graph without messages is learned from the texts in its state.

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
    checkpointer = checkpointer if checkpointer is not None else inner.checkpointer
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
        channels = inner.builder.channels
        self._has_messages = messages_key in channels
        self._keys = list(channels)
        self._reduced = {
            name for name, channel in channels.items() if isinstance(channel, BinaryOperatorAggregate)
        }

    # load_knowledge

    def load_knowledge(self, state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        """Resolve who it is and recall what is known."""
        begun = self._begin(state, config)
        if isinstance(begun, dict):
            return begun
        return {
            "learning_run": portal()
            .run_sync(with_knowledge(self.machine, begun, self._question(state)))
            .as_state(self.machine.seal)
        }

    async def aload_knowledge(self, state: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        """The async form of `load_knowledge`."""
        begun = self._begin(state, config)
        if isinstance(begun, dict):
            return begun
        known = await portal().run(with_knowledge(self.machine, begun, self._question(state)))
        return {"learning_run": known.as_state(self.machine.seal)}

    def _begin(self, state: dict[str, Any], config: RunnableConfig) -> OpenRun | dict[str, Any]:
        around = ambient_run.get()
        if around is not None:
            return {"learning_run": replace(around, nested=True).as_state(self.machine.seal)}
        runtime = get_runtime()
        name = self.inner.name if self.inner.name != "LangGraph" else None
        identity = resolve_identity(
            self.machine.settings,
            config,
            runtime,
            agent_id=self.machine.agent_id or name,
            claimed=self.machine.claimed_identity,
        )
        if not identity.is_somebody:
            emit(
                "run_skipped",
                reason="nobody: no user_id in context or configurable",
                agent_id=identity.agent_id,
            )
            return {"learning_run": {}}
        run_id = getattr(runtime.execution_info, "run_id", None) or uuid.uuid4()
        return OpenRun(
            identity=identity,
            run_id=str(run_id),
            started_at=now(),
            first_message_id=first_of_input(state.get(self.messages_key) or [])
            if self._has_messages
            else None,
            knowledge="",
        )

    def _question(self, state: Mapping[str, Any]) -> str:
        if self._has_messages:
            return question_of(state.get(self.messages_key) or [])
        return _texts(state, self._keys)

    # execute

    def execute(
        self, state: dict[str, Any], config: RunnableConfig, invoke: Callable[..., Any]
    ) -> dict[str, Any]:
        """Run the graph with what is known."""
        run = OpenRun.from_state(state, self.machine.seal)
        given = self._given(state, run)
        if run is None:
            return self._changes(given, invoke(given, config, output_keys=self._keys))
        try:
            with inside(run):
                result = invoke(given, config, output_keys=self._keys)
        except BaseException as error:  # recorded as it ended, and raised on, interrupts included
            self._ended_early(state, run, error)
            raise
        return self._changes(given, result)

    async def aexecute(
        self, state: dict[str, Any], config: RunnableConfig, invoke: Callable[..., Awaitable[Any]]
    ) -> dict[str, Any]:
        """The async form of `execute`."""
        run = OpenRun.from_state(state, self.machine.seal)
        given = self._given(state, run)
        if run is None:
            return self._changes(given, await invoke(given, config, output_keys=self._keys))
        try:
            with inside(run):
                result = await invoke(given, config, output_keys=self._keys)
        except BaseException as error:  # recorded as it ended, and raised on, interrupts included
            self._ended_early(state, run, error)
            raise
        return self._changes(given, result)

    def _given(self, state: Mapping[str, Any], run: OpenRun | None) -> dict[str, Any]:
        given = {name: state[name] for name in self._keys if name in state}
        if run is not None and run.knowledge and self._has_messages:
            known = SystemMessage(run.knowledge, id=KNOWLEDGE_MESSAGE_ID)
            given[self.messages_key] = [known, *(given.get(self.messages_key) or [])]
        return given

    def _changes(self, given: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """What the graph changed, as updates that this graph's reducers turn into its result."""
        changes: dict[str, Any] = {}
        for name, value in result.items():
            before = given.get(name)
            if name == self.messages_key and name in self._reduced and _are_messages(value):
                if updates := _message_updates(before or [], value):
                    changes[name] = updates
            elif name not in self._reduced:
                changes[name] = value
            elif isinstance(value, list) and isinstance(before, list) and value[: len(before)] == before:
                if len(value) > len(before):
                    changes[name] = value[len(before) :]
            elif value != before:
                changes[name] = Overwrite(value)
        return changes

    def _ended_early(self, state: Mapping[str, Any], run: OpenRun, error: BaseException) -> None:
        if run.nested:
            return
        status = status_of(error)
        record = run_as_json(
            run, status, self._messages(state, run), error=None if status == "interrupted" else error
        )
        self.machine.record_later(run.identity, record)

    # learn

    def learn(self, state: dict[str, Any]) -> None:
        """Record the finished run; a worker learns from it later."""
        if (ended := self._ended(state)) is not None:
            portal().run_sync(self.machine.record(*ended))

    async def alearn(self, state: dict[str, Any]) -> None:
        """The async form of `learn`."""
        if (ended := self._ended(state)) is not None:
            await portal().run(self.machine.record(*ended))

    def _ended(self, state: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        run = OpenRun.from_state(state, self.machine.seal)
        if run is None or run.nested:
            return None
        return run.identity, run_as_json(run, "completed", self._messages(state, run, ended=True))

    def _messages(
        self, state: Mapping[str, Any], run: OpenRun, *, ended: bool = False
    ) -> Sequence[BaseMessage]:
        if self._has_messages:
            return messages_of_run(state.get(self.messages_key) or [], run.first_message_id)
        asked = list(self.inner.builder.schemas[self.inner.builder.input_schema])
        answered = [
            name for name in self.inner.builder.schemas[self.inner.builder.output_schema] if name not in asked
        ]
        said: list[BaseMessage] = [HumanMessage(_texts(state, asked), id=f"{run.run_id}-input")]
        if ended and (text := _texts(state, answered)):
            said.append(AIMessage(text, id=f"{run.run_id}-output"))
        return said


def _texts(state: Mapping[str, Any], names: Sequence[str]) -> str:
    """The texts among some values of a state, a line each."""
    return "\n".join(value for name in names if isinstance(value := state.get(name), str) and value.strip())


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, BaseMessage) for item in value)


def _message_updates(before: Sequence[BaseMessage], after: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The messages to add or replace and the removals that turn one list into the other; knowledge is left out."""
    old = {message.id: message for message in before if message.id != KNOWLEDGE_MESSAGE_ID}
    new = {message.id: message for message in after if message.id != KNOWLEDGE_MESSAGE_ID}
    removed: list[BaseMessage] = [
        RemoveMessage(id=gone) for gone in old if gone is not None and gone not in new
    ]
    return removed + [message for message_id, message in new.items() if old.get(message_id) != message]
