"""The script that makes the logins of agents' SQL: run by us where we may, else by the owner of the tables."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from psycopg import sql

from agent.approval.risk import Risk
from agent.errors import ConfigurationError

if TYPE_CHECKING:
    from agent.approval.policy_file import PolicyFile, Table

Kind = Literal["reader", "writer"]

_SCRAM_ROUNDS = 4096
_TAG = "$agent$"
_FORM = 2  # of the row policies: logins made in another form are made anew

# Never readable through agents' SQL, whatever a policy file says: secrets, keys, and our own tables.
_CLOSED_SCHEMAS = {
    "auth", "vault", "agent_private", "agent_queue", "information_schema", "pgsodium", "supabase_functions",
    "supabase_migrations", "storage", "net", "cron", "pgbouncer",
}  # fmt: skip
_OUR_TABLES = re.compile(r"public\.(agent_|human_approval_|approval_)")


@dataclass(frozen=True, kw_only=True)
class TenantLogins:
    """The two logins of one tenant in one database."""

    tenant_id: str
    key: str
    """Tells them from those of other tenants and databases: roles belong to the whole server."""
    reader_password: str
    writer_password: str

    @property
    def reader(self) -> str:
        """Name of the login that reads."""
        return f"agent_reader_{self.key}"

    @property
    def writer(self) -> str:
        """Name of the login that writes."""
        return f"agent_writer_{self.key}"

    @classmethod
    def make(cls, tenant_id: str, database: str, *, kept: dict[str, str] | None = None) -> TenantLogins:
        """Logins with the passwords that are kept for them, else with new ones."""
        digest = hashlib.sha256(f"{database}\0{tenant_id}".encode()).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9]+", "_", tenant_id.lower()).strip("_")[:24]
        return cls(
            tenant_id=tenant_id,
            key=f"{slug}_{digest}" if slug else digest,
            reader_password=_password_of((kept or {}).get("reader")),
            writer_password=_password_of((kept or {}).get("writer")),
        )


def _password_of(url: str | None) -> str:
    kept = urlsplit(url).password if url else None
    return unquote(kept) if kept else secrets.token_hex(24)


def owner_script(policy: PolicyFile, logins: TenantLogins) -> str:
    """What the owner of the tables must run for these logins; running it again makes them what the policy says now.

    It holds SCRAM verifiers of the passwords and not the passwords.

    Raises:
        ConfigurationError: the policy lists a table that no agent may touch, or a name that is none.
    """
    tables = tables_of(policy, logins.tenant_id)
    parts = [
        _render(_ROLES, logins),
        _render(_SETTINGS_OF_ROLES, logins, statement_ms=int(policy.sql.timeout_seconds * 1000)),
        _render(_TAKE_BACK, logins),
        _render(_HARDEN, logins),
        *(_grants(table, logins) for table in tables),
        *(_render(_ROWS, logins, **_row_names(table, logins)) for table in tables if table.tenant_column),
        *(
            _render(_FUNCTION, logins, function=name, is_read=Risk.of(str(risk)) is Risk.READ)
            for name, risk in policy.sql.functions.items()
        ),
        _render(_ENROL, logins),
    ]
    return "\n".join(parts)


def tables_of(policy: PolicyFile, tenant_id: str) -> list[Table]:
    """The tables that the SQL of this tenant's agents may touch.

    Raises:
        ConfigurationError: one is listed that no agent may touch, or its name is none.
    """
    found = [table for table in policy.tables if "*" in table.tenants or tenant_id in table.tenants]
    for table in found:
        schema, name = _split(table.name)
        if schema in _CLOSED_SCHEMAS or schema.startswith("pg_") or _OUR_TABLES.match(f"{schema}.{name}"):
            raise ConfigurationError(
                f"the policy lists the table {table.name!r}, which no agent's SQL may touch: it holds secrets, or what "
                "this package decides by. Take it out of the policy file"
            )
    return found


def policy_digest(policy: PolicyFile, tenant_id: str) -> str:
    """Changes with whatever the logins of this tenant depend on, and with nothing else in the policy file."""
    told = [
        [
            table.name, sorted(table.columns) if table.columns is not None else None, table.tenant_column,
            table.insert, sorted(table.update), table.delete,
        ]
        for table in tables_of(policy, tenant_id)
    ]  # fmt: skip
    functions = sorted((name, str(risk)) for name, risk in policy.sql.functions.items())
    whole = json.dumps([_FORM, told, functions, float(policy.sql.timeout_seconds)])
    return hashlib.sha256(whole.encode()).hexdigest()


def _split(name: str) -> tuple[str, str]:
    schema, dot, rest = name.partition(".")
    if not dot or not schema or not rest or "." in rest or _TAG in name or "\x00" in name:
        raise ConfigurationError(f"{name!r} in the policy file is no name of the form schema.name")
    return schema, rest


def _render(template: str, logins: TenantLogins, **values: Any) -> str:
    """The template with names and literals put in. `{name}` is a literal, `{"name"}` an identifier."""
    known = {
        "reader": logins.reader,
        "writer": logins.writer,
        "tenant": logins.tenant_id,
        "key": logins.key,
        "reader_verifier": verifier(logins.reader_password),
        "writer_verifier": verifier(logins.writer_password),
        **values,
    }
    if any(_TAG in str(value) for value in known.values()):
        raise ConfigurationError(f"a name in the policy file holds {_TAG!r}")

    def put(found: re.Match[str]) -> str:
        value = known[found[2]]
        return (sql.Identifier(value) if found[1] else sql.Literal(value)).as_string(None)

    return re.sub(r'\{("?)(\w+)"?\}', put, template)


def verifier(password: str, *, salt: bytes | None = None) -> str:
    """What Postgres stores for a password (RFC 5803), so that the password itself is in no script and no log."""
    salt = salt or secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ROUNDS)
    client = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    told = [base64.b64encode(part).decode() for part in (salt, client, server)]
    return f"SCRAM-SHA-256${_SCRAM_ROUNDS}:{told[0]}${told[1]}:{told[2]}"


def _grants(table: Table, logins: TenantLogins) -> str:
    schema, name = _split(table.name)
    target = sql.Identifier(schema, name)
    both = sql.SQL(", ").join([sql.Identifier(logins.reader), sql.Identifier(logins.writer)])
    writer = sql.Identifier(logins.writer)

    def columns(names: Iterable[str] | None) -> sql.Composable:
        return (
            sql.SQL("")
            if names is None
            else sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, sorted(names))))
        )

    made = [
        sql.SQL("GRANT USAGE ON SCHEMA {} TO {};").format(sql.Identifier(schema), both),
        sql.SQL("GRANT SELECT{} ON TABLE {} TO {};").format(columns(table.columns), target, both),
    ]
    if table.insert:
        made.append(sql.SQL("GRANT INSERT ON TABLE {} TO {};").format(target, writer))
    if table.update:
        made.append(
            sql.SQL("GRANT UPDATE{} ON TABLE {} TO {};").format(columns(table.update), target, writer)
        )
    if table.delete:
        made.append(sql.SQL("GRANT DELETE ON TABLE {} TO {};").format(target, writer))
    text = "\n".join(statement.as_string(None) for statement in made)
    if _TAG in text:
        raise ConfigurationError(f"a name in the policy file holds {_TAG!r}")
    return f"{text}\n{_render(_SEQUENCES, logins, target=target.as_string(None))}" if table.insert else text


def _row_names(table: Table, logins: TenantLogins) -> dict[str, str]:
    schema, name = _split(table.name)
    return {
        "target": sql.Identifier(schema, name).as_string(None),
        "column": str(table.tenant_column),
        "may": f"agent_sql_may_{logins.key}",
        "only": f"agent_sql_only_{logins.key}",
    }


_ROLES = """-- The logins of agents' SQL of one tenant.
DO $agent$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY[{reader}, {writer}] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOBYPASSRLS NOINHERIT NOCREATEDB NOCREATEROLE', wanted);
        END IF;
    END LOOP;
END
$agent$;
ALTER ROLE {"reader"} LOGIN NOINHERIT CONNECTION LIMIT 5 PASSWORD {reader_verifier};
ALTER ROLE {"writer"} LOGIN NOINHERIT CONNECTION LIMIT 5 PASSWORD {writer_verifier};
DO $agent$
BEGIN
    EXECUTE format('GRANT agent_sql_reader TO %I', {reader});
    EXECUTE format('GRANT agent_sql_writer TO %I', {writer});
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I, %I', current_database(), {reader}, {writer});
END
$agent$;
"""

_SETTINGS_OF_ROLES = """-- Defaults of their sessions. They are no boundary: whoever has a session can change them.
DO $agent$
DECLARE
    login text;
BEGIN
    FOREACH login IN ARRAY ARRAY[{reader}, {writer}] LOOP
        EXECUTE format('ALTER ROLE %I SET statement_timeout = %L', login, {statement_ms});
        EXECUTE format('ALTER ROLE %I SET lock_timeout = %L', login, '500ms');
        EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = %L', login, '10s');
        EXECUTE format('ALTER ROLE %I SET search_path = %L', login, '');
        IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            EXECUTE format('ALTER ROLE %I SET temp_file_limit = %L', login, '256MB');
        END IF;
    END LOOP;
    EXECUTE format('ALTER ROLE %I SET default_transaction_read_only = on', {reader});
END
$agent$;
"""

_TAKE_BACK = """-- Everything that an earlier policy gave them.
DO $agent$
DECLARE
    logins oid[] := ARRAY(SELECT oid FROM pg_roles WHERE rolname IN ({reader}, {writer}));
    names text := format('%I, %I', {reader}, {writer});
    found record;
BEGIN
    FOR found IN
        SELECT DISTINCT c.oid::regclass AS name, c.relkind FROM pg_class c
        WHERE EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantee = ANY (logins))
           OR EXISTS (SELECT FROM pg_attribute t CROSS JOIN LATERAL aclexplode(t.attacl) a
                      WHERE t.attrelid = c.oid AND t.attacl IS NOT NULL AND a.grantee = ANY (logins))
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %s', CASE found.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
                       found.name, names);
    END LOOP;
    FOR found IN SELECT p.oid::regprocedure AS name FROM pg_proc p
                 WHERE EXISTS (SELECT FROM aclexplode(p.proacl) a WHERE a.grantee = ANY (logins))
    LOOP
        EXECUTE format('REVOKE ALL ON ROUTINE %s FROM %s', found.name, names);
    END LOOP;
    FOR found IN SELECT n.nspname AS name FROM pg_namespace n
                 WHERE EXISTS (SELECT FROM aclexplode(n.nspacl) a WHERE a.grantee = ANY (logins))
    LOOP
        EXECUTE format('REVOKE ALL ON SCHEMA %I FROM %s', found.name, names);
    END LOOP;
    FOR found IN SELECT p.polname AS name, p.polrelid::regclass AS target FROM pg_policy p
                 WHERE p.polname IN ('agent_sql_may_' || {key}, 'agent_sql_only_' || {key})
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', found.name, found.target);
    END LOOP;
END
$agent$;
"""

_HARDEN = """-- Rights that everybody has, and so these logins too, are given to each role there is by name
-- instead. What only a superuser can change is left alone where another runs this; there the gate alone refuses it.
DO $agent$
DECLARE
    is_super boolean := (SELECT rolsuper FROM pg_roles WHERE rolname = current_user);
    others text := (
        SELECT string_agg(format('%I', r.rolname), ', ') FROM pg_roles r
        WHERE NOT r.rolsuper AND r.rolname !~ '^pg_' AND r.rolname !~ '^agent_(reader|writer|sql_reader|sql_writer)');
    found record;
BEGIN
    IF others IS NULL THEN
        others := quote_ident(current_user);
    END IF;
    FOR found IN
        SELECT d.datname AS name FROM pg_database d
        WHERE d.datname = current_database() AND (is_super OR pg_has_role(d.datdba, 'USAGE'))
          AND EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
                      WHERE a.grantee = 0 AND a.privilege_type = 'TEMPORARY')
    LOOP
        EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO %s', found.name, others);
        EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', found.name);
    END LOOP;
    FOR found IN
        SELECT n.nspname AS name, a.privilege_type AS privilege
        FROM pg_namespace n
        CROSS JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
        WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND a.grantee = 0
          AND (a.privilege_type = 'CREATE' OR n.nspname <> 'public') AND (is_super OR pg_has_role(n.nspowner, 'USAGE'))
    LOOP
        EXECUTE format('GRANT %s ON SCHEMA %I TO %s', found.privilege, found.name, others);
        EXECUTE format('REVOKE %s ON SCHEMA %I FROM PUBLIC', found.privilege, found.name);
    END LOOP;
    FOR found IN
        SELECT p.oid::regprocedure AS name
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname <> 'information_schema' AND (is_super OR pg_has_role(p.proowner, 'USAGE'))
          AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0)
          AND CASE
              WHEN n.nspname <> 'pg_catalog' THEN n.nspname !~ '^pg_' AND (p.provolatile = 'v' OR p.prosecdef)
              ELSE is_super AND (
                  p.proname IN ('pg_sleep', 'pg_sleep_for', 'pg_sleep_until', 'set_config', 'pg_notify', 'loread',
                                'lowrite', 'ts_stat', 'pg_export_snapshot', 'txid_current', 'pg_current_xact_id',
                                'pg_logical_emit_message', 'pg_terminate_backend', 'pg_cancel_backend')
                  OR p.proname ~ '^(query|table|schema|database|cursor)_to_xml'
                  OR p.proname ~ '^lo_' OR p.proname ~ '^pg_(try_)?advisory_'
                  OR (p.proname = 'ts_rewrite' AND p.pronargs = 2)
                  OR EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.classid = 'pg_proc'::regclass
                             AND d.deptype = 'e' AND p.provolatile = 'v'))
              END
    LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %s', found.name, others);
        EXECUTE format('REVOKE EXECUTE ON ROUTINE %s FROM PUBLIC', found.name);
    END LOOP;
END
$agent$;
"""

_SEQUENCES = """DO $agent$
DECLARE
    sequence regclass;
BEGIN
    FOR sequence IN
        SELECT c.oid::regclass FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
          AND d.refobjid = to_regclass({target}) AND d.deptype = 'a'
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', sequence, {writer});
    END LOOP;
END
$agent$;
"""

_ROWS = """-- Rows of this tenant only, whatever other policies let in.
DO $agent$
DECLARE
    target regclass := to_regclass({target});
    condition text;
    survives boolean := false;
    found record;
BEGIN
    SELECT c.relkind, c.relrowsecurity, format_type(a.atttypid, a.atttypmod) AS type,
           a.atttypid IN ('text'::regtype, 'varchar'::regtype) AS is_text,
           coalesce(o.collisdeterministic, true) AS is_exact
    INTO found
    FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = {column} AND NOT a.attisdropped
    LEFT JOIN pg_collation o ON o.oid = a.attcollation
    WHERE c.oid = target;
    IF found.type IS NULL THEN
        RAISE EXCEPTION 'table % has no column %, which the policy names as the tenant''s', {target}, {column}
            USING ERRCODE = 'undefined_column';
    ELSIF found.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% is no table, and row level security holds only tables: list its tables instead', {target};
    ELSIF NOT found.relrowsecurity THEN
        RAISE EXCEPTION 'row level security of % is off, so nothing would keep tenants apart', {target}
            USING HINT = format('See what else reads it, then run: ALTER TABLE %s ENABLE ROW LEVEL SECURITY', {target});
    END IF;
    -- A type that cuts or changes the name of the tenant would show it the rows of another.
    BEGIN
        EXECUTE format('SELECT %L::%s::text = %L', {tenant}, found.type, {tenant}) INTO survives;
    EXCEPTION WHEN data_exception OR check_violation THEN
        survives := false;
    END;
    IF survives IS NOT TRUE THEN
        RAISE EXCEPTION 'column % of % is of type %, which cannot hold the name of this tenant as it is', {column},
            {target}, found.type USING HINT = 'Name a column of type text as the tenant''s, or the tenant otherwise';
    ELSIF NOT found.is_exact THEN
        RAISE EXCEPTION 'column % of % has a collation in which different names are equal', {column}, {target}
            USING HINT = 'Name a column with a deterministic collation as the tenant''s';
    END IF;
    condition := format('%I::text = (SELECT agent_private.sql_tenant())', {column});
    IF NOT found.is_text THEN  -- for an index of the column
        condition := format('%I = (SELECT agent_private.sql_tenant())::%s AND %s', {column}, found.type, condition);
    END IF;
    EXECUTE format('CREATE POLICY %I ON %s TO %I, %I USING (%s) WITH CHECK (%s)', {may}, target, {reader}, {writer},
                   condition, condition);
    EXECUTE format('CREATE POLICY %I ON %s AS RESTRICTIVE TO %I, %I USING (%s) WITH CHECK (%s)', {only}, target,
                   {reader}, {writer}, condition, condition);
END
$agent$;
"""

_FUNCTION = """DO $agent$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT p.oid::regprocedure AS name, n.nspname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname || '.' || p.proname = {function} AND n.nspname <> 'pg_catalog'
    LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', found.nspname, {writer});
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', found.name, {writer});
        IF {is_read} THEN
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', found.nspname, {reader});
            EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', found.name, {reader});
        END IF;
    END LOOP;
END
$agent$;
"""

_ENROL = """-- Whose logins they are, and the one function of ours that the writer calls.
INSERT INTO agent_private.sql_login (login_name, tenant_id, kind)
VALUES ({reader}, {tenant}, 'reader'), ({writer}, {tenant}, 'writer')
ON CONFLICT (login_name) DO UPDATE SET tenant_id = excluded.tenant_id, kind = excluded.kind;
GRANT EXECUTE ON FUNCTION agent_private.sql_tenant() TO {"reader"}, {"writer"};
GRANT USAGE ON SCHEMA public TO {"writer"};
GRANT EXECUTE ON FUNCTION public.finish_write(text, jsonb) TO {"writer"};
"""
