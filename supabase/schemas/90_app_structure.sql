-- What discovery found of the application's database.

-- The structure of this database, as far as the caller may see it, in one query over the catalogs. It is the one text of
-- that query: where the application lives in another database, Python runs the body as it stands, with the same argument.
-- So the body names nothing of ours but to leave it out, and its argument is $1.
--
-- wanted: {schemas: [names], exclude: ['schema.name' patterns with * and ?], known: {name: fingerprint},
-- only: [oids], names_only: bool}, each of them optional. What has a known fingerprint comes back as its name, fingerprint and
-- estimates. only and names_only serve to go round an object that cannot be read.
-- Returns {tables, functions, extensions, problems}, or with names_only {names: [{oid, name}]}.
--
-- Left out: system schemas, temporary tables, partitions (counted), what belongs to an extension, and what is the learning
-- layer's: owned by agent_app, granted to it, or in its two schemas.
-- Locks nothing. Functions that would wait for a lock are not called for a table that somebody has locked for himself;
-- such a table is a problem, not a document. Sizes and row counts are those that the
-- planner has of the last VACUUM or ANALYZE; before the first the size is read from the disk.
-- SECURITY INVOKER, unlike all other storage functions: it shall see what its caller sees.
CREATE FUNCTION public.discover_app_structure(wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '500ms'
SET jit = off
SET max_parallel_workers_per_gather = 0
AS $structure$
WITH asked AS MATERIALIZED (
    SELECT w.document AS wanted,
           ARRAY(SELECT jsonb_array_elements_text(nullif(w.document -> 'schemas', 'null'))) AS schemas,
           -- As patterns of LIKE: what it takes as special is escaped, then * and ? are put in its words.
           ARRAY(SELECT translate(regexp_replace(x, '([\\%_])', '\\\1', 'g'), '*?', '%_')
                 FROM jsonb_array_elements_text(nullif(w.document -> 'exclude', 'null')) AS x) AS exclude,
           ARRAY(SELECT x::bigint::oid FROM jsonb_array_elements_text(nullif(w.document -> 'only', 'null')) AS x) AS only_oids,
           coalesce((w.document ->> 'names_only')::boolean, false) AS names_only,
           (SELECT r.oid FROM pg_roles r
            WHERE r.rolname = 'agent_app' AND EXISTS (
                SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                WHERE n.nspname = 'agent_private' AND p.proname = 'publish')) AS layer
    FROM (SELECT CASE WHEN jsonb_typeof($1) = 'string' THEN ($1 #>> '{}')::jsonb ELSE $1 END AS document) AS w
),
spaces AS MATERIALIZED (
    SELECT n.oid, n.nspname::text AS schema, has_schema_privilege(n.oid, 'USAGE') AS usable
    FROM pg_namespace n CROSS JOIN asked a
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
      AND NOT (a.layer IS NOT NULL AND n.nspname IN ('agent_private', 'agent_queue'))
      AND (jsonb_typeof(a.wanted -> 'schemas') IS DISTINCT FROM 'array' OR n.nspname = ANY (a.schemas))
),
relations AS MATERIALIZED (
    SELECT c.oid, s.schema, c.relname::text AS name, quote_ident(s.schema) || '.' || quote_ident(c.relname) AS full_name,
           c.relkind, c.reltuples, c.relpages::bigint AS relpages, c.reltoastrelid, c.relrowsecurity, c.relforcerowsecurity, s.usable,
           s.usable AND has_table_privilege(c.oid, 'SELECT') AS readable
    FROM pg_class c JOIN spaces s ON s.oid = c.relnamespace CROSS JOIN asked a
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition AND c.relpersistence <> 't'
      AND (jsonb_typeof(a.wanted -> 'only') IS DISTINCT FROM 'array' OR c.oid = ANY (a.only_oids))
      AND NOT EXISTS (SELECT FROM unnest(a.exclude) AS x WHERE s.schema || '.' || c.relname LIKE x)
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
      AND NOT (a.layer IS NOT NULL AND (
          (s.schema = 'public' AND c.relname = 'agent_migration') OR c.relowner = a.layer
          OR EXISTS (SELECT FROM aclexplode(c.relacl) AS g WHERE g.grantee = a.layer)))
),
routines AS MATERIALIZED (
    SELECT p.oid, s.schema, p.proname::text AS name, pg_get_function_identity_arguments(p.oid) AS identity_arguments,
           quote_ident(s.schema) || '.' || quote_ident(p.proname) || '('
               || pg_get_function_identity_arguments(p.oid) || ')' AS full_name,
           p.prokind, p.provolatile, p.prosecdef, p.proconfig, p.prosrc, p.prosqlbody::text AS tree, p.probin, l.lanname
    FROM pg_proc p JOIN spaces s ON s.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang CROSS JOIN asked a
    WHERE (jsonb_typeof(a.wanted -> 'only') IS DISTINCT FROM 'array' OR p.oid = ANY (a.only_oids))
      AND NOT EXISTS (SELECT FROM unnest(a.exclude) AS x WHERE s.schema || '.' || p.proname LIKE x)
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
      AND p.proowner IS DISTINCT FROM a.layer
      AND NOT (s.schema = 'auth' AND obj_description(p.oid, 'pg_proc') IS NOT DISTINCT FROM 'stand-in of the learning layer')
),
locked AS MATERIALIZED (
    SELECT DISTINCT k.relation AS oid FROM pg_locks k
    WHERE k.locktype = 'relation' AND k.mode = 'AccessExclusiveLock' AND k.pid <> pg_backend_pid()
      AND k.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
),
-- Every partitioned table with the one at its top. Partitions that are no such tables are counted and never listed.
trees AS MATERIALIZED (
    WITH RECURSIVE tree AS (
        SELECT r.oid AS top, r.oid FROM relations r WHERE r.relkind = 'p'
        UNION ALL
        SELECT t.top, c.oid FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid JOIN tree t ON t.oid = i.inhparent
        WHERE c.relkind = 'p' AND c.relispartition
    )
    SELECT t.top, sum(n.children) - count(*) + 1 AS partitions, array_agg(t.oid) AS nodes
    FROM tree t CROSS JOIN LATERAL (SELECT count(*) AS children FROM pg_inherits i WHERE i.inhparent = t.oid) AS n
    GROUP BY t.top
),
seen AS MATERIALIZED (
    SELECT r.full_name, coalesce(e.row_estimate, nullif(r.reltuples, -1)::bigint) AS row_estimate,
           CASE WHEN r.relkind IN ('r', 'm') AND r.reltuples >= 0
                    THEN (r.relpages + indexes.pages + coalesce(
                        (SELECT o.relpages + sum(c.relpages) FROM pg_class o
                         JOIN pg_index i ON i.indrelid = o.oid JOIN pg_class c ON c.oid = i.indexrelid
                         WHERE o.oid = r.reltoastrelid GROUP BY o.relpages), 0)) * current_setting('block_size')::bigint
                WHEN r.relkind IN ('r', 'm') THEN pg_total_relation_size(r.oid) ELSE e.size_bytes END AS size_bytes,
           jsonb_build_object(
               'schema', r.schema, 'name', r.name,
               'kind', CASE r.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned_table' WHEN 'v' THEN 'view'
                                      WHEN 'm' THEN 'materialized_view' ELSE 'foreign_table' END,
               'comment', (SELECT told.description FROM pg_description told
                           WHERE told.objoid = r.oid AND told.classoid = 'pg_class'::regclass AND told.objsubid = 0),
               'columns', columns.list, 'indexes', indexes.list, 'triggers', triggers.list, 'policies', policies.list,
               'primary_key', coalesce(constraints.primary_key, '[]'), 'unique', coalesce(constraints.uniques, '[]'),
               'foreign_keys', coalesce(constraints.foreign_keys, '[]'), 'checks', coalesce(constraints.checks, '[]'),
               'rls', jsonb_build_object('enabled', r.relrowsecurity, 'forced', r.relforcerowsecurity),
               'partitions', coalesce(t.partitions, 0),
               'partition_by', CASE r.relkind WHEN 'p' THEN pg_get_partkeydef(r.oid) END,
               'reads', views.reads, 'definition_hash', views.definition_hash,
               'readable', r.readable
           ) AS document
    FROM relations r
    LEFT JOIN trees t ON t.top = r.oid
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'nullable', NOT a.attnotnull,
                   'base_type', CASE WHEN y.typtype = 'd' THEN format_type(y.typbasetype, y.typtypmod) END,
                   'default', CASE WHEN a.attgenerated = '' AND a.atthasdef THEN pg_get_expr(d.adbin, d.adrelid) END,
                   'generated', CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END,
                   'identity', CASE a.attidentity WHEN 'a' THEN 'always' WHEN 'd' THEN 'by default' END,
                   'comment', told.description,
                   'enum', CASE WHEN y.typtype IN ('e', 'd') OR y.typcategory = 'A' THEN (
                       SELECT jsonb_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e
                       WHERE e.enumtypid = CASE WHEN y.typtype = 'd' THEN y.typbasetype
                                                WHEN y.typcategory = 'A' THEN y.typelem ELSE y.oid END) END,
                   'readable', r.readable OR (r.usable AND has_column_privilege(r.oid, a.attnum, 'SELECT'))
               ) ORDER BY a.attnum), '[]') AS list
        FROM pg_attribute a
        LEFT JOIN pg_type y ON y.oid = a.atttypid
        LEFT JOIN pg_description told
               ON told.objoid = r.oid AND told.classoid = 'pg_class'::regclass AND told.objsubid = a.attnum
        LEFT JOIN pg_attrdef d ON a.atthasdef AND d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS columns
    CROSS JOIN LATERAL (
        SELECT (jsonb_agg(x.columns) FILTER (WHERE x.contype = 'p')) -> 0 AS primary_key,
               jsonb_agg(jsonb_build_object('name', x.conname, 'columns', x.columns) ORDER BY x.conname)
                   FILTER (WHERE x.contype = 'u') AS uniques,
               jsonb_agg(jsonb_build_object(
                   'name', x.conname, 'columns', x.columns, 'to_schema', x.to_schema, 'to_table', x.to_table,
                   'to_columns', x.to_columns, 'on_delete', CASE x.confdeltype
                       WHEN 'a' THEN 'no action' WHEN 'r' THEN 'restrict' WHEN 'c' THEN 'cascade'
                       WHEN 'n' THEN 'set null' ELSE 'set default' END) ORDER BY x.conname)
                   FILTER (WHERE x.contype = 'f') AS foreign_keys,
               jsonb_agg(jsonb_build_object('name', x.conname, 'definition', x.definition) ORDER BY x.conname)
                   FILTER (WHERE x.contype IN ('c', 'x')) AS checks
        FROM (
            SELECT k.contype, k.conname::text AS conname, k.confdeltype, n.nspname AS to_schema, f.relname AS to_table,
                   CASE WHEN k.contype IN ('c', 'x') THEN pg_get_constraintdef(k.oid) END AS definition,
                   (SELECT jsonb_agg(a.attname ORDER BY u.place)
                    FROM unnest(k.conkey) WITH ORDINALITY AS u (number, place)
                    JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number) AS columns,
                   CASE WHEN k.contype = 'f' THEN (
                       SELECT jsonb_agg(a.attname ORDER BY u.place)
                       FROM unnest(k.confkey) WITH ORDINALITY AS u (number, place)
                       JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number) END AS to_columns
            FROM pg_constraint k
            LEFT JOIN pg_class f ON k.contype = 'f' AND f.oid = k.confrelid
            LEFT JOIN pg_namespace n ON n.oid = f.relnamespace
            -- A key to a partitioned table has further rows, one per partition, whose parent it is.
            WHERE k.conrelid = r.oid AND k.contype IN ('p', 'u', 'f', 'c', 'x') AND k.conparentid = 0
        ) AS x
    ) AS constraints
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'name', c.relname, 'definition', pg_get_indexdef(i.indexrelid), 'unique', i.indisunique)
                   ORDER BY c.relname), '[]') AS list, coalesce(sum(c.relpages), 0) AS pages
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = r.oid
    ) AS indexes
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'name', g.tgname, 'definition', pg_get_triggerdef(g.oid), 'enabled', g.tgenabled <> 'D',
                   'function', (SELECT quote_ident(n.nspname) || '.' || quote_ident(p.proname)
                                FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.oid = g.tgfoid))
                   ORDER BY g.tgname), '[]') AS list
        FROM pg_trigger g WHERE g.tgrelid = r.oid AND NOT g.tgisinternal
    ) AS triggers
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'name', o.polname, 'command', CASE o.polcmd WHEN 'r' THEN 'select' WHEN 'a' THEN 'insert'
                       WHEN 'w' THEN 'update' WHEN 'd' THEN 'delete' ELSE 'all' END,
                   'roles', (SELECT jsonb_agg(CASE u.oid WHEN 0 THEN 'public' ELSE pg_get_userbyid(u.oid) END)
                             FROM unnest(o.polroles) AS u (oid)),
                   'using', pg_get_expr(o.polqual, o.polrelid), 'check', pg_get_expr(o.polwithcheck, o.polrelid))
                   ORDER BY o.polname), '[]') AS list
        FROM pg_policy o WHERE o.polrelid = r.oid
    ) AS policies
    -- The rule of a view is compared as it is stored: to print it would lock the tables of the view.
    LEFT JOIN LATERAL (
        SELECT md5(string_agg(w.ev_action::text, ' ' ORDER BY w.oid)) AS definition_hash,
               (SELECT jsonb_agg(x.name ORDER BY x.name)
                FROM (SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name
                      FROM pg_rewrite w2
                      JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w2.oid
                           AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.oid
                      JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE w2.ev_class = r.oid) AS x) AS reads
        FROM pg_rewrite w WHERE w.ev_class = r.oid
    ) AS views ON r.relkind IN ('v', 'm')
    -- Of ten thousand partitions and more nothing is summed up.
    LEFT JOIN LATERAL (
        SELECT sum(greatest(c.reltuples, 0))::bigint AS row_estimate,
               sum(c.relpages::bigint) * current_setting('block_size')::bigint AS size_bytes
        FROM unnest(t.nodes) AS u (oid) JOIN pg_inherits i ON i.inhparent = u.oid JOIN pg_class c ON c.oid = i.inhrelid
        WHERE c.relkind <> 'p' HAVING bool_or(c.reltuples >= 0)
    ) AS e ON t.partitions <= 10000
    WHERE NOT (SELECT a.names_only FROM asked a) AND r.oid NOT IN (SELECT l.oid FROM locked l)
),
seen_routines AS MATERIALIZED (
    SELECT p.full_name, p.lanname IN ('sql', 'plpgsql') AND p.tree IS NULL AS has_body, p.prosrc, p.tree,
           md5(concat_ws(' ', p.prosrc, p.probin, p.tree)) AS body_hash,
           jsonb_build_object(
               'schema', p.schema, 'name', p.name, 'identity_arguments', p.identity_arguments,
               'kind', CASE p.prokind WHEN 'f' THEN 'function' WHEN 'p' THEN 'procedure' WHEN 'a' THEN 'aggregate'
                                      ELSE 'window' END,
               'arguments', pg_get_function_arguments(p.oid), 'result', pg_get_function_result(p.oid),
               'volatility', CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END,
               'security', CASE WHEN p.prosecdef THEN 'definer' ELSE 'invoker' END,
               'search_path_pinned', EXISTS (SELECT FROM unnest(p.proconfig) AS o WHERE o LIKE 'search\_path=%'),
               'language', p.lanname, 'comment', (
                   SELECT told.description FROM pg_description told
                   WHERE told.objoid = p.oid AND told.classoid = 'pg_proc'::regclass AND told.objsubid = 0)
           ) AS document
    FROM routines p
    WHERE NOT (SELECT a.names_only FROM asked a)
)
SELECT CASE WHEN a.names_only THEN jsonb_build_object(
    -- Without an encoding a name may hold bytes that no client can be sent; they are what fails here.
    'names', (SELECT coalesce(jsonb_agg(jsonb_build_object('oid', x.oid::bigint, 'name',
                  CASE WHEN current_setting('server_encoding') = 'SQL_ASCII'
                       THEN regexp_replace(x.full_name, '[^ -~]', '?', 'g') ELSE x.full_name END) ORDER BY x.full_name), '[]')
              FROM (SELECT r.oid, r.full_name FROM relations r UNION ALL SELECT p.oid, p.full_name FROM routines p) AS x))
ELSE jsonb_build_object(
    'tables', (
        SELECT coalesce(jsonb_agg(
            CASE WHEN a.wanted -> 'known' ->> s.full_name = f.fingerprint
                 THEN jsonb_build_object('known', s.full_name) ELSE s.document END
            || jsonb_build_object('fingerprint', f.fingerprint, 'row_estimate', s.row_estimate, 'size_bytes', s.size_bytes)
            ORDER BY s.full_name), '[]')
        FROM seen s CROSS JOIN LATERAL (SELECT md5(s.document::text) AS fingerprint) AS f),
    'functions', (
        SELECT coalesce(jsonb_agg(
            CASE WHEN a.wanted -> 'known' ->> s.full_name = f.fingerprint
                 THEN jsonb_build_object('known', s.full_name)
                 ELSE s.document || jsonb_build_object(
                     'body', CASE WHEN s.has_body THEN s.prosrc END,
                     -- A body in the standard's form is kept as a tree: what its statements do, and which functions it calls.
                     'body_writes', s.tree ~ ':commandType [2-6]',
                     'body_calls', CASE WHEN s.tree IS NOT NULL THEN coalesce((
                         SELECT jsonb_agg(DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.proname))
                         FROM regexp_matches(s.tree, ':funcid (\d+)', 'g') AS m (found)
                         JOIN pg_proc c ON c.oid = m.found[1]::oid JOIN pg_namespace n ON n.oid = c.pronamespace), '[]') END)
            END || jsonb_build_object('fingerprint', f.fingerprint)
            ORDER BY s.full_name), '[]')
        FROM seen_routines s CROSS JOIN LATERAL (SELECT md5(s.document::text || s.body_hash) AS fingerprint) AS f),
    'extensions', (
        SELECT coalesce(jsonb_agg(jsonb_build_object('name', e.extname, 'version', e.extversion, 'schema', n.nspname)
                                  ORDER BY e.extname), '[]')
        FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace),
    'problems', (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
            'object', r.full_name, 'reason', 'another session has locked it for itself') ORDER BY r.full_name), '[]')
        FROM relations r WHERE r.oid IN (SELECT l.oid FROM locked l)))
END
FROM asked a
$structure$;

CREATE TABLE public.agent_app (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    app text NOT NULL CHECK (length(app) BETWEEN 1 AND 400),
    discovery_id text NOT NULL,
    discovered_at timestamptz NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    extensions jsonb NOT NULL DEFAULT '[]',
    problems jsonb NOT NULL DEFAULT '[]',
    changes jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (tenant_id, app)
);
COMMENT ON TABLE public.agent_app IS 'The databases that agents work on: when each was discovered last, what could not be seen, and what had changed.';
COMMENT ON COLUMN public.agent_app.app IS 'default for the layer''s own database, else host:port/database; never a user or a password.';
COMMENT ON COLUMN public.agent_app.version IS 'Rises whenever a row of agent_app_object changes, so that a reader can tell whether what it has is still so.';
COMMENT ON COLUMN public.agent_app.changes IS '{added, removed, changed}: names of the last discovery''s differences.';

CREATE TABLE public.agent_app_object (
    tenant_id text NOT NULL,
    app text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('table', 'function', 'relationship')),
    object_key text NOT NULL,
    name text NOT NULL,
    fingerprint text NOT NULL,
    document jsonb NOT NULL,
    row_estimate bigint,
    size_bytes bigint,
    first_seen timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    gone_at timestamptz,
    PRIMARY KEY (tenant_id, app, kind, object_key),
    FOREIGN KEY (tenant_id, app) REFERENCES public.agent_app ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_app_object IS 'Tables, functions and relationships of the databases that agents work on, as discovery saw them last.';
COMMENT ON COLUMN public.agent_app_object.object_key IS 'The name, or its beginning and hash where it is too long for an index.';
COMMENT ON COLUMN public.agent_app_object.changed_at IS 'When discovery saw this fingerprint for the first time; an object that is not gone was seen last at agent_app.discovered_at.';

SELECT agent_private.guard(t) FROM unnest(ARRAY['public.agent_app', 'public.agent_app_object']::regclass[]) AS t;
CREATE POLICY own_tenant ON public.agent_app TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true))
           AND (SELECT current_setting('agent.reach', true)) = 'tenant');
CREATE POLICY own_tenant ON public.agent_app_object TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true))
           AND (SELECT current_setting('agent.reach', true)) = 'tenant');

-- The field of the memory that tells about one object: there is one such memory at a time.
CREATE FUNCTION agent_private.app_field(the_app text, the_kind text, the_name text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.short_id(the_app || ' ' || the_kind || ' ' || the_name);
$$;

-- Write the memories of objects that have none yet, all at once: a first discovery has thousands. items: [{kind, field,
-- memory}]. The caller has entered.
CREATE FUNCTION agent_private.write_app_memories(items jsonb, the_run_id text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    numbers bigint[];
BEGIN
    PERFORM agent_private.touch_scope('tenant');
    WITH written AS (
        INSERT INTO public.agent_memory (
            tenant_id, memory_id, version, store, kind, scope, owner_id, field, content, content_hash, trust, source, run_id)
        SELECT tenant, gen_random_uuid(), 1, 'application', i.kind, 'tenant', '', i.field, i.memory,
               agent_private.content_hash(i.memory), 'tool', 'discovery', the_run_id
        FROM jsonb_to_recordset(items) AS i (kind text, field text, memory text)
        RETURNING memory_number, memory_id, content
    ), founded AS (
        INSERT INTO public.agent_memory_evidence (tenant_id, memory_id, version, scope, owner_id, run_id, quote)
        SELECT tenant, w.memory_id, 1, 'tenant', '', the_run_id, left(w.content, 1000) FROM written w
    )
    SELECT array_agg(w.memory_number) INTO numbers FROM written w;
    PERFORM agent_private.index_memories('tenant', '', coalesce(numbers, '{}'));
END
$$;

-- Save what one discovery saw: objects, what changed since the last one, and memories of both in store application,
-- scope tenant. A second discovery that saw the same changes nothing.
-- discovery: {discovery_id, extensions, problems, schemas: [names] or null for all, unseen: [names],
-- objects: [{kind, name, fingerprint, row_estimate, size_bytes} of each object that is there; with document and memory,
-- and change in words, unless its fingerprint was known]}. Objects of other schemas and those in unseen are not gone.
-- Or, where all is as it was saved with a version, {discovery_id, extensions, problems, same_as_version}: PT409 where it is at
-- another version by now.
-- Returns {discovered_at, version, is_first, added, removed, changed}, the last three as names of tables and functions.
-- Locks the row of the app, so that discoveries of one app are saved one after the other.
CREATE FUNCTION public.save_app_structure(identity jsonb, the_app text, discovery jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    saved public.agent_app;
    was_there boolean;
    fresh jsonb;
    gone jsonb;
    moved integer;
    item record;
    surplus public.agent_memory;
    the_evidence jsonb;
    the_changes jsonb;
    told text;
BEGIN
    identity := agent_private.document(identity);
    discovery := agent_private.document(discovery);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a discovery needs a tenant');
    END IF;
    IF coalesce(discovery ->> 'discovery_id', '') = '' OR coalesce(the_app, '') = '' THEN
        PERFORM agent_private.refuse('PT422', 'a discovery needs an id and an app');
    END IF;
    tenant := current_setting('agent.tenant_id');
    INSERT INTO public.agent_app AS a (tenant_id, app, discovery_id, discovered_at, extensions, problems)
    VALUES (tenant, the_app, '', now(), '[]', '[]')
    ON CONFLICT (tenant_id, app) DO UPDATE SET discovered_at = greatest(a.discovered_at, clock_timestamp())
    RETURNING * INTO saved;
    was_there := saved.discovery_id <> '';
    IF discovery ->> 'same_as_version' IS NOT NULL THEN
        IF NOT was_there OR saved.version <> (discovery ->> 'same_as_version')::bigint THEN
            PERFORM agent_private.refuse('PT409', format('what is known of %s is at version %s now', the_app, saved.version));
        END IF;
        the_changes := '{"added": [], "changed": [], "removed": []}';
        UPDATE public.agent_app a
        SET discovery_id = discovery ->> 'discovery_id', changes = the_changes,
            extensions = coalesce(discovery -> 'extensions', '[]'), problems = coalesce(discovery -> 'problems', '[]')
        WHERE a.tenant_id = tenant AND a.app = the_app;
        PERFORM agent_private.leave(previous);
        RETURN the_changes || jsonb_build_object('discovered_at', saved.discovered_at, 'version', saved.version, 'is_first', false);
    END IF;

    SELECT coalesce(jsonb_agg(jsonb_build_object(
               'kind', g.kind, 'name', g.name, 'object_key', agent_private.short_id(g.name), 'fingerprint', g.fingerprint,
               'document', g.document, 'row_estimate', g.row_estimate, 'size_bytes', g.size_bytes, 'memory', g.memory,
               'change', g.change, 'is_new', o.object_key IS NULL OR o.gone_at IS NOT NULL)), '[]') INTO fresh
    FROM jsonb_to_recordset(discovery -> 'objects') AS g (
        kind text, name text, fingerprint text, document jsonb, row_estimate bigint, size_bytes bigint, memory text, change text)
    LEFT JOIN public.agent_app_object o
           ON o.tenant_id = tenant AND o.app = the_app AND o.kind = g.kind
              AND o.object_key = agent_private.short_id(g.name)
    WHERE g.document IS NOT NULL AND (o.object_key IS NULL OR o.gone_at IS NOT NULL OR o.fingerprint <> g.fingerprint OR o.document <> g.document);
    INSERT INTO public.agent_app_object AS o
        (tenant_id, app, kind, object_key, name, fingerprint, document, row_estimate, size_bytes)
    SELECT tenant, the_app, f.kind, f.object_key, f.name, f.fingerprint, f.document, f.row_estimate, f.size_bytes
    FROM jsonb_to_recordset(fresh) AS f (
        kind text, object_key text, name text, fingerprint text, document jsonb, row_estimate bigint, size_bytes bigint)
    ON CONFLICT (tenant_id, app, kind, object_key) DO UPDATE
    SET fingerprint = excluded.fingerprint, document = excluded.document, row_estimate = excluded.row_estimate,
        size_bytes = excluded.size_bytes, changed_at = now(), gone_at = NULL;
    UPDATE public.agent_app_object o
    SET row_estimate = g.row_estimate, size_bytes = g.size_bytes
    FROM jsonb_to_recordset(discovery -> 'objects') AS g (kind text, name text, row_estimate bigint, size_bytes bigint)
    WHERE o.tenant_id = tenant AND o.app = the_app AND o.kind = g.kind AND o.object_key = agent_private.short_id(g.name)
      AND (o.row_estimate, o.size_bytes) IS DISTINCT FROM (g.row_estimate, g.size_bytes);
    GET DIAGNOSTICS moved = ROW_COUNT;
    WITH there AS (
        SELECT g.kind, agent_private.short_id(g.name) AS object_key
        FROM jsonb_to_recordset(discovery -> 'objects') AS g (kind text, name text)
    ), ended AS (
        UPDATE public.agent_app_object o SET gone_at = now()
        WHERE o.tenant_id = tenant AND o.app = the_app AND o.gone_at IS NULL
          AND NOT (o.kind = 'relationship' AND o.document -> 'declared' = 'false')
          AND (o.kind, o.object_key) NOT IN (SELECT t.kind, t.object_key FROM there t)
          AND NOT coalesce(discovery -> 'unseen', '[]') ? coalesce(o.document ->> 'from_table', o.name)
          AND (jsonb_typeof(discovery -> 'schemas') IS DISTINCT FROM 'array'
               OR discovery -> 'schemas' ? (o.document ->> 'schema'))
        RETURNING o.kind, o.name)
    SELECT coalesce(jsonb_agg(to_jsonb(e)), '[]') INTO gone FROM ended e;

    IF EXISTS (SELECT FROM jsonb_array_elements(fresh) AS f WHERE (f -> 'is_new')::boolean) THEN
        PERFORM agent_private.write_app_memories(
            (SELECT jsonb_agg(jsonb_build_object('kind', f.kind, 'memory', f.memory,
                                                 'field', agent_private.app_field(the_app, f.kind, f.name)))
             FROM jsonb_to_recordset(fresh) AS f (kind text, name text, memory text, is_new boolean) WHERE f.is_new),
            discovery ->> 'discovery_id');
    END IF;
    FOR item IN
        SELECT * FROM jsonb_to_recordset(fresh) AS f (kind text, name text, memory text, is_new boolean) WHERE NOT f.is_new
    LOOP
        the_evidence := jsonb_build_array(jsonb_build_object(
            'run_id', discovery ->> 'discovery_id', 'quote', left(item.memory, 1000)));
        PERFORM agent_private.write_memory(jsonb_build_object(
            'store', 'application', 'scope', 'tenant', 'kind', item.kind, 'trust', 'tool', 'source', 'discovery',
            'field', agent_private.app_field(the_app, item.kind, item.name), 'content', item.memory,
            'run_id', discovery ->> 'discovery_id', 'evidence', the_evidence));
    END LOOP;
    FOR item IN SELECT * FROM jsonb_to_recordset(gone) AS g (kind text, name text) LOOP
        PERFORM agent_private.retire_memory(jsonb_build_object(
            'store', 'application', 'scope', 'tenant', 'reason', 'the application has it no more',
            'field', agent_private.app_field(the_app, item.kind, item.name)));
    END LOOP;

    SELECT jsonb_build_object(
        'added', (SELECT coalesce(jsonb_agg(f ->> 'name' ORDER BY f ->> 'name'), '[]') FROM jsonb_array_elements(fresh) AS f
                  WHERE f ->> 'kind' <> 'relationship' AND (f -> 'is_new')::boolean),
        'changed', (SELECT coalesce(jsonb_agg(f ->> 'name' ORDER BY f ->> 'name'), '[]') FROM jsonb_array_elements(fresh) AS f
                    WHERE f ->> 'kind' <> 'relationship' AND NOT (f -> 'is_new')::boolean),
        'removed', (SELECT coalesce(jsonb_agg(g ->> 'name' ORDER BY g ->> 'name'), '[]') FROM jsonb_array_elements(gone) AS g
                    WHERE g ->> 'kind' <> 'relationship')) INTO the_changes;
    IF was_there AND the_changes <> '{"added": [], "changed": [], "removed": []}' THEN
        SELECT string_agg(x.line, '; ' ORDER BY x.place, x.line) INTO told
        FROM (SELECT 1 AS place, f ->> 'change' AS line FROM jsonb_array_elements(fresh) AS f
              WHERE f ->> 'kind' <> 'relationship' AND f ->> 'change' IS NOT NULL
              UNION ALL
              SELECT 2, 'removed ' || (g ->> 'kind') || ' ' || (g ->> 'name') FROM jsonb_array_elements(gone) AS g
              WHERE g ->> 'kind' <> 'relationship') AS x;
        told := left(format('The application''s database %s changed, seen on %s: %s', the_app,
                            to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), told), 4000);
        PERFORM agent_private.write_memory(jsonb_build_object(
            'store', 'application', 'scope', 'tenant', 'kind', 'change', 'trust', 'tool', 'source', 'discovery',
            'content', told, 'run_id', discovery ->> 'discovery_id',
            'evidence', jsonb_build_array(jsonb_build_object(
                'run_id', discovery ->> 'discovery_id', 'quote', left(told, 1000)))));
        FOR surplus IN  -- a hundred changes are history enough
            SELECT * FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = 'tenant' AND m.owner_id = '' AND m.store = 'application'
              AND m.kind = 'change' AND m.superseded_at IS NULL
            ORDER BY m.memory_number DESC OFFSET 100
        LOOP
            PERFORM agent_private.close_memory(surplus, 'over a hundred changes');
        END LOOP;
    END IF;

    UPDATE public.agent_app a
    SET discovery_id = discovery ->> 'discovery_id', changes = the_changes,
        extensions = coalesce(discovery -> 'extensions', '[]'), problems = coalesce(discovery -> 'problems', '[]'),
        version = a.version + (moved > 0 OR fresh <> '[]' OR gone <> '[]')::integer
    WHERE a.tenant_id = tenant AND a.app = the_app
    RETURNING * INTO saved;
    PERFORM agent_private.leave(previous);
    RETURN the_changes || jsonb_build_object('discovered_at', saved.discovered_at, 'version', saved.version, 'is_first', NOT was_there);
END
$$;

-- What is known of an app, or NULL where it was never discovered: {app, discovered_at, version, extensions, problems,
-- changes, objects: [{kind, name, fingerprint, row_estimate, size_bytes, document}]}. Without objects where the_version is
-- the one that the caller has already.
CREATE FUNCTION public.get_app_structure(identity jsonb, the_app text, the_version bigint DEFAULT NULL)
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
        RETURN NULL;
    END IF;
    SELECT jsonb_build_object(
        'app', a.app, 'discovered_at', a.discovered_at, 'version', a.version, 'extensions', a.extensions,
        'problems', a.problems, 'changes', a.changes)
        || CASE WHEN a.version = the_version THEN '{}' ELSE jsonb_build_object('objects', (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                       'kind', o.kind, 'name', o.name, 'fingerprint', o.fingerprint, 'row_estimate', o.row_estimate,
                       'size_bytes', o.size_bytes, 'document', o.document) ORDER BY o.kind, o.object_key), '[]')
            FROM public.agent_app_object o
            WHERE o.tenant_id = a.tenant_id AND o.app = a.app AND o.gone_at IS NULL)) END INTO found
    FROM public.agent_app a
    WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.app = the_app;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

SELECT agent_private.publish(f, 'private') FROM unnest(ARRAY[
    'agent_private.app_field(text, text, text)',
    'agent_private.write_app_memories(jsonb, text)']::regprocedure[]) AS f;
SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.discover_app_structure(jsonb)',
    'public.save_app_structure(jsonb, text, jsonb)',
    'public.get_app_structure(jsonb, text, bigint)']::regprocedure[]) AS f;
