"""Traces by OpenTelemetry, named by its conventions for generative AI; next to nothing where no exporter is set up.

Needs OpenTelemetry's API alone: the application, or `exporting` with the extra `telemetry`, brings the SDK. No span
holds text of a message, memory, argument, result or error, and none names a user.

Names follow the package `opentelemetry-semantic-conventions` 0.66b (`gen_ai.*`), which comes with the SDK; what it has
no name for is under `learning.*`. A run's span is kept here by the run's id, because its beginning and end are seen by
different hooks, in different contexts and threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agent.events import emit
from agent.settings import telemetry_endpoint

if TYPE_CHECKING:
    from agent.identity import Identity

OPERATION: Final = "gen_ai.operation.name"
AGENT_NAME: Final = "gen_ai.agent.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
DATA_SOURCE_ID: Final = "gen_ai.data_source.id"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
ERROR_TYPE: Final = "error.type"

RUN_ID: Final = "learning.run.id"
RUN_STATUS: Final = "learning.run.status"
TOOL_RISK: Final = "learning.tool.risk"
TOOL_DECISION: Final = "learning.tool.decision"
TOOL_STATUS: Final = "learning.tool.status"
APPROVAL_ID: Final = "learning.approval.id"
APPROVAL_STATE: Final = "learning.approval.state"

_SERVICE: Final = "langchain-learning-machine"
_RUNS_MAX: Final = 10_000
"""Runs that are open at once in a process; the oldest above it end without their end being seen."""
_FLUSH_MS: Final = 5_000
_ENDED_WELL: Final = ("completed", "interrupted")
_PROVIDERS: Final = {
    "google_genai": "gcp.gemini",
    "google_vertexai": "gcp.vertex_ai",
    "azure_openai": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "bedrock_converse": "aws.bedrock",
    "mistralai": "mistral_ai",
    "xai": "x_ai",
    "ibm": "ibm.watsonx.ai",
}
"""LangChain's names of providers where the conventions have others."""

_tracer = trace.get_tracer("agent")
_propagator = TraceContextTextMapPropagator()
_runs: OrderedDict[str, _OpenRun] = OrderedDict()
_run_of_session: dict[tuple[str, str | None], str] = {}
_runs_lock = threading.Lock()


class _OpenRun(NamedTuple):
    span: Span
    session: tuple[str, str | None]


def is_on() -> bool:
    """Whether anybody collects spans: asked before anything is put together for one."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
) -> Iterator[Span]:
    """A span around a block; what the block raises sets its `error.type`, by the name of the class alone.

    Args:
        name: few different ones: an operation, and a model, tool or agent.
        attributes: those that are `None` are left out.
        kind: `CLIENT` for a call of a service elsewhere.
        parent: the context to hang it under; `None`: the current one.
    """
    if not is_on():
        yield trace.INVALID_SPAN
        return
    with _tracer.start_as_current_span(
        name,
        context=parent,
        kind=kind,
        attributes=_known(attributes),
        record_exception=False,  # with it the text of the error would go along
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            from langgraph.errors import GraphBubbleUp

            if not isinstance(error, GraphBubbleUp):  # a pause is no failure
                failed(current, type(error).__name__)
            raise


def failed(current: Span, kind: str) -> None:
    """Mark a span as failed by this kind of error."""
    current.set_attribute(ERROR_TYPE, kind)
    current.set_status(Status(StatusCode.ERROR))


def _known(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}


# --- runs -------------------------------------------------------------------------------------------------------------


def open_run(identity: Identity, run_id: str, traceparent: str = "") -> str:
    """Begin the span of a run, `invoke_agent`, under the current one; it ends with `close_run`.

    Args:
        identity: agent and session of the run.
        run_id: by which it is found again.
        traceparent: of the run's span in the process or at the time before a pause; empty where the run begins now.

    Returns:
        `traceparent` (W3C) of the span, by which the run goes on in the same trace after a pause; empty where nobody
        collects spans.
    """
    if not is_on():
        return ""
    parent = _propagator.extract({"traceparent": traceparent}) if traceparent else None
    opened = _tracer.start_span(
        f"invoke_agent {identity.agent_id}" if identity.agent_id else "invoke_agent",
        context=parent,
        attributes=_known(
            {
                OPERATION: "invoke_agent",
                AGENT_NAME: identity.agent_id,
                CONVERSATION_ID: identity.session_id,
                RUN_ID: run_id,
                "learning.run.resumed": True if traceparent else None,
            }
        ),
    )
    session = (identity.tenant_id, identity.session_id)
    with _runs_lock:
        _runs[run_id] = _OpenRun(opened, session)
        _run_of_session[session] = run_id
        oldest = next(iter(_runs)) if len(_runs) > _RUNS_MAX else None
    if oldest is not None:
        close_run(oldest, "forgotten")
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(opened))
    return carrier.get("traceparent", "")


def reopen_run(identity: Identity, run_id: str, traceparent: str) -> None:
    """Begin a span for the rest of a run that was paused, unless it is open here."""
    if traceparent and run_id not in _runs:
        open_run(identity, run_id, traceparent)


def close_run(run_id: str, status: str) -> None:
    """A run ended, or paused, with this status of its record."""
    if not _runs:
        return
    with _runs_lock:
        closing = _runs.pop(run_id, None)
        if closing is not None and _run_of_session.get(closing.session) == run_id:
            del _run_of_session[closing.session]
    if closing is None:
        return
    closing.span.set_attribute(RUN_STATUS, status)
    if status not in _ENDED_WELL:
        failed(closing.span, status)
    closing.span.end()


def around(identity: Identity, run_id: str | None = None) -> Context | None:
    """The context inside an open run, to hang spans under; `None` where it is not open here. An identity whose run
    nobody has numbered is taken for the newest run of its session."""
    if not _runs:
        return None
    run_id = run_id or identity.run_id
    if run_id is None and identity.session_id is not None:
        run_id = _run_of_session.get((identity.tenant_id, identity.session_id))
    opened = _runs.get(run_id) if run_id is not None else None
    return trace.set_span_in_context(opened.span) if opened is not None else None


@contextmanager
def within(identity: Identity, run_id: str) -> Iterator[None]:
    """Make an open run's span the current one for this block: what others trace in it hangs under the run."""
    inside = around(identity, run_id)
    if inside is None:
        yield
        return
    token = otel_context.attach(inside)
    try:
        yield
    finally:
        otel_context.detach(token)


# --- what ended already -----------------------------------------------------------------------------------------------


def tool_call(
    *,
    tool: str,
    risk: str,
    decision: str,
    status: str,
    seconds: float,
    identity: Identity,
    call_id: str | None = None,
    approval_id: str | None = None,
) -> None:
    """A span `execute_tool` for a call that ended now, `seconds` after it began; of none for one that was not run."""
    if not is_on():
        return
    ended = time.time_ns()
    done = _tracer.start_span(
        f"execute_tool {tool}",
        context=around(identity),
        start_time=ended - int(seconds * 1e9),
        attributes=_known(
            {
                OPERATION: "execute_tool",
                TOOL_NAME: tool,
                TOOL_TYPE: "function",
                TOOL_CALL_ID: call_id,
                CONVERSATION_ID: identity.session_id,
                RUN_ID: identity.run_id,
                TOOL_RISK: risk,
                TOOL_DECISION: decision,
                TOOL_STATUS: status,
                APPROVAL_ID: approval_id,
            }
        ),
    )
    if status != "succeeded":
        failed(done, status)
    done.end(ended)


def approval_wait(
    *,
    tool: str,
    risk: str,
    state: str,
    approval_id: str,
    identity: Identity,
    since: datetime,
    until: datetime,
) -> None:
    """A span `await_approval` for a pause of a graph in which people decided."""
    if not is_on():
        return
    _tracer.start_span(
        f"await_approval {tool}",
        context=around(identity),
        start_time=int(since.timestamp() * 1e9),
        attributes={
            TOOL_NAME: tool,
            TOOL_RISK: risk,
            APPROVAL_ID: approval_id,
            APPROVAL_STATE: state,
        },
    ).end(max(int(until.timestamp() * 1e9), int(since.timestamp() * 1e9)))


# --- calls of models --------------------------------------------------------------------------------------------------


@contextmanager
def model_call(operation: str, model: Any, named: str | None = None) -> Iterator[Span]:
    """A span around a call of a model: `chat` or `embeddings`.

    Args:
        operation: of the conventions' `gen_ai.operation.name`.
        model: LangChain's object, asked for its name.
        named: `provider:model`, where that is known.
    """
    if not is_on():
        yield trace.INVALID_SPAN
        return
    provider, _, name = named.partition(":") if named and ":" in named else ("", "", named or "")
    if not provider and callable(getattr(model, "_get_ls_params", None)):
        provider = str(model._get_ls_params().get("ls_provider") or "")  # noqa: SLF001 - what LangSmith is told too
    name = str(getattr(model, "model_name", None) or getattr(model, "model", None) or name)
    attributes = {
        OPERATION: operation,
        PROVIDER_NAME: _PROVIDERS.get(provider, provider) or None,
        REQUEST_MODEL: name or None,
    }
    with span(f"{operation} {name}".strip(), attributes, kind=SpanKind.CLIENT) as current:
        yield current


def answered(current: Span, message: Any) -> None:
    """Enter the tokens that a chat model's answer (LangChain's message) says it took, and which model answered."""
    if not current.is_recording():
        return
    usage = getattr(message, "usage_metadata", None) or {}
    response = getattr(message, "response_metadata", None) or {}
    found = {
        INPUT_TOKENS: usage.get("input_tokens"),
        OUTPUT_TOKENS: usage.get("output_tokens"),
        RESPONSE_MODEL: response.get("model_name") or response.get("model"),
    }
    current.set_attributes(_known(found))


# --- exporting --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def exporting() -> AsyncIterator[bool]:
    """Send spans to the OTLP endpoint that OpenTelemetry's own variables name, from now on; what is left is sent at the
    end of the block, for at most five seconds.

    Nothing is done where they name none, or where the application has set a provider. Gives whether spans are
    collected.
    """
    provider = await asyncio.to_thread(_set_up)
    try:
        yield is_on()
    finally:
        if provider is not None:
            await asyncio.to_thread(provider.force_flush, _FLUSH_MS)


_provider: Any = None


def _set_up() -> Any:
    """Our provider, made once in a process; OpenTelemetry takes no second one."""
    global _provider  # noqa: PLW0603 - as global as what it sets
    if _provider is not None or is_on() or telemetry_endpoint() is None:
        return _provider
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        emit(
            "telemetry_unavailable",
            reason="an OTLP endpoint is set, but not the extra: pip install 'langchain-learning-machine[telemetry]'",
        )
        return None
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
    made = TracerProvider(resource=resource)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(made)
    logging.getLogger("agent").info("spans go to the OTLP endpoint of the environment")
    _provider = made
    return made
