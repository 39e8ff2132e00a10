"""Warnings before a tool call: what is known of a tool's errors, call by call, and how well it would have warned.

A call is warned of from a limit on, which is drawn from the risks of calls that then succeeded: so that fewer than one
in twenty of those is warned of. It is never below `RISK_MIN`.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.learning.tool_experience_calls import Condition, ToolCall
from agent.learning.tool_experience_model import BELIEFS, Example, Model, fit, weigh

RISK_MIN = 0.03
"""Nothing is warned of below this probability."""
RISK_MAX = 0.5
"""From this probability on everything is warned of."""
CLEAN_SHARE = 0.048
"""Share of the calls that succeed that may have been warned of."""
CLEAN_SPARE = 4
"""So many more of them, so that little data does not silence all warnings."""
CLEAN_KEPT = 2_000
"""Calls that succeeded whose risk the limit is drawn from: the latest."""
FAILED_EXAMPLES_MAX = 300
CLEAN_EXAMPLES_MAX = 600
"""Calls of a tool that a model is fitted to: the latest."""
ERRORS_MAX = 100
"""Errors of one tool that have a model: those that were seen last."""


@dataclass
class _Tool:
    failed: dict[str, deque[Mapping[int, float]]] = field(default_factory=dict)
    clean: deque[Mapping[int, float]] = field(default_factory=lambda: deque(maxlen=CLEAN_EXAMPLES_MAX))
    models: dict[str, Model] = field(default_factory=dict)
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
        known.since += 1
        self._changed.add(tool)

    def refit(self, *, always: bool = False) -> list[str]:
        """Fit the models of tools whose calls have grown by a twentieth, or of all that changed; which they were."""
        due = [tool for tool in sorted(self._changed) if always or self._is_due(self._tools[tool])]
        for tool in due:
            known = self._tools[tool]
            clean = [Example(values, False) for values in known.clean]
            for template, examples in known.failed.items():
                known.models[template] = fit(
                    [*(Example(values, True) for values in examples), *clean],
                    believed(template, self.tenant_id),
                )
            known.since = 0
            self._changed.discard(tool)
        return due

    def knows(self, tool: str) -> bool:
        """Whether an error of the tool is known."""
        return tool in self._tools and bool(self._tools[tool].failed)

    def models(self, tool: str) -> Mapping[str, Model]:
        """The fitted models of a tool, by template."""
        return self._tools[tool].models

    def _is_due(self, known: _Tool) -> bool:
        calls = len(known.clean) + sum(len(examples) for examples in known.failed.values())
        return bool(known.failed) and (known.since * 20 >= calls or len(known.models) < len(known.failed))


def errors_in_run(conditions: Iterable[Condition]) -> list[str]:
    """The errors that the tool ran into earlier in the run of a call, by the conditions of the call."""
    return list(
        dict.fromkeys(condition.text for condition in conditions if condition.kind in ("again", "retry"))
    )


def believed(template: str, tenant_id: str = "") -> dict[int, float]:
    """The weights of an error's model before there are data."""
    return {Condition(kind, template, "").key(tenant_id): weight for kind, weight in BELIEFS.items()}


class Limit:
    """The risk from which calls are warned of, drawn from the risks of the latest calls that succeeded."""

    def __init__(self, risks: Sequence[float] = ()) -> None:
        self._latest: deque[float] = deque(risks[-CLEAN_KEPT:])
        self._sorted = sorted(self._latest)

    def add(self, risk: float) -> None:
        """Take in the risk, before it was made, of a call that succeeded."""
        self._latest.append(risk)
        bisect.insort(self._sorted, risk)
        if len(self._latest) > CLEAN_KEPT:
            del self._sorted[bisect.bisect_left(self._sorted, self._latest.popleft())]

    @property
    def value(self) -> float:
        """The limit now."""
        allowed = int(CLEAN_SHARE * len(self._sorted)) + CLEAN_SPARE
        found = self._sorted[-allowed - 1] + 1e-9 if allowed < len(self._sorted) else 0.0
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
            warned = {error for error, risk in risks.items() if risk >= experience.limit.value}
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
