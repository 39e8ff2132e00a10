"""Learning over real OpenAI traffic: the client's own request and time-out code against a server on this machine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from agent import Identity, LearningMachine, UserProfileConfig, listening
from agent.errors import ConfigurationError, ModelError
from agent.events import Event
from agent.portal import portal
from agent.settings import Settings, current_settings
from agent.testing import tool_call
from agent.testing.openai_server import CutOff, Hang, OpenAIServer, Refusal, Slow, openai_server
from agent.testing.throwaway import ThrowawayDatabase
from tests.integration.test_extraction import Customer, add, learned, said

ADA = Identity(user_id="ada@example.com", session_id="t1")
KEY = "sk-hunter2hunter2hunter2"
GOOD = learned(user_memory=[add("Has a cat")])
Make = Callable[..., LearningMachine]


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    with listening(events.append):
        yield events


@pytest.fixture
async def make(learning_database: ThrowawayDatabase) -> AsyncIterator[Make]:
    """Machines whose settings are those of a server's address and key, given back at the end."""
    made: list[LearningMachine] = []

    def machine(server: OpenAIServer | None = None, **options: Any) -> LearningMachine:
        environment = {
            "DATABASE_URL": learning_database.url,
            "LEARNING_DATA_DIR": str(learning_database.settings.data_dir),
            "LEARNING_QUIET_PERIOD": "0",
            "LEARNING_WORKER": "off",
            "LEARNING_EMBEDDING_TIMEOUT": "10",
            "LEARNING_RECALL_TIMEOUT": "20",
            **({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url} if server else {}),
            **options.pop("environment", {}),
        }
        made.append(LearningMachine(settings=Settings.from_environment(environment), **options))
        return made[-1]

    yield machine
    for one in made:
        await one.aclose()


async def record(machine: LearningMachine, *texts: str, session: str = "t1") -> None:
    for number, text in enumerate(texts):
        run = {
            "run_id": f"{session}-{number}-{text[:40]}", "status": "completed", "messages": [said(text)],
            "exposures": [], "tool_errors": [],
        }  # fmt: skip
        assert await portal().run(machine.record(ADA.with_(session_id=session), run))


async def learn(machine: LearningMachine, session: str = "t1") -> int:
    return await portal().run(machine.learn_session(ADA.with_(session_id=session)))


async def contents(machine: LearningMachine) -> list[str]:
    return [memory["content"] for memory in await machine.get_learnings(identity=ADA)][::-1]


async def waiting(machine: LearningMachine) -> int:
    return len((await portal().run(machine.database.call("pending_learning", ADA)))["runs"])


# --- the ordinary way -------------------------------------------------------------------------------------------


async def test_a_key_and_an_address_are_enough_to_learn_and_to_recall_by_meaning(make: Make) -> None:
    with openai_server([GOOD], api_key=KEY) as server:
        machine = make(server)
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
        assert await contents(machine) == ["Has a cat"]
        found = await portal().run(machine.recall(ADA, "cat"))
        assert "Has a cat" in found.text

    (chat,) = server.chat_requests
    assert chat.body["model"] == "gpt-5-mini"
    assert chat.body["tools"][0]["function"]["name"] == "Learned"
    assert chat.body["tool_choice"] == {"type": "function", "function": {"name": "Learned"}}
    assert "response_format" not in chat.body
    memory, question = server.embedding_requests
    assert memory.body["model"] == question.body["model"] == "text-embedding-3-small"
    assert sorted(memory.body["input"]) == ["Has a cat", "I have a cat"]
    assert question.body["input"] in (["cat"], "cat")


async def test_settings_of_the_environment_and_a_file_lead_there_too(
    make: Make, learning_database: ThrowawayDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with openai_server([GOOD], api_key=KEY) as server:
        monkeypatch.chdir(tmp_path)
        (tmp_path / ".env").write_text(f"OPENAI_API_KEY={KEY}\nDATABASE_URL={learning_database.url}\n")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("LEARNING_WORKER", "off")
        current_settings.cache_clear()
        try:
            machine = LearningMachine()
        finally:
            current_settings.cache_clear()
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
        assert await contents(machine) == ["Has a cat"]
        await machine.aclose()


@pytest.mark.parametrize("as_object", [False, True])
async def test_models_may_be_named_or_given(make: Make, as_object: bool) -> None:
    with openai_server([GOOD], api_key=KEY, dimensions=64) as server:
        model: Any = "openai:gpt-named"
        embeddings: Any = "openai:embed-named"
        if as_object:
            model = ChatOpenAI(model="gpt-named", base_url=server.url, api_key=SecretStr(KEY))
            embeddings = OpenAIEmbeddings(
                model="embed-named",
                base_url=server.url,
                api_key=SecretStr(KEY),
                check_embedding_ctx_length=False,
            )
        machine = make(None if as_object else server, model=model, embeddings=embeddings)
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
        assert (await machine.search("cat", identity=ADA))[0]["why"]["vector"]["score"] > 0
    assert {request.body["model"] for request in server.chat_requests} == {"gpt-named"}
    assert {request.body["model"] for request in server.embedding_requests} == {"embed-named"}


async def test_settings_name_models_too(make: Make) -> None:
    with openai_server([GOOD], api_key=KEY) as server:
        names = {"LEARNING_MODEL": "openai:gpt-set", "LEARNING_EMBEDDINGS": "openai:embed-set"}
        machine = make(server, environment=names)
        await record(machine, "I have a cat")
        await learn(machine)
    assert [request.body["model"] for request in server.requests] == ["gpt-set", "embed-set"]


async def test_a_custom_schema_travels_as_json_schema(make: Make) -> None:
    age = {"field": "age", "value": 36, "evidence": ["r1.m1"]}
    with openai_server([learned(user_profile=[age])]) as server:
        machine = make(
            server,
            user_profile=UserProfileConfig(schema=Customer),
            environment={"LEARNING_EMBEDDINGS": "none"},
        )
        await record(machine, "I am 36")
        assert await learn(machine) == 1
    (memory,) = await machine.get_learnings(identity=ADA)
    assert (memory["value"], type(memory["value"])) == (36, int)
    sent = json.dumps(server.chat_requests[0].body["tools"])
    assert [
        word
        for word in ("born_on", '"format": "date"', "languages", '"pro"', '"minimum": 0')
        if word not in sent
    ] == []


async def test_none_turns_models_off_though_there_is_a_key(make: Make) -> None:
    with openai_server([GOOD]) as server:
        machine = make(server, environment={"LEARNING_MODEL": "none", "LEARNING_EMBEDDINGS": "none"})
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
        assert (await portal().run(machine.recall(ADA.with_(session_id="t2"), "cat"))).text
    assert server.requests == []
    (turn,) = await machine.get_learnings(identity=ADA, store="conversation")
    assert turn["content"] == "I have a cat"


async def test_without_a_model_vectors_are_made_of_the_words_of_the_user(make: Make) -> None:
    with openai_server([GOOD]) as server:
        machine = make(server, environment={"LEARNING_MODEL": "none"})
        await record(machine, "I have a cat", "I have a dog")
        assert await learn(machine) == 2
    (request,) = server.embedding_requests
    assert sorted(request.body["input"]) == ["I have a cat", "I have a dog"]


async def test_a_hundred_memories_are_embedded_in_a_few_requests(make: Make) -> None:
    with openai_server([GOOD], dimensions=16) as server:
        machine = make(server, environment={"LEARNING_MODEL": "none"})
        await record(machine, *(f"thought number {number}" for number in range(100)))
        assert await learn(machine) == 100
        assert await portal().run(machine.embed_memories(ADA)) == 0
    embedded = [text for request in server.embedding_requests for text in request.body["input"]]
    assert len(embedded) == len(set(embedded)) == 100
    assert len(server.embedding_requests) <= 3


# --- servers that fail ------------------------------------------------------------------------------------------

_TEXT = "I have saved it, no need for a tool."


@contextmanager
def failing(*faults: Any, api_key: str | None = None) -> Iterator[OpenAIServer]:
    """Meets each fault in turn, then answers well."""
    with openai_server([*faults, GOOD], api_key=api_key) as server:
        yield server


@pytest.mark.parametrize(
    "fault",
    [
        Refusal(status=401, message=f"Incorrect API key provided: {KEY}"),
        Refusal(status=400, message="This model does not support tools"),
        Refusal(status=404, message="The model does not exist"),
        Refusal(status=429, message="Rate limit", retry_after=timedelta(0)),
        Refusal(status=500),
        Refusal(status=503),
        CutOff(GOOD),
        _TEXT,
        AIMessage(""),
        tool_call("Learned", user_memory="cat"),
        tool_call("SendMail", to="eve"),
        learned(user_memory=[add("x", memory_type="opinion")]),
    ],
    ids=lambda fault: str(fault.status) if isinstance(fault, Refusal) else str(fault)[:30],
)
async def test_a_fault_teaches_nothing_and_the_next_answer_is_learned_once(make: Make, fault: Any) -> None:
    with failing(fault) as server:
        machine = make(
            model=ChatOpenAI(model="gpt", base_url=server.url, api_key=SecretStr(KEY), max_retries=0),
            environment={"LEARNING_EMBEDDINGS": "none"},
        )
        await record(machine, "I have a cat", "She is called Zoë")
        with pytest.raises(ModelError) as caught:
            await learn(machine)
        assert KEY not in str(caught.value)
        assert (await contents(machine), await waiting(machine)) == ([], 2)
        assert await learn(machine) == 2
        assert await learn(machine) == 0
        assert await contents(machine) == ["Has a cat"]
    assert len(server.chat_requests) == 2


async def test_an_error_says_what_the_server_said_in_kind(make: Make) -> None:
    """An operator must be able to tell a wrong key from a full quota without the text of the conversation."""
    with failing(Refusal(status=401), Refusal(status=404), Hang()) as server:
        machine = make(
            model=ChatOpenAI(model="gpt", base_url=server.url, api_key=SecretStr(KEY), max_retries=0),
            environment={"LEARNING_EMBEDDINGS": "none", "LEARNING_MODEL_TIMEOUT": "0.2"},
        )
        await record(machine, "I have a cat")
        told = []
        for _ in range(3):
            with pytest.raises(ModelError) as caught:
                await learn(machine)
            told.append(str(caught.value))
    assert "401" in told[0]
    assert "404" in told[1]
    assert "0.2 seconds" in told[2]
    assert not [text for text in told if "a cat" in text]


async def test_an_answer_with_its_evidence_invented_is_refused_over_the_wire_too(
    make: Make, heard: list[Event]
) -> None:
    answers = [learned(user_memory=[add("Owns a boat", "r7.m7"), add("Has a cat")])]
    with openai_server(answers) as server:
        machine = make(server, environment={"LEARNING_EMBEDDINGS": "none"})
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
    assert await contents(machine) == ["Has a cat"]
    assert [event.name for event in heard].count("operation_refused") == 1


async def test_a_server_that_hangs_is_given_up_and_asked_again_later(make: Make) -> None:
    with failing(Hang()) as server:
        machine = make(server, environment={"LEARNING_MODEL_TIMEOUT": "0.3", "LEARNING_EMBEDDINGS": "none"})
        await record(machine, "I have a cat")
        with pytest.raises(ModelError, match="seconds"):
            await learn(machine)
        assert await waiting(machine) == 1
        await machine.aclose()
        again = make(server, environment={"LEARNING_MODEL_TIMEOUT": "20", "LEARNING_EMBEDDINGS": "none"})
        assert await learn(again) == 1
        assert await contents(again) == ["Has a cat"]


async def test_a_busy_server_is_asked_again_by_the_client_itself(make: Make) -> None:
    with failing(Refusal(status=429, retry_after=timedelta(0)), Refusal(status=500)) as server:
        machine = make(server, environment={"LEARNING_EMBEDDINGS": "none"})
        await record(machine, "I have a cat")
        assert await learn(machine) == 1
    assert len(server.chat_requests) == 3


async def test_a_server_that_is_not_there_is_a_model_that_failed(make: Make) -> None:
    with openai_server() as server:
        url = server.url
    machine = make(
        model=ChatOpenAI(model="gpt", base_url=url, api_key=SecretStr(KEY), max_retries=0),
        environment={"LEARNING_EMBEDDINGS": "none"},
    )
    await record(machine, "I have a cat")
    with pytest.raises(ModelError, match="Connect"):
        await learn(machine)
    assert await waiting(machine) == 1


async def test_the_worker_learns_once_through_faults(make: Make, heard: list[Event]) -> None:
    with failing(Refusal(status=400), _TEXT) as server:
        machine = make(server, environment={"LEARNING_WORKER": "inside", "LEARNING_EMBEDDINGS": "none"})
        await record(machine, "I have a cat")
        assert not await machine.drain()  # one failure is hurried past, a second waits for its time
        assert await waiting(machine) == 1
        assert await learn(machine) == 1
        assert await contents(machine) == ["Has a cat"]
    names = [event.name for event in heard]
    assert names.count("learning_attempt_failed") == 2
    assert names.count("session_learned") == 1
    assert KEY not in str(heard)


# --- vectors that fail ------------------------------------------------------------------------------------------


async def test_vectors_that_could_not_be_made_are_made_at_the_next_try(
    make: Make, heard: list[Event]
) -> None:
    """The memories are learned; the job that finds nothing left to learn still finds vectors to make."""
    with openai_server([GOOD], embedding_faults=[Refusal(status=400)]) as server:
        machine = make(server, environment={"LEARNING_WORKER": "inside"})
        await record(machine, "I have a cat")
        assert await machine.drain()
        assert await contents(machine) == ["Has a cat"]
        found = {
            hit["content"]: hit["why"]["vector"]["score"] for hit in await machine.search("cat", identity=ADA)
        }
        assert found.keys() == {"I have a cat", "Has a cat"}
        assert all(score > 0 for score in found.values())
    assert len(server.chat_requests) == 1
    assert [event.name for event in heard].count("session_learned") == 1


@pytest.mark.parametrize(
    "fault",
    [
        Refusal(status=401),
        Refusal(status=500),
        Hang(),
        CutOff(),
        Slow(delay=timedelta(seconds=30), answer=None),
    ],
)
async def test_a_question_without_a_vector_is_answered_by_words(
    make: Make, heard: list[Event], fault: Any
) -> None:
    with openai_server([GOOD], embedding_faults=[None, *[fault] * 10]) as server:
        machine = make(server, environment={"LEARNING_EMBEDDING_TIMEOUT": "0.3"})
        await record(machine, "I have a cat")
        await learn(machine)
        heard.clear()
        found = await portal().run(machine.recall(ADA, "my cat"))
    assert "Has a cat" in found.text
    (event,) = [event for event in heard if event.name == "embedding_failed"]
    assert event.facts["model"] == "openai:text-embedding-3-small"
    assert "my cat" not in str(event.facts)
    assert not [event for event in heard if event.name == "recall_failed"]


# --- names that lead nowhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt-5-mini-without-key", "OPENAI_API_KEY"),
        ("openai:gpt-5-mini", "OPENAI_API_KEY"),
        ("nonsuch:model", "nonsuch"),
        ("mistralai:small", "langchain-mistralai|langchain_mistralai"),
        ("mystery-model", "mystery-model"),
    ],
)
async def test_a_model_that_cannot_be_made_is_refused_with_the_next_step(
    make: Make, name: str, says: str
) -> None:
    machine = make(model=name)
    await record(machine, "I have a cat")
    with pytest.raises(ConfigurationError, match=says):
        await learn(machine)
    assert await waiting(machine) == 1


@pytest.mark.parametrize("name", ["openai:text-embedding-3-small", "nonsuch:model", "no provider"])
async def test_an_embedder_that_cannot_be_made_is_told_once_and_recall_goes_by_words(
    make: Make, heard: list[Event], name: str
) -> None:
    machine = make(embeddings=name)
    await record(machine, "I have a cat")
    assert await learn(machine) == 1
    for _ in range(2):
        assert "I have a cat" in (await portal().run(machine.recall(ADA.with_(session_id="t2"), "cat"))).text
    (event,) = [event for event in heard if event.name == "embedding_failed"]
    assert event.facts["model"] == name
