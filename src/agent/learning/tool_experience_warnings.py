"""Warnings before a tool call: what is known of a tool's errors, call by call, and how well it would have warned.

A call is warned of from a limit on. It is drawn from the risks of calls that then succeeded, and steered by how many of
those were warned of so far: so that fewer than one in twenty is, whatever the tools. It is never below `RISK_MIN`.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.learning.tool_experience_calls import Condition, ToolCall
from agent.learning.tool_experience_model import BELIEFS, Model, fit, weigh

RISK_MIN = 0.02
"""Nothing is warned of below this probability."""
RISK_MAX = 0.5
"""From this probability on everything is warned of."""
CLEAN_SHARE = 0.046
"""Share of the calls that succeed that may have been warned of."""
CLEAN_SPARE = 1
"""So many more of them, so that little data does not silence all warnings."""
STEERING = 4
"""How strongly the limit makes up for clean calls that were warned of beyond their share, or short of it."""
LIKELY_SHARE = 0.03
"""A warning names the errors that are at least so likely, as a share of the likeliest one."""
CLEAN_KEPT = 2_000
"""Calls that succeeded whose risk the limit is drawn from: the latest."""
CLEAN_EXAMPLES_MAX = 400
FAILED_EXAMPLES_MAX = 400
"""Calls of a tool that its models are fitted to: the latest, of each error the same number."""
ERRORS_MAX = 100
"""Errors of one tool that have a model: those that were seen last."""


@dataclass
class _Tool:
    failed: dict[str, deque[Mapping[int, float]]] = field(default_factory=dict)
    clean: deque[Mapping[int, float]] = field(default_factory=lambda: deque(maxlen=CLEAN_EXAMPLES_MAX))
    models: dict[str, Model] = field(default_factory=dict)
    calls: int = 0
    """All that were learned."""
    since: int = 0
    """Calls since the models were fitted."""


class Experience:
    """What is known of tools' errors: asked before a call, told after it, refitted between runs."""

    def __init__(self, tenant_id: str = "") -> None:
        self.tenant_id = tenant_id
        self.limit = Limit()
        self._tools: dict[str, _Tool] = defaultdict(_Tool)
        self._changed: set[str] = set()

    def risks(self, tool: str, conditions: Sequence[Condition]) -> dict[str, float]:
        """Per known error of the tool, those of this very run included, how likely the call is to fail with it."""
        values = weigh(conditions, self.tenant_id)
        models = self._tools[tool].models if tool in self._tools else {}
        unfitted = (
            Model(weights=believed(template, self.tenant_id)) for template in errors_in_run(conditions)
        )
        fresh = dict(zip(errors_in_run(conditions), unfitted, strict=True))
        return {template: model.risk(values) for template, model in {**fresh, **models}.items()}

    def learn(self, tool: str, values: Mapping[int, float], template: str | None) -> None:
        """Take in a call and what became of it: the template of its error, `None` where it succeeded."""
        known = self._tools[tool]
        if template is None:
            known.clean.append(values)
        else:
            examples = known.failed.pop(template, None) or deque(maxlen=FAILED_EXAMPLES_MAX)
            examples.append(values)
            known.failed[template] = examples
            if len(known.failed) > ERRORS_MAX:
                oldest = next(iter(known.failed))
                del known.failed[oldest]
                known.models.pop(oldest, None)
        known.calls += 1
        known.since += 1
        self._changed.add(tool)

    def refit(self, *, always: bool = False) -> list[str]:
        """Fit the models of tools whose calls have grown by a twentieth, or of all that changed; which they were."""
        due = [tool for tool in sorted(self._changed) if always or self._is_due(self._tools[tool])]
        for tool in due:
            self._fit(self._tools[tool], always)
        self._changed.difference_update(due)
        return due

    def _fit(self, known: _Tool, always: bool) -> None:
        errors = list(known.failed)
        if always or known.since * 20 >= known.calls:
            known.since = 0
        else:
            errors = [error for error in errors if error not in known.models]
        of_each = FAILED_EXAMPLES_MAX // max(len(known.failed), 1)
        calls: list[tuple[Mapping[int, float], str | None]] = [(values, None) for values in known.clean]
        for error in errors:
            calls += [(values, error) for values in list(known.failed[error])[-of_each:]]
        known.models |= fit(calls, {error: believed(error, self.tenant_id) for error in errors})

    def knows(self, tool: str) -> bool:
        """Whether an error of the tool is known."""
        return tool in self._tools and bool(self._tools[tool].failed)

    def models(self, tool: str) -> Mapping[str, Model]:
        """The fitted models of a tool, by template."""
        return self._tools[tool].models

    def _is_due(self, known: _Tool) -> bool:
        return bool(known.failed) and (
            known.since * 20 >= known.calls or len(known.models) < len(known.failed)
        )


def errors_in_run(conditions: Iterable[Condition]) -> list[str]:
    """The errors that the tool ran into earlier in the run of a call, by the conditions of the call."""
    return list(
        dict.fromkeys(condition.text for condition in conditions if condition.kind in ("again", "retry"))
    )


def believed(template: str, tenant_id: str = "") -> dict[int, float]:
    """The weights of an error's model before there are data."""
    return {Condition(kind, template, "").key(tenant_id): weight for kind, weight in BELIEFS.items()}


def likely(risks: Mapping[str, float], limit: float) -> dict[str, float]:
    """The errors that a call is warned of, the likeliest first: one that reaches the limit and others so likely."""
    highest = max(risks.values(), default=0.0)
    if highest < limit:
        return {}
    ranked = sorted(risks.items(), key=lambda item: (-item[1], item[0]))
    return {error: risk for error, risk in ranked if risk >= LIKELY_SHARE * highest}


class Limit:
    """The risk from which calls are warned of.

    Args:
        latest: of the latest calls that succeeded, oldest first: the risk before it was made, and whether that warned.
    """

    def __init__(self, latest: Iterable[tuple[float, bool]] = ()) -> None:
        self._latest = deque(latest, maxlen=CLEAN_KEPT)
        self._sorted = sorted(risk for risk, _ in self._latest)
        self._warned = sum(was_warned for _, was_warned in self._latest)

    def add(self, risk: float) -> None:
        """Take in the risk, before it was made, of a call that succeeded."""
        was_warned = risk >= self.value
        if len(self._latest) == CLEAN_KEPT:
            oldest, oldest_warned = self._latest.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
            self._warned -= oldest_warned
        self._latest.append((risk, was_warned))
        bisect.insort(self._sorted, risk)
        self._warned += was_warned

    @property
    def value(self) -> float:
        """The limit now: lower while fewer were warned of than may be, higher after more were."""
        share = CLEAN_SHARE * len(self._sorted)
        above = int(share + STEERING * (share + CLEAN_SPARE - self._warned))
        if above < 0:
            return RISK_MAX
        found = self._sorted[-above - 1] + 1e-9 if above < len(self._sorted) else 0.0
        return min(max(found, RISK_MIN), RISK_MAX)


@dataclass(kw_only=True)
class WarningCounts:
    """How well calls were warned of, each with what was known before it."""

    templates: int = 0
    """Errors seen, by tool and template."""
    errors: int = 0
    repeats: int = 0
    """Calls that failed with an error seen before."""
    repeats_warned: int = 0
    """Those of which that very error was warned of."""
    clean: int = 0
    """Calls that succeeded."""
    clean_warned: int = 0


def evaluate_warnings(runs: Iterable[Sequence[ToolCall]]) -> WarningCounts:
    """Go through runs in the order of time and count: each call is judged by what earlier runs taught and what its own
    run had shown before it; its outcome is learned when its run is over."""
    experience = Experience()
    counts = WarningCounts()
    seen: set[tuple[str, str]] = set()
    for run in runs:
        learned = []
        for call in run:
            risks = experience.risks(call.tool, call.conditions)
            warned = likely(risks, experience.limit.value)
            template = call.template
            if template is None:
                counts.clean += 1
                counts.clean_warned += bool(warned)
                experience.limit.add(max(risks.values(), default=0.0))
            else:
                counts.errors += 1
                if (call.tool, template) in seen:
                    counts.repeats += 1
                    counts.repeats_warned += template in warned
                seen.add((call.tool, template))
            learned.append((call.tool, weigh(call.conditions), template))
        for tool, values, template in learned:
            experience.learn(tool, values, template)
        experience.refit()
    counts.templates = len(seen)
    return counts
