"""LearningMachine: assembles stores, recall, recording, learning and tools around one database."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

from langchain_core.documents import BaseDocumentCompressor
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool

from agent import telemetry
from agent.database.opening import open_database, queue_url
from agent.database.protocol import Begun, Database, checked_id, somebody
from agent.database.supabase import SupabaseDatabase
from agent.errors import ConfigurationError, IdentityError, InvalidLearning, LearningError
from agent.events import emit
from agent.identity import Identity
from agent.jobs import DEFAULT_QUEUE
from agent.learning import models
from agent.learning.embedding import Embedder
from agent.learning.in_process_worker import shared_worker
from agent.learning.learner import Learner
from agent.learning.recorder import Recorder
from agent.learning.reranking import CANDIDATES, Reranker, reranker_of
from agent.learning.run_identity import resolve_identity
from agent.learning.run_record import OpenRun, kept_in
from agent.learning.run_seal import RunSeal
from agent.learning.run_watch import ambient_run
from agent.portal import forget_in_forked_child, portal
from agent.settings import Settings, current_settings
from agent.stores.base import Store, is_blank
from agent.stores.conversation import ConversationConfig, ConversationStore
from agent.stores.session_context import SessionContextConfig, SessionContextStore
from agent.stores.user_memory import UserMemoryConfig, UserMemoryStore
from agent.stores.user_profile import UserProfileConfig, UserProfileStore

if TYPE_CHECKING:
    from agent.learning.learning_middleware import LearningMiddleware

_RECORDING_UNWAITED_MAX = 64
"""Runs of a machine on their way to the database before answers wait: what a killed process could lose."""
_ANSWER_FIRST = timedelta(milliseconds=2)
"""How long a run that was handed over lets its answer go out first."""
StoreName = Literal["user_profile", "user_memory", "session_context", "conversation"]
_STORE_NAMES = get_args(StoreName)


class LearningMachine:
    """What an agent knows and how it learns.

    Everything is made at first use: constructing one does no I/O. One machine serves any number of agents, threads and
    event loops.

    Args:
        user_profile: `True` for the defaults, `False` for none, or its config.
        user_memory: as `user_profile`.
        session_context: as `user_profile`.
        conversation: as `user_profile`; what was said, word for word.
        model: chat model that extracts, as an object or LangChain's `provider:model`. `None`: as the settings say.
        embeddings: embedder, likewise.
        reranker: LangChain document compressor that puts what was found into a better order, as an object or
            `module:object`. `None`: as the settings say.
        settings: instead of those of the environment.
        database: instead of the one the settings name.
        **absent: stores that this version does not have may be switched off by name.
        agent_id: name of the agent in records, and of its queue. `None`: the graph's own name, in the common queue.

    Raises:
        ConfigurationError: an argument of the wrong type, or settings that cannot be.
    """

    def __init__(
        self,
        *,
        user_profile: bool | UserProfileConfig = True,
        user_memory: bool | UserMemoryConfig = True,
        session_context: bool | SessionContextConfig = True,
        conversation: bool | ConversationConfig = True,
        model: str | BaseChatModel | None = None,
        embeddings: str | Embeddings | None = None,
        reranker: str | BaseDocumentCompressor | None = None,
        settings: Settings | None = None,
        database: Database | None = None,
        agent_id: str | None = None,
        **absent: bool,
    ) -> None:
        _check_absent(absent)
        _check_type("settings", settings, (Settings,))
        _check_agent_id(agent_id)
        self.settings = settings or current_settings()
        self.agent_id = agent_id
        self.stores: tuple[Store, ...] = tuple(
            store
            for store in (
                _store("user_profile", user_profile, UserProfileConfig, UserProfileStore),
                _store("user_memory", user_memory, UserMemoryConfig, UserMemoryStore),
                _store("session_context", session_context, SessionContextConfig, SessionContextStore),
                _store("conversation", conversation, ConversationConfig, ConversationStore),
            )
            if store is not None
        )
        self.queue = queue_of(agent_id, self.stores)
        _check_type("model", model, (str, BaseChatModel))
        _check_type("embeddings", embeddings, (str, Embeddings))
        _check_type("reranker", reranker, (str, BaseDocumentCompressor))
        self._model_named: str | BaseChatModel | None = (
            model if model is not None else self.settings.extraction_model
        )
        self._embeddings_named: str | Embeddings | None = (
            embeddings if embeddings is not None else self.settings.embedding_model
        )
        self._reranker_named = reranker if reranker is not None else self.settings.reranker
        if self._model_named == "none":
            self._model_named = None
        if self._embeddings_named == "none":
            self._embeddings_named = None
        self.database: Database = database if database is not None else open_database(self.settings)
        self.start_anew()
        forget_in_forked_child(self)
        self._seal: RunSeal | None = None
        self._own_seal = RunSeal(None)
        _living.add(self)

    def start_anew(self) -> None:
        """Be as at first use; also in a forked child, where all that is open is the parent's."""
        self._recorder: Recorder | None = None
        self._embedder: Embedder | None = None
        self._embedder_lock = asyncio.Lock()
        self._reranker: Reranker | None = None
        self._worker = shared_worker(self, (_sameness(self._model_named), _sameness(self._embeddings_named)))
        self._learner = Learner(
            self.database,
            self.settings,
            stores=self.stores,
            limits=self.limits,
            model=self._model_named,
            ready_embedder=self.ready_embedder,
            worker=self._worker,
        )
        self.in_use = False
        self._recording: set[concurrent.futures.Future[bool]] = set()

    # What an agent gets

    def middleware(self) -> LearningMiddleware:
        """The middleware for `create_agent`."""
        from agent.learning.learning_middleware import LearningMiddleware

        return LearningMiddleware(self)

    def wrap(self, graph: Any, **options: Any) -> Any:
        """The graph with learning around it: see `with_learning`."""
        from agent.learning.learning_graph import with_learning

        return with_learning(graph, self, **options)

    @property
    def tools(self) -> list[BaseTool]:
        """The tools of the stores in AGENTIC mode; the middleware adds them by itself."""
        return [tool for store in self.stores for tool in store.tools(self._write_by_tool)]

    @property
    def limits(self) -> dict[str, int]:
        """Greatest number of memories by store."""
        return {name: limit for store in self.stores for name, limit in store.limits().items()}

    # The request path; all of it runs in the portal

    @property
    def claimed_identity(self) -> Identity | None:
        """Whom the database takes every caller for, where it is reached with one user's access token."""
        return self.database.claimed_identity if isinstance(self.database, SupabaseDatabase) else None

    @property
    def seal(self) -> RunSeal:
        """Seals the runs in graph states; the same in every process on this database."""
        if self._seal is None:
            secret = self.database.secret()
            if secret is None:
                return self._own_seal  # not started yet: good for this process
            self._seal = RunSeal(secret, self._own_seal)
        return self._seal

    def run_of(self, state: Any) -> OpenRun | None:
        """The run in a graph's state; `None` for nobody's, and for one that we did not seal."""
        run = OpenRun.from_state(state, self.seal) if kept_in(state) else None
        if run is not None and not run.nested:
            telemetry.reopen_run(run.identity, run.run_id, run.traceparent)
        return run

    async def arun_of(self, state: Any) -> OpenRun | None:
        """The async form of `run_of`."""
        if kept_in(state):
            await self.ready_seal()
        return self.run_of(state)

    async def ready_seal(self) -> None:
        """Let `seal` be that of all processes on this database, where the database can be asked."""
        if self._seal is None:
            with suppress(
                LearningError
            ):  # whoever needs it says so; until then what is sealed holds in this process
                await self.database.prepare()

    @property
    def recorder(self) -> Recorder:
        """Recall and record, without vectors until the embedder is ready."""
        if self._recorder is None:
            self._recorder = Recorder(
                self.database,
                self.settings,
                stores=[store.name for store in self.stores],
                queue=self.queue,
                embedder=self._embedder,
                reranker=self._reranker,
                delivered=self._worker.recorded,
            )
        return self._recorder

    def begin_recall(self, identity: Identity, question: str) -> Begun | None:
        """See `Recorder.begin_recall`."""
        return None if self._embeddings_named is not None else self.recorder.begin_recall(identity, question)

    async def recall(self, identity: Identity, question: str, begun: Begun | None = None) -> Any:
        """See `Recorder.recall`."""
        await self.ready_embedder()
        await self.ready_reranker()
        return await self.recorder.recall(identity, question, begun)

    async def record(self, identity: Identity, run: dict[str, Any]) -> bool:
        """See `Recorder.record`; a small worker learns it later where no other does."""
        self._use()
        recorded = await self.recorder.record(identity, run)
        if run["status"] == "completed" and identity.is_somebody:
            await self._worker.recorded(identity)
        return recorded

    def record_later(
        self, identity: Identity, run: dict[str, Any], *, rest: timedelta = timedelta(0)
    ) -> concurrent.futures.Future[bool]:
        """Record a run whether or not the caller waits for it; `drain` and the end of the process do.

        Args:
            identity: whose it is.
            run: what `record_run` takes.
            rest: how long recording leaves the interpreter to others before it begins.
        """
        telemetry.close_run(run["run_id"], run["status"])
        self._use()
        self._worker.register()
        future = portal().submit(self._record_after(rest, identity, run))
        self._recording.add(future)
        future.add_done_callback(self._recording.discard)
        return future

    async def _record_after(self, rest: timedelta, identity: Identity, run: dict[str, Any]) -> bool:
        if rest:
            await asyncio.sleep(rest.total_seconds())
        return await self.record(identity, run)

    def _hand_over(self, identity: Identity, run: dict[str, Any]) -> concurrent.futures.Future[bool]:
        # One interpreter serves both: without the rest the record would be written while the answer waits for it.
        rest = timedelta(0) if self.settings.durable_runs else _ANSWER_FIRST
        return self.record_later(identity, run, rest=rest)

    def finish(self, identity: Identity, run: dict[str, Any]) -> None:
        """`record_later` at the end of a run, whose answer waits for it only where it should: with `durable_runs`, or
        when the database takes runs more slowly than they come."""
        recording = self._hand_over(identity, run)
        if self._must_wait:
            recording.result()

    async def afinish(self, identity: Identity, run: dict[str, Any]) -> None:
        """The async form of `finish`."""
        recording = self._hand_over(identity, run)
        if self._must_wait:
            # Shielded: who gives up waiting now must not take the finished run with them.
            await asyncio.shield(asyncio.wrap_future(recording))

    @property
    def _must_wait(self) -> bool:
        return self.settings.durable_runs or len(self._recording) > _RECORDING_UNWAITED_MAX

    async def recorded_all(self) -> None:
        """Wait until everything handed to `record_later` is recorded or spooled."""
        while self._recording:
            await asyncio.gather(*(asyncio.wrap_future(future) for future in list(self._recording)))

    async def ready_embedder(self) -> Embedder | None:
        """The embedder, made at first use; `None` where there is none, or none can be made."""
        if self._embedder is not None or self._embeddings_named is None:
            return self._embedder
        async with self._embedder_lock:
            if self._embedder is None and self._embeddings_named is not None:
                named = self._embeddings_named
                try:
                    made = await asyncio.to_thread(models.embedder, named, self.settings)
                except ConfigurationError as error:
                    emit("embedding_failed", model=str(named), reason=str(error))
                    self._embeddings_named = None
                    return None
                self._embedder = Embedder(
                    made, name=embedder_name(named), timeout=self.settings.embedding_timeout
                )
                self._recorder = None
            return self._embedder

    async def ready_reranker(self) -> Reranker | None:
        """The reranker, made at first use; `None` where there is none, or none can be made."""
        if self._reranker is not None or self._reranker_named is None:
            return self._reranker
        named = self._reranker_named
        try:
            compressor = await asyncio.to_thread(reranker_of, named)
        except ConfigurationError as error:
            emit("reranking_failed", reranker=str(named), reason=str(error))
            self._reranker_named = None
            return None
        if self._reranker is None:
            self._reranker = Reranker(compressor, timeout=self.settings.reranker_timeout)
            self._recorder = None
        return self._reranker

    async def _write_by_tool(self, runtime: Any, learnings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write what an agent's tool says, as evidence of its own call; return the receipts."""
        run = await self.arun_of(getattr(runtime, "state", None))
        config: RunnableConfig = getattr(runtime, "config", None) or RunnableConfig()
        ambient = ambient_run.get()
        if run is not None:
            identity = run.identity.with_(run_id=run.run_id)
        elif ambient is not None:
            identity = ambient.identity.with_(run_id=ambient.run_id)
        else:
            identity = resolve_identity(
                self.settings, config, runtime, agent_id=self.agent_id, claimed=self.claimed_identity
            )
        if not identity.is_somebody:
            raise IdentityError(
                "nothing can be remembered for nobody: pass context={'user_id': …} or "
                "config={'configurable': {'user_id': …}} when the agent is called"
            )
        evidence = (
            [{"run_id": identity.run_id, "tool_call_id": getattr(runtime, "tool_call_id", None) or ""}]
            if identity.run_id
            else []
        )
        receipts: list[dict[str, Any]] = await self.database.call(
            "upsert_learnings",
            identity,
            learnings=[learning | {"evidence": evidence} for learning in learnings],
            limits=self.limits,
        )
        return receipts

    # Learning; called by workers

    async def learn_session(self, identity: Identity) -> int:
        """Learn all runs of a session that wait: each exactly once, whoever else tries at the same time.

        Returns:
            How many runs were learned.

        Raises:
            ModelError: the model gave nothing usable; the runs go on waiting.
            ConflictError: others wrote without a pause meanwhile; likewise.
            DatabaseUnavailable: likewise.
        """
        return await portal().run(self._learner.learn_session(identity))

    async def embed_memories(self, identity: Identity, *, scope: str = "user") -> int:
        """Give the memories of a scope vectors where they have none of this model, the newest first.

        A text for which the embedder has no usable vector goes without, and the event `embedding_failed` says so.

        Args:
            identity: whose memories; scope `tenant` needs no user.
            scope: `user`, or `agent` or `tenant`: what discovery learned is the tenant's.

        Returns:
            How many got one.

        Raises:
            ModelError: the embedder failed; what was embedded before is kept.
        """
        return await self._learner.embed_memories(identity, scope)

    # The storage operations

    async def get_learning(self, memory_id: str, *, identity: Identity) -> dict[str, Any] | None:
        """One memory with its versions and evidence, or `None` where this identity has none of that id."""
        return await self.database.get_learning(memory_id, identity=identity)

    async def get_learnings(
        self,
        *,
        identity: Identity,
        store: StoreName | None = None,
        kind: str | None = None,
        field: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Current memories, newest first; turns of conversations only with `store="conversation"`, for they would hide
        all else. At most 10,000 at once."""
        self._check_store(store)
        return await self.database.get_learnings(
            identity=identity, store=store, kind=kind, field=field, limit=limit, offset=offset
        )

    async def upsert_learning(
        self,
        *,
        identity: Identity,
        store: StoreName,
        content: Any,
        field: str | None = None,
        kind: str | None = None,
        memory_id: str | None = None,
        expected_version: int | None = None,
        evidence: Sequence[Mapping[str, str]] = (),
    ) -> dict[str, Any]:
        """Write one memory: a new one, a new version of `memory_id`, or the value of a profile `field`.

        Args:
            identity: whose it is.
            store: which store.
            content: the text; for a profile field a value of its type, `None` to clear it.
            field: profile or session field; needed there, refused elsewhere.
            kind: type of a user memory; default the first of its `memory_types`, or that of the memory to change.
            memory_id: memory to change; it must exist.
            expected_version: the version that was read; another one raises.
            evidence: `{run_id, message_id?, tool_call_id?, quote?}` each.

        Returns:
            The receipt: `status` (`created`, `updated`, `unchanged`, `retired`, `absent`), `memory_id`, `version`, ….

        Raises:
            InvalidLearning: the value does not fit the store.
            NotFound: no such memory of this identity.
            ConflictError: it is at another version.
        """
        somebody(identity)
        operation = self._operation(store, content, field=field, kind=kind, identity=identity)
        if memory_id is not None and kind is None:
            operation.pop("kind", None)
        more = {"memory_id": memory_id and checked_id(memory_id), "expected_version": expected_version}
        operation |= {name: value for name, value in more.items() if value is not None}
        return await self.database.upsert_learning(
            operation | {"evidence": [dict(item) for item in evidence]},
            identity=identity,
            memory_limit=self.limits.get(store),
        )

    def _check_store(self, name: str | None) -> None:
        if name is not None and name not in _STORE_NAMES:
            raise InvalidLearning(f"store={name!r} is no store; there are {', '.join(_STORE_NAMES)}")

    def _operation(
        self, name: str, content: Any, *, field: str | None, kind: str | None, identity: Identity
    ) -> dict[str, Any]:
        store = next((store for store in self.stores if store.name == name), None)
        if store is None:
            raise InvalidLearning(
                f"store={name!r} is not enabled; enabled are {[s.name for s in self.stores]}"
            )
        if isinstance(store, UserProfileStore):
            if field is None:
                raise InvalidLearning("store='user_profile' needs a field=")
            return store.change(field, content, trust="user", source="api")
        if not isinstance(content, str) or is_blank(content):
            raise InvalidLearning(f"content={content!r} of store={name!r} must be text that is not empty")
        operation = {
            "action": "write",
            "store": name,
            "content": content.strip(),
            "trust": "user",
            "source": "api",
        }
        if isinstance(store, SessionContextStore):
            if field not in store.fields or identity.session_id is None:
                raise InvalidLearning(
                    f"store='session_context' needs a session_id in the identity and a field of {list(store.fields)};"
                    f" field={field!r}, session_id={identity.session_id!r}"
                )
            return operation | {"field": field, "session_id": identity.session_id}
        if field is not None:
            raise InvalidLearning(f"field={field!r}: store={name!r} has no fields")
        if isinstance(store, ConversationStore):
            raise InvalidLearning(
                "store='conversation' holds what was said; semantic_search.add_conversation takes messages"
            )
        if isinstance(store, UserMemoryStore):
            if kind is not None and kind not in store.config.memory_types:
                raise InvalidLearning(f"kind={kind!r} is none of memory_types={store.config.memory_types!r}")
            operation["kind"] = kind or store.config.memory_types[0]
        return operation

    async def delete_learning(self, memory_id: str, *, identity: Identity) -> bool:
        """Delete one memory for good with all its versions. `False`: this identity has none of that id."""
        return await self.database.delete_learning(memory_id, identity=identity)

    async def delete_learnings(self, memory_ids: Sequence[str], *, identity: Identity) -> int:
        """Delete these memories for good; ids this identity does not have are passed over. Returns how many went."""
        return await self.database.delete_learnings(memory_ids, identity=identity)

    async def clear_learnings(self, *, identity: Identity, store: StoreName | None = None) -> int:
        """Delete all memories of an identity for good, of one store or of all. Returns how many went."""
        self._check_store(store)
        return await self.database.clear_learnings(identity=identity, store=store)

    async def search(
        self,
        question: str,
        *,
        identity: Identity,
        limit: int = 5,
        scope: str = "user",
        filters: Mapping[str, Any] | None = None,
        as_of: str | None = None,
        rerank: bool = True,
    ) -> list[dict[str, Any]]:
        """The memories of a scope that fit a question best, each with its scores; empty where none does.

        Args:
            question: what to look for.
            identity: who asks; scope `tenant` needs no user.
            limit: at most so many, up to 200.
            scope: `user`, or for servers `agent` and `tenant`: what discovery learned is the tenant's.
            filters: as `match_memories` takes them; `SemanticSearch` has them as arguments.
            as_of: what was believed at that time (ISO 8601); `None` is now.
            rerank: whether the reranker, where there is one, decides the order.
        """
        if scope == "user":
            somebody(identity)

        async def match() -> list[dict[str, Any]]:
            embedder = await self.ready_embedder()
            reranker = await self.ready_reranker() if rerank else None
            vector: dict[str, Any] = {}
            if embedder is not None and (embedded := await embedder.embed_question(question)):
                vector = {"question_embedding": embedded, "embedding_model": embedder.name}
            found: list[dict[str, Any]] = await self.database.call(
                "match_memories",
                identity,
                question=question,
                memory_limit=limit if reranker is None else max(limit, CANDIDATES),
                the_scope=scope,
                filters=dict(filters or {}),
                as_of=as_of,
                **vector,
            )
            return found if reranker is None else (await reranker.rerank(question, found))[:limit]

        return await portal().run(match())

    # Life

    async def queue_url(self) -> str:
        """Address of the Postgres that holds the queue, for workers.

        Raises:
            ConfigurationError: only Supabase's web address is known; workers need a Postgres connection.
        """
        return await queue_url(self.database)

    async def start_worker(self) -> None:
        """Start the worker of this process now rather than at the first run, where `settings.worker` wants one."""
        self._use()
        await portal().run(self._worker.start())

    async def drain(self, timeout: timedelta | float | None = None) -> bool:
        """Wait until everything this process recorded is in the database and learned, without waiting for quiet.

        Args:
            timeout: longest wait, as a number in seconds; `None` is one minute.

        Returns:
            Whether all of it is learned.
        """
        return await portal().run(self._worker.drain(_duration(timeout)))

    def drain_sync(self, timeout: timedelta | float | None = None) -> bool:
        """`drain` where no event loop runs."""
        return portal().run_sync(self._worker.drain(_duration(timeout)))

    async def aclose(self) -> None:
        """Stop the worker and give back connections. What waits is learned by the next worker."""
        await portal().run(self.close_in_portal())

    async def close_in_portal(self) -> None:
        """`aclose` for code that runs in the portal already."""
        await self.recorded_all()
        if self._recorder is not None:
            await self._recorder.settled()
        self.in_use = False
        await self._worker.left_by(self)
        if not any(machine.database is self.database and machine.in_use for machine in living_machines()):
            await self.database.close()

    def _use(self) -> None:
        self.in_use = True
        self._worker.used_by(self)


_living: weakref.WeakSet[LearningMachine] = weakref.WeakSet()


def living_machines() -> list[LearningMachine]:
    """The machines of this process that are in use."""
    return list(_living)


def _duration(timeout: timedelta | float | None) -> timedelta:
    if timeout is None:
        return timedelta(minutes=1)
    return timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)


def queue_of(agent_id: str | None, stores: Sequence[Store] = ()) -> str:
    """Name of the queue of an agent, or of all agents without a name whose stores are set alike: what one of them
    records, another would learn otherwise. At most 40 bytes, for Postgres limits the channel that is made from it."""
    if agent_id is not None:
        return f"{DEFAULT_QUEUE}-{hashlib.sha256(agent_id.encode()).hexdigest()[:16]}"
    settings = repr([store.config for store in stores])
    default = repr([UserProfileConfig(), UserMemoryConfig(), SessionContextConfig(), ConversationConfig()])
    if not stores or settings == default:
        return DEFAULT_QUEUE
    return f"{DEFAULT_QUEUE}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def _sameness(named: object) -> object:
    """What tells two models apart: a name, or the object itself."""
    return named if isinstance(named, str) or named is None else id(named)


def embedder_name(named: str | Embeddings) -> str:
    """How vectors of an embedder are labelled: `provider:model`, or class and model of an object."""
    if isinstance(named, str):
        return named
    model = getattr(named, "model", None) or getattr(named, "model_name", None) or ""
    return f"{type(named).__name__}:{model}" if model else type(named).__name__


def _store(name: str, given: Any, config: type, store: type) -> Any:
    if given is False:
        return None
    if given is True:
        return store(config())
    if not isinstance(given, config):
        raise ConfigurationError(f"{name}={given!r} must be True, False or a {config.__name__}")
    return store(given)


_STORES_TO_COME = ("entity_memory", "learned_knowledge", "decision_log", "feedback")


def _check_absent(absent: Mapping[str, object]) -> None:
    for name, value in absent.items():
        if name not in _STORES_TO_COME:
            raise TypeError(f"LearningMachine got an unexpected keyword argument {name!r}")
        if value is not False:
            raise ConfigurationError(
                f"{name}={value!r}: this version has no such store, only {', '.join(_STORE_NAMES)}"
            )


def _check_type(name: str, value: Any, allowed: tuple[type, ...]) -> None:
    if value is not None and not isinstance(value, allowed):
        raise ConfigurationError(
            f"{name}={value!r} must be one of {', '.join(t.__name__ for t in allowed)}, or None"
        )


def _check_agent_id(agent_id: str | None) -> None:
    try:
        Identity(agent_id=agent_id)
    except IdentityError as error:
        raise ConfigurationError(f"agent_id={agent_id!r:.100} cannot be: {error}") from None
