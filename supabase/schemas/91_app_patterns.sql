-- What samples told of the application's tables, and sampling over Supabase's keys.

CREATE TABLE public.agent_app_pattern (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    app text NOT NULL CHECK (app <> ''),
    table_name text NOT NULL CHECK (table_name <> ''),
    document jsonb NOT NULL,
    seen jsonb NOT NULL DEFAULT '{}',
    estimates jsonb NOT NULL DEFAULT '[]',
    inferred jsonb NOT NULL DEFAULT '[]',
    sampled_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, app, table_name)
);
COMMENT ON TABLE public.agent_app_pattern IS 'One row per sampled table of the application: shares, ranges, formats, statuses. Of personal data its shape alone.';
COMMENT ON COLUMN public.agent_app_pattern.app IS 'default for our own database, else host:port/database.';
COMMENT ON COLUMN public.agent_app_pattern.table_name IS 'schema.name, quoted as Postgres does.';
COMMENT ON COLUMN public.agent_app_pattern.seen IS 'By status column and keyed hash of a row''s primary key the status it had: never a key.';
COMMENT ON COLUMN public.agent_app_pattern.estimates IS '[[time, rows], …], oldest first, for the growth.';
COMMENT ON COLUMN public.agent_app_pattern.inferred IS 'References of its columns that nobody declared and whose values confirm them.';

SELECT agent_private.guard('public.agent_app_pattern'::regclass);
CREATE POLICY of_the_tenant ON public.agent_app_pattern TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true))
           AND (SELECT current_setting('agent.reach', true)) = 'tenant');

-- Save patterns of tables of an application, all or nothing: [{table, document, seen, estimates, inferred, memory, changes}].
-- memory is the sentence that recall shall find, empty where there is none; changes are [{table, column, kind, what, before,
-- after}], each kept as a memory, of which the newest 200 of the application stay. Returns {saved, memories, changes}.
CREATE FUNCTION public.save_app_patterns(identity jsonb, the_app text, patterns jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    given jsonb;
    changed jsonb;
    old public.agent_memory;
    saved integer := 0;
    memories integer := 0;
    changes integer := 0;
BEGIN
    identity := agent_private.document(identity);
    patterns := agent_private.document(patterns);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'patterns need a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    -- In one order, so that two that save at once wait and do not lock each other out.
    FOR given IN SELECT p FROM jsonb_array_elements(patterns) AS p ORDER BY p ->> 'table' LOOP
        INSERT INTO public.agent_app_pattern AS a (tenant_id, app, table_name, document, seen, estimates, inferred)
        VALUES (tenant, the_app, given ->> 'table', given -> 'document', coalesce(given -> 'seen', '{}'),
                coalesce(given -> 'estimates', '[]'), coalesce(given -> 'inferred', '[]'))
        ON CONFLICT (tenant_id, app, table_name) DO UPDATE
        SET document = excluded.document, seen = excluded.seen, estimates = excluded.estimates,
            inferred = excluded.inferred, sampled_at = clock_timestamp();
        saved := saved + 1;
        IF coalesce(given ->> 'memory', '') <> '' THEN
            memories := memories + (agent_private.write_memory(jsonb_build_object(
                'store', 'application', 'kind', 'pattern', 'scope', 'tenant', 'trust', 'tool', 'source', 'discovery',
                'field', agent_private.short_id('pattern ' || the_app || ' ' || (given ->> 'table')),
                'content', given ->> 'memory',
                'value', jsonb_build_object('app', the_app, 'table', given ->> 'table'))) ->> 'status' <> 'unchanged')::integer;
        ELSE
            PERFORM agent_private.retire_memory(jsonb_build_object(
                'store', 'application', 'scope', 'tenant', 'reason', 'nothing is known of it any more',
                'field', agent_private.short_id('pattern ' || the_app || ' ' || (given ->> 'table'))));
        END IF;
        FOR changed IN SELECT c FROM jsonb_array_elements(coalesce(given -> 'changes', '[]')) AS c LOOP
            PERFORM agent_private.write_memory(jsonb_build_object(
                'store', 'application', 'kind', 'change', 'scope', 'tenant', 'trust', 'tool', 'source', 'discovery',
                'content', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD') || ': ' || (changed ->> 'what'),
                'value', changed || jsonb_build_object('app', the_app, 'sampled_at', given #> '{document,sampled_at}')));
            changes := changes + 1;
        END LOOP;
    END LOOP;
    IF changes > 0 THEN
        FOR old IN
            SELECT * FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = 'tenant' AND m.owner_id = '' AND m.store = 'application'
              AND m.kind = 'change' AND m.superseded_at IS NULL AND m.value ->> 'app' = the_app AND m.value ? 'sampled_at'
            ORDER BY m.memory_number DESC OFFSET 200
        LOOP
            PERFORM agent_private.close_memory(old, 'newer changes took its place');
        END LOOP;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('saved', saved, 'memories', memories, 'changes', changes);
END
$$;

-- The stored patterns of an application by table: [{table, document, inferred}], with rest also seen and estimates.
-- the_tables: only these; NULL is all.
CREATE FUNCTION public.read_app_patterns(identity jsonb, the_app text, the_tables text[] DEFAULT NULL, rest boolean DEFAULT false)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(
        jsonb_build_object('table', a.table_name, 'document', a.document, 'inferred', a.inferred)
        || CASE WHEN rest THEN jsonb_build_object('seen', a.seen, 'estimates', a.estimates) ELSE '{}' END
        ORDER BY a.table_name), '[]') INTO found
    FROM public.agent_app_pattern a
    WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.app = the_app
      AND (the_tables IS NULL OR a.table_name = ANY (the_tables));
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Forget the patterns of all tables of an application but these, and the memories of them. Returns how many.
CREATE FUNCTION public.forget_app_patterns(identity jsonb, the_app text, kept_tables text[])
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone text;
    forgotten integer := 0;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'patterns need a tenant');
    END IF;
    FOR gone IN
        DELETE FROM public.agent_app_pattern a
        WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.app = the_app AND NOT a.table_name = ANY (kept_tables)
        RETURNING a.table_name
    LOOP
        PERFORM agent_private.retire_memory(jsonb_build_object(
            'store', 'application', 'scope', 'tenant', 'reason', 'the table is gone',
            'field', agent_private.short_id('pattern ' || the_app || ' ' || gone)));
        forgotten := forgotten + 1;
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(forgotten);
END
$$;

-- The function of another role that reading a table would run with the rights of the reader, or NULL. To plan a query, Postgres
-- computes what is constant in the expressions of indexes, statistics and partition keys; a value is made text by a cast, which
-- the owner of its type may define; policies and the rules of views run as they say. So whoever owns a table could have code run
-- by whom samples it. The functions of superusers and of roles that may become the reader are no others'.
-- The one text of this query: where the application lives in another database, Python runs the body as it stands.
-- So its arguments are $1, the schema, and $2, the table. SECURITY INVOKER: it asks for its caller. Locks nothing.
CREATE FUNCTION public.code_of_others(the_schema text, the_table text)
RETURNS text
LANGUAGE sql STABLE SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
AS $code$
    WITH RECURSIVE tables (oid) AS (
        SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2
        UNION
        SELECT x.oid FROM tables t CROSS JOIN LATERAL (
            SELECT i.inhrelid AS oid FROM pg_inherits i WHERE i.inhparent = t.oid
            UNION ALL
            SELECT d.refobjid FROM pg_policy o
            JOIN pg_depend d ON d.classid = 'pg_policy'::regclass AND d.objid = o.oid AND d.refclassid = 'pg_class'::regclass
            WHERE o.polrelid = t.oid AND row_security_active(t.oid)
            UNION ALL
            SELECT d.refobjid FROM pg_class v JOIN pg_rewrite w ON w.ev_class = v.oid
            JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_class'::regclass
            WHERE v.oid = t.oid AND v.relkind = 'v') AS x
    ), expressions (classid, objid) AS (
        SELECT 'pg_class'::regclass::oid, t.oid FROM tables t
        UNION ALL
        SELECT 'pg_class'::regclass, i.indexrelid FROM tables t JOIN pg_index i ON i.indrelid = t.oid
        UNION ALL
        SELECT 'pg_statistic_ext'::regclass, s.oid FROM tables t JOIN pg_statistic_ext s ON s.stxrelid = t.oid
        UNION ALL
        SELECT 'pg_policy'::regclass, o.oid FROM tables t JOIN pg_policy o ON o.polrelid = t.oid WHERE row_security_active(t.oid)
        UNION ALL
        SELECT 'pg_rewrite'::regclass, w.oid FROM tables t
        JOIN pg_class v ON v.oid = t.oid AND v.relkind = 'v' JOIN pg_rewrite w ON w.ev_class = v.oid
    ), types (oid) AS (
        SELECT a.atttypid FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
        UNION
        SELECT y.typbasetype FROM types t JOIN pg_type y ON y.oid = t.oid AND y.typtype = 'd'
    ), functions (oid) AS (
        SELECT CASE d.refclassid WHEN 'pg_proc'::regclass THEN d.refobjid ELSE o.oprcode::oid END
        FROM expressions e JOIN pg_depend d ON d.classid = e.classid AND d.objid = e.objid
        LEFT JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
        WHERE d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass)
        UNION ALL
        SELECT k.castfunc FROM types t JOIN pg_cast k ON k.castsource = t.oid AND k.casttarget = 'text'::regtype
    )
    SELECT quote_ident(n.nspname) || '.' || quote_ident(p.proname)
    FROM functions f JOIN pg_proc p ON p.oid = f.oid JOIN pg_namespace n ON n.oid = p.pronamespace
    JOIN pg_roles r ON r.oid = p.proowner
    WHERE NOT r.rolsuper AND NOT pg_has_role(p.proowner, current_user, 'MEMBER')
    ORDER BY 1 LIMIT 1
$code$;

-- A sample of a table for callers who have no connection of their own: {now, rows: [[value, …, whether of the newest]]}, or
-- {code_of_others} where that would run any.
-- With the rights of the caller, so that it reads nothing they may not; it changes nothing (STABLE: an API runs it read
-- only), and waits half a second for a lock. Names are quoted as identifiers and must be those of a relation and of its
-- columns. how_read by column: text, small or null. percent NULL: the first rows; else that share of the blocks, and one
-- row in spread of theirs. key_column: by it the same rows are taken each time. newest_by: the indexed time whose greatest
-- rows are read too, newest_rows of them.
CREATE FUNCTION public.sample_app_table(the_schema text, the_table text, the_columns text[], how_read text[],
                                        row_limit integer, percent double precision DEFAULT NULL,
                                        spread integer DEFAULT 1, key_column text DEFAULT NULL, newest_by text DEFAULT NULL,
                                        newest_rows integer DEFAULT 0)
RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '500ms'
SET constraint_exclusion = off
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
AS $$
DECLARE
    target regclass := to_regclass(format('%I.%I', the_schema, the_table));
    taken integer := least(greatest(row_limit, 1), 1000);
    parts text;
    chosen text;
    statement text;
    found jsonb;
BEGIN
    IF target IS NULL OR EXISTS (
        SELECT FROM unnest(the_columns || array_remove(ARRAY[key_column, newest_by], NULL)) AS w (name)
        WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = target AND a.attname = w.name
                          AND a.attnum > 0 AND NOT a.attisdropped)) THEN
        RAISE EXCEPTION 'there is no such table with these columns' USING ERRCODE = 'PT404';
    END IF;
    IF public.code_of_others(the_schema, the_table) IS NOT NULL THEN
        RETURN jsonb_build_object('code_of_others', public.code_of_others(the_schema, the_table));
    END IF;
    SELECT string_agg(CASE h.how
        WHEN 'text' THEN format('left(%I::text, 200)', h.name)
        WHEN 'small' THEN format('CASE WHEN pg_column_size(%1$I) <= 8000 THEN left(%1$I::text, 200) '
                                 'WHEN %1$I IS NOT NULL THEN '''' END', h.name)
        ELSE format('CASE WHEN %I IS NOT NULL THEN '''' END', h.name) END, ', ' ORDER BY h.place)
    INTO parts FROM unnest(the_columns, how_read) WITH ORDINALITY AS h (name, how, place);
    IF percent IS NULL THEN
        statement := format('SELECT ARRAY[%s]::text[] AS r, false AS newest FROM %I.%I LIMIT %s', parts, the_schema, the_table, taken);
    ELSE
        chosen := CASE WHEN key_column IS NULL THEN format('random() * %s < 1', greatest(spread, 1))
                       ELSE format('hashtext(%I::text) %% %s = 0', key_column, greatest(spread, 1)) END;
        statement := format(
            '(SELECT ARRAY[%s]::text[] AS r, false AS newest FROM %I.%I TABLESAMPLE SYSTEM (%s) REPEATABLE (1) WHERE %s LIMIT %s)',
            parts, the_schema, the_table, least(percent, 100), chosen, taken);
        IF newest_by IS NOT NULL THEN
            statement := statement || format(
                ' UNION ALL (SELECT ARRAY[%1$s]::text[], true FROM %2$I.%3$I WHERE %4$I IS NOT NULL '
                'ORDER BY %4$I DESC LIMIT %5$s)', parts, the_schema, the_table, newest_by, least(greatest(newest_rows, 0), 1000));
        END IF;
    END IF;
    EXECUTE format('SELECT coalesce(jsonb_agg(to_jsonb(s.r) || to_jsonb(s.newest)), ''[]'') FROM (%s) AS s', statement) INTO found;
    RETURN jsonb_build_object('now', now(), 'rows', found);
END
$$;

-- How many values of a column there are in some rows, how many different ones, and how many of them another column has:
-- {sampled, distinct, matched}, or {code_of_others} where that would run any. With the rights of the caller; it changes nothing. The other column needs a unique index.
-- percent: the share of the blocks that the rows are taken from; NULL: the first rows.
-- Names are quoted as identifiers and must be those of relations and of their columns.
CREATE FUNCTION public.match_app_values(from_schema text, from_table text, from_column text, to_schema text, to_table text,
                                        to_column text, row_limit integer, percent double precision DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '500ms'
SET constraint_exclusion = off
AS $$
DECLARE
    source regclass := to_regclass(format('%I.%I', from_schema, from_table));
    target regclass := to_regclass(format('%I.%I', to_schema, to_table));
    found jsonb;
BEGIN
    IF source IS NULL OR target IS NULL
       OR NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = source AND a.attname = from_column AND a.attnum > 0)
       OR NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                      WHERE i.indrelid = target AND i.indisunique AND i.indpred IS NULL AND i.indnkeyatts = 1
                        AND a.attname = to_column) THEN
        RAISE EXCEPTION 'there are no such columns, the second with a unique index' USING ERRCODE = 'PT404';
    END IF;
    found := to_jsonb(coalesce(public.code_of_others(from_schema, from_table), public.code_of_others(to_schema, to_table)));
    IF found IS NOT NULL THEN
        RETURN jsonb_build_object('code_of_others', found);
    END IF;
    EXECUTE format(
        'SELECT jsonb_build_object(''sampled'', count(*), ''distinct'', count(DISTINCT v.value), '
        '''matched'', count(*) FILTER (WHERE EXISTS (SELECT FROM %1$I.%2$I AS t WHERE t.%3$I = v.value OFFSET 0))) '
        'FROM (SELECT %4$I AS value FROM %5$I.%6$I%8$s LIMIT %7$s) AS v WHERE v.value IS NOT NULL',
        to_schema, to_table, to_column, from_column, from_schema, from_table, least(greatest(row_limit, 1), 1000),
        CASE WHEN percent IS NOT NULL THEN format(' TABLESAMPLE SYSTEM (%s)', least(percent, 100)) END) INTO found;
    RETURN found;
END
$$;

SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.save_app_patterns(jsonb, text, jsonb)',
    'public.read_app_patterns(jsonb, text, text[], boolean)',
    'public.forget_app_patterns(jsonb, text, text[])',
    'public.code_of_others(text, text)',
    'public.sample_app_table(text, text, text[], text[], integer, double precision, integer, text, text, integer)',
    'public.match_app_values(text, text, text, text, text, text, integer, double precision)']::regprocedure[]) AS f;
