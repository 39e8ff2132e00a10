"""`agent tools resume`: a run of an agent-written tool that was put away goes on from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent import Identity
from agent.approval.policy_file import parse_policy
from agent.cli import app
from agent.errors import LearningError
from agent.execution.safe_executor import SafeExecutor
from agent.execution.tool_library import ToolLibrary
from agent.portal import portal
from agent.settings import current_settings
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.shop_sql import POLICY, shop

CAROL = Identity(tenant_id="acme", user_id="carol")
CODE = """def run(item: int) -> str:
    found = query_data(table="shop.products", columns=["name"], filters=[{"column": "id", "op": "=", "value": item}])
    return found["rows"][0]["name"]
"""
PARAMETERS = {"type": "object", "properties": {"item": {"type": "integer"}}, "required": ["item"]}
REVIEWERS = '[[reviewer]]\nname = "grace"\ncli = true\n'


def test_a_run_that_was_put_away_goes_on_once_it_is_approved(
    learning_database: ThrowawayDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = REVIEWERS + POLICY
    (tmp_path / "policy.toml").write_text(policy)
    monkeypatch.setenv("DATABASE_URL", learning_database.url)
    monkeypatch.setenv("LEARNING_POLICY_FILE", str(tmp_path / "policy.toml"))
    monkeypatch.setenv("LEARNING_DATA_DIR", str(learning_database.settings.data_dir))
    monkeypatch.setenv("LEARNING_TENANT", "acme")
    current_settings.cache_clear()

    def agent(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    with shop(learning_database, policy=policy):
        settings = current_settings()
        executor = SafeExecutor(settings=settings, policy=parse_policy(policy.encode()))
        library = ToolLibrary(executor.database, executor.queue, executor=executor, wait_seconds=0)
        version = portal().run_sync(
            library.create(
                "product_name",
                "says what a product is called",
                CODE,
                PARAMETERS,
                [{"arguments": {"item": 1}}],
                CAROL,
            )
        )
        agent("approvals", "approve", str(version.approval_id), "--as", "grace", "--yes")
        portal().run_sync(library.activate_approved(CAROL))

        run = portal().run_sync(library.run("product_name", {"item": 2}, CAROL))
        assert run.status == "paused"  # the first runs of a version ask even for reads
        with pytest.raises(LearningError, match="decided"):
            portal().run_sync(library.resume(str(run.approval_id), CAROL))
        agent("approvals", "approve", str(run.approval_id), "--as", "grace", "--yes")

        assert agent("tools", "resume", str(run.approval_id)).strip() == '"veil"'
        assert (
            agent("tools", "resume", str(run.approval_id)).strip() == '"veil"'
        )  # what came of it, not another run
        (row,) = portal().run_sync(
            executor.database.call(
                "list_executions", CAROL, wanted={"tool": "product_name", "state": "executed"}
            )
        )
        assert row["tool_version"] == "1"
        portal().run_sync(executor.aclose())
    current_settings.cache_clear()
