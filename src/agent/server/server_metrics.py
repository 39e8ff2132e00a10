"""Counters of this process and gauges of its database, in Prometheus's text format.

Counters are fed by events. No label names a tenant, user, session, agent or tool: their number has no bound, and some
of them are people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent.events import Event
from agent.monitoring.findings import SEVERITIES

_SECONDS: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LABEL_CHARACTERS_MAX: Final = 40
_OTHER: Final = "other"


class ServerMetrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._house = _House()
        self.registry.register(self._house)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, labels, registry=self.registry)

        def histogram(name: str, says: str, *labels: str) -> Histogram:
            return Histogram(name, says, labels, registry=self.registry, buckets=_SECONDS)

        self._events = counter("agent_events", "Events by name.", "event")
        self._runs = counter(
            "agent_runs_recorded", "Runs that the database took, by how they ended.", "status"
        )
        self._spooled = counter(
            "agent_runs_spooled", "Runs kept on disk because the database did not take them."
        )
        self._lost = counter("agent_runs_lost", "Runs that could be neither recorded nor kept on disk.")
        self._recall = histogram("agent_recall_seconds", "How long recall took, where it succeeded.")
        self._recall_failed = counter("agent_recall_failures", "Recalls that failed or took too long.")
        self._calls = counter("agent_tool_calls", "Calls of tools that ended.", "risk", "decision", "status")
        self._call = histogram("agent_tool_call_seconds", "How long calls of tools took that ran.", "risk")
        self._requested = counter("agent_approvals_requested", "Requests for approval.", "risk", "state")
        self._decided = counter("agent_approvals_decided", "Votes that counted.", "verdict")
        self._learned = counter("agent_runs_learned", "Runs that were learned from.")
        self._cycles = counter("agent_learner_cycles", "Cycles of the background learner that ended here.")
        self._steps = counter("agent_learner_steps", "Steps of the background learner.", "step", "state")
        self._looks = counter("agent_monitor_looks", "Looks of the monitor that ended here.")
        self._checks = counter("agent_monitor_checks", "Checks of the monitor.", "state")
        self._learning_failed = counter("agent_learning_failures", "Sessions whose learning failed for good.")

    def count(self, event: Event) -> None:
        """Count an event; quick, and from any thread."""
        facts = event.facts
        self._events.labels(event.name).inc()
        match event.name:
            case "run_recorded":
                self._runs.labels(_label(facts["status"])).inc()
            case "run_spooled":
                self._spooled.inc()
            case "run_record_failed":
                self._lost.inc()
            case "knowledge_recalled":
                self._recall.observe(facts["duration_ms"] / 1000)
            case "recall_failed":
                self._recall_failed.inc()
            case "tool_call_ended":
                risk, decision = _label(facts["risk"]), _label(facts["decision"])
                self._calls.labels(risk, decision, _label(facts["status"])).inc()
                if decision in ("allowed", "approved"):
                    self._call.labels(risk).observe(facts["duration_ms"] / 1000)
            case "approval_requested":
                self._requested.labels(_label(facts["risk"]), _label(facts["state"])).inc()
            case "approval_decided" if facts["outcome"] == "recorded":
                self._decided.labels(_label(facts["verdict"])).inc()
            case "session_learned":
                self._learned.inc(facts["runs"])
            case "learning_cycle_done":
                self._cycles.inc()
            case "learning_step_done":
                self._steps.labels(_label(facts["step"]), "done").inc()
            case "learning_step_failed":
                self._steps.labels(_label(facts["step"]), "failed").inc()
            case "monitor_looked":
                failed = len(facts["failed"])
                self._looks.inc()
                self._checks.labels("failed").inc(failed)
                self._checks.labels("done").inc(facts["checks"] - failed)
            case "learning_failed":
                self._learning_failed.inc()
            case _:
                pass

    def render(self, state: Mapping[str, Any] | None) -> bytes:
        """Everything as text.

        Args:
            state: what `server_state` gave; `None`: it gave nothing, and its gauges are left out.
        """
        self._house.state = state
        return generate_latest(self.registry)


def _label(value: Any) -> str:
    """A word of our own as a label; what is longer is none of ours."""
    text = str(value)
    return text if len(text) <= _LABEL_CHARACTERS_MAX else _OTHER


class _House:
    """The gauges of the database, from what was read last."""

    def __init__(self) -> None:
        self.state: Mapping[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        """As `prometheus_client` asks for them."""
        state = self.state
        yield GaugeMetricFamily(
            "agent_database_up", "Whether the database answered.", value=0.0 if state is None else 1.0
        )
        if state is None:
            return
        yield GaugeMetricFamily("agent_workers", "Workers with a sign of life.", value=state["workers"])
        yield _by("agent_jobs", "Jobs in the queue, at most 100,000.", "state", state["jobs"])
        yield GaugeMetricFamily(
            "agent_queue_age_seconds",
            "How long the oldest due job has waited.",
            value=state["queue_age_seconds"],
        )
        approvals: Mapping[str, Mapping[str, float]] = state["approvals"]
        yield _by(
            "agent_approvals_pending",
            "Requests that wait for a person.",
            "risk",
            {risk: found["pending"] for risk, found in approvals.items()},
        )
        yield GaugeMetricFamily(
            "agent_approval_age_seconds",
            "How long the oldest request has waited for a person.",
            value=max((found["oldest_seconds"] for found in approvals.values()), default=0.0),
        )
        # All severities, at 0 too: an alert on a series needs it to be there before.
        open_alerts = dict.fromkeys(SEVERITIES, 0) | state["alerts"]
        yield _by("agent_alerts_open", "Alerts that last.", "severity", open_alerts)
        clocks: Mapping[str, Mapping[str, float]] = state["clocks"]
        yield _by(
            "agent_clock_replicas",
            "Processes in which a clock ticks.",
            "clock",
            {name: found["replicas"] for name, found in clocks.items()},
        )
        yield _by(
            "agent_clock_age_seconds",
            "Since the last cycle of a clock was done.",
            "clock",
            {name: found["age_seconds"] for name, found in clocks.items()},
        )


def _by(name: str, says: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, says, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
