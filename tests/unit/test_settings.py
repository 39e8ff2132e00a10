"""Settings: where they come from, what they refuse and in which words, and that no secret gets out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from agent.errors import ConfigurationError
from agent.learning.machine import LearningMachine
from agent.settings import Settings, WorkerMode, current_settings

SECRET = "hunter2-do-not-show"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings are read once a process: each test reads them anew, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    current_settings.cache_clear()
    yield
    current_settings.cache_clear()


def refusal_of(**environment: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment(environment)
    return str(caught.value)


def test_with_nothing_set_there_is_no_model_and_no_key() -> None:
    settings = Settings.from_environment({})
    assert (settings.extraction_model, settings.embedding_model) == (None, None)
    assert settings.database_url is None
    assert settings.worker is WorkerMode.AUTO
    assert settings.quiet_period == timedelta(seconds=20)
    assert settings.token_budget == 1500


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "DATABASE_URL": f"postgresql://u:{SECRET}@h/d",
            "SUPABASE_URL": "https://p.supabase.co",
            "SUPABASE_SERVICE_ROLE_KEY": "service",
            "SUPABASE_ANON_KEY": "anon",
            "SUPABASE_ACCESS_TOKEN": "jwt",
            "OPENAI_API_KEY": "sk",
            "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
            "LEARNING_MODEL": "a:b",
            "LEARNING_EMBEDDINGS": "c:d",
            "LEARNING_DATA_DIR": "/data",
            "LEARNING_TENANT": "acme",
            "LEARNING_DEFAULT_USER": "ada",
            "LEARNING_TOKEN_BUDGET": "200",
            "LEARNING_QUIET_PERIOD": "0.5",
            "LEARNING_WORKER": "off",
            "LEARNING_RECALL_TIMEOUT": "1",
            "LEARNING_MODEL_TIMEOUT": "2",
            "LEARNING_EMBEDDING_TIMEOUT": "3",
            "LEARNING_RERANKER": "mine:reranker",
            "LEARNING_RERANKER_TIMEOUT": "6",
            "LEARNING_STALLED_AFTER": "4",
            "LEARNING_EXIT_TIMEOUT": "0",
            "LEARNING_TOOL_WARNINGS": "true",
            "LEARNING_DURABLE_RUNS": "true",
            "LEARNING_POLICY_FILE": "/etc/policy.toml",
            "LEARNING_SQL_LOGINS_FILE": "/etc/logins.json",
            "LEARNING_PUBLIC_URL": "https://agents.example.com",
            "SUPABASE_JWT_SECRET": "signs",
            "SLACK_BOT_TOKEN": "xoxb-1",
            "SLACK_SIGNING_SECRET": "slack signs",
            "SLACK_APP_TOKEN": "xapp-1",
            "SLACK_API_URL": "http://127.0.0.1:2/api/",
            "TELEGRAM_BOT_TOKEN": "1:a",
            "TELEGRAM_SECRET": "sixteen_letters_",
            "TELEGRAM_API_URL": "http://127.0.0.1:3",
            "LEARNING_SMTP_URL": f"smtps://u:{SECRET}@h:465",
            "LEARNING_MAIL_FROM": "agent@example.com",
            "APP_DATABASE_URL": f"postgresql://r:{SECRET}@h/app",
            "LEARNING_DISCOVERY_EXCLUDE": "audit.*, public.tmp_?",
            "LEARNING_DISCOVERY_TIMEOUT": "5",
            "LEARNING_LEARNER": "off",
            "LEARNING_LEARNER_INTERVAL": "6",
            "LEARNING_MONITOR": "0",
            "LEARNING_MONITOR_INTERVAL": "7",
            "LEARNING_TARGET_RESOLUTION_RATE": "0.6",
            "LEARNING_TARGET_ESCALATION_RATE": "0.2",
            "LEARNING_TARGET_CONFIDENCE": "0.5",
            "LEARNING_TARGET_CATEGORY_ACCURACY": "0.9",
            "LEARNING_TARGET_RESPONSE_TIME": "8",
            "LEARNING_ALERT_SLACK_WEBHOOK": "https://hooks.slack.com/services/x",
            "LEARNING_ALERT_TELEGRAM_CHAT": "-100",
            "LEARNING_ALERT_WEBHOOK": "http://127.0.0.1:4/alerts",
            "LEARNING_ALERT_MAIL": "ops@example.com",
            "LEARNING_ALERT_COOLDOWN": "0",
            "LEARNING_ALERT_REMINDER": "9",
            "LEARNING_METRICS_TOKEN": "a metrics token",
            "PATH": "/bin",
        }
    )
    assert settings.model_fields_set == set(Settings.model_fields)
    assert settings == Settings(
        database_url=SecretStr(f"postgresql://u:{SECRET}@h/d"),
        supabase_url="https://p.supabase.co",
        supabase_service_role_key=SecretStr("service"),
        supabase_anon_key=SecretStr("anon"),
        supabase_access_token=SecretStr("jwt"),
        openai_api_key=SecretStr("sk"),
        openai_base_url="http://127.0.0.1:1/v1",
        model="a:b",
        embeddings="c:d",
        data_dir=Path("/data"),
        tenant="acme",
        default_user="ada",
        token_budget=200,
        quiet_period=timedelta(seconds=0.5),
        worker=WorkerMode.OFF,
        recall_timeout=timedelta(seconds=1),
        model_timeout=timedelta(seconds=2),
        embedding_timeout=timedelta(seconds=3),
        reranker="mine:reranker",
        reranker_timeout=timedelta(seconds=6),
        stalled_after=timedelta(seconds=4),
        exit_timeout=timedelta(0),
        tool_warnings=True,
        durable_runs=True,
        policy_file=Path("/etc/policy.toml"),
        sql_logins_file=Path("/etc/logins.json"),
        public_url="https://agents.example.com",
        supabase_jwt_secret=SecretStr("signs"),
        slack_bot_token=SecretStr("xoxb-1"),
        slack_signing_secret=SecretStr("slack signs"),
        slack_app_token=SecretStr("xapp-1"),
        slack_api_url="http://127.0.0.1:2/api/",
        telegram_bot_token=SecretStr("1:a"),
        telegram_secret=SecretStr("sixteen_letters_"),
        telegram_api_url="http://127.0.0.1:3",
        smtp_url=SecretStr(f"smtps://u:{SECRET}@h:465"),
        mail_from="agent@example.com",
        app_database_url=SecretStr(f"postgresql://r:{SECRET}@h/app"),
        discovery_exclude=("audit.*", "public.tmp_?"),
        discovery_timeout=timedelta(seconds=5),
        learner=False,
        learner_interval=timedelta(seconds=6),
        monitor=False,
        monitor_interval=timedelta(seconds=7),
        target_resolution_rate=0.6,
        target_escalation_rate=0.2,
        target_confidence=0.5,
        target_category_accuracy=0.9,
        target_response_time=timedelta(seconds=8),
        alert_slack_webhook=SecretStr("https://hooks.slack.com/services/x"),
        alert_telegram_chat="-100",
        alert_webhook=SecretStr("http://127.0.0.1:4/alerts"),
        alert_mail="ops@example.com",
        alert_cooldown=timedelta(0),
        alert_reminder=timedelta(seconds=9),
        metrics_token=SecretStr("a metrics token"),
    )


@pytest.mark.parametrize(
    ("variable", "field"),
    [
        ("SUPABASE_SECRET_KEY", "supabase_service_role_key"),
        ("SUPABASE_PUBLISHABLE_KEY", "supabase_anon_key"),
    ],
)
def test_supabases_newer_names_of_keys_are_taken_too(variable: str, field: str) -> None:
    key = getattr(Settings.from_environment({variable: "k"}), field)
    assert key.get_secret_value() == "k"


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("LEARNING_MODLE", "LEARNING_MODEL"),
        ("LEARNING_QUIET_PERIODS", "LEARNING_QUIET_PERIOD"),
        ("LEARNING_DATADIR", "LEARNING_DATA_DIR"),
        ("LEARNING_DEFAULTUSER", "LEARNING_DEFAULT_USER"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(unknown: str, near: str) -> None:
    message = refusal_of(**{unknown: "x"})
    assert unknown in message
    assert near in message


def test_an_unknown_variable_near_to_none_lists_what_there_is() -> None:
    message = refusal_of(LEARNING_ZZZZZZZZZZZZZZZ="x")
    assert all(name in message for name in ("LEARNING_MODEL", "LEARNING_WORKER", "LEARNING_TENANT"))


def test_what_discovery_leaves_out_is_named_with_its_schema() -> None:
    assert "store.*" in refusal_of(LEARNING_DISCOVERY_EXCLUDE="audit.*,store")


@pytest.mark.parametrize("unknown", ["LEARNING_OPENAI_API_KEY", "LEARNING_DATABASE_URL", "LEARNING_PASSWORD"])
def test_the_value_of_an_unknown_variable_is_not_shown(unknown: str) -> None:
    assert SECRET not in refusal_of(**{unknown: SECRET})


def test_variables_of_others_are_left_alone() -> None:
    given = {"DATABASE_URL_OLD": "x", "SUPABASE_DB_PASSWORD": "x", "OPENAI_ORG_ID": "x", "LEARNINGS": "x"}
    assert Settings.from_environment(given) == Settings()


def test_a_variable_set_to_nothing_is_not_set() -> None:
    assert Settings.from_environment({"DATABASE_URL": "", "LEARNING_TOKEN_BUDGET": ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LEARNING_TOKEN_BUDGET", "many"),
        ("LEARNING_TOKEN_BUDGET", "99"),
        ("LEARNING_TOKEN_BUDGET", "1e9"),
        ("LEARNING_WORKER", "INSIDE "),
        ("LEARNING_QUIET_PERIOD", "-1"),
        ("LEARNING_QUIET_PERIOD", "soon"),
        ("LEARNING_QUIET_PERIOD", "nan"),
        ("LEARNING_QUIET_PERIOD", "inf"),
        ("LEARNING_QUIET_PERIOD", "1e300"),
        ("LEARNING_RECALL_TIMEOUT", "-0.1"),
        ("LEARNING_RECALL_TIMEOUT", "0"),
        ("LEARNING_MODEL_TIMEOUT", "0"),
        ("LEARNING_EMBEDDING_TIMEOUT", "0"),
        ("LEARNING_STALLED_AFTER", "0"),
        ("LEARNING_EXIT_TIMEOUT", "-5"),
        ("LEARNING_TENANT", "  "),
        ("LEARNING_TENANT", "x" * 513),
        ("LEARNING_DEFAULT_USER", "\t"),
        ("DATABASE_URL", "mysql://h/d"),
        ("DATABASE_URL", "localhost:5432"),
        ("DATABASE_URL", "postgresql://[::1/d"),
        ("SUPABASE_URL", "project.supabase.co"),
        ("SUPABASE_URL", "https://"),
        ("OPENAI_BASE_URL", "localhost:11434"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(variable: str, value: str) -> None:
    assert variable in refusal_of(**{variable: value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LEARNING_TOKEN_BUDGET", "many"),
        ("LEARNING_WORKER", "everywhere"),
        ("LEARNING_QUIET_PERIOD", "soon"),
        ("LEARNING_STALLED_AFTER", "-7"),
        ("SUPABASE_URL", "project.supabase.co"),
    ],
)
def test_a_refusal_says_the_value_and_what_is_allowed(variable: str, value: str) -> None:
    message = refusal_of(**{variable: value})
    assert value in message
    assert len(message) > len(variable) + len(value) + 10


def test_all_faults_are_told_at_once() -> None:
    message = refusal_of(LEARNING_TOKEN_BUDGET="1", LEARNING_WORKER="x", DATABASE_URL="mysql://h")
    assert all(name in message for name in ("LEARNING_TOKEN_BUDGET", "LEARNING_WORKER", "DATABASE_URL"))


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{SECRET}@h/d",
        f"{SECRET}://u@h/d",
        f"u:{SECRET}@h/d",
        f"postgresql://u:{SECRET}@[h/d",
        f"postgresql://u:{SECRET}\u2100@h/d",
        f"host=h password={SECRET}",
    ],
)
def test_a_bad_database_address_is_refused_without_its_password(url: str) -> None:
    assert SECRET not in refusal_of(DATABASE_URL=url)


@pytest.mark.parametrize("variable", ["SUPABASE_URL", "OPENAI_BASE_URL"])
@pytest.mark.parametrize(
    "address",
    [
        f"https://ada:{SECRET}@h",
        f"https://{SECRET}@h/v1",
        f"https://ada:12/{SECRET}@h",
        f"https://ada:12#{SECRET}@h",
        f"https://ada:{SECRET}\u2100@h",
        f"https://h:{SECRET}/v1",
        f"https://[{SECRET}",
        f"ada:{SECRET}@h",
    ],
)
def test_a_web_address_with_a_login_is_refused_without_showing_it(variable: str, address: str) -> None:
    message = refusal_of(**{variable: address})
    assert variable in message
    if "@" in address:
        assert SECRET not in message
        assert "must not hold a user name or a password" in message


@pytest.mark.parametrize(
    "address",
    [f"http://u:{SECRET}@h", f"smtp://u:{SECRET}@", f"smtp://u:{SECRET}@h:port", f"smtp://{SECRET}@[h"],
)
def test_an_address_of_no_mail_server_is_refused_without_its_password(address: str) -> None:
    message = refusal_of(LEARNING_SMTP_URL=address)
    assert "LEARNING_SMTP_URL" in message
    assert "smtp://user:password@host:587" in message
    assert SECRET not in message


@pytest.mark.parametrize("secret", ["fifteen_letters", "sixteen letters ", "x" * 257, "\u00fc" * 16])
def test_a_secret_that_telegram_would_not_take_is_refused_without_showing_it(secret: str) -> None:
    message = refusal_of(TELEGRAM_SECRET=secret)
    assert "TELEGRAM_SECRET: must be 16 to 256 of A-Z a-z 0-9 _ -" in message
    assert secret not in message


def test_settings_given_in_code_are_refused_without_their_secrets() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"database_url": f"mysql://u:{SECRET}@h", "openai_api_key": [SECRET]})
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(ValidationError, match="modle"):
        Settings.model_validate({"modle": "x"})


def test_no_secret_shows() -> None:
    settings = Settings.from_environment(
        {
            "DATABASE_URL": f"postgresql://u:{SECRET}@h/d",
            "SUPABASE_URL": "https://p.supabase.co",
            "SUPABASE_SERVICE_ROLE_KEY": SECRET,
            "SUPABASE_ANON_KEY": SECRET,
            "SUPABASE_ACCESS_TOKEN": SECRET,
            "OPENAI_API_KEY": SECRET,
            "SUPABASE_JWT_SECRET": SECRET,
            "SLACK_BOT_TOKEN": SECRET,
            "SLACK_SIGNING_SECRET": SECRET,
            "SLACK_APP_TOKEN": SECRET,
            "TELEGRAM_BOT_TOKEN": SECRET,
            "TELEGRAM_SECRET": SECRET * 3,
            "LEARNING_SMTP_URL": f"smtp://u:{SECRET}@h",
        }
    )
    machine = LearningMachine(settings=settings)
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(machine), repr(machine.database)]
    assert not [text for text in shown if SECRET in text]


def test_settings_are_final() -> None:
    with pytest.raises(ValidationError):
        Settings().tenant = "other"


@pytest.mark.parametrize(
    ("environment", "model", "embeddings"),
    [
        ({"OPENAI_API_KEY": "k"}, "openai:gpt-5-mini", "openai:text-embedding-3-small"),
        ({"OPENAI_API_KEY": "k", "LEARNING_MODEL": "none"}, None, "openai:text-embedding-3-small"),
        ({"OPENAI_API_KEY": "k", "LEARNING_EMBEDDINGS": "none"}, "openai:gpt-5-mini", None),
        ({"LEARNING_MODEL": "ollama:qwen3"}, "ollama:qwen3", None),
        ({"OPENAI_API_KEY": ""}, None, None),
    ],
)
def test_a_key_chooses_the_models_and_a_name_overrules_it(
    environment: dict[str, str], model: str | None, embeddings: str | None
) -> None:
    settings = Settings.from_environment(environment)
    assert (settings.extraction_model, settings.embedding_model) == (model, embeddings)


# --- .env -------------------------------------------------------------------------------------------------------


def test_the_file_fills_what_the_environment_leaves_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(
        "LEARNING_TENANT=file\nLEARNING_DEFAULT_USER=ada # who\n", encoding="utf-8"
    )
    monkeypatch.setenv("LEARNING_TENANT", "environment")
    settings = current_settings()
    assert (settings.tenant, settings.default_user) == ("environment", "ada")


def test_an_empty_variable_turns_off_what_the_file_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://h/file\n", encoding="utf-8")
    monkeypatch.setenv("DATABASE_URL", "")
    assert current_settings().database_url is None


def test_the_environment_wins_whichever_of_two_names_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("SUPABASE_SECRET_KEY=of-the-file\n", encoding="utf-8")
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "of-the-environment")
    key = current_settings().supabase_service_role_key
    assert key is not None
    assert key.get_secret_value() == "of-the-environment"


def test_an_unknown_variable_in_the_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LEARNING_MODLE=x\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="LEARNING_MODEL"):
        current_settings()


def test_a_home_folder_in_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".env").write_text("LEARNING_DATA_DIR=~/memory\n", encoding="utf-8")
    assert current_settings().data_dir == tmp_path / "home" / "memory"


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe\x00LEARNING_TENANT=x")
    with pytest.raises(ConfigurationError, match=r"\.env"):
        current_settings()


@given(st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), st.text(max_size=40), max_size=4))
def test_whatever_is_set_gives_settings_or_a_plain_refusal(values: dict[str, str]) -> None:
    environment = {f"LEARNING_{field.upper()}": value for field, value in values.items()}
    environment |= {name.removeprefix("LEARNING_"): value for name, value in environment.items()}
    with suppress(ConfigurationError):
        assert isinstance(Settings.from_environment(environment), Settings)
