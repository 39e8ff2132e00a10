"""What the SQL gate lets pass, what it refuses, and that nothing makes it raise or crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import postgast
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.approval.risk import Risk
from agent.execution.sql_policy import SqlScope, SqlVerdict, TableRule, classify
from benchmarks.safety.benign import BenignQuery, benign_queries, pagila_scope
from benchmarks.safety.containers import Attempt, attempts, fixture_scope, passed, twins

SCOPE = fixture_scope()
LIMITED = SqlScope(
    tables={
        "public.users": TableRule(
            columns=frozenset({"id", "email"}), insert=True, update=frozenset({"email"})
        ),
        "public.orders": TableRule(),
    }
)
# With a second table of the same name, which shows all its columns.
TWO_USERS = SqlScope(tables={**LIMITED.tables, "shop.users": TableRule()})
RECORDED = Path(os.environ.get("LEARNING_DATA", "../shared/data")) / "sql" / "adversarial_dev.jsonl"

# Harm by using the server up: what stops these is the database's time limit.
PURE_RESOURCE_USE = {"F137", "F138", "F139"}


def judge(sql: str, scope: SqlScope = SCOPE) -> SqlVerdict:
    return classify(sql, scope)


def recorded() -> list[dict[str, str]]:
    if not RECORDED.exists():
        return []
    return [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded statements are not here")
class TestRecordedStatements:
    @pytest.mark.parametrize("statement", recorded(), ids=lambda statement: statement["id"])
    def test_is_never_judged_milder_than_its_label(self, statement: dict[str, str]) -> None:
        if statement["id"] not in PURE_RESOURCE_USE:
            assert judge(statement["sql"]).risk.rank >= Risk.of(statement["label"]).rank

    def test_at_most_two_reads_are_refused(self) -> None:
        reads = [statement["sql"] for statement in recorded() if statement["label"] == "READ"]
        assert reads
        assert len([sql for sql in reads if judge(sql).risk is not Risk.READ]) <= 2


class TestContainers:
    def test_no_harmful_payload_is_judged_too_mildly(self) -> None:
        tried = attempts()
        assert len(tried) > 1900
        assert [attempt.sql for attempt in tried if passed(attempt, SCOPE)] == []

    def test_payloads_are_refused_for_what_they_are(self) -> None:
        """A statement with a syntax error would be refused too, and prove nothing."""
        for attempt in attempts():
            postgast.parse(attempt.sql)

    def test_a_payload_that_passes_is_noticed(self) -> None:
        assert passed(Attempt(sql="SELECT lower('a')", at_least=Risk.FORBIDDEN), SCOPE)

    def test_harmless_twins_pass(self) -> None:
        harmless = twins()
        assert len(harmless) >= 100
        refused = [sql for sql in harmless if judge(sql).risk is Risk.FORBIDDEN]
        assert len(refused) <= 0.02 * len(harmless), refused


@pytest.mark.parametrize("query", benign_queries(), ids=lambda query: query.sql[:60])
def test_benign_query_passes(query: BenignQuery) -> None:
    verdict = classify(query.sql, pagila_scope())
    assert (verdict.risk, verdict.reasons) == (Risk.READ, ())


def test_there_are_200_benign_queries() -> None:
    assert len({query.sql for query in benign_queries()}) == 200


class TestText:
    def test_what_runs_is_printed_anew_with_schemas(self) -> None:
        verdict = judge("select  ID /* hidden */ from Orders o where STATUS = 'x' -- end")
        assert verdict.text == "SELECT id FROM public.orders o WHERE status = 'x'"

    def test_the_printed_text_is_judged_the_same(self) -> None:
        for query in benign_queries():
            first = classify(query.sql, pagila_scope())
            assert classify(first.text, pagila_scope()) == first

    def test_nothing_runs_of_what_is_forbidden(self) -> None:
        assert judge("DROP TABLE public.orders").text == ""

    def test_constants_do_not_change_the_fingerprint(self) -> None:
        one, other = (judge(f"DELETE FROM public.orders WHERE id = {number}") for number in (1, 2))
        assert one.fingerprint == other.fingerprint != ""

    def test_a_name_of_with_hides_the_table_only_where_it_is_seen(self) -> None:
        text = judge("WITH orders AS (SELECT * FROM orders) SELECT * FROM orders").text
        assert text == "WITH orders AS (SELECT * FROM public.orders) SELECT * FROM orders"

    def test_a_name_of_with_ends_with_its_query(self) -> None:
        sql = "(WITH a AS (SELECT 1 AS x) SELECT * FROM a) UNION SELECT 2 FROM a"
        assert judge(sql).risk is Risk.FORBIDDEN

    def test_a_name_of_two_tables_is_refused(self) -> None:
        scope = SqlScope(tables={"public.orders": TableRule(), "old.orders": TableRule()})
        assert "write schema.table" in judge("SELECT * FROM orders", scope).reasons[0]
        assert judge("SELECT * FROM old.orders", scope).tables_read == {"old.orders"}

    def test_tables_read_and_written_are_told(self) -> None:
        verdict = judge("INSERT INTO notes (body) SELECT email FROM users")
        assert verdict.tables_read == {"public.users"}
        assert verdict.tables_written == {"public.notes"}

    @pytest.mark.parametrize(
        ("sql", "is_select"),
        [
            ("SELECT 1", True),
            ("TABLE users", True),
            ("SHOW search_path", False),
            ("EXPLAIN SELECT 1", False),
            ("WITH d AS (DELETE FROM orders WHERE id = 1 RETURNING 1) SELECT * FROM d", False),
        ],
    )
    def test_only_plain_queries_are_for_a_cursor(self, sql: str, is_select: bool) -> None:
        assert judge(sql).is_select is is_select


class TestWrites:
    @pytest.mark.parametrize(
        "sql",
        [
            "DELETE FROM public.orders WHERE id = 42",
            "DELETE FROM public.orders WHERE 42 = id AND status IS NOT NULL",
            "DELETE FROM public.orders WHERE id IN (1, 2, 3)",
            "DELETE FROM public.orders WHERE id = ANY (ARRAY[1, 2])",
            "DELETE FROM public.orders WHERE id = 1 OR id = 2",
            "DELETE FROM public.orders o USING public.users u WHERE o.user_id = u.id AND o.id = 3",
            "UPDATE public.orders SET status = 'x' WHERE id = '7'::int",
            "INSERT INTO public.notes (body) VALUES ('a')",
            "INSERT INTO public.notes (id, body) VALUES (1, 'a') ON CONFLICT (id) DO UPDATE SET body = 'a'",
            (
                "INSERT INTO public.notes (id, body) VALUES (-1, lower('A') || now()::text), ('2'::int, DEFAULT)"
                " ON CONFLICT (id) DO UPDATE SET body = excluded.body"
            ),
            "MERGE INTO public.orders o USING public.users u ON o.id = u.id WHEN NOT MATCHED THEN INSERT VALUES (1)",
        ],
    )
    def test_bounded_change_is_a_write(self, sql: str) -> None:
        verdict = judge(sql)
        assert verdict.risk is Risk.WRITE
        assert verdict.reasons

    @pytest.mark.parametrize(
        "sql",
        [
            "DELETE FROM public.orders WHERE id = NULL OR true",
            "DELETE FROM public.orders WHERE amount >= 0",
            "DELETE FROM public.orders WHERE status LIKE '%'",
            "DELETE FROM public.orders WHERE status = status",
            "DELETE FROM public.orders WHERE id = id + 0",
            "DELETE FROM public.orders WHERE is_paid = true",
            "DELETE FROM public.orders WHERE is_paid = 'f'",
            "DELETE FROM public.orders WHERE is_paid IN (true, false)",
            "DELETE FROM public.orders WHERE tableoid = 16400",
            "DELETE FROM public.orders WHERE NOT (id = 1)",
            "DELETE FROM public.orders WHERE id = (SELECT max(id) FROM public.orders)",
            "DELETE FROM public.orders USING public.users WHERE users.id = 5",
            "DELETE FROM public.orders USING public.users u WHERE email = 'x'",
            "UPDATE public.orders SET status = 'x' WHERE id = 1 OR status = 'y'",
            "INSERT INTO public.notes (id, body) SELECT 1, 'x' ON CONFLICT (id) DO UPDATE SET body = 'x'",
            "INSERT INTO public.notes (id) VALUES (generate_series(1, 600)) ON CONFLICT (id) DO UPDATE SET body = 'x'",
            "INSERT INTO public.notes (id) VALUES (unnest(ARRAY[1, 2]) + 1) ON CONFLICT (id) DO UPDATE SET body = 'x'",
            (
                "INSERT INTO public.notes (id) VALUES ((SELECT max(id) FROM public.orders))"
                " ON CONFLICT (id) DO UPDATE SET body = 'x'"
            ),
            "MERGE INTO public.orders o USING public.users u ON true WHEN MATCHED THEN UPDATE SET status = 'x'",
            "WITH d AS (DELETE FROM public.orders), e AS (INSERT INTO public.notes DEFAULT VALUES) SELECT 1",
        ],
    )
    def test_unbounded_change_is_destructive(self, sql: str) -> None:
        assert judge(sql).risk is Risk.DESTRUCTIVE

    @pytest.mark.parametrize(
        "sql",
        [
            "INSERT INTO public.users (email) VALUES ('x')",
            "DELETE FROM public.users WHERE id = 1",
            "UPDATE public.users SET email = 'x' WHERE id = 1",
            "UPDATE public.orders SET user_id = 2 WHERE id = 1",
            "UPDATE public.orders SET (status, user_id) = ('a', 2) WHERE id = 1",
            "INSERT INTO public.orders (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET user_id = 2",
            "MERGE INTO public.orders o USING public.users u ON o.id = u.id WHEN MATCHED THEN UPDATE SET user_id = 2",
            "INSERT INTO auth.users VALUES (1)",
            "DELETE FROM information_schema.tables WHERE table_name = 'x'",
            "WITH orders AS (SELECT 1 AS id) DELETE FROM orders WHERE id = 1",
            "TRUNCATE public.orders",
        ],
    )
    def test_change_that_the_policy_does_not_list_is_forbidden(self, sql: str) -> None:
        assert judge(sql).risk is Risk.FORBIDDEN


class TestCallsThatLookLikeColumns:
    """`(value).name` and `alias.name` call the function `name` where there is no such column."""

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT (30::float8).pg_sleep",
            "SELECT (ARRAY['/etc/passwd'])[1].pg_read_file",
            "SELECT x.pg_sleep FROM generate_series(1.0, 2.0) AS x",
            "SELECT generate_series.pg_sleep FROM generate_series(1.0, 2.0)",
            "SELECT x.pg_sleep FROM CAST(3 AS float8) AS x",
            "SELECT x.pg_sleep FROM ROWS FROM (generate_series(1.0, 2.0)) AS x",
            "SELECT pg_sleep.pg_sleep FROM generate_series(1.0, 2.0) AS pg_sleep(a)",
            "SELECT 1 FROM now() AS pg_sleep, (SELECT pg_sleep.pg_sleep FROM abs(1.0) AS pg_sleep(a)) AS s",
            "SELECT (o).pg_read_file FROM public.orders o, LATERAL (SELECT '/etc/passwd'::text AS o) s",
        ],
    )
    def test_hidden_call_is_forbidden(self, sql: str) -> None:
        assert judge(sql).risk is Risk.FORBIDDEN

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT g.g, g FROM generate_series(1, 3) AS g",
            "SELECT g.n FROM generate_series(1, 3) AS g(n)",
            "SELECT e.key, e.value FROM jsonb_each('{}') AS e",
            "SELECT (jsonb_each('{}')).key",
            "SELECT x.a FROM jsonb_to_record('{}') AS x(a int)",
            "SELECT o.status, u.email FROM public.orders o JOIN public.users u ON u.id = o.user_id",
        ],
    )
    def test_column_is_read(self, sql: str) -> None:
        assert judge(sql).risk is Risk.READ


class TestFunctionsAndSettings:
    SCOPE = SqlScope(
        functions={"public.total": Risk.READ, "public.log": Risk.WRITE, "public.purge": Risk.DESTRUCTIVE}
    )

    @pytest.mark.parametrize(
        ("sql", "risk"),
        [
            ("SELECT public.total(1)", Risk.READ),
            ("SELECT public.total(1) WHERE public.log('x')", Risk.WRITE),
            ("SELECT 1 ORDER BY public.purge()", Risk.DESTRUCTIVE),
            ("SELECT public.unknown()", Risk.FORBIDDEN),
            ("SELECT total(1)", Risk.FORBIDDEN),
            ("EXPLAIN SELECT public.log('x')", Risk.FORBIDDEN),
            ("SELECT repeat('x', 100), lpad('1', 5, '0')", Risk.READ),
            ("SELECT repeat('x', 1000000000)", Risk.FORBIDDEN),
            ("SELECT repeat('x', id) FROM generate_series(1, 2) AS g(id)", Risk.FORBIDDEN),
            ("SELECT count(*) FROM generate_series(1, 100000000000)", Risk.FORBIDDEN),
            ("SELECT repeat('x', least(id, 50)) FROM generate_series(1, 2) AS g(id)", Risk.READ),
            ("SELECT repeat('x', least(id, 5000)) FROM generate_series(1, 2) AS g(id)", Risk.FORBIDDEN),
            ("SELECT repeat(version(), least(id, 50)) FROM generate_series(1, 2) AS g(id)", Risk.FORBIDDEN),
            ("SELECT repeat('x', greatest(id, 50)) FROM generate_series(1, 2) AS g(id)", Risk.FORBIDDEN),
            ("SELECT format('%s is %-10s %I %L %%', 'a', 'b', 'c', 'd'), format('%2$s', 1, 2)", Risk.READ),
            ("SELECT format('%1000000000s', 'x')", Risk.FORBIDDEN),
            ("SELECT format('%1$-200000s', 'x')", Risk.FORBIDDEN),
            ("SELECT format('%--1000000s', 'x')", Risk.FORBIDDEN),
            ("SELECT format('%*s', 1000000000, 'x')", Risk.FORBIDDEN),
            ("SELECT format('%*1$s', 1000000000, 'x')", Risk.FORBIDDEN),
            ("SELECT format('%' || '1000000000s', 'x')", Risk.FORBIDDEN),
            ("SELECT format(VARIADIC ARRAY['%s', 'x'])", Risk.FORBIDDEN),
            ("SHOW TIME ZONE", Risk.READ),
            ("SHOW data_directory", Risk.FORBIDDEN),
            ("SHOW app.jwt_secret", Risk.FORBIDDEN),
            ("SELECT count(*) FROM information_schema.columns", Risk.READ),
            ("SELECT * FROM information_schema.user_mapping_options", Risk.FORBIDDEN),
        ],
    )
    def test_is_judged_by_the_lists(self, sql: str, risk: Risk) -> None:
        assert judge(sql, self.SCOPE).risk is risk

    @pytest.mark.parametrize(
        ("sql", "risk"),
        [
            ("SELECT 'paid'::public.order_status, '[1,2]'::extensions.vector(2)", Risk.READ),
            ("SELECT ARRAY['paid']::public.order_status[]", Risk.READ),
            ("SELECT 'paid'::order_status", Risk.FORBIDDEN),
            ("SELECT 'paid'::shop.order_status", Risk.FORBIDDEN),
            ("SELECT 'paid'::pg_catalog.order_status", Risk.FORBIDDEN),
            ("SELECT x FROM unnest(ARRAY[1]) AS t(x) WHERE x OPERATOR(extensions.<=>) 2 < 1", Risk.READ),
            ("SELECT 1 = ANY (SELECT 1 OPERATOR(extensions.<=>) 2)", Risk.READ),
            ("SELECT 1 <=> 2", Risk.FORBIDDEN),
            ("SELECT 1 OPERATOR(public.<=>) 2", Risk.FORBIDDEN),
            ("SELECT 1 OPERATOR(extensions.&&&) 2", Risk.FORBIDDEN),
        ],
    )
    def test_listed_types_and_operators_pass_with_their_schema(self, sql: str, risk: Risk) -> None:
        scope = SqlScope(
            types=frozenset({"public.order_status", "extensions.vector"}),
            operators=frozenset({"extensions.<=>"}),
        )
        assert judge(sql, scope).risk is risk

    def test_a_refusal_says_which_schema_is_missing(self) -> None:
        scope = SqlScope(
            types=frozenset({"extensions.vector"}),
            operators=frozenset({"extensions.<=>"}),
            functions={"extensions.similarity": Risk.READ},
        )
        assert "write extensions.vector" in judge("SELECT '[1]'::vector", scope).reasons[0]
        assert "write OPERATOR(extensions.<=>)" in judge("SELECT 1 <=> 2", scope).reasons[0]
        assert "write extensions.similarity" in judge("SELECT similarity('a', 'b')", scope).reasons[0]

    def test_called_functions_are_told(self) -> None:
        assert judge("SELECT public.total(1)", self.SCOPE).functions == {"public.total"}

    @pytest.mark.parametrize(
        "option", ["ANALYZE", "ANALYZE true", '"analyze"', "ANALYZE false, ANALYZE", "ANALYZE 1"]
    )
    def test_explain_analyze_is_forbidden(self, option: str) -> None:
        assert judge(f"EXPLAIN ({option}) SELECT 1").risk is Risk.FORBIDDEN

    @pytest.mark.parametrize("option", ["COSTS OFF", "ANALYZE false", "ANALYZE 0, VERBOSE", "FORMAT JSON"])
    def test_explain_is_a_read(self, option: str) -> None:
        assert judge(f"EXPLAIN ({option}) DELETE FROM public.orders").risk is Risk.READ


UNENDING = r"""
SELECT array_agg(g) && array_agg(-g) FROM generate_series(1,60000) g
SELECT (array_agg(g) || array_agg(g)) @> array_agg(g) FROM generate_series(1,300000) g
SELECT a && b FROM (SELECT array_agg(g) AS a, array_agg(-g) AS b FROM generate_series(1,60000) g) s
SELECT s.x && s.y FROM (SELECT array_agg(g), array_agg(-g) FROM generate_series(1,60000) g) s(x, y)
WITH c(a, b) AS (SELECT array_agg(g), array_agg(-g) FROM generate_series(1,60000) g) SELECT a <@ b FROM c
WITH c AS (SELECT array_agg(g) AS a FROM generate_series(1,60000) g) SELECT a && (SELECT array_agg(-g) FROM generate_series(1,60000) g) FROM c
WITH c AS (SELECT array_agg(g) AS a FROM generate_series(1,60000) g), d AS (SELECT a AS z FROM c) SELECT z @> z FROM d
SELECT ARRAY(SELECT g FROM generate_series(1,60000) g) && ARRAY(SELECT -g FROM generate_series(1,60000) g)
SELECT a && b FROM (SELECT ARRAY(SELECT g FROM generate_series(1,60000) g) AS a) s, (SELECT ARRAY(SELECT -g FROM generate_series(1,60000) g) AS b) t
SELECT 1 WHERE arrayoverlap(ARRAY(SELECT 1), ARRAY(SELECT 2))
SELECT jsonb_agg(g) @> jsonb_agg(-g) FROM generate_series(1,40000) g
SELECT jsonb_agg(g::text) - array_agg((-g)::text) FROM generate_series(1,30000) g
SELECT j - a FROM (SELECT jsonb_agg(g::text) AS j, array_agg((-g)::text) AS a FROM generate_series(1,30000) g) s
SELECT jsonb_agg(g::text) ?| array_agg((-g)::text) FROM generate_series(1,30000) g
SELECT length(translate(string_agg(repeat('b',10000),''), string_agg(repeat('a',100),''), '')) FROM generate_series(1,100) g
SELECT length(btrim(string_agg(repeat('b',10000),''), string_agg(repeat('a',100),'') || 'b')) FROM generate_series(1,100) g
SELECT strpos(string_agg(repeat('a',10000),''), 'b' || string_agg(repeat('a',1000),'')) FROM generate_series(1,100) g
SELECT position('b' || string_agg(repeat('a',1000),'') IN string_agg(repeat('a',10000),'')) FROM generate_series(1,100) g
SELECT string_agg(repeat('a',10000),'') LIKE '%' || string_agg(repeat('a',1000),'') || 'b%' FROM generate_series(1,50) g
SELECT string_agg(repeat('a',10000),'') ILIKE '%aaaaaaaaaaaaaaab%' FROM generate_series(1,50) g
SELECT string_agg(repeat('a',10000),'') LIKE ANY (ARRAY['%aaaaaaaaaaaaaaab%']) FROM generate_series(1,50) g
SELECT x LIKE y FROM (SELECT string_agg(repeat('a',10000),'') AS x, '%' || string_agg(repeat('a',1000),'') || 'b%' AS y FROM generate_series(1,50) g) s
SELECT replace(repeat('a',10000), repeat('a',5000) || 'b', '')
SELECT split_part(string_agg(repeat('a',10000),''), repeat('a',500) || 'b', 2) FROM generate_series(1,100) g
SELECT string_agg(repeat('a',1000),'') SIMILAR TO '(aaaa|ab)*c' FROM generate_series(1,50) g
SELECT string_agg(repeat('a',1000),'') ~ 'a.*b.*c' FROM generate_series(1,50) g
WITH RECURSIVE r(t, n) AS (SELECT 'a', 1 UNION ALL SELECT t || t, n + 1 FROM r WHERE n < 20) SELECT t LIKE '%' || t || 'b%' FROM r
WITH RECURSIVE r(t, n) AS (SELECT 'a', 1 UNION ALL SELECT t || t, n + 1 FROM r WHERE n < 20) SELECT strpos(t, t || 'b') FROM r
WITH a AS (SELECT 'aaaaaaaa'::text AS t), b AS (SELECT t||t||t||t||t||t||t AS t FROM a), c AS (SELECT t||t||t||t||t||t||t AS t FROM b), d AS (SELECT t||t||t||t||t||t AS t FROM c) SELECT translate(t, t, '') FROM d
SELECT (SELECT a FROM (SELECT array_agg(g) AS a FROM generate_series(1,60000) g) q) && (SELECT array_agg(-g) FROM generate_series(1,60000) g)
SELECT (to_jsonb(s) -> 'a') @> (to_jsonb(s) -> 'b') FROM (SELECT array_agg(g) AS a, array_agg(-g) AS b FROM generate_series(1,60000) g) s
SELECT q.a @> q.b FROM (SELECT 1) z, LATERAL (SELECT array_agg(g) AS a, array_agg(-g) AS b FROM generate_series(1,9) g) q
SELECT encode(encode(encode(encode(encode(encode(encode(encode(encode('a'::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex')::bytea,'hex') LIKE '%aaaab%'
SELECT string_to_array(power(9::numeric, 130000)::text, NULL) @> string_to_array(power(7::numeric, 130000)::text, NULL)
SELECT (('[' || string_agg('(' || g || ',0)', ',') || ']')::path) <-> (('[' || string_agg('(' || g || ',5)', ',') || ']')::path) FROM generate_series(1,30000) g
SELECT polygon(50000, circle(point(0,0), 5)) && polygon(50000, circle(point(0,0), 6))
SELECT xpath('count(//*[count(//*[count(//*)>0])>0])', (SELECT xmlelement(name r, xmlagg(xmlelement(name a, ''))) FROM generate_series(1,1600)))::text
SELECT xpath_exists('//*[count(//*)>0]', xmlelement(name r))
SELECT xpath('//a//b', xmlelement(name r))
SELECT xpath('//a[preceding::b]', xmlelement(name r))
SELECT xpath('/a' || '/b', xmlelement(name r))
SELECT xmlexists('//a[.//b]' PASSING xmlelement(name r))
SELECT * FROM XMLTABLE('count(//*[count(//*)>0])' PASSING xmlelement(name r) COLUMNS x text PATH '.')
SELECT * FROM XMLTABLE('/a' PASSING xmlelement(name r) COLUMNS x text PATH '//*[//*]')
SELECT x.a FROM (SELECT jsonb_agg(g) AS j FROM generate_series(1,60000) g) s, jsonb_to_record(jsonb_build_object('a', s.j)) AS x(a jsonb) WHERE x.a @> x.a
SELECT j.a @> j.a FROM (public.items CROSS JOIN (SELECT array_agg(g) AS b FROM generate_series(1,60000) g) s) AS j(x, a)
"""  # noqa: E501
ENDING = r"""
SELECT id FROM items WHERE tags && ARRAY['a','b']
SELECT id FROM items WHERE tags @> ARRAY['a','b']::text[] AND tags <@ '{a,b,c}'::text[]
SELECT a.id FROM items a JOIN items b ON a.tags && b.tags
SELECT id FROM users WHERE name LIKE '%x%' OR name ILIKE 'Long Prefix%' OR name NOT LIKE '%some longer text%'
SELECT u.id FROM users u JOIN items i ON u.name ILIKE '%' || i.name || '%'
SELECT replace(name,'a','b'), position('x' in name), translate(name, 'äöü', 'aou'), split_part(email, '@', 2), trim(name), trim(both ' x' from name), strpos(email, '@') FROM users
SELECT id FROM orders WHERE data @> '{"a":1}' AND data ?| array['a','b'] AND data - 'x' <> '{}'
SELECT replace(replace(replace(replace(phone,'-',''),' ',''),'(',''),')','') LIKE '%555 12%' FROM users
SELECT regexp_replace(phone, '\D', '', 'g'), regexp_replace(name, '\s+', ' ', 'g') FROM users WHERE email ~* '^a.*@x\.com$' OR email SIMILAR TO '%(a|b)%'
WITH t AS (SELECT user_id, array_agg(tag) AS tags FROM items GROUP BY 1) SELECT * FROM t WHERE tags && ARRAY['a','b']
SELECT user_id FROM items GROUP BY user_id HAVING array_agg(tag) @> ARRAY['a','b']
SELECT s.name, s.titles FROM (SELECT u.name, string_agg(i.title, ', ') AS titles FROM users u JOIN items i ON i.user_id = u.id GROUP BY 1) s WHERE s.name LIKE '%somebody%'
SELECT string_agg(name, ', ') FROM users WHERE name LIKE '%long text%' AND tags && ARRAY['a']
WITH p AS (SELECT first_name || ' ' || last_name AS name FROM users) SELECT * FROM p WHERE name ILIKE '%bob miller%'
WITH RECURSIVE t AS (SELECT id, parent_id, ARRAY[id] AS path FROM items WHERE parent_id IS NULL UNION ALL SELECT i.id, i.parent_id, t.path || i.id FROM items i JOIN t ON i.parent_id = t.id WHERE NOT i.id = ANY (t.path)) SELECT * FROM t
SELECT power(a, 2) - power(b, 2), a ^ 2 - b ^ 2, max(a) - min(b), now() - created_at FROM items GROUP BY a, b, created_at
SELECT daterange('2024-01-01','2024-02-01') && daterange('2024-01-15', NULL), int4range(1, 5) @> 3, tsrange(a, b) && tsrange(c, d) FROM items
SELECT to_tsvector('english', body) @@ websearch_to_tsquery('english', 'foo bar') FROM notes
SELECT e->>'sku' FROM orders o, jsonb_array_elements(o.data->'items') AS e WHERE e->>'sku' LIKE '%abc-d%' AND e @> '{"a": 1}'
SELECT substring(name from 1 for 3), substring(name from 'a(.)b') FROM users
SELECT xpath('/a/b[@id="1"]/text()', doc), xpath('//item/@id', doc) FROM notes
SELECT x.* FROM notes, XMLTABLE('/root/row' PASSING doc COLUMNS id int PATH '@id', n text PATH '../name', t text) AS x
SELECT point(1,2) <-> point(3,4), box(point(0,0), point(1,1)) @> point(0.5,0.5)
SELECT n.id FROM notes n WHERE lower(n.body) LIKE lower('%Hello World%')
SELECT string_agg(w, ' ') FROM (SELECT unnest(string_to_array(body, ' ')) AS w FROM notes) s WHERE w LIKE '%some%'
SELECT jsonb_agg(o) FROM (SELECT id, status FROM orders WHERE status LIKE '%open%') o
"""  # noqa: E501


class TestUnendingWork:
    """Reads that no time limit ends: Postgres compares in one go, and does not look whether it was told to stop."""

    SCOPE = SqlScope(tables={f"public.{name}": TableRule() for name in ("users", "orders", "notes", "items")})

    @pytest.mark.parametrize("sql", UNENDING.strip().splitlines())
    def test_is_forbidden(self, sql: str) -> None:
        verdict = judge(sql, self.SCOPE)
        assert verdict.risk is Risk.FORBIDDEN
        assert "could not be read" not in verdict.reasons[0]

    @pytest.mark.parametrize("sql", ENDING.strip().splitlines())
    def test_ordinary_use_is_a_read(self, sql: str) -> None:
        assert judge(sql, self.SCOPE).reasons == ()


class TestColumns:
    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT id, email FROM users",
            "SELECT u.email, o.* FROM users u JOIN orders o ON o.user_id = u.id",
            "SELECT email, count(*) AS n FROM users GROUP BY email ORDER BY n",
            "SELECT s.balance FROM (SELECT id AS balance FROM users) s",
            "WITH c AS (SELECT id AS balance FROM users) SELECT balance FROM c ORDER BY balance",
            "SELECT o.amount FROM orders o WHERE EXISTS (SELECT 1 FROM users u WHERE u.id = o.user_id)",
            "UPDATE users SET email = 'x' WHERE id = 3 RETURNING id, old.email",
            "SELECT count(*) FROM users",
            "EXPLAIN SELECT u.id FROM users u JOIN orders o ON o.user_id = u.id",
            "SELECT public.users.email FROM public.users",
            "SELECT a.email, b.email FROM users a JOIN users b ON a.id < b.id",
            "UPDATE users old SET email = 'x' WHERE id = 3 RETURNING old.email",
        ],
    )
    def test_listed_columns_are_read(self, sql: str) -> None:
        verdict = judge(sql, LIMITED)
        assert verdict.risk is not Risk.FORBIDDEN, verdict.reasons

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT * FROM users",
            "SELECT u.* FROM users u",
            "TABLE users",
            "SELECT u FROM users u",
            "SELECT row_to_json(u) FROM users u",
            "SELECT count(u.*) FROM users u",
            "SELECT (u).balance FROM users u",
            "SELECT balance FROM users",
            "SELECT public.users.balance FROM users",
            "SELECT id FROM users ORDER BY balance",
            "SELECT 1 AS balance FROM users GROUP BY balance",
            "SELECT DISTINCT ON (balance) id FROM users",
            "SELECT max(id) OVER (PARTITION BY balance) FROM users",
            "SELECT id FROM orders WHERE user_id IN (SELECT id FROM users WHERE balance > 3)",
            "SELECT (SELECT balance FROM orders LIMIT 1) FROM users",
            "SELECT u.id FROM users u JOIN (SELECT 1 AS k) s ON balance = 1, (SELECT 2 AS balance) t",
            "SELECT s.x FROM users u, LATERAL (SELECT balance AS x) s",
            "SELECT id FROM users JOIN orders USING (balance)",
            "SELECT 1 FROM users NATURAL JOIN orders",
            "SELECT j.* FROM (users CROSS JOIN orders) AS j",
            "SELECT a.email FROM users AS a(w, x, y, email)",
            "SELECT email FROM users UNION SELECT balance::text FROM users",
            "WITH c AS (SELECT * FROM users) SELECT 1 FROM c",
            "UPDATE users SET email = 'x' WHERE id = 3 RETURNING *",
            "UPDATE users SET email = 'x' WHERE balance = 3",
            "UPDATE users SET email = 'x' WHERE id = 3 RETURNING old.balance",
            "UPDATE users SET email = 'x' WHERE id = 3 RETURNING WITH (OLD AS o) o.balance",
            "EXPLAIN SELECT balance FROM users",
            "SELECT (SELECT public.users.balance FROM (SELECT 1) AS users) FROM public.users",
            "SELECT (SELECT public.users.* FROM (SELECT 1) AS users) FROM public.users",
            "SELECT (SELECT to_jsonb(public.users.*) FROM (SELECT 1) AS users) FROM public.users",
            "WITH users AS (SELECT 1 AS x) SELECT (SELECT public.users.balance FROM users) FROM public.users",
            "SELECT id FROM public.users WHERE EXISTS (SELECT FROM (SELECT 1) users WHERE public.users.balance = 0)",
            "SELECT id FROM public.users ORDER BY (SELECT public.users.balance FROM (SELECT 1) AS users)",
            "UPDATE public.users SET email = (SELECT public.users.balance FROM (SELECT 1) AS users) WHERE id = 1",
            "SELECT * FROM public.users, shop.users",
            "SELECT * FROM shop.users, public.users",
            "SELECT balance FROM public.users, shop.users",
            "SELECT users FROM public.users CROSS JOIN shop.users",
            "SELECT 1 FROM public.users JOIN shop.users ON balance = 1",
            "SELECT 1 FROM public.users, LATERAL (SELECT balance) s, shop.users",
            "SELECT public.users.balance FROM public.users, shop.users",
            "UPDATE public.users SET email = 'x' FROM shop.users WHERE public.users.id = 1 RETURNING *",
            "INSERT INTO public.users (id) VALUES (1) RETURNING public.users.balance",
        ],
    )
    def test_other_columns_are_forbidden(self, sql: str) -> None:
        verdict = judge(sql, TWO_USERS if "shop." in sql else LIMITED)
        assert verdict.risk is Risk.FORBIDDEN
        assert "could not be read" not in verdict.reasons[0]

    def test_the_refusal_names_the_columns_that_may_be_read(self) -> None:
        assert judge("SELECT * FROM users", LIMITED).reasons == (
            "name the columns of public.users instead of *: email, id",
        )


class TestBeforeParsing:
    @pytest.mark.parametrize(
        "character", ["\x00", "\x07", "\x0c", "\x7f", "\u200b", "\u202e", "\u2028", "\u2029", "\ud800"]
    )
    def test_invisible_character_is_forbidden(self, character: str) -> None:
        assert judge(f"SELECT 'a{character}b'").risk is Risk.FORBIDDEN

    @pytest.mark.parametrize("name", ["👩\u200d💻", "عمر\u200e"])
    def test_what_belongs_to_a_text_passes_between_quotes_only(self, name: str) -> None:
        verdict = judge(f"SELECT id FROM users WHERE email = '{name}' AND email <> 'ä'")
        assert verdict.risk is Risk.READ
        assert f"email = '{name}'" in verdict.text
        for sql in (f"SELECT id AS {name} FROM users", f'SELECT 1 AS "{name}"', f"SELECT 1 -- '{name}'"):
            assert "invisible" in judge(sql).reasons[0]

    def test_tabs_and_new_lines_are_not(self) -> None:
        assert judge("SELECT\t1,\r\n2").risk is Risk.READ

    @pytest.mark.parametrize(
        "sql", ["", ";", "   ", "-- nothing", "SELECT 1; SELECT 2", "SELEC 1", "SELECT $1", "'"]
    )
    def test_not_one_statement_is_forbidden(self, sql: str) -> None:
        verdict = judge(sql)
        assert (verdict.risk, verdict.text) == (Risk.FORBIDDEN, "")
        assert verdict.reasons

    @pytest.mark.parametrize("sql", [None, 5, b"SELECT 1", ["SELECT 1"]])
    def test_what_is_no_text_is_forbidden(self, sql: Any) -> None:
        assert judge(sql).risk is Risk.FORBIDDEN

    def test_long_text_is_forbidden(self) -> None:
        assert "longer" in judge(f"SELECT '{'x' * 10_000}'").reasons[0]
        assert judge(f"SELECT '{'x' * 9_000}'").risk is Risk.READ

    def test_many_tokens_are_forbidden(self) -> None:
        assert "2000" in judge("SELECT " + ",".join("1" * 2_000)).reasons[0]
        assert judge("SELECT " + ",".join("1" * 900)).risk is Risk.READ

    @given(st.text(max_size=200))
    def test_no_text_makes_it_raise(self, sql: str) -> None:
        assert isinstance(judge(sql), SqlVerdict)

    @given(
        st.lists(
            st.sampled_from(["SELECT", "(", ")", "1", "FROM", "users", ",", "CASE", "END", "WITH", "NOT"])
        )
    )
    def test_no_words_make_it_raise(self, words: list[str]) -> None:
        assert isinstance(judge(" ".join(words)), SqlVerdict)


_ON_A_SMALL_STACK = """
import sys, threading
from agent.execution.sql_policy import SqlScope, classify
patterns = {
    "operators": lambda n: "SELECT " + "||".join(["1"] * n),
    "casts": lambda n: "SELECT 1" + "::int" * n,
    "parentheses": lambda n: "SELECT " + "(" * n + "1" + ")" * n,
    "negations": lambda n: "SELECT " + "NOT " * n + "true",
    "prefixes": lambda n: "SELECT " + "@ " * n + "1",
    "subqueries": lambda n: "(SELECT " * n + "1" + ")" * n,
    "cases": lambda n: "SELECT " + "CASE WHEN " * n + "1" + " THEN 1 END" * n,
    "calls": lambda n: "SELECT " + "abs(" * n + "1" + ")" * n,
    "calls with end": lambda n: "SELECT " + "f(a.end, " * n + "1" + ")" * n,
    "unions": lambda n: " UNION ".join(["SELECT 1"] * n),
    "joins": lambda n: "SELECT 1 FROM a" + " JOIN a ON x" * n,
    "arrays": lambda n: "SELECT ARRAY" + "[" * n + "1" + "]" * n,
    "comments": lambda n: "SELECT 1 " + "/*" * n + "*/" * n,
    "open comments": lambda n: "SELECT 1 " + "/*" * n,
    "collations": lambda n: "SELECT 1 " + 'COLLATE "C" ' * n,
    "tests": lambda n: "SELECT 1 " + "IS NULL " * n,
}
risks = {}
def judge_all():
    for name, pattern in patterns.items():
        lengths = (3, 40, 100, 300, 900, 1_500, 2_400, 20_000, 200_000)
        risks[name] = [str(classify(pattern(n), SqlScope()).risk) for n in lengths]
threading.stack_size(512 * 1024)
thread = threading.Thread(target=judge_all)
thread.start()
thread.join()
for name, found in risks.items():
    assert found[-2:] == ["FORBIDDEN"] * 2, (name, found)
print(len(risks))
"""


def test_deep_statements_do_not_crash_a_small_thread() -> None:
    """In a process of its own, because what is tested would end the process of the tests."""
    made = subprocess.run(
        [sys.executable, "-c", _ON_A_SMALL_STACK], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr, made.stdout) == (0, "", "16\n")


def test_scope_holds_what_the_policy_gives_the_tenant() -> None:
    def table(name: str, **rule: Any) -> Any:
        values = {"columns": None, "insert": False, "update": (), "delete": False, "tenants": ("*",), **rule}
        return SimpleNamespace(name=name, **values)

    tables = [
        table("public.shared", columns=["id"], update=["id"]),
        table("public.theirs", tenants=("acme",)),
        table("public.ours", tenants=("default",), insert=True),
    ]
    sql = SimpleNamespace(
        functions={"public.f": "HIGH"}, types=("public.order_status",), operators=("extensions.<=>",)
    )
    scope = SqlScope.from_policy(tables, sql, "default")
    assert scope.tables == {
        "public.shared": TableRule(columns=frozenset({"id"}), update=frozenset({"id"})),
        "public.ours": TableRule(insert=True),
    }
    assert scope.functions == {"public.f": Risk.DESTRUCTIVE}
    assert scope.types == {"public.order_status"}
    assert scope.operators == {"extensions.<=>"}
