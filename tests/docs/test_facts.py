"""What the documentation says about the code is so: settings, commands, functions, events, names, links, places."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
import typer

import agent
import agent.testing
from agent import LearningMachine, SessionContextConfig, Settings, UserMemoryConfig, UserProfileConfig, errors
from agent.cli import app
from agent.database.protocol import refusal
from agent.settings import _FIELD_OF_VARIABLE, _NOT_OURS
from agent.testing.throwaway import ThrowawayDatabase
from tests.docs.pages import ROOT, anchors, blocks, code_words, links, page, pages, rows, section

MACHINE = "docs/reference/python.md"
GRAPH_VARIABLES = {"GRAPH_MODEL", "AGENT_MODEL"}  # read by the sample graphs


# --- settings ---------------------------------------------------------------------------------------------------


def setting_rows() -> dict[str, tuple[list[str], str]]:
    """Field -> its variables and its default, as the page has them."""
    return {
        code_words(field)[0]: (code_words(variables), default.strip("`"))
        for variables, field, default, _ in rows(page("docs/reference/settings.md"))
    }


def shown_default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, timedelta):
        return f"{value.total_seconds():g}"
    return str(value.value if isinstance(value, Enum) else value)


def test_every_setting_is_documented_with_its_variables_and_default() -> None:
    expected = {
        name: (
            [variable for variable, field in _FIELD_OF_VARIABLE.items() if field == name],
            shown_default(info.default),
        )
        for name, info in Settings.model_fields.items()
    }

    assert setting_rows() == expected


def test_every_variable_that_a_page_names_exists() -> None:
    known = {*_FIELD_OF_VARIABLE, *_NOT_OURS, *GRAPH_VARIABLES}

    named = {
        (path.name, name)
        for path in pages()
        for name in re.findall(
            r"\b(?:LEARNING|SUPABASE|OPENAI|SLACK|TELEGRAM|GRAPH|AGENT)_[A-Z_]*[A-Z]\b|\b(?:APP_)?DATABASE_URL\b",
            path.read_text("utf-8"),
        )
    }

    assert {(where, name) for where, name in named if name not in known} == set()
    assert {name for _, name in named} >= set(_FIELD_OF_VARIABLE)


# --- commands ---------------------------------------------------------------------------------------------------


def commands() -> dict[str, click.Command]:
    """`agent memory list` -> the command, for every one that does something."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for part, inner in command.commands.items():
                yield from walk(f"{name} {part}", inner)
            if command.invoke_without_command:  # a group that does something by itself
                yield name, command
        else:
            yield name, command

    return dict(walk("agent", typer.main.get_command(app)))


def options_of(command: Any) -> set[str]:
    return {
        option
        for parameter in command.params
        for option in parameter.opts
        if parameter.param_type_name == "option" and option.startswith("--")
    }


def arguments_of(command: Any) -> list[str]:
    return [
        (parameter.metavar or parameter.name).strip("[]")
        for parameter in command.params
        if parameter.param_type_name == "argument"
    ]


def test_every_command_is_documented_and_no_other() -> None:
    headings = re.findall(r"^## (agent .+)$", page("docs/reference/commands.md"), re.MULTILINE)

    assert sorted(headings) == sorted(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_options_of_a_command_are_documented_and_no_others(name: str) -> None:
    text = section(page("docs/reference/commands.md"), name)
    documented = {code_words(cells[0])[0].split()[0] for cells in rows(text)}

    assert documented == options_of(commands()[name]) - {"--help"}
    usage = next(words for words in code_words(text) if words.startswith(name))
    assert usage.removeprefix(name).replace("[", " ").replace("]", " ").split() == arguments_of(
        commands()[name]
    )


def shell_lines() -> Iterator[tuple[str, str]]:
    for path in pages():
        for block in blocks(path):
            if block.language == "sh":
                for line in block.code.replace("\\\n", " ").splitlines():
                    yield block.place, re.sub(r"\s#.*$", "", line).strip()


def test_the_command_lines_on_the_pages_are_commands_that_exist() -> None:
    seen = 0
    for place, line in shell_lines():
        found = re.search(
            r"(?:^|[ /])agent "
            r"((?:alerts|approvals|learner|log|memory|monitor|runs|sql|telegram|tools) \w[\w-]*|[a-z]+)\b(.*)",
            line,
        )
        if found is None:
            continue
        seen += 1
        command = commands().get(f"agent {found[1]}")
        assert command is not None, f"{place}: there is no command in {line!r}"
        unknown = set(re.findall(r"(?<!\S)--[a-z-]+", found[2].partition("|")[0])) - options_of(command)
        assert not unknown, f"{place}: {line!r} has unknown {unknown}"
    assert seen > 10


def test_the_make_targets_on_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))
    named = {
        name for path in pages() for name in re.findall(r"(?:`|^|\n)make ([a-z]+)", path.read_text("utf-8"))
    }

    assert named
    assert named <= targets


# --- storage functions ------------------------------------------------------------------------------------------

SCHEMAS = ROOT / "supabase" / "schemas"
FUNCTIONS = """
SELECT p.proname, pg_get_function_identity_arguments(p.oid),
       has_function_privilege('authenticated', p.oid, 'EXECUTE'), has_function_privilege('anon', p.oid, 'EXECUTE')
FROM pg_proc p JOIN pg_roles o ON o.oid = p.proowner
WHERE p.pronamespace = 'public'::regnamespace AND o.rolname = 'agent_app'
"""


def test_every_storage_function_is_documented_with_its_arguments_under_who_may_call_it(
    learning_database: ThrowawayDatabase,
) -> None:
    text = page("docs/reference/storage-functions.md")
    documented = {
        (code_words(name)[0], code_words(arguments)[0], for_users)
        for heading, for_users in (
            ("For users and servers", True),
            ("For servers: learning", False),
            ("For servers: operators", False),
            ("For servers: approvals", False),
            ("For servers: executions", False),
            ("For servers: tools of agents", False),
            ("For servers: discovery", False),
            ("For servers: clocks", False),
            ("For servers: experience with tools", False),
            ("For servers: alerts", False),
            ("For servers: the application's data", False),
            ("For servers: the background learner", False),
            ("For servers: monitor", False),
            ("For the login that writes", False),
        )
        for name, arguments, _ in rows(section(text, heading))
    }
    with psycopg.connect(learning_database.url) as connection:
        found = connection.execute(FUNCTIONS).fetchall()

    assert documented == {(name, arguments, for_users) for name, arguments, for_users, _ in found}
    assert not any(for_anybody for *_, for_anybody in found)


def test_the_errors_of_storage_functions_are_documented() -> None:
    states = section(page("docs/reference/storage-functions.md"), "Storage functions").partition("\n## ")[0]
    documented = {code_words(state)[0]: code_words(error)[0] for state, error, _ in rows(states)}
    refused = {
        state
        for path in SCHEMAS.glob("*.sql")
        for state in re.findall(r"\brefuse\('(\w+)'", path.read_text("utf-8"))
    }

    assert documented == {state: type(refusal("f", state, "")).__name__ for state in documented}
    assert documented.keys() == refused | {"42501"}


def test_every_table_is_documented(learning_database: ThrowawayDatabase) -> None:
    documented = {
        code_words(name)[0]
        for name, _ in rows(section(page("docs/reference/storage-functions.md"), "The rows"))
    }
    with psycopg.connect(learning_database.url) as connection:
        query = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        found = {name for (name,) in connection.execute(query)}

    assert documented == found


# --- events -----------------------------------------------------------------------------------------------------


def emitted() -> dict[str, set[str]]:
    """Name -> the facts that any place in the code gives it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "agent").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "emit":
                name = node.args[0]
                assert isinstance(name, ast.Constant), (
                    f"{path.name}:{node.lineno}: the name of an event is a variable"
                )
                facts = found.setdefault(str(name.value), set())
                for keyword in node.keywords:
                    spread = ast.unparse(keyword.value)
                    if keyword.arg is not None:
                        facts.add(keyword.arg)
                    elif spread == "facts":  # the run that could not be recorded
                        facts.update(("run_id", "status", "reason"))
                    else:
                        assert spread.endswith("identity.as_json()"), f"{path.name}:{node.lineno}: {spread}"
                        facts.add("identity")
    return found


def test_every_event_is_documented_with_its_facts_and_no_other() -> None:
    documented = {
        code_words(name)[0]: {*code_words(facts), *re.findall(r"\bidentity\b", facts)}
        for name, _, facts in rows(page("docs/reference/events.md"))
    }

    assert documented == emitted()


# --- Python -----------------------------------------------------------------------------------------------------


def test_every_public_name_is_documented() -> None:
    text = page(MACHINE)
    headings = {
        name.strip() for line in re.findall(r"^### (.+)$", text, re.MULTILINE) for name in line.split(",")
    }

    assert headings == {*agent.__all__, *agent.testing.__all__}


def test_the_arguments_of_a_machine_are_documented_with_their_defaults() -> None:
    parameters = [
        parameter
        for parameter in inspect.signature(LearningMachine).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    arguments, members = _tables_of_machine()

    assert arguments == {parameter.name: repr(parameter.default) for parameter in parameters}
    for name, names in members.items():
        member = inspect.getattr_static(LearningMachine, name, None)
        if inspect.isfunction(member):
            taken = [p for p in inspect.signature(member).parameters if p != "self"]
            assert names in ([], taken), name


def _tables_of_machine() -> tuple[dict[str, str], dict[str, list[str]]]:
    arguments: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for cells in rows(section(page(MACHINE), "LearningMachine")):
        if len(cells) == 3:
            arguments[code_words(cells[0])[0]] = cells[1].strip("`")
        else:
            for words in code_words(cells[0]):
                name, _, given = words.removeprefix("await ").partition("(")
                members[name] = re.findall(r"\w+", given)
    return arguments, members


def test_the_members_of_a_machine_exist_and_its_operations_are_all_there() -> None:
    machine = LearningMachine(settings=Settings())
    _, members = _tables_of_machine()
    operations = {name for name in dir(LearningMachine) if re.search("learnings?$", name) and name[0] != "_"}

    assert [name for name in members if not hasattr(machine, name)] == []
    assert operations <= members.keys()


@pytest.mark.parametrize("config", [UserProfileConfig, UserMemoryConfig, SessionContextConfig])
def test_the_options_of_a_store_are_documented_with_their_defaults(config: Any) -> None:
    def shown(value: Any) -> str:
        if isinstance(value, Enum):
            return f"{type(value).__name__}.{value.name}"
        if isinstance(value, type):
            return value.__name__
        return json.dumps(value) if isinstance(value, str) else str(value).replace("'", '"')

    documented = {
        code_words(name)[0]: default.strip("`")
        for name, default, _ in rows(section(page(MACHINE), config.__name__))
    }

    assert documented == {
        field.name: shown(field.default) for field in fields(config) if field.default is not MISSING
    }


def test_the_default_fields_of_a_profile_are_documented() -> None:
    assert code_words(section(page(MACHINE), "UserProfile")) == list(agent.UserProfile.model_fields)


def test_every_error_is_documented_with_its_parent() -> None:
    tree = {
        name: error.__mro__[1].__name__
        for name, error in vars(errors).items()
        if isinstance(error, type)
        and issubclass(error, errors.LearningError)
        and error is not errors.LearningError
    }
    documented = {
        code_words(name)[0]: next(iter(code_words(who)), "LearningError")
        for name, who in rows(section(page(MACHINE), "LearningError, ConfigurationError"))
    }

    assert documented == tree


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(path: Path) -> None:
    for target in links(path.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{target} leads nowhere"
        assert place.is_relative_to(ROOT), f"{target} leads out of the project"
        assert not anchor or anchor in anchors(place.read_text("utf-8")), (
            f"{target}: there is no such heading"
        )


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    to_do = [ROOT / "README.md"]
    while to_do:
        path = to_do.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        to_do += [
            (path.parent / target.partition("#")[0]).resolve()
            for target in links(path.read_text("utf-8"))
            if "://" not in target
        ]

    assert {path.relative_to(ROOT) for path in pages()} <= {path.relative_to(ROOT) for path in reached}


def test_the_tests_that_a_page_names_exist() -> None:
    for path in pages():
        for line in path.read_text("utf-8").splitlines():
            named = [
                name for name in code_words(line) if name.startswith("test_") and not name.endswith(".py")
            ]
            files = [
                (path.parent / link).resolve() for link in links(line) if Path(link).name.startswith("test_")
            ]
            if files and all(file.exists() for file in files):  # else the test of links says so
                text = "".join(file.read_text("utf-8") for file in files)
                assert [name for name in named if not re.search(rf"\bdef {name}\b", text)] == [], path.name


def test_the_modules_that_the_architecture_names_exist() -> None:
    house = blocks(ROOT / "ARCHITECTURE.md")[0].code
    named = set(re.findall(r"\b[\w*]+\.py\b", house + " ".join(code_words(page("ARCHITECTURE.md")))))
    there = {path.name for path in (ROOT / "src" / "agent").rglob("*.py")}

    assert {name for name in named if "*" not in name} <= there
    top = [
        path
        for path in (ROOT / "src" / "agent").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert [path.name for path in top if not re.search(rf"\b{re.escape(path.name)}", house)] == []


ABOVE = (
    {"cli.py", "commands", "server", "testing"},
    {"learning", "execution", "monitoring"},
    {"approval", "stores", "jobs.py", "clock.py", "clock_worker.py", "discovery"},
    {"database", "chat"},
)


def test_imports_run_one_way_as_the_architecture_says() -> None:
    def height(name: str) -> int:
        return next((len(ABOVE) - i for i, layer in enumerate(ABOVE) if {name, f"{name}.py"} & layer), 0)

    for path, module in _imports():
        place = path.relative_to(ROOT / "src" / "agent").parts[0]
        if module.startswith("agent.") and place != "__init__.py":
            assert height(module.split(".")[1]) <= height(place), f"{path} imports {module}"
        for library, homes in {
            "fastapi": {"server"},
            "supabase": {"database"},
            "psycopg": {"database", "jobs.py", "discovery", "testing"},
        }.items():
            is_sql = library == "psycopg" and place == "execution" and path.name.startswith("sql_")
            assert module.split(".")[0] != library or place in homes or is_sql, f"{path} imports {module}"


def _imports() -> Iterator[tuple[Path, str]]:
    """What each file imports when it runs, not what only type checkers see."""

    class Finder(ast.NodeVisitor):
        def __init__(self) -> None:
            self.modules: list[str] = []

        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            self.modules += [alias.name for alias in node.names]

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            self.modules.append(node.module or "")

    for path in (ROOT / "src" / "agent").rglob("*.py"):
        finder = Finder()
        finder.visit(ast.parse(path.read_text("utf-8")))
        yield from ((path, module) for module in finder.modules)


def test_the_python_names_on_the_pages_can_be_imported() -> None:
    for path in pages():
        for name in re.findall(r"`(agent(?:\.[a-z_]+)+)`", path.read_text("utf-8")):
            _import(name)


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)
