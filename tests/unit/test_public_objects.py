"""The objects that the process has one of: importing them reads no setting and opens nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("agent.learning.auto_discover", "auto_discovery"),
        ("agent.learning.background_learner", "background_learner"),
        ("agent.learning.semantic_search", "semantic_search"),
        ("agent.execution.safe_executor", "safe_executor"),
        ("agent.monitoring.continuous_monitor", "continuous_monitor"),
        ("agent.approval.human_approval", "human_approval_queue"),
    ],
)
def test_importing_one_makes_none_of_its_parts(module: str, name: str) -> None:
    # In a process of its own: in this one another test may have used it.
    program = f"from {module} import {name}\nprint([k for k in vars({name}) if not k.startswith('_')])"
    environment = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "LEARNING_TOKEN_BUDGET": "wrong"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
