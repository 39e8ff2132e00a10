"""The one place that reads the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from agent.errors import ConfigurationError, IdentityError
from agent.identity import DEFAULT_TENANT, Identity

DEFAULT_OPENAI_MODEL = "openai:gpt-5-mini"
DEFAULT_OPENAI_EMBEDDINGS = "openai:text-embedding-3-small"


class WorkerMode(StrEnum):
    """Who learns what this process records."""

    AUTO = "auto"
    """A small worker in this process, unless another worker is alive."""
    INSIDE = "inside"
    """Always a worker in this process."""
    OFF = "off"
    """Never: `agent worker` runs elsewhere."""


class Settings(BaseModel):
    """Everything that can be set, read once from the environment and `.env`.

    Values are final: nobody writes into settings they were given; `model_copy(update=…)` makes others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: SecretStr | None = None
    """Postgres to use, `postgresql://…` (`DATABASE_URL`). Unset: Supabase if set, else the embedded server."""
    supabase_url: str | None = None
    """Project address of Supabase (`SUPABASE_URL`), without credentials; used when `database_url` is unset."""
    supabase_service_role_key: SecretStr | None = None
    """Key of a server: bypasses row level security (`SUPABASE_SERVICE_ROLE_KEY`, or an `sb_secret_…` key)."""
    supabase_anon_key: SecretStr | None = None
    """Public key (`SUPABASE_ANON_KEY`); good only together with a user's access token."""
    supabase_access_token: SecretStr | None = None
    """A user's JWT (`SUPABASE_ACCESS_TOKEN`); its claims are then the identity."""
    openai_api_key: SecretStr | None = None
    """Set: extraction by a small OpenAI model and OpenAI's embeddings (`OPENAI_API_KEY`)."""

    openai_base_url: str | None = None
    """Address of a server that speaks OpenAI's protocol (`OPENAI_BASE_URL`). Default: OpenAI."""

    model: str | None = None
    """LangChain `provider:model` for extraction (`LEARNING_MODEL`); `none` turns it off. Default: OpenAI's small
    model where `OPENAI_API_KEY` is set, else none."""
    embeddings: str | None = None
    """LangChain `provider:model` for vectors (`LEARNING_EMBEDDINGS`); `none` turns them off. Default as `model`."""
    data_dir: Path = Path(".agent")
    """Folder for the embedded server and the spool (`LEARNING_DATA_DIR`)."""
    tenant: str = DEFAULT_TENANT
    """Tenant of runs that name none (`LEARNING_TENANT`)."""
    default_user: str | None = None
    """User of runs that name none (`LEARNING_DEFAULT_USER`): for one person on one machine. Unset: such runs read
    and write nothing personal."""
    token_budget: int = Field(default=1500, ge=100, le=100_000)
    """Tokens that recalled knowledge may take in a prompt (`LEARNING_TOKEN_BUDGET`)."""
    quiet_period: timedelta = timedelta(seconds=20)
    """How long a session must be quiet before it is learned, in seconds (`LEARNING_QUIET_PERIOD`); 0 learns at once.
    A session that never rests is learned after fifteen quiet periods."""
    tool_warnings: bool = False
    """Whether an agent whose tool call failed is told, with the error, what such calls had in common before
    (`LEARNING_TOOL_WARNINGS`): one more database call for each call that fails. People see warnings on the cards of
    calls that wait for them in any case."""
    durable_runs: bool = False
    """Whether an answer waits until its run is on the database's disk (`LEARNING_DURABLE_RUNS`). If not, a run is
    handed over when the answer is given, and two things may lose it, whole and with its order to learn: a kill of this
    process in the few milliseconds after the answer, before the database has the run, and a crash of the database
    server in the half second after that. A process that ends in the ordinary way waits for its runs. Where the database
    is slow, an answer waits as soon as more than 64 runs of its machine are on their way."""
    worker: WorkerMode = WorkerMode.AUTO
    """Who learns: `auto`, `inside` or `off` (`LEARNING_WORKER`)."""
    recall_timeout: timedelta = timedelta(seconds=2)
    """Longest wait for recall, in seconds; then the agent answers without (`LEARNING_RECALL_TIMEOUT`)."""
    model_timeout: timedelta = timedelta(seconds=60)
    """Longest wait for one extraction call, in seconds (`LEARNING_MODEL_TIMEOUT`)."""
    embedding_timeout: timedelta = timedelta(milliseconds=800)
    """Longest wait for the embedding of a question, in seconds (`LEARNING_EMBEDDING_TIMEOUT`)."""
    reranker: str | None = None
    """`module:object` of a LangChain document compressor that puts what was found into a better order
    (`LEARNING_RERANKER`), or of something that returns one when called. Unset: none."""
    reranker_timeout: timedelta = timedelta(milliseconds=800)
    """Longest wait for the reranker, in seconds; then the order without it counts (`LEARNING_RERANKER_TIMEOUT`)."""
    stalled_after: timedelta = timedelta(seconds=30)
    """A worker without a heartbeat for this long is taken for dead and its jobs are done by others, in seconds
    (`LEARNING_STALLED_AFTER`)."""
    exit_timeout: timedelta = timedelta(seconds=5)
    """How long a leaving process goes on learning what it recorded, in seconds (`LEARNING_EXIT_TIMEOUT`)."""

    policy_file: Path | None = None
    """TOML file that says who may approve, what tools may do and which tables SQL may touch (`LEARNING_POLICY_FILE`).
    Unset: `agent-policy.toml` in the working folder where there is one; without one nobody may approve anything."""
    sql_logins_file: Path | None = None
    """Private file with the database logins of agents' SQL (`LEARNING_SQL_LOGINS_FILE`), written by
    `agent migrate --roles`. Unset: `sql_logins.json` in the data folder."""
    public_url: str | None = None
    """Address under which people reach this server (`LEARNING_PUBLIC_URL`), for links in approval cards."""
    supabase_jwt_secret: SecretStr | None = None
    """Secret of the project's access tokens (`SUPABASE_JWT_SECRET`): reviewers may then decide on the web with one."""
    slack_bot_token: SecretStr | None = None
    """Token of the Slack app, `xoxb-…` (`SLACK_BOT_TOKEN`); with the signing secret approvals go to Slack."""
    slack_signing_secret: SecretStr | None = None
    """Secret by which Slack signs what it sends (`SLACK_SIGNING_SECRET`)."""
    slack_app_token: SecretStr | None = None
    """Token of Socket Mode, `xapp-…` (`SLACK_APP_TOKEN`): answers come over a connection of ours, no public address."""
    slack_api_url: str = "https://slack.com/api/"
    """Address of Slack's interface (`SLACK_API_URL`)."""
    telegram_bot_token: SecretStr | None = None
    """Token of the Telegram bot (`TELEGRAM_BOT_TOKEN`); with the secret approvals go to Telegram."""
    telegram_secret: SecretStr | None = None
    """Secret that Telegram sends with every update (`TELEGRAM_SECRET`)."""
    telegram_api_url: str = "https://api.telegram.org"
    """Address of Telegram's interface (`TELEGRAM_API_URL`)."""
    smtp_url: SecretStr | None = None
    """Mail server of the tool `send_email`, `smtp://user:password@host:587` or `smtps://…` (`LEARNING_SMTP_URL`)."""
    mail_from: str | None = None
    """Sender of mail (`LEARNING_MAIL_FROM`)."""

    app_database_url: SecretStr | None = None
    """Postgres of the application that agents work on, where it is another than ours (`APP_DATABASE_URL`): what
    discovery reads. Unset: our own database."""
    discovery_exclude: tuple[str, ...] = ()
    """What discovery leaves out (`LEARNING_DISCOVERY_EXCLUDE`): `schema.name` patterns with `*` and `?`, separated by
    commas. System schemas and what belongs to this layer are left out anyway."""
    discovery_timeout: timedelta = timedelta(seconds=2)
    """Longest time of one statement of discovery, in seconds (`LEARNING_DISCOVERY_TIMEOUT`)."""
    metrics_token: SecretStr | None = None
    """What a program must send as `Authorization: Bearer …` to read the metrics of this server
    (`LEARNING_METRICS_TOKEN`). Unset: only programs on the same machine may."""
    learner: bool = True
    """Whether a server of this process starts the hourly learner (`LEARNING_LEARNER`)."""
    learner_interval: timedelta = timedelta(hours=1)
    """Time between two cycles of the learner, in seconds (`LEARNING_LEARNER_INTERVAL`)."""
    monitor: bool = True
    """Whether a server of this process starts the monitor (`LEARNING_MONITOR`)."""
    monitor_interval: timedelta = timedelta(minutes=5)
    """Time between two checks of the monitor, in seconds (`LEARNING_MONITOR_INTERVAL`)."""
    target_resolution_rate: float = Field(default=0.7, ge=0, le=1)
    """Least share of conversations resolved without a person (`LEARNING_TARGET_RESOLUTION_RATE`)."""
    target_escalation_rate: float = Field(default=0.1, ge=0, le=1)
    """Largest share of conversations handed to a person (`LEARNING_TARGET_ESCALATION_RATE`)."""
    target_confidence: float = Field(default=0.8, ge=0, le=1)
    """Least average confidence that agents report (`LEARNING_TARGET_CONFIDENCE`)."""
    target_category_accuracy: float = Field(default=0.75, ge=0, le=1)
    """Least share of runs whose category was right (`LEARNING_TARGET_CATEGORY_ACCURACY`)."""
    target_response_time: timedelta = timedelta(seconds=10)
    """Longest time that 95 of 100 runs may take, in seconds (`LEARNING_TARGET_RESPONSE_TIME`)."""
    alert_slack_webhook: SecretStr | None = None
    """Address of a Slack incoming webhook that gets alerts (`LEARNING_ALERT_SLACK_WEBHOOK`)."""
    alert_telegram_chat: str | None = None
    """Chat that gets alerts from the Telegram bot (`LEARNING_ALERT_TELEGRAM_CHAT`)."""
    alert_webhook: SecretStr | None = None
    """Any address that gets alerts as JSON by POST (`LEARNING_ALERT_WEBHOOK`)."""
    alert_mail: str | None = None
    """Receivers of alerts by mail, separated by commas (`LEARNING_ALERT_MAIL`); needs `smtp_url` and `mail_from`."""
    alert_cooldown: timedelta = timedelta(minutes=30)
    """How long a cause that was resolved must rest before it is told anew, in seconds (`LEARNING_ALERT_COOLDOWN`)."""
    alert_reminder: timedelta = timedelta(hours=4)
    """How often an alert that lasts is told again, in seconds (`LEARNING_ALERT_REMINDER`)."""

    @field_validator("discovery_exclude", mode="before")
    @classmethod
    def _is_a_list(cls, given: Any) -> Any:
        if isinstance(given, str):
            return tuple(part.strip() for part in given.split(",") if part.strip())
        return given

    @field_validator("discovery_exclude")
    @classmethod
    def _is_schema_and_name(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if "." not in pattern:
                raise ValueError(f"{pattern!r} must be schema.name; for a whole schema write {pattern}.*")
        return patterns

    @field_validator("alert_slack_webhook", "alert_webhook")
    @classmethod
    def _is_secret_web_address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                parts = urlsplit(url.get_secret_value())
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # whose words may show the address, which is a secret
                usable = False
            if not usable:
                raise ValueError("must be an address that begins with https:// or http://")
        return url

    @field_validator("database_url", "app_database_url")
    @classmethod
    def _is_postgres(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must begin with postgresql:// and does not")
        try:
            urlsplit(url.get_secret_value() if url is not None else "")
        except ValueError:  # whose words may show the password
            raise ValueError("cannot be read; are [ ] / @ : in the password percent-encoded?") from None
        return url

    @field_validator("supabase_url", "openai_base_url", "public_url", "slack_api_url", "telegram_api_url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if "@" in url:  # addresses are shown in errors and by the doctor, and a password would be with them
            raise ValueError(
                "must not hold a user name or a password. Leave out what stands before the @; keys have settings of "
                "their own, and an @ of the path is written %40"
            )
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - reading it is the check
        except ValueError:  # whose words may show more than the value's first characters
            raise ValueError("cannot be read; must be an address such as https://host:port/path") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address that begins with https:// or http://")
        return url

    @field_validator("reranker")
    @classmethod
    def _is_module_and_object(cls, named: str | None) -> str | None:
        if named is not None and not re.fullmatch(r"[\w.]+:\w+", named):
            raise ValueError("must be module:object, such as my_rerankers:reranker")
        return named

    @field_validator("tenant", "default_user")
    @classmethod
    def _is_an_id(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                Identity(user_id=name)
            except IdentityError as error:
                raise ValueError(str(error).replace("user_id", "the id", 1)) from None
        return name

    @field_validator("data_dir", "policy_file", "sql_logins_file")
    @classmethod
    def _is_from_home(cls, path: Path | None) -> Path | None:
        try:
            return path.expanduser() if path is not None else None  # no shell has read `.env`
        except RuntimeError:
            raise ValueError("names the home of a user that is not here") from None

    @field_validator("smtp_url")
    @classmethod
    def _is_mail_server(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                parts = urlsplit(url.get_secret_value())
                usable = parts.scheme in ("smtp", "smtps") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # whose words may show the password
                usable = False
            if not usable:
                raise ValueError("must be an address such as smtp://user:password@host:587")
        return url

    @field_validator("telegram_secret")
    @classmethod
    def _is_telegram_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,256}", secret.get_secret_value()):
            raise ValueError("must be 16 to 256 of A-Z a-z 0-9 _ -")
        return secret

    @field_validator("quiet_period", "exit_timeout", "alert_cooldown")
    @classmethod
    def _is_not_negative(cls, duration: timedelta) -> timedelta:
        if duration < timedelta(0):
            raise ValueError("must not be negative")
        return duration

    @field_validator(
        "recall_timeout", "model_timeout", "embedding_timeout", "reranker_timeout", "stalled_after",
        "discovery_timeout", "learner_interval", "monitor_interval", "target_response_time", "alert_reminder",
    )  # fmt: skip
    @classmethod
    def _is_some_time(cls, duration: timedelta) -> timedelta:
        if duration <= timedelta(0):
            raise ValueError("must be more than 0 seconds")
        return duration

    @property
    def extraction_model(self) -> str | None:
        """`provider:model` that extracts, or `None` for no model."""
        return self._chosen(self.model, DEFAULT_OPENAI_MODEL)

    @property
    def embedding_model(self) -> str | None:
        """`provider:model` that embeds, or `None` for no vectors."""
        return self._chosen(self.embeddings, DEFAULT_OPENAI_EMBEDDINGS)

    def _chosen(self, named: str | None, default: str) -> str | None:
        if named is not None:
            return None if named == "none" else named
        return default if self.openai_api_key is not None else None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Settings from these variables; where two name one setting, the earlier counts.

        Raises:
            ConfigurationError: a value is malformed, or a `LEARNING_…` variable is unknown; then it names the nearest.
        """
        given: dict[str, Any] = {}
        for variable, value in environment.items():
            if variable in _FIELD_OF_VARIABLE:
                if value != "":
                    given.setdefault(_FIELD_OF_VARIABLE[variable], value)
            elif variable.startswith("LEARNING_") and variable not in _NOT_OURS:
                near = difflib.get_close_matches(variable, _FIELD_OF_VARIABLE, n=1)
                hint = (
                    f"; did you mean {near[0]}?"
                    if near
                    else f"; known are {', '.join(_learning_variables())}"
                )
                # Without the value: it may be a key under a wrong name.
                raise ConfigurationError(f"unknown setting {variable}{hint}")
        for name in _SECONDS & given.keys():
            try:
                given[name] = timedelta(seconds=float(given[name]))
            except (ValueError, OverflowError):
                raise ConfigurationError(
                    f"{_VARIABLE_OF_FIELD[name]}={given[name]!r} is not a number of seconds"
                ) from None
        try:
            return cls(**given)
        except ValidationError as error:
            faults = "; ".join(
                f"{_shown(str(fault['loc'][0]), environment)}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_url=False, include_input=False)
            )
            raise ConfigurationError(f"settings refused: {faults}") from None


_FIELD_OF_VARIABLE = {
    "DATABASE_URL": "database_url",
    "SUPABASE_URL": "supabase_url",
    "SUPABASE_SERVICE_ROLE_KEY": "supabase_service_role_key",
    "SUPABASE_SECRET_KEY": "supabase_service_role_key",
    "SUPABASE_ANON_KEY": "supabase_anon_key",
    "SUPABASE_PUBLISHABLE_KEY": "supabase_anon_key",
    "SUPABASE_ACCESS_TOKEN": "supabase_access_token",
    "OPENAI_API_KEY": "openai_api_key",
    "OPENAI_BASE_URL": "openai_base_url",
    "SUPABASE_JWT_SECRET": "supabase_jwt_secret",
    "SLACK_BOT_TOKEN": "slack_bot_token",
    "SLACK_SIGNING_SECRET": "slack_signing_secret",
    "SLACK_APP_TOKEN": "slack_app_token",
    "SLACK_API_URL": "slack_api_url",
    "TELEGRAM_BOT_TOKEN": "telegram_bot_token",
    "TELEGRAM_SECRET": "telegram_secret",
    "TELEGRAM_API_URL": "telegram_api_url",
    "APP_DATABASE_URL": "app_database_url",
} | {
    f"LEARNING_{name.upper()}": name
    for name in (
        "model", "embeddings", "data_dir", "tenant", "default_user", "token_budget", "quiet_period",
        "tool_warnings", "durable_runs", "worker",
        "recall_timeout", "model_timeout", "embedding_timeout", "reranker", "reranker_timeout", "stalled_after",
        "exit_timeout",
        "policy_file", "sql_logins_file", "public_url", "smtp_url", "mail_from",
        "discovery_exclude", "discovery_timeout", "learner", "learner_interval", "monitor", "monitor_interval",
        "target_resolution_rate", "target_escalation_rate", "target_confidence", "target_category_accuracy",
        "target_response_time",
        "alert_slack_webhook", "alert_telegram_chat", "alert_webhook", "alert_mail", "alert_cooldown", "alert_reminder",
        "metrics_token",
    )
}  # fmt: skip
_VARIABLE_OF_FIELD = {field: variable for variable, field in reversed(_FIELD_OF_VARIABLE.items())}
_SECONDS = {name for name, info in Settings.model_fields.items() if info.annotation is timedelta}
_NOT_OURS = {"LEARNING_DATA"}  # where tests and benchmarks find their data


def _shown(field: str, environment: Mapping[str, str]) -> str:
    """The variable of a field with its value, unless that is or holds a secret."""
    variables = [name for name, of in _FIELD_OF_VARIABLE.items() if of == field]
    variable = next((name for name in variables if environment.get(name)), variables[0])
    value = environment.get(variable, "")
    is_secret = "Secret" in str(Settings.model_fields[field].annotation) or "@" in value
    return variable if is_secret else f"{variable}={value[:100]!r}"


def _learning_variables() -> list[str]:
    return sorted(name for name in _FIELD_OF_VARIABLE if name.startswith("LEARNING_"))


@lru_cache(maxsize=1)
def current_settings() -> Settings:
    """The settings of this process, read at the first call: the environment first, then `.env` in this folder.

    Raises:
        ConfigurationError: a value is malformed, or a `LEARNING_…` variable is unknown.
    """
    try:
        from_file = {name: value or "" for name, value in dotenv_values(".env").items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f".env in this folder cannot be read: {error}") from None
    return Settings.from_environment({**os.environ, **from_file, **os.environ})


def telemetry_endpoint() -> str | None:
    """Where OpenTelemetry's own variables (`OTEL_…`, of the environment alone) send traces; `None`: nowhere, or they
    switch that off. Its SDK reads the rest of them by itself."""
    given = os.environ
    if (
        given.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        or given.get("OTEL_TRACES_EXPORTER") == "none"
    ):
        return None
    return given.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or given.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
