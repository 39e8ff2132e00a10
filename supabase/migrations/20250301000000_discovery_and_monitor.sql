-- Discovery of the application, the background learner, the monitor and its alerts. Made from supabase/schemas/ by supabase/build_migrations.sh.

-- ---- schemas/90_app_structure.sql

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

-- ---- schemas/91_app_patterns.sql

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

-- ---- schemas/92_learner.sql

-- Clocks: what is done once per time slot, however many replicas tick; and the steps of the background learner.

CREATE TABLE public.agent_tick (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    clock text NOT NULL CHECK (clock <> ''),
    slot timestamptz NOT NULL,
    state text NOT NULL DEFAULT 'todo',
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    worker text,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    claimed_by text NOT NULL,
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    leased_until timestamptz,
    finished_at timestamptz,
    error text,
    PRIMARY KEY (tenant_id, clock, slot),
    -- todo -> doing -> done | failed; doing -> todo (handed back, or to be tried again)
    CONSTRAINT agent_tick_state CHECK (state IN ('todo', 'doing', 'done', 'failed')),
    CONSTRAINT agent_tick_lease CHECK ((state = 'doing') = (leased_until IS NOT NULL))
);
COMMENT ON TABLE public.agent_tick IS 'One row per clock and time slot in which some replica ticked: the work of that slot and what became of it.';
COMMENT ON COLUMN public.agent_tick.slot IS 'When the slot began: the time of the database, rounded down to the interval.';
COMMENT ON COLUMN public.agent_tick.claimed_by IS 'The replica that ticked first.';
COMMENT ON COLUMN public.agent_tick.attempts IS 'How often it was begun; also the token of who is at it, since each beginning raises it.';
COMMENT ON COLUMN public.agent_tick.leased_until IS 'Until when the worker that is at it may be silent; afterwards another takes it over.';
CREATE INDEX agent_tick_open ON public.agent_tick (tenant_id, clock, slot) WHERE state IN ('todo', 'doing');
-- A later tick never runs beside an earlier one of the same clock.
CREATE UNIQUE INDEX agent_tick_one_at_a_time ON public.agent_tick (tenant_id, clock) WHERE state = 'doing';

CREATE TABLE public.agent_clock (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    clock text NOT NULL CHECK (clock <> ''),
    replica text NOT NULL CHECK (replica <> ''),
    interval_seconds double precision NOT NULL CHECK (interval_seconds > 0),
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, clock, replica)
);
COMMENT ON TABLE public.agent_clock IS 'The processes in which a clock runs, and when each was last heard of.';

CREATE TABLE public.learning_analytics (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    cycle text NOT NULL CHECK (cycle <> ''),
    step text NOT NULL CHECK (step <> ''),
    state text NOT NULL DEFAULT 'doing',
    attempts integer NOT NULL DEFAULT 1 CHECK (attempts >= 0),
    worker text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    leased_until timestamptz,
    finished_at timestamptz,
    counts jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(counts) = 'object'),
    details jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(details) = 'object'),
    error text,
    PRIMARY KEY (tenant_id, cycle, step),
    -- doing -> done | failed | todo; todo -> doing
    CONSTRAINT learning_analytics_state CHECK (state IN ('todo', 'doing', 'done', 'failed')),
    CONSTRAINT learning_analytics_lease CHECK ((state = 'doing') = (leased_until IS NOT NULL))
);
COMMENT ON TABLE public.learning_analytics IS 'One row per step of a cycle of the background learner: what it did, how long it took, what went wrong.';
COMMENT ON COLUMN public.learning_analytics.cycle IS 'The time slot of the tick, or "once" and a random id for a cycle that somebody asked for.';
COMMENT ON COLUMN public.learning_analytics.attempts IS 'How often it was begun; also the token of who is at it.';
COMMENT ON COLUMN public.learning_analytics.counts IS 'How much of what it did, as numbers.';
CREATE INDEX learning_analytics_by_time ON public.learning_analytics (tenant_id, started_at DESC);
-- A step never runs beside itself, whichever cycles they are of.
CREATE UNIQUE INDEX learning_analytics_one_at_a_time ON public.learning_analytics (tenant_id, step) WHERE state = 'doing';

-- Curating finds what is no longer valid without reading all memories.
CREATE INDEX agent_memory_by_end ON public.agent_memory (tenant_id, valid_to) WHERE superseded_at IS NULL AND valid_to IS NOT NULL;

-- Curating looks for doubles only where something was written since it last looked.
ALTER TABLE public.agent_scope ADD COLUMN curated_version bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN public.agent_scope.curated_version IS 'The version that was looked through for doubles.';
CREATE INDEX agent_scope_to_curate ON public.agent_scope (tenant_id, scope, owner_id) WHERE version > curated_version;

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_tick', 'public.agent_clock', 'public.learning_analytics']::regclass[]) AS t;

-- What serves all tenants may see whose runs there are; it then works for each tenant by itself.
CREATE POLICY of_all_tenants ON public.agent_run FOR SELECT TO agent_app
    USING ((SELECT current_setting('agent.reach', true)) = 'everywhere');

-- Which queues a worker works on, where it does not work on all of them.
CREATE TABLE agent_queue.agent_worker (
    worker_id bigint PRIMARY KEY REFERENCES agent_queue.procrastinate_workers (id) ON DELETE CASCADE,
    queues text[] NOT NULL
);
COMMENT ON TABLE agent_queue.agent_worker IS 'The queues of a worker that does not work on all; the table of the queue itself does not say.';
GRANT SELECT, INSERT, UPDATE, DELETE ON agent_queue.agent_worker TO agent_server;
-- A session's jobs that failed for good, which order_sessions looks for once per session. Small: few jobs fail.
CREATE INDEX agent_failed_job_by_lock ON agent_queue.procrastinate_jobs (lock) WHERE status = 'failed';

-- The work of queue_state, by the workers that work on this queue. Runs as its owner, because agent_app has no rights on
-- the queue.
CREATE OR REPLACE FUNCTION agent_private.queue_state(the_queue text)
RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers w
                    LEFT JOIN agent_queue.agent_worker a ON a.worker_id = w.id
                    WHERE w.last_heartbeat > now() - interval '30 seconds'
                      AND (a.queues IS NULL OR the_queue = ANY (a.queues))),
        'overdue_seconds', (SELECT coalesce(extract(epoch FROM now() - min(j.scheduled_at)), 0)
                            FROM agent_queue.procrastinate_jobs j
                            WHERE j.queue_name = the_queue AND j.status = 'todo' AND j.scheduled_at <= now()));
$$;

-- The queue, the lock and the queueing lock of a clock: one of its jobs waits and one is at work, at most. Short enough for
-- the name of a channel of notifications.
CREATE FUNCTION agent_private.clock_key(the_tenant text, the_clock text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'clock ' || left(encode(sha256(convert_to(jsonb_build_array(the_tenant, the_clock)::text, 'UTF8')), 'hex'), 32);
$$;

-- Have a worker look for open ticks of a clock, unless a job for that waits or is at work.
-- Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.enqueue_tick(the_tenant text, the_clock text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    key text := agent_private.clock_key(the_tenant, the_clock);
BEGIN
    IF EXISTS (SELECT FROM agent_queue.procrastinate_jobs j WHERE j.queueing_lock = key AND j.status = 'todo')
       OR EXISTS (SELECT FROM agent_queue.procrastinate_jobs j WHERE j.lock = key AND j.status = 'doing') THEN
        RETURN false;
    END IF;
    PERFORM agent_queue.procrastinate_defer_jobs_v1(ARRAY[ROW(
        key, 'agent.tick', 0, key, key,
        jsonb_build_object('identity', jsonb_build_object('tenant_id', the_tenant), 'clock', the_clock),
        NULL)::agent_queue.procrastinate_job_to_defer_v1]);
    RETURN true;
EXCEPTION WHEN unique_violation THEN
    RETURN false;
END
$$;
REVOKE ALL ON FUNCTION agent_private.enqueue_tick(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.enqueue_tick(text, text) TO agent_app;

-- Tick: claim the slot of now for a clock, once for all replicas, and order its work in the same transaction. While an
-- earlier tick waits to be begun no other is made, so time that nobody ticked in gives one tick and not many. Also orders
-- the work anew that nobody is at any more: call it several times per interval.
-- Returns {queue, slot, claimed, open}: open says whether a tick waits for a worker now. Locks the clock where there is
-- something to do.
CREATE FUNCTION public.tick(identity jsonb, the_clock text, interval_seconds double precision, replica text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    slot_now timestamptz;
    is_claimed boolean := false;
    is_open boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    IF NOT (interval_seconds >= 0.1) THEN
        PERFORM agent_private.refuse('PT422', 'the interval of a clock is at least 0.1 seconds');
    END IF;
    tenant := current_setting('agent.tenant_id');
    INSERT INTO public.agent_clock AS c (tenant_id, clock, replica, interval_seconds)
    VALUES (tenant, the_clock, tick.replica, tick.interval_seconds)
    ON CONFLICT ON CONSTRAINT agent_clock_pkey DO UPDATE
    SET seen_at = clock_timestamp(), interval_seconds = excluded.interval_seconds;
    slot_now := to_timestamp(floor(extract(epoch FROM clock_timestamp())::double precision / interval_seconds) * interval_seconds);
    IF NOT EXISTS (SELECT FROM public.agent_tick t WHERE t.tenant_id = tenant AND t.clock = the_clock AND t.slot >= slot_now) THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('agent clock ' || jsonb_build_array(tenant, the_clock)::text, 0));
        INSERT INTO public.agent_tick AS t (tenant_id, clock, slot, claimed_by)
        SELECT tenant, the_clock, slot_now, tick.replica
        WHERE NOT EXISTS (SELECT FROM public.agent_tick o
                          WHERE o.tenant_id = tenant AND o.clock = the_clock AND (o.slot >= slot_now OR o.state = 'todo'));
        is_claimed := FOUND;
    END IF;
    is_open := EXISTS (
        SELECT FROM public.agent_tick t
        WHERE t.tenant_id = tenant AND t.clock = the_clock
          AND (t.state = 'todo' AND t.due_at <= clock_timestamp() OR t.state = 'doing' AND t.leased_until <= clock_timestamp()));
    IF is_open THEN
        PERFORM agent_private.enqueue_tick(tenant, the_clock);
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('queue', agent_private.clock_key(tenant, the_clock), 'slot', slot_now,
                              'claimed', is_claimed, 'open', is_open);
END
$$;

-- Take the oldest open tick of a clock to do it, also one whose worker has been silent past its lease. NULL where none is
-- open, or another is at work, or it must wait for its next try. One that was begun attempts_max times and never ended
-- has failed. Returns {slot, state, attempt}: state is doing, or failed for such a one.
CREATE FUNCTION public.take_tick(identity jsonb, the_clock text, worker text, lease_seconds double precision, attempts_max integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found public.agent_tick;
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended(
        'agent clock ' || jsonb_build_array(current_setting('agent.tenant_id'), the_clock)::text, 0));
    SELECT t.* INTO found FROM public.agent_tick t
    WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.clock = the_clock AND t.state IN ('todo', 'doing')
    ORDER BY t.state = 'doing' DESC, t.slot LIMIT 1
    FOR UPDATE;
    IF found.state = 'todo' AND found.due_at <= clock_timestamp()
       OR found.state = 'doing' AND found.leased_until <= clock_timestamp() THEN
        IF found.attempts >= attempts_max THEN
            found.state := 'failed';
            UPDATE public.agent_tick t
            SET state = 'failed', finished_at = clock_timestamp(), leased_until = NULL,
                error = coalesce(t.error, 'each worker that began it went away')
            WHERE t.tenant_id = found.tenant_id AND t.clock = found.clock AND t.slot = found.slot;
        ELSE
            UPDATE public.agent_tick t
            SET state = 'doing', attempts = t.attempts + 1, worker = take_tick.worker, started_at = clock_timestamp(),
                leased_until = clock_timestamp() + make_interval(secs => lease_seconds)
            WHERE t.tenant_id = found.tenant_id AND t.clock = found.clock AND t.slot = found.slot
            RETURNING t.* INTO found;
        END IF;
        receipt := jsonb_build_object('slot', found.slot, 'state', found.state, 'attempt', found.attempts, 'error', found.error);
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- Say that the worker of a tick lives. Returns false where the tick is another's by now: then it must end its work.
CREATE FUNCTION public.keep_tick(identity jsonb, the_clock text, slot timestamptz, attempt integer, lease_seconds double precision)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    is_kept boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    UPDATE public.agent_tick t SET leased_until = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.clock = the_clock AND t.slot = keep_tick.slot
      AND t.state = 'doing' AND t.attempts = attempt;
    is_kept := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(is_kept);
END
$$;

-- Tell how a tick ended, by who began it as this attempt. the_state: done; failed, for good; or todo: handed back, to be
-- begun again after delay_seconds. A tick handed back without an error does not count as tried. Told twice it changes
-- nothing. Returns false where the tick is another's by now.
CREATE FUNCTION public.finish_tick(
    identity jsonb, the_clock text, slot timestamptz, attempt integer, the_state text, error text DEFAULT NULL,
    delay_seconds double precision DEFAULT 0)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found public.agent_tick;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    IF the_state IS NULL OR the_state NOT IN ('done', 'failed', 'todo') THEN
        PERFORM agent_private.refuse('PT422', 'a tick ends as done, failed or todo');
    END IF;
    SELECT t.* INTO found FROM public.agent_tick t
    WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.clock = the_clock AND t.slot = finish_tick.slot
    FOR UPDATE;
    IF found.state = 'doing' AND found.attempts = attempt THEN
        UPDATE public.agent_tick t
        SET state = the_state, error = finish_tick.error, leased_until = NULL,
            due_at = clock_timestamp() + make_interval(secs => delay_seconds),
            attempts = t.attempts - (the_state = 'todo' AND finish_tick.error IS NULL)::integer,
            finished_at = CASE WHEN the_state <> 'todo' THEN clock_timestamp() END
        WHERE t.tenant_id = found.tenant_id AND t.clock = found.clock AND t.slot = found.slot;
        found.state := the_state;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(coalesce(found.state = the_state, false));
END
$$;

-- A replica stops ticking: it is no longer counted.
CREATE FUNCTION public.leave_clock(identity jsonb, the_clock text, replica text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    is_gone boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    DELETE FROM public.agent_clock c
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.clock = the_clock AND c.replica = leave_clock.replica;
    is_gone := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(is_gone);
END
$$;

-- How the clocks of a tenant stand: {clock: {interval_seconds, replicas, next_at, ticks}}. A replica counts that was heard
-- of in the last alive_seconds; next_at is when its next slot begins, NULL where none is alive; ticks are the newest.
CREATE FUNCTION public.clock_status(identity jsonb, alive_seconds double precision DEFAULT 60, tick_limit integer DEFAULT 10)
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
        PERFORM agent_private.refuse('PT403', 'a clock needs a tenant');
    END IF;
    SELECT coalesce(jsonb_object_agg(x.clock, to_jsonb(x) - 'clock'), '{}') INTO found
    FROM (
        SELECT k.clock, alive.interval_seconds, coalesce(alive.replicas, '[]') AS replicas,
               to_timestamp(ceil(extract(epoch FROM clock_timestamp())::double precision / alive.interval_seconds)
                            * alive.interval_seconds) AS next_at,
               (SELECT coalesce(jsonb_agg(to_jsonb(t) - '{tenant_id,clock}'::text[] ORDER BY t.slot DESC), '[]')
                FROM (SELECT o.* FROM public.agent_tick o
                      WHERE o.tenant_id = current_setting('agent.tenant_id') AND o.clock = k.clock
                      ORDER BY o.slot DESC LIMIT least(tick_limit, 1000)) AS t) AS ticks
        FROM (SELECT c.clock FROM public.agent_clock c UNION SELECT t.clock FROM public.agent_tick t) AS k
        LEFT JOIN LATERAL (
            SELECT min(c.interval_seconds) AS interval_seconds, jsonb_agg(c.replica ORDER BY c.replica) AS replicas
            FROM public.agent_clock c
            WHERE c.clock = k.clock AND c.seen_at > clock_timestamp() - make_interval(secs => alive_seconds)) AS alive ON true
    ) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Begin a step of a cycle. Returns {state, attempt, since}: doing, then the caller does it, keeps its lease and finishes
-- it; done or failed, if it was already; busy where it runs in another process, in whichever cycle. since is when it last
-- began and went well in another cycle, or NULL. One that was begun attempts_max times and never ended has failed, and so
-- has one of another cycle whose process went away.
CREATE FUNCTION public.begin_step(
    identity jsonb, the_cycle text, the_step text, worker text, lease_seconds double precision, attempts_max integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found public.learning_analytics;
    the_state text;
    last_begun timestamptz;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM pg_advisory_xact_lock(hashtextextended('agent step ' || jsonb_build_array(tenant, the_step)::text, 0));
    UPDATE public.learning_analytics a
    SET state = 'failed', leased_until = NULL, finished_at = clock_timestamp(), error = 'its process went away'
    WHERE a.tenant_id = tenant AND a.step = the_step AND a.state = 'doing' AND a.leased_until <= clock_timestamp()
      AND (a.cycle <> the_cycle OR a.attempts >= attempts_max);
    SELECT a.* INTO found FROM public.learning_analytics a
    WHERE a.tenant_id = tenant AND a.cycle = the_cycle AND a.step = the_step;
    IF found.state IN ('done', 'failed') THEN
        the_state := found.state;
    ELSIF EXISTS (SELECT FROM public.learning_analytics a
                  WHERE a.tenant_id = tenant AND a.step = the_step AND a.state = 'doing'
                    AND a.leased_until > clock_timestamp()) THEN
        the_state := 'busy';
    ELSE
        INSERT INTO public.learning_analytics AS a (tenant_id, cycle, step, worker, leased_until)
        VALUES (tenant, the_cycle, the_step, begin_step.worker, clock_timestamp() + make_interval(secs => lease_seconds))
        ON CONFLICT ON CONSTRAINT learning_analytics_pkey DO UPDATE
        SET state = 'doing', attempts = a.attempts + 1, worker = excluded.worker, leased_until = excluded.leased_until
        RETURNING a.* INTO found;
        the_state := 'doing';
        SELECT max(a.started_at) INTO last_begun FROM public.learning_analytics a
        WHERE a.tenant_id = tenant AND a.step = the_step AND a.state = 'done' AND a.cycle <> the_cycle;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('state', the_state, 'attempt', found.attempts, 'since', last_begun,
                              'counts', found.counts, 'details', found.details, 'error', found.error);
END
$$;

-- Say that the process that does a step lives. Returns false where the step is another's by now.
CREATE FUNCTION public.keep_step(identity jsonb, the_cycle text, the_step text, attempt integer, lease_seconds double precision)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    is_kept boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    UPDATE public.learning_analytics a SET leased_until = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.cycle = the_cycle AND a.step = the_step
      AND a.state = 'doing' AND a.attempts = attempt;
    is_kept := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(is_kept);
END
$$;

-- Tell how a step ended. the_state: done; failed, for good; or todo: to be begun again, and without an error it does not
-- count as tried. report: {counts, details, error}. Told twice it changes nothing. Returns false where the step is another's.
CREATE FUNCTION public.finish_step(identity jsonb, the_cycle text, the_step text, attempt integer, the_state text, report jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found public.learning_analytics;
BEGIN
    identity := agent_private.document(identity);
    report := agent_private.document(report);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    IF the_state IS NULL OR the_state NOT IN ('done', 'failed', 'todo') THEN
        PERFORM agent_private.refuse('PT422', 'a step ends as done, failed or todo');
    END IF;
    SELECT a.* INTO found FROM public.learning_analytics a
    WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.cycle = the_cycle AND a.step = the_step
    FOR UPDATE;
    IF found.state = 'doing' AND found.attempts = attempt THEN
        UPDATE public.learning_analytics a
        SET state = the_state, leased_until = NULL, error = report ->> 'error',
            counts = coalesce(report -> 'counts', '{}'), details = coalesce(report -> 'details', '{}'),
            attempts = a.attempts - (the_state = 'todo' AND report ->> 'error' IS NULL)::integer,
            finished_at = CASE WHEN the_state <> 'todo' THEN clock_timestamp() END
        WHERE a.tenant_id = found.tenant_id AND a.cycle = found.cycle AND a.step = found.step;
        found.state := the_state;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(coalesce(found.state = the_state, false));
END
$$;

-- The newest cycles of the learner: [{cycle, started_at, finished_at, steps: [row of learning_analytics]}]. finished_at is
-- NULL while a step is open.
CREATE FUNCTION public.list_cycles(identity jsonb, cycle_limit integer DEFAULT 10)
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
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.started_at DESC), '[]') INTO found
    FROM (SELECT a.cycle, min(a.started_at) AS started_at,
                 CASE WHEN bool_and(a.state IN ('done', 'failed')) THEN max(a.finished_at) END AS finished_at,
                 jsonb_agg(to_jsonb(a) - '{tenant_id,cycle,leased_until}'::text[] ORDER BY a.started_at) AS steps
          FROM public.learning_analytics a
          WHERE a.tenant_id = current_setting('agent.tenant_id')
          GROUP BY a.cycle ORDER BY 2 DESC LIMIT least(cycle_limit, 1000)) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- What discovery and samples found changed in the application since a moment (NULL: ever), by what changed: the memories
-- of store application and kind change. Returns {changes, tables: {table: number}, structure}: structure is how many were
-- changes of the structure. At most change_limit are looked at, the newest first.
CREATE FUNCTION public.count_app_changes(identity jsonb, since timestamptz, change_limit integer)
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
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    WITH changed AS (
        SELECT m.value ->> 'table' AS of_table FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'tenant' AND m.owner_id = ''
          AND m.store = 'application' AND m.kind = 'change' AND m.superseded_at IS NULL
          AND (since IS NULL OR m.recorded_at >= since)
        ORDER BY m.memory_number DESC LIMIT least(change_limit, 10000))
    SELECT jsonb_build_object(
        'changes', (SELECT count(*) FROM changed),
        'structure', (SELECT count(*) FROM changed c WHERE c.of_table IS NULL),
        'tables', (SELECT coalesce(jsonb_object_agg(x.of_table, x.number), '{}')
                   FROM (SELECT c.of_table, count(*) AS number FROM changed c WHERE c.of_table IS NOT NULL GROUP BY c.of_table) AS x))
    INTO found;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The tenants that have runs, for what serves all of them; in the order of their names.
CREATE FUNCTION public.list_tenants(tenant_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    found jsonb;
BEGIN
    -- One look at the primary key per tenant rather than one per run.
    WITH RECURSIVE tenant AS (
        SELECT min(r.tenant_id) AS tenant_id FROM public.agent_run r
        UNION ALL
        SELECT (SELECT min(r.tenant_id) FROM public.agent_run r WHERE r.tenant_id > t.tenant_id)
        FROM tenant t WHERE t.tenant_id IS NOT NULL)
    SELECT coalesce(jsonb_agg(x.tenant_id), '[]') INTO found
    FROM (SELECT t.tenant_id FROM tenant t WHERE t.tenant_id IS NOT NULL LIMIT tenant_limit) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The work of order_waiting_learning: order these sessions, in their order and at most session_limit, unless a job of theirs
-- waits, is at work, or failed for good in the last day. sessions: [{user_id, session_id, agent_id}]. Returns {ordered, given_up}.
-- Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.order_sessions(the_tenant text, sessions jsonb, session_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    session record;
    the_queue text;
    failed_at timestamptz;
    ordered integer := 0;
    given_up integer := 0;
BEGIN
    FOR session IN
        SELECT s.user_id, s.session_id, s.agent_id, agent_private.learning_key(the_tenant, s.user_id, s.session_id) AS key
        FROM jsonb_to_recordset(sessions) AS s (user_id text, session_id text, agent_id text)
    LOOP
        CONTINUE WHEN EXISTS (SELECT FROM agent_queue.procrastinate_jobs j WHERE j.queueing_lock = session.key AND j.status = 'todo')
                   OR EXISTS (SELECT FROM agent_queue.procrastinate_jobs j WHERE j.lock = session.key AND j.status = 'doing');
        SELECT j.queue_name, (SELECT max(e.at) FROM agent_queue.procrastinate_events e WHERE e.job_id = j.id)
        INTO the_queue, failed_at
        FROM agent_queue.procrastinate_jobs j WHERE j.lock = session.key AND j.status = 'failed' ORDER BY j.id DESC LIMIT 1;
        IF failed_at > now() - interval '1 day' THEN
            given_up := given_up + 1;
            CONTINUE;
        END IF;
        DELETE FROM agent_queue.procrastinate_jobs j WHERE j.lock = session.key AND j.status = 'failed';
        PERFORM agent_private.enqueue_learning(
            the_tenant, session.user_id, session.session_id, session.agent_id, coalesce(the_queue, 'learning'), interval '0');
        ordered := ordered + 1;
        EXIT WHEN ordered >= session_limit;
    END LOOP;
    RETURN jsonb_build_object('ordered', ordered, 'given_up', given_up);
END
$$;
REVOKE ALL ON FUNCTION agent_private.order_sessions(text, jsonb, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.order_sessions(text, jsonb, integer) TO agent_app;

-- Order the learning of sessions of a tenant whose runs have waited for so long though nothing is ordered, the longest
-- waiting first, at most session_limit; the 20,000 that wait longest are looked at, ordered already or not.
-- Returns {waiting, ordered, given_up}: given_up failed for good in the last day.
CREATE FUNCTION public.order_waiting_learning(identity jsonb, older_than_seconds double precision, session_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    sessions jsonb;
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x)), '[]') INTO sessions
    FROM (SELECT r.user_id, r.session_id, max(r.agent_id) AS agent_id
          FROM public.agent_run r
          WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.learned_at IS NULL AND r.status = 'completed'
            AND r.user_id IS NOT NULL AND r.recorded_at < clock_timestamp() - make_interval(secs => older_than_seconds)
          GROUP BY r.user_id, r.session_id ORDER BY min(r.recorded_at) LIMIT 20000) AS x;
    receipt := agent_private.order_sessions(current_setting('agent.tenant_id'), sessions, session_limit)
               || jsonb_build_object('waiting', jsonb_array_length(sessions));
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- Retire what a tenant's memories need no more: past its end, at most row_limit; said by another memory of the same owner
-- and store in the same words; above limits ({store: greatest number}), the oldest first. Nothing is deleted.
-- For doubles at most row_limit owners are looked through whose memories changed since they were last: a double begins with
-- something that is written. Leans on agent_memory_by_end, agent_scope_to_curate, agent_memory_one_answer_per_field and
-- agent_memory_no_duplicate_text. Returns {expired, duplicates, over_limit}. Locks the owners one after the other.
CREATE FUNCTION public.curate_memories(identity jsonb, limits jsonb, row_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    due record;
    target public.agent_memory;
    changed public.agent_scope[];
    expired integer := 0;
    duplicates integer := 0;
    over_limit integer := 0;
BEGIN
    identity := agent_private.document(identity);
    limits := agent_private.document(limits);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT coalesce(array_agg(s), '{}') INTO changed
    FROM (SELECT * FROM public.agent_scope o WHERE o.tenant_id = tenant AND o.version > o.curated_version
          ORDER BY o.scope, o.owner_id LIMIT row_limit) AS s;
    FOR due IN
        SELECT x.scope, x.owner_id, array_agg(x.memory_id) AS ids, array_agg(x.reason) AS reasons
        FROM (
            (SELECT m.scope, m.owner_id, m.memory_id, 'past valid_to' AS reason FROM public.agent_memory m
             WHERE m.tenant_id = tenant AND m.superseded_at IS NULL AND m.valid_to <= clock_timestamp()
             ORDER BY m.valid_to LIMIT row_limit)
            UNION ALL
            -- Equal texts without a field cannot both be current: one of the two has a field and stays.
            (SELECT DISTINCT m.scope, m.owner_id, m.memory_id, 'duplicate'
             FROM unnest(changed) AS s
             JOIN public.agent_memory o ON o.tenant_id = tenant AND o.scope = s.scope AND o.owner_id = s.owner_id
                 AND o.superseded_at IS NULL AND o.field IS NOT NULL
             JOIN public.agent_memory m ON m.tenant_id = tenant AND m.scope = s.scope AND m.owner_id = s.owner_id AND m.store = o.store
                 AND m.content_hash = o.content_hash AND m.superseded_at IS NULL AND m.field IS NULL
             WHERE coalesce(o.session_id, '') = coalesce(m.session_id, '')
               AND (m.valid_to IS NULL OR m.valid_to > clock_timestamp()))) AS x
        GROUP BY x.scope, x.owner_id ORDER BY x.scope, x.owner_id
    LOOP
        PERFORM set_config('agent.user_id', CASE due.scope WHEN 'user' THEN due.owner_id ELSE '' END, true),
                set_config('agent.agent_id', CASE due.scope WHEN 'agent' THEN due.owner_id ELSE '' END, true);
        PERFORM agent_private.touch_scope(due.scope);
        FOR i IN 1..cardinality(due.ids) LOOP
            SELECT m.* INTO target FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.memory_id = due.ids[i] AND m.superseded_at IS NULL FOR UPDATE;
            CONTINUE WHEN target.memory_id IS NULL;
            PERFORM agent_private.close_memory(target, due.reasons[i]);
            expired := expired + (due.reasons[i] = 'past valid_to')::integer;
            duplicates := duplicates + (due.reasons[i] = 'duplicate')::integer;
        END LOOP;
    END LOOP;
    -- As it was read: what was written meanwhile is looked through the next time.
    UPDATE public.agent_scope s SET curated_version = c.version
    FROM unnest(changed) AS c
    WHERE s.tenant_id = tenant AND s.scope = c.scope AND s.owner_id = c.owner_id;
    FOR due IN
        SELECT s.owner_id, l.key AS store, l.value::integer AS memory_limit
        FROM public.agent_scope s CROSS JOIN LATERAL jsonb_each_text(limits) AS l
        WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.memory_count > l.value::integer
        ORDER BY s.owner_id, l.key
    LOOP
        EXIT WHEN over_limit >= row_limit;
        PERFORM set_config('agent.user_id', due.owner_id, true);
        PERFORM agent_private.touch_scope('user');
        over_limit := over_limit + agent_private.hold_to_limit(due.store, due.memory_limit);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('expired', expired, 'duplicates', duplicates, 'over_limit', over_limit);
END
$$;

-- Delete what the clocks and the learner wrote about themselves, at most row_limit of each: ticks and steps that ended
-- keep_seconds ago, and replicas that were not heard of for a day. Returns {ticks, steps, replicas}.
CREATE FUNCTION public.forget_ticks(identity jsonb, keep_seconds double precision, row_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    oldest timestamptz := clock_timestamp() - make_interval(secs => keep_seconds);
    ticks integer;
    steps integer;
    replicas integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'the learner needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    DELETE FROM public.agent_tick t WHERE t.tenant_id = tenant AND (t.clock, t.slot) IN (
        SELECT o.clock, o.slot FROM public.agent_tick o
        WHERE o.tenant_id = tenant AND o.state IN ('done', 'failed') AND o.finished_at < oldest
          -- The newest tells that its slot was done, however long the interval is.
          AND o.slot < (SELECT max(n.slot) FROM public.agent_tick n WHERE n.tenant_id = tenant AND n.clock = o.clock)
        ORDER BY o.slot LIMIT row_limit FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS ticks = ROW_COUNT;
    DELETE FROM public.learning_analytics a WHERE a.tenant_id = tenant AND (a.cycle, a.step) IN (
        SELECT o.cycle, o.step FROM public.learning_analytics o
        WHERE o.tenant_id = tenant AND o.state <> 'doing' AND o.started_at < oldest
        ORDER BY o.started_at LIMIT row_limit FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS steps = ROW_COUNT;
    DELETE FROM public.agent_clock c WHERE c.tenant_id = tenant AND c.seen_at < clock_timestamp() - interval '1 day';
    GET DIAGNOSTICS replicas = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('ticks', ticks, 'steps', steps, 'replicas', replicas);
END
$$;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_tick', 'agent_clock', 'learning_analytics'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_tenant ON public.%I TO agent_app
            USING (
                tenant_id = (SELECT current_setting('agent.tenant_id', true))
                AND (SELECT current_setting('agent.reach', true)) = 'tenant'
            )
        $policy$, target);
    END LOOP;
END
$$;

SELECT agent_private.publish('agent_private.clock_key(text, text)'::regprocedure, 'private');
SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.tick(jsonb, text, double precision, text)',
    'public.take_tick(jsonb, text, text, double precision, integer)',
    'public.keep_tick(jsonb, text, timestamptz, integer, double precision)',
    'public.finish_tick(jsonb, text, timestamptz, integer, text, text, double precision)',
    'public.leave_clock(jsonb, text, text)',
    'public.clock_status(jsonb, double precision, integer)',
    'public.begin_step(jsonb, text, text, text, double precision, integer)',
    'public.keep_step(jsonb, text, text, integer, double precision)',
    'public.finish_step(jsonb, text, text, integer, text, jsonb)',
    'public.list_cycles(jsonb, integer)',
    'public.count_app_changes(jsonb, timestamptz, integer)',
    'public.list_tenants(integer)',
    'public.order_waiting_learning(jsonb, double precision, integer)',
    'public.curate_memories(jsonb, jsonb, integer)',
    'public.forget_ticks(jsonb, double precision, integer)']::regprocedure[]) AS f;

-- ---- schemas/93_tool_experience.sql

-- What runs teach about tools: their errors as templates, and what tells a call that fails from one that does not.

CREATE TABLE public.agent_tool_run (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    run_id text NOT NULL,
    user_id text,
    status text NOT NULL,
    finished_at timestamptz NOT NULL,
    learned_at timestamptz NOT NULL DEFAULT now(),
    risk_limit double precision NOT NULL CHECK (risk_limit BETWEEN 0 AND 1),
    PRIMARY KEY (tenant_id, run_id)
);
COMMENT ON TABLE public.agent_tool_run IS 'Runs whose tool calls are counted, each once; one that was delivered again with another status, or given to a user, is counted anew.';
COMMENT ON COLUMN public.agent_tool_run.risk_limit IS 'From which risk calls are warned of, as the learner had it after this run: that of the latest run holds.';
CREATE INDEX agent_tool_run_by_user ON public.agent_tool_run (tenant_id, user_id);
CREATE INDEX agent_tool_run_by_time ON public.agent_tool_run (tenant_id, learned_at DESC);

CREATE TABLE public.agent_tool_call (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    call_number integer NOT NULL,
    user_id text,
    tool text NOT NULL CHECK (tool <> ''),
    template text,
    tool_call_id text NOT NULL DEFAULT '',
    message_id text NOT NULL DEFAULT '',
    called_at timestamptz NOT NULL,
    conditions jsonb NOT NULL CHECK (jsonb_typeof(conditions) = 'object'),
    risk double precision NOT NULL,
    is_repeat boolean NOT NULL,
    was_warned boolean NOT NULL,
    call_order bigint GENERATED ALWAYS AS IDENTITY,
    PRIMARY KEY (tenant_id, run_id, call_number)
);
COMMENT ON TABLE public.agent_tool_call IS 'Tool calls of runs: what held before each of them, as numbers that say nothing of its values, and what became of it.';
COMMENT ON COLUMN public.agent_tool_call.template IS 'The template of its error; NULL where it succeeded.';
COMMENT ON COLUMN public.agent_tool_call.called_at IS 'When its run began; calls of a run have no time of their own.';
COMMENT ON COLUMN public.agent_tool_call.conditions IS 'Weight of each condition, by its number.';
COMMENT ON COLUMN public.agent_tool_call.risk IS 'The highest risk of any error by what was known before the call was learned.';
COMMENT ON COLUMN public.agent_tool_call.was_warned IS 'Whether that would have warned: of this very error where it failed, of any where it did not.';
CREATE INDEX agent_tool_call_by_tool ON public.agent_tool_call (tenant_id, tool, call_order DESC);
CREATE INDEX agent_tool_call_by_user ON public.agent_tool_call (tenant_id, user_id);

CREATE TABLE public.agent_tool_error (
    tenant_id text NOT NULL,
    error_id uuid NOT NULL DEFAULT gen_random_uuid(),
    tool text NOT NULL,
    template text NOT NULL CHECK (length(template) BETWEEN 1 AND 300),
    failures integer NOT NULL CHECK (failures >= 0),
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    base double precision,
    fitted_to bigint NOT NULL DEFAULT 0,
    reasons jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(reasons) = 'array'),
    memory_id uuid,
    PRIMARY KEY (tenant_id, error_id),
    UNIQUE (tenant_id, tool, template)
);
COMMENT ON TABLE public.agent_tool_error IS 'Errors of tools, as templates, and the model that tells which calls run into them.';
COMMENT ON COLUMN public.agent_tool_error.base IS 'Log odds of the error where no condition is known; NULL before a model was fitted.';
COMMENT ON COLUMN public.agent_tool_error.fitted_to IS 'The last call that the models of the tool were fitted to.';
COMMENT ON COLUMN public.agent_tool_error.reasons IS 'What calls that fail with it have in common, in words: {text, failures, calls}, the most telling first.';

CREATE TABLE public.agent_tool_weight (
    tenant_id text NOT NULL,
    error_id uuid NOT NULL,
    condition bigint NOT NULL,
    weight double precision NOT NULL,
    PRIMARY KEY (tenant_id, error_id, condition),
    FOREIGN KEY (tenant_id, error_id) REFERENCES public.agent_tool_error ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_tool_weight IS 'How much each condition adds to the log odds of an error.';

CREATE TABLE public.agent_tool_condition (
    tenant_id text NOT NULL,
    tool text NOT NULL,
    condition bigint NOT NULL,
    kind text NOT NULL,
    shown text NOT NULL,
    opened text NOT NULL DEFAULT '',
    contributor text NOT NULL,
    PRIMARY KEY (tenant_id, tool, condition)
);
COMMENT ON TABLE public.agent_tool_condition IS 'Conditions of calls that failed, in words.';
COMMENT ON COLUMN public.agent_tool_condition.opened IS 'The words with a value: empty until runs of two people had it, and always where it looks personal.';
COMMENT ON COLUMN public.agent_tool_condition.contributor IS 'Hash of whose run had it first; empty once somebody else had it too.';

CREATE TABLE public.agent_tool_mark (
    tenant_id text PRIMARY KEY CHECK (tenant_id <> ''),
    counted_until timestamptz NOT NULL
);
COMMENT ON TABLE public.agent_tool_mark IS 'Runs of the tenant that were recorded before this are counted, except those of agent_tool_recount.';

CREATE TABLE public.agent_tool_recount (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    PRIMARY KEY (tenant_id, run_id),
    FOREIGN KEY (tenant_id, run_id) REFERENCES public.agent_run ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_tool_recount IS 'Runs that changed after they were recorded: paused ones that ended, retries, logs that were given to a user. Their calls are to be counted, or counted anew.';

-- Note a run that changed. As whoever records it, whose tenant it is.
CREATE FUNCTION agent_private.note_changed_run()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO public.agent_tool_recount (tenant_id, run_id) VALUES (NEW.tenant_id, NEW.run_id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER note_changed_run AFTER UPDATE OF status, finished_at, user_id ON public.agent_run
    FOR EACH ROW WHEN (NEW.status <> 'interrupted'
                       AND (OLD.status, OLD.finished_at, OLD.user_id) IS DISTINCT FROM (NEW.status, NEW.finished_at, NEW.user_id))
    EXECUTE FUNCTION agent_private.note_changed_run();

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_tool_mark', 'public.agent_tool_recount', 'public.agent_tool_run', 'public.agent_tool_call', 'public.agent_tool_error', 'public.agent_tool_weight',
    'public.agent_tool_condition']::regclass[]) AS t;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_tool_run', 'agent_tool_call', 'agent_tool_error', 'agent_tool_weight',
                                  'agent_tool_condition', 'agent_tool_mark'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_tenant ON public.%I TO agent_app
            USING (
                tenant_id = (SELECT current_setting('agent.tenant_id', true))
                AND (SELECT current_setting('agent.reach', true)) = 'tenant'
            )
        $policy$, target);
    END LOOP;
END
$$;

-- Whoever records a run notes that it changed; nobody but the learner reads it.
CREATE POLICY of_the_tenant ON public.agent_tool_recount TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true)));

-- Keep learners of one tenant in line until the transaction ends.
CREATE FUNCTION agent_private.hold_tool_experience(the_tenant text)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_advisory_xact_lock(hashtextextended('agent tool experience ' || the_tenant, 0));
$$;

-- Runs whose tool calls are not counted yet, or that changed since, the oldest first, at most 100 and about 8 MB of
-- messages; `since` leaves out runs that were recorded earlier. Runs at rest only: a paused one comes when it ends.
-- Returns [{run_id, user_id, session_id, status, started_at, finished_at, messages}]. Leans on agent_run_by_time, from the first
-- run on that was not counted the last time, which it keeps where since is NULL, and on agent_tool_recount.
CREATE FUNCTION public.tool_runs_to_learn(identity jsonb, since timestamptz DEFAULT NULL, run_limit integer DEFAULT 50)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
    -- Whoever was recording a run then began a moment before.
    safely constant timestamptz := clock_timestamp() - interval '5 minutes';
    begins timestamptz;
    first_at timestamptz;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT least(m.counted_until, safely) INTO begins FROM public.agent_tool_mark m WHERE m.tenant_id = tenant;
    WITH uncounted AS (
        (SELECT r.run_id, r.recorded_at, false AS is_changed, CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line
         FROM public.agent_run r
         LEFT JOIN public.agent_tool_run t ON t.tenant_id = r.tenant_id AND t.run_id = r.run_id
         WHERE r.tenant_id = tenant AND r.status <> 'interrupted'
           AND r.recorded_at >= greatest(coalesce(begins, '-infinity'), coalesce(tool_runs_to_learn.since, '-infinity'))
           AND (t.run_id IS NULL OR t.status <> r.status OR t.finished_at <> r.finished_at OR t.user_id IS DISTINCT FROM r.user_id)
         ORDER BY r.recorded_at, line, r.run_id LIMIT least(run_limit, 100))
        UNION ALL
        (SELECT r.run_id, r.recorded_at, true, CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line
         FROM public.agent_tool_recount c
         JOIN public.agent_run r ON r.tenant_id = c.tenant_id AND r.run_id = c.run_id
         WHERE c.tenant_id = tenant AND r.status <> 'interrupted' AND r.recorded_at < begins
           AND (tool_runs_to_learn.since IS NULL OR r.recorded_at >= tool_runs_to_learn.since)
         ORDER BY r.recorded_at, line, r.run_id LIMIT least(run_limit, 100))
    ), sized AS (
        SELECT r.run_id, r.user_id, r.session_id, r.status, r.started_at, r.finished_at, u.recorded_at, r.messages, u.line,
               sum(pg_column_size(r.messages)) OVER (ORDER BY u.recorded_at, u.line, u.run_id) - pg_column_size(r.messages) AS size_before
        FROM (SELECT * FROM uncounted n ORDER BY n.recorded_at, n.line, n.run_id LIMIT least(run_limit, 100)) AS u
        JOIN public.agent_run r ON r.tenant_id = tenant AND r.run_id = u.run_id
    )
    SELECT (SELECT coalesce(jsonb_agg(to_jsonb(s) - '{line,recorded_at,size_before}'::text[] ORDER BY s.recorded_at, s.line, s.run_id), '[]')
            FROM sized s WHERE s.size_before < 8 * 1024 * 1024),
           (SELECT min(u.recorded_at) FROM uncounted u WHERE NOT u.is_changed)
    INTO found, first_at;
    IF tool_runs_to_learn.since IS NULL THEN
        INSERT INTO public.agent_tool_mark AS m (tenant_id, counted_until) VALUES (tenant, least(first_at, safely))
        ON CONFLICT ON CONSTRAINT agent_tool_mark_pkey DO UPDATE SET counted_until = excluded.counted_until
        WHERE m.counted_until < excluded.counted_until;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Take the calls of some runs out again, with what they count for. The caller holds the tenant's experience.
CREATE FUNCTION agent_private.forget_tool_calls(the_tenant text, run_ids text[])
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH gone AS (
        DELETE FROM public.agent_tool_call c WHERE c.tenant_id = the_tenant AND c.run_id = ANY (run_ids)
        RETURNING c.tool, c.template
    )
    UPDATE public.agent_tool_error e SET failures = greatest(e.failures - g.failures, 0)
    FROM (SELECT x.tool, x.template, count(*) AS failures FROM gone x WHERE x.template IS NOT NULL GROUP BY 1, 2) AS g
    WHERE e.tenant_id = the_tenant AND e.tool = g.tool AND e.template = g.template;
    DELETE FROM public.agent_tool_run r WHERE r.tenant_id = the_tenant AND r.run_id = ANY (run_ids);
END
$$;

-- Count the calls of one run: {run_id, user_id, session_id, status, started_at, finished_at, risk_limit, calls: [{tool, template, tool_call_id, message_id,
-- conditions, risk, is_repeat, was_warned}], words: [{tool, condition, kind, shown, opened}]}. A run that somebody else counted
-- meanwhile in this form is passed over. Of a tool the latest 2,000 calls are kept, and of the tenant the latest 1,000 errors.
-- Returns whether it was counted.
CREATE FUNCTION public.store_tool_calls(identity jsonb, run jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    whose text;
    target text;
BEGIN
    identity := agent_private.document(identity);
    run := agent_private.document(run);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'tool calls belong to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM agent_private.hold_tool_experience(tenant);
    -- Unless it changed once more since it was read.
    DELETE FROM public.agent_tool_recount c
    WHERE c.tenant_id = tenant AND c.run_id = run ->> 'run_id'
      AND EXISTS (SELECT FROM public.agent_run r
                  WHERE r.tenant_id = tenant AND r.run_id = c.run_id AND r.status = run ->> 'status'
                    AND r.finished_at = (run ->> 'finished_at')::timestamptz AND r.user_id IS NOT DISTINCT FROM run ->> 'user_id');
    -- It may have been erased, or counted by another learner, since it was read.
    PERFORM FROM public.agent_run r
    WHERE r.tenant_id = tenant AND r.run_id = run ->> 'run_id' AND r.user_id IS NOT DISTINCT FROM run ->> 'user_id';
    IF NOT FOUND OR EXISTS (
        SELECT FROM public.agent_tool_run t
        WHERE t.tenant_id = tenant AND t.run_id = run ->> 'run_id' AND t.status = run ->> 'status'
          AND t.finished_at = (run ->> 'finished_at')::timestamptz AND t.user_id IS NOT DISTINCT FROM run ->> 'user_id') THEN
        PERFORM agent_private.leave(previous);
        RETURN 'false';
    END IF;
    PERFORM agent_private.forget_tool_calls(tenant, ARRAY[run ->> 'run_id']);
    INSERT INTO public.agent_tool_run (tenant_id, run_id, user_id, status, finished_at, risk_limit)
    VALUES (tenant, run ->> 'run_id', run ->> 'user_id', run ->> 'status', (run ->> 'finished_at')::timestamptz,
            (run ->> 'risk_limit')::double precision);
    INSERT INTO public.agent_tool_call (
        tenant_id, run_id, call_number, user_id, tool, template, tool_call_id, message_id, called_at, conditions, risk, is_repeat,
        was_warned)
    SELECT tenant, run ->> 'run_id', c.number, run ->> 'user_id', c.item ->> 'tool', c.item ->> 'template',
           agent_private.short_id(coalesce(c.item ->> 'tool_call_id', '')),
           agent_private.short_id(coalesce(c.item ->> 'message_id', '')), (run ->> 'started_at')::timestamptz,
           c.item -> 'conditions', (c.item ->> 'risk')::double precision, (c.item ->> 'is_repeat')::boolean,
           (c.item ->> 'was_warned')::boolean
    FROM jsonb_array_elements(run -> 'calls') WITH ORDINALITY AS c (item, number) ORDER BY c.number;
    INSERT INTO public.agent_tool_error AS e (tenant_id, tool, template, failures, first_seen_at, last_seen_at)
    SELECT tenant, c.item ->> 'tool', c.item ->> 'template', count(*), (run ->> 'started_at')::timestamptz, (run ->> 'started_at')::timestamptz
    FROM jsonb_array_elements(run -> 'calls') AS c (item)
    WHERE c.item ->> 'template' IS NOT NULL
    GROUP BY 2, 3
    ON CONFLICT (tenant_id, tool, template) DO UPDATE SET
        failures = e.failures + excluded.failures,
        first_seen_at = least(e.first_seen_at, excluded.first_seen_at),
        last_seen_at = greatest(e.last_seen_at, excluded.last_seen_at);
    whose := encode(sha256(convert_to(jsonb_build_array(
        tenant, coalesce(run ->> 'user_id', ''), CASE WHEN run ->> 'user_id' IS NULL THEN run ->> 'session_id' END)::text, 'UTF8')), 'hex');
    INSERT INTO public.agent_tool_condition AS t (tenant_id, tool, condition, kind, shown, contributor)
    SELECT tenant, w ->> 'tool', (w ->> 'condition')::bigint, w ->> 'kind', left(w ->> 'shown', 300), whose
    FROM jsonb_array_elements(run -> 'words') AS w
    ON CONFLICT (tenant_id, tool, condition) DO NOTHING;
    UPDATE public.agent_tool_condition t SET contributor = '', opened = left(w ->> 'opened', 300)
    FROM jsonb_array_elements(run -> 'words') AS w
    WHERE t.tenant_id = tenant AND t.tool = w ->> 'tool' AND t.condition = (w ->> 'condition')::bigint
      AND t.contributor NOT IN ('', whose);
    FOR target IN SELECT DISTINCT c ->> 'tool' FROM jsonb_array_elements(run -> 'calls') AS c LOOP
        DELETE FROM public.agent_tool_call c
        WHERE c.tenant_id = tenant AND c.tool = target AND c.call_order <= (
            SELECT k.call_order FROM public.agent_tool_call k WHERE k.tenant_id = tenant AND k.tool = target
            ORDER BY k.call_order DESC OFFSET 2000 LIMIT 1);
    END LOOP;
    DELETE FROM public.agent_tool_error e
    WHERE e.tenant_id = tenant AND e.error_id IN (
        SELECT k.error_id FROM public.agent_tool_error k WHERE k.tenant_id = tenant
        ORDER BY k.failures > 0 DESC, k.last_seen_at DESC, k.failures DESC, k.template OFFSET 1000);
    PERFORM agent_private.leave(previous);
    RETURN 'true';
END
$$;

-- The latest calls of a tool to fit models to, oldest first, the number of the last, and conditions in words: {calls: [{template,
-- conditions}], last, words: {condition: {kind, text}}}. Where no tool is named: the tools that are known, those whose models
-- have not seen the last calls, and of the latest calls that succeeded (at most 5,000) risk and whether they were warned of:
-- {tools, stale, clean: [[risk, was_warned]]}. call_limit: calls of a tool, at most 2,000, or calls that succeeded.
CREATE FUNCTION public.tool_examples(identity jsonb, the_tool text DEFAULT NULL, call_limit integer DEFAULT 1000)
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
        RETURN '{}';
    END IF;
    IF the_tool IS NULL THEN
        found := jsonb_build_object(
            'tools', (SELECT coalesce(jsonb_agg(DISTINCT e.tool), '[]') FROM public.agent_tool_error e
                      WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.failures > 0),
            'stale', (SELECT coalesce(jsonb_agg(DISTINCT e.tool), '[]') FROM public.agent_tool_error e
                      WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.failures > 0
                        AND EXISTS (SELECT FROM public.agent_tool_call c
                                    WHERE c.tenant_id = e.tenant_id AND c.tool = e.tool AND c.call_order > e.fitted_to)),
            'clean', (SELECT coalesce(jsonb_agg(jsonb_build_array(x.risk, x.was_warned) ORDER BY x.call_order), '[]')
                      FROM (SELECT c.risk, c.was_warned, c.call_order FROM public.agent_tool_call c
                            WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.template IS NULL
                            ORDER BY c.call_order DESC LIMIT least(call_limit, 5000)) AS x));
    ELSE
        found := jsonb_build_object(
            'calls', (SELECT coalesce(jsonb_agg(jsonb_build_object('template', x.template, 'conditions', x.conditions) ORDER BY x.call_order), '[]')
                      FROM (SELECT c.template, c.conditions, c.call_order FROM public.agent_tool_call c
                            WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.tool = the_tool
                            ORDER BY c.call_order DESC LIMIT least(call_limit, 2000)) AS x),
            'last', (SELECT coalesce(max(c.call_order), 0) FROM public.agent_tool_call c
                     WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.tool = the_tool),
            'words', (SELECT coalesce(jsonb_object_agg(t.condition::text, jsonb_build_object(
                          'kind', t.kind, 'text', coalesce(nullif(t.opened, ''), t.shown))), '{}')
                      FROM public.agent_tool_condition t
                      WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.tool = the_tool));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Put fitted models in the place of those before: models: [{template, base, weights: {condition: weight}, reasons, memory,
-- said}], where memory is the text to remember it by and said stands for what it says: only another one makes a new version of the
-- memory, which is the tenant's, in store learned_knowledge, with the latest calls that failed as its evidence.
-- last is the last call that they were fitted to; models that saw a later one stay.
-- Returns how many errors have a new model.
CREATE FUNCTION public.store_tool_models(identity jsonb, the_tool text, models jsonb, last bigint)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    model jsonb;
    target public.agent_tool_error;
    receipt jsonb;
    the_memory uuid;
    stored integer := 0;
BEGIN
    identity := agent_private.document(identity);
    models := agent_private.document(models);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'models of tools belong to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM agent_private.hold_tool_experience(tenant);
    FOR model IN SELECT m FROM jsonb_array_elements(models) AS m LOOP
        SELECT * INTO target FROM public.agent_tool_error e
        WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.template = model ->> 'template' AND e.failures > 0 AND e.fitted_to < last;
        CONTINUE WHEN NOT FOUND;
        DELETE FROM public.agent_tool_weight w WHERE w.tenant_id = tenant AND w.error_id = target.error_id;
        INSERT INTO public.agent_tool_weight (tenant_id, error_id, condition, weight)
        SELECT tenant, target.error_id, w.key::bigint, w.value::double precision
        FROM jsonb_each_text(model -> 'weights') AS w;
        the_memory := target.memory_id;
        IF NOT EXISTS (SELECT FROM public.agent_memory m
                       WHERE m.tenant_id = tenant AND m.memory_id = target.memory_id AND m.superseded_at IS NULL
                         AND m.value ->> 'said' = model ->> 'said') THEN
            receipt := agent_private.write_memory(jsonb_build_object(
                'scope', 'tenant', 'store', 'learned_knowledge', 'kind', 'tool_error', 'trust', 'tool', 'source', 'tool_experience',
                'field', 'tool_error ' || target.error_id, 'content', model ->> 'memory', 'valid_from', target.first_seen_at,
                'value', jsonb_build_object('said', model ->> 'said', 'tool', the_tool)));
            the_memory := (receipt ->> 'memory_id')::uuid;
            -- Not by attach_evidence: what a whole tenant knows comes from runs of many users.
            INSERT INTO public.agent_memory_evidence (tenant_id, memory_id, version, scope, owner_id, run_id, message_id, tool_call_id)
            SELECT tenant, the_memory, (receipt ->> 'version')::integer, 'tenant', '', c.run_id, c.message_id, c.tool_call_id
            FROM public.agent_tool_call c
            WHERE c.tenant_id = tenant AND c.tool = the_tool AND c.template = target.template
            ORDER BY c.call_order DESC LIMIT 5
            ON CONFLICT DO NOTHING;
        END IF;
        UPDATE public.agent_tool_error e
        SET base = (model ->> 'base')::double precision, reasons = model -> 'reasons', memory_id = the_memory
        WHERE e.tenant_id = tenant AND e.error_id = target.error_id;
        stored := stored + 1;
    END LOOP;
    UPDATE public.agent_tool_error e SET fitted_to = last WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.fitted_to < last;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(stored);
END
$$;

-- How likely a call is to run into each known error of its tool, the most likely first: conditions: {condition: weight}.
-- Returns {risks: [{template, risk, failures, first_seen_at, last_seen_at, reasons}], limit}: warn where the highest risk is at
-- least the limit, which is that of the learner after the latest run; null where nothing was learned.
-- Leans on the primary key of agent_tool_weight and on agent_tool_run_by_time; locks nothing.
CREATE FUNCTION public.match_tool_warnings(identity jsonb, the_tool text, conditions jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
    the_limit double precision;
BEGIN
    identity := agent_private.document(identity);
    conditions := agent_private.document(conditions);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '{"risks": [], "limit": null}';
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'template', x.template, 'risk', x.risk, 'failures', x.failures, 'first_seen_at', x.first_seen_at,
        'last_seen_at', x.last_seen_at, 'reasons', x.reasons) ORDER BY x.risk DESC, x.template), '[]')
    INTO found
    FROM (
        SELECT e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons,
               1 / (1 + exp(least(greatest(-e.base - coalesce(sum(w.weight * c.value::double precision), 0), -60), 60))) AS risk
        FROM public.agent_tool_error e
        LEFT JOIN (jsonb_each_text(match_tool_warnings.conditions) AS c
                   JOIN public.agent_tool_weight w ON w.tenant_id = tenant AND w.condition = c.key::bigint)
            ON w.error_id = e.error_id
        WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.base IS NOT NULL AND e.failures > 0
        GROUP BY e.error_id, e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons, e.base
    ) AS x;
    SELECT r.risk_limit INTO the_limit FROM public.agent_tool_run r WHERE r.tenant_id = tenant
    ORDER BY r.learned_at DESC LIMIT 1;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('risks', found, 'limit', the_limit);
END
$$;

-- What is known of tools: {errors: [{tool, template, failures, first_seen_at, last_seen_at, reasons, evidence}], warnings: {templates,
-- errors, repeats, repeats_warned, clean, clean_warned}, slow: [{tool, calls, median_ms, p95_ms, latest_median_ms}], sequences:
-- [{tools, runs, succeeded, lift}]}. wanted: tool, errors_only (true: nothing else is looked up). Slow tools are those of the execution log whose median of the latest 20 calls is twice
-- that of the up to 500 before them. Sequences are of 2 to 5 tools, called one after the other in at least 3 of the latest
-- 1,000 runs whose outcome is known; lift is their share of successes by that of all these runs.
CREATE FUNCTION public.list_tool_experience(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '{"errors": [], "warnings": {}, "slow": [], "sequences": []}';
    END IF;
    tenant := current_setting('agent.tenant_id');
    found := jsonb_build_object('errors', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.failures DESC, x.tool, x.template), '[]') FROM (
            SELECT e.tool, e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons, e.memory_id,
                   (SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]') FROM (
                       SELECT c.run_id, c.tool_call_id FROM public.agent_tool_call c
                       WHERE c.tenant_id = tenant AND c.tool = e.tool AND c.template = e.template
                       ORDER BY c.call_order DESC LIMIT 5) AS c) AS evidence
            FROM public.agent_tool_error e
            WHERE e.tenant_id = tenant AND e.failures > 0 AND (wanted ->> 'tool' IS NULL OR e.tool = wanted ->> 'tool')
            ORDER BY e.failures DESC, e.tool, e.template LIMIT 1000) AS x));
    IF coalesce((wanted ->> 'errors_only')::boolean, false) THEN
        PERFORM agent_private.leave(previous);
        RETURN found;
    END IF;
    found := found || jsonb_build_object(
        'warnings', (SELECT jsonb_build_object(
                'templates', (SELECT count(*) FROM public.agent_tool_error e WHERE e.tenant_id = tenant AND e.failures > 0),
                'errors', count(*) FILTER (WHERE c.template IS NOT NULL),
                'repeats', count(*) FILTER (WHERE c.template IS NOT NULL AND c.is_repeat),
                'repeats_warned', count(*) FILTER (WHERE c.template IS NOT NULL AND c.is_repeat AND c.was_warned),
                'clean', count(*) FILTER (WHERE c.template IS NULL),
                'clean_warned', count(*) FILTER (WHERE c.template IS NULL AND c.was_warned))
            FROM public.agent_tool_call c WHERE c.tenant_id = tenant AND (wanted ->> 'tool' IS NULL OR c.tool = wanted ->> 'tool')),
        'slow', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.latest_median_ms DESC, x.tool), '[]') FROM (
            SELECT l.tool, count(*) AS calls,
                   round((percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place > 20))::numeric, 1) AS median_ms,
                   round((percentile_cont(0.95) WITHIN GROUP (ORDER BY l.duration_ms))::numeric, 1) AS p95_ms,
                   round((percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place <= 20))::numeric, 1) AS latest_median_ms
            FROM (SELECT g.tool, g.duration_ms::double precision AS duration_ms, row_number() OVER (PARTITION BY g.tool ORDER BY g.log_id DESC) AS place
                  FROM public.agent_execution_log g
                  WHERE g.tenant_id = tenant AND g.duration_ms IS NOT NULL AND (wanted ->> 'tool' IS NULL OR g.tool = wanted ->> 'tool')) AS l
            WHERE l.place <= 520
            GROUP BY l.tool
            HAVING count(*) >= 40
               AND percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place <= 20)
                   >= 2 * greatest(percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place > 20), 1)) AS x),
        'sequences', agent_private.tool_sequences(tenant, wanted ->> 'tool'));
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Sequences of tools and how the runs that had them ended; see list_tool_experience. The caller has entered.
CREATE FUNCTION agent_private.tool_sequences(the_tenant text, the_tool text)
RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    WITH judged AS MATERIALIZED (
        SELECT t.run_id, o.succeeded
        FROM public.agent_tool_run t
        CROSS JOIN LATERAL (SELECT bool_and(x.succeeded) AS succeeded FROM public.agent_outcome x
                            WHERE x.tenant_id = t.tenant_id AND x.run_id = t.run_id) AS o
        WHERE t.tenant_id = the_tenant AND o.succeeded IS NOT NULL
        ORDER BY t.learned_at DESC, t.run_id LIMIT 1000
    ), steps AS (
        SELECT c.run_id, c.call_number, array_agg(c.tool) OVER (
                   PARTITION BY c.run_id ORDER BY c.call_number ROWS BETWEEN CURRENT ROW AND 4 FOLLOWING) AS tools
        FROM public.agent_tool_call c JOIN judged j ON j.run_id = c.run_id
        WHERE c.tenant_id = the_tenant
    ), sequences AS (
        SELECT s.tools[1:n] AS tools, count(DISTINCT s.run_id) AS runs,
               count(DISTINCT s.run_id) FILTER (WHERE j.succeeded) AS succeeded
        FROM steps s JOIN judged j ON j.run_id = s.run_id CROSS JOIN generate_series(2, 5) AS n
        WHERE cardinality(s.tools) >= n AND (the_tool IS NULL OR the_tool = ANY (s.tools[1:n]))
        GROUP BY 1 HAVING count(DISTINCT s.run_id) >= 3
    )
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.lift DESC NULLS LAST, x.runs DESC, x.tools), '[]')
    FROM (SELECT q.tools, q.runs, q.succeeded,
                 round((q.succeeded::numeric / q.runs) / nullif((SELECT avg(j.succeeded::integer) FROM judged j), 0), 2) AS lift
          FROM sequences q ORDER BY lift DESC NULLS LAST, q.runs DESC, q.tools LIMIT 50) AS x;
$$;

-- Take out what a user's runs taught about tools: calls, their counts, the words and weights of conditions that nobody else's
-- calls had, and errors that nobody else met, with their memories. Returns how many calls went.
CREATE FUNCTION agent_private.erase_tool_experience(the_tenant text, the_user text)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    runs text[];
    only_theirs bigint[];
    calls integer;
    target public.agent_memory;
BEGIN
    PERFORM agent_private.hold_tool_experience(the_tenant);
    SELECT coalesce(array_agg(r.run_id), '{}') INTO runs FROM public.agent_tool_run r
    WHERE r.tenant_id = the_tenant AND r.user_id = the_user;
    SELECT count(*) INTO calls FROM public.agent_tool_call c WHERE c.tenant_id = the_tenant AND c.run_id = ANY (runs);
    IF runs = '{}' THEN
        RETURN 0;
    END IF;
    SELECT coalesce(array_agg(x.condition), '{}') INTO only_theirs FROM (
        SELECT k.condition::bigint FROM public.agent_tool_call c CROSS JOIN jsonb_object_keys(c.conditions) AS k (condition)
        WHERE c.tenant_id = the_tenant AND c.run_id = ANY (runs)
        EXCEPT
        SELECT k.condition::bigint FROM public.agent_tool_call c CROSS JOIN jsonb_object_keys(c.conditions) AS k (condition)
        WHERE c.tenant_id = the_tenant AND NOT c.run_id = ANY (runs)) AS x (condition);
    DELETE FROM public.agent_tool_weight w WHERE w.tenant_id = the_tenant AND w.condition = ANY (only_theirs);
    DELETE FROM public.agent_tool_condition t WHERE t.tenant_id = the_tenant AND t.condition = ANY (only_theirs);
    PERFORM agent_private.forget_tool_calls(the_tenant, runs);
    DELETE FROM public.agent_memory_evidence e WHERE e.tenant_id = the_tenant AND e.scope = 'tenant' AND e.run_id = ANY (runs);
    FOR target IN
        SELECT m.* FROM public.agent_memory m
        JOIN public.agent_tool_error e ON e.tenant_id = m.tenant_id AND e.memory_id = m.memory_id
        WHERE m.tenant_id = the_tenant AND e.failures = 0
    LOOP
        DELETE FROM public.agent_memory m WHERE m.tenant_id = the_tenant AND m.memory_id = target.memory_id;
    END LOOP;
    DELETE FROM public.agent_tool_error e WHERE e.tenant_id = the_tenant AND e.failures = 0;
    RETURN calls;
END
$$;

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private'
  AND p.proname IN ('note_changed_run', 'hold_tool_experience', 'forget_tool_calls', 'tool_sequences', 'erase_tool_experience');

SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.tool_runs_to_learn(jsonb, timestamptz, integer)',
    'public.store_tool_calls(jsonb, jsonb)',
    'public.tool_examples(jsonb, text, integer)',
    'public.store_tool_models(jsonb, text, jsonb, bigint)',
    'public.match_tool_warnings(jsonb, text, jsonb)',
    'public.list_tool_experience(jsonb, jsonb)']::regprocedure[]) AS f;

-- ---- schemas/94_monitor.sql

-- What the monitor measures: readings by five minutes, and what is so right now. All of it is for servers and over all
-- tenants; what is kept of texts is where something was seen, never what.

CREATE TABLE public.agent_reading (
    tenant_id text NOT NULL,
    measure text NOT NULL CHECK (measure <> ''),
    agent_id text NOT NULL DEFAULT '',
    part text NOT NULL DEFAULT '',
    bucket timestamptz NOT NULL,
    events bigint NOT NULL CHECK (events >= 0),
    failures bigint NOT NULL DEFAULT 0 CHECK (failures BETWEEN 0 AND events),
    total double precision NOT NULL DEFAULT 0,
    squares double precision NOT NULL DEFAULT 0,
    middle double precision,
    PRIMARY KEY (tenant_id, measure, agent_id, part, bucket)
);
COMMENT ON TABLE public.agent_reading IS 'What happened in five minutes, by series: counts and sums, kept for 35 days. Names no user.';
COMMENT ON COLUMN public.agent_reading.tenant_id IS 'Empty for what belongs to no tenant, such as the size of a table.';
COMMENT ON COLUMN public.agent_reading.part IS 'Tool, kind of outcome or table, as the measure has it; else empty.';
COMMENT ON COLUMN public.agent_reading.bucket IS 'Begin of the five minutes.';
COMMENT ON COLUMN public.agent_reading.failures IS 'How many of the events are what is watched: errors, refusals, answers above their target.';
COMMENT ON COLUMN public.agent_reading.total IS 'Sum of the values of the events (milliseconds, tokens, scores, bytes); squares is the sum of their squares and middle their median.';
CREATE INDEX agent_reading_by_time ON public.agent_reading (bucket);

CREATE TABLE public.agent_reading_hour (
    tenant_id text NOT NULL,
    measure text NOT NULL CHECK (measure <> ''),
    agent_id text NOT NULL DEFAULT '',
    part text NOT NULL DEFAULT '',
    hour timestamptz NOT NULL,
    events bigint NOT NULL CHECK (events >= 0),
    failures bigint NOT NULL DEFAULT 0 CHECK (failures BETWEEN 0 AND events),
    total double precision NOT NULL DEFAULT 0,
    squares double precision NOT NULL DEFAULT 0,
    middle double precision,
    PRIMARY KEY (tenant_id, measure, agent_id, part, hour)
);
COMMENT ON TABLE public.agent_reading_hour IS 'The readings added up by hours, as a look compares with them: a twelfth of the rows, made anew with the readings.';
COMMENT ON COLUMN public.agent_reading_hour.hour IS 'Begin of the hour.';
COMMENT ON COLUMN public.agent_reading_hour.middle IS 'Median of the medians of its readings.';
CREATE INDEX agent_reading_hour_by_time ON public.agent_reading_hour (hour);

CREATE TABLE public.agent_sighting (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    place text NOT NULL CHECK (place <> ''),
    kind text NOT NULL CHECK (kind <> ''),
    agent_id text NOT NULL DEFAULT '',
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, run_id, place, kind),
    FOREIGN KEY (tenant_id, run_id) REFERENCES public.agent_run ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_sighting IS 'A text of a run that holds a key or looks like an injection: where and of which kind, never the text. Kept for 35 days, gone with its run.';
COMMENT ON COLUMN public.agent_sighting.place IS 'Message id, or run error.';
CREATE INDEX agent_sighting_by_time ON public.agent_sighting (seen_at);

CREATE TABLE public.agent_monitor_mark (
    name text PRIMARY KEY CHECK (name <> ''),
    until timestamptz NOT NULL
);
COMMENT ON TABLE public.agent_monitor_mark IS 'How far the monitor has come with what it does bit by bit.';

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_reading', 'public.agent_reading_hour', 'public.agent_sighting', 'public.agent_monitor_mark']::regclass[]) AS t;
DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_reading', 'agent_reading_hour', 'agent_sighting', 'agent_monitor_mark'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_monitor ON public.%I TO agent_app
            USING ((SELECT current_setting('agent.reach', true)) = 'everywhere')
        $policy$, target);
    END LOOP;
    -- The monitor looks over all tenants and changes nothing of theirs; runs it may see by of_all_tenants.
    FOREACH target IN ARRAY ARRAY['agent_outcome', 'agent_memory', 'agent_tool_call'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_monitor ON public.%I FOR SELECT TO agent_app
            USING ((SELECT current_setting('agent.reach', true)) = 'everywhere')
        $policy$, target);
    END LOOP;
END
$$;
-- What ended or came in lately, whoever's it is. Those of runs and outcomes add 4 % to the processor time of record_run (0.02 ms
-- of 0.58 among 600,000 runs).
CREATE INDEX agent_run_by_end ON public.agent_run (finished_at, recorded_at) WHERE source = 'live';
CREATE INDEX agent_run_paused ON public.agent_run (finished_at) WHERE status = 'interrupted';
CREATE INDEX agent_outcome_by_time ON public.agent_outcome (recorded_at);
CREATE INDEX agent_execution_log_of_all ON public.agent_execution_log (at);
CREATE INDEX agent_tool_call_failed ON public.agent_tool_call (called_at) WHERE template IS NOT NULL;
CREATE INDEX approval_vote_by_time ON public.approval_vote (at);
CREATE INDEX agent_memory_quarantined ON public.agent_memory (recorded_at) WHERE trust = 'external' AND superseded_at IS NULL;

-- Sizes in bytes of the hundred largest tables, ours and the application's.
CREATE FUNCTION agent_private.table_sizes()
RETURNS TABLE (table_name text, bytes bigint)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('%I.%I', n.nspname, c.relname), pg_total_relation_size(c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
    ORDER BY c.relpages DESC, c.oid LIMIT 100;
$$;

-- Make the readings of what ended or came in from since until until, anew for each five minutes that it touches and their
-- hours, so that runs that come late are in them; of those that came in, such as ended at most 26 hours before. Answers
-- that took longer than target_ms count as failures of response_time. Leans on agent_run_by_end, agent_outcome_by_time
-- and agent_execution_log_of_all. The caller has entered and holds the readings. Returns {buckets, readings}.
CREATE FUNCTION agent_private.make_readings(target_ms double precision, since timestamptz, until timestamptz)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    five constant interval := '5 minutes';
    this_moment constant timestamptz := clock_timestamp();
    touched timestamptz[];
    hours timestamptz[];
    first timestamptz;
    last timestamptz;
    made bigint;
BEGIN
    SELECT coalesce(array_agg(DISTINCT date_bin(five, x.at, 'epoch')), '{}') INTO touched
    FROM (SELECT r.finished_at AS at FROM public.agent_run r
          WHERE r.source = 'live' AND r.finished_at >= since AND r.finished_at <= make_readings.until
          UNION ALL
          -- Apart from these, so that both columns of the index tell which rows to read.
          SELECT r.finished_at FROM public.agent_run r
          WHERE r.source = 'live' AND r.finished_at >= since - interval '26 hours' AND r.finished_at < since
            AND r.recorded_at >= since AND r.recorded_at <= make_readings.until
          UNION ALL
          SELECT o.recorded_at FROM public.agent_outcome o WHERE o.recorded_at >= since AND o.recorded_at <= make_readings.until
          UNION ALL
          SELECT l.at FROM public.agent_execution_log l WHERE l.at >= since AND l.at <= make_readings.until) AS x;
    -- One range with fixed ends: of a join with each of the five minutes the planner cannot know how many they are.
    SELECT min(t.bucket), max(t.bucket), coalesce(array_agg(DISTINCT date_bin('1 hour', t.bucket, 'epoch')), '{}')
    INTO first, last, hours FROM unnest(touched) AS t (bucket);
    DELETE FROM public.agent_reading g WHERE g.bucket = ANY (touched) AND g.measure <> 'table_bytes';
    WITH ended AS MATERIALIZED (
        SELECT date_bin(five, r.finished_at, 'epoch') AS bucket, r.tenant_id, r.agent_id, r.status, r.messages, r.facts,
               extract(epoch FROM r.finished_at - r.started_at) * 1000 AS ms
        FROM public.agent_run r
        WHERE r.source = 'live' AND r.finished_at >= first AND r.finished_at < last + five AND r.finished_at <= this_moment
          AND r.status IN ('completed', 'blocked', 'failed') AND date_bin(five, r.finished_at, 'epoch') = ANY (touched)
    ), done AS MATERIALIZED (
        SELECT date_bin(five, l.at, 'epoch') AS bucket, l.tenant_id, l.agent_id, l.tool, l.state, l.risk, l.duration_ms
        FROM public.agent_execution_log l
        WHERE l.at >= first AND l.at < last + five AND date_bin(five, l.at, 'epoch') = ANY (touched)
    ), seen (tenant_id, measure, agent_id, part, bucket, is_failure, value) AS (
        SELECT e.tenant_id, 'runs', e.agent_id, '', e.bucket, e.status = 'failed', NULL::double precision FROM ended e
        UNION ALL
        -- What waited for a person says nothing about the agent.
        SELECT e.tenant_id, 'response_time', e.agent_id, '', e.bucket, e.ms > target_ms, greatest(e.ms, 0)
        FROM ended e WHERE e.status = 'completed' AND NOT e.facts ? 'paused'
        UNION ALL
        -- Facts are what a client says: a number that no model counts must not spoil the sums of everybody.
        SELECT e.tenant_id, 'run_tokens', e.agent_id, '', e.bucket, false, (e.facts #>> '{usage,total_tokens}')::double precision
        FROM ended e WHERE jsonb_typeof(e.facts #> '{usage,total_tokens}') = 'number' AND e.facts #>> '{usage,total_tokens}' ~ '^\d{1,15}$'
        UNION ALL
        SELECT e.tenant_id, 'tool_tokens', e.agent_id, left(u.tool, 200), e.bucket, false, u.tokens::double precision
        FROM ended e, jsonb_each_text(CASE jsonb_typeof(e.facts #> '{usage,tools}') WHEN 'object' THEN e.facts #> '{usage,tools}' ELSE '{}' END) AS u (tool, tokens)
        WHERE u.tokens ~ '^\d{1,15}$'
        UNION ALL
        SELECT e.tenant_id, 'tool_calls', e.agent_id, left(m ->> 'name', 200), e.bucket, coalesce(m -> 'is_error' = 'true', false), NULL
        FROM ended e, jsonb_array_elements(e.messages) AS m
        WHERE m ->> 'role' = 'tool' AND coalesce(m ->> 'name', '') <> ''
        UNION ALL
        SELECT d.tenant_id, 'executions', coalesce(d.agent_id, ''), d.tool, d.bucket, d.state IN ('failed', 'unknown'), d.duration_ms
        FROM done d WHERE d.state IN ('executed', 'failed', 'unknown')
        UNION ALL
        SELECT d.tenant_id, 'refusals', coalesce(d.agent_id, ''), '', d.bucket, d.state = 'refused' OR d.risk = 'FORBIDDEN', NULL
        FROM done d
        UNION ALL
        SELECT o.tenant_id, 'outcomes', r.agent_id, left(o.kind, 200), date_bin(five, o.recorded_at, 'epoch'),
               coalesce(NOT o.succeeded, false), o.score
        FROM public.agent_outcome o
        JOIN public.agent_run r ON r.tenant_id = o.tenant_id AND r.run_id = o.run_id AND r.source = 'live'
        WHERE o.recorded_at >= first AND o.recorded_at < last + five AND date_bin(five, o.recorded_at, 'epoch') = ANY (touched)
          AND (o.score IS NULL OR o.score BETWEEN -1e100 AND 1e100)  -- no NaN, which would spoil every sum
    )
    INSERT INTO public.agent_reading AS g (tenant_id, measure, agent_id, part, bucket, events, failures, total, squares, middle)
    SELECT s.tenant_id, s.measure, s.agent_id, s.part, s.bucket, count(*), count(*) FILTER (WHERE s.is_failure),
           coalesce(sum(s.value), 0), coalesce(sum(s.value * s.value), 0), percentile_cont(0.5) WITHIN GROUP (ORDER BY s.value)
    FROM seen s
    GROUP BY s.tenant_id, s.measure, s.agent_id, s.part, s.bucket;
    GET DIAGNOSTICS made = ROW_COUNT;
    DELETE FROM public.agent_reading_hour h WHERE h.hour = ANY (hours) AND h.measure <> 'table_bytes';
    INSERT INTO public.agent_reading_hour (tenant_id, measure, agent_id, part, hour, events, failures, total, squares, middle)
    SELECT g.tenant_id, g.measure, g.agent_id, g.part, date_bin('1 hour', g.bucket, 'epoch'), sum(g.events), sum(g.failures), sum(g.total),
           sum(g.squares), percentile_cont(0.5) WITHIN GROUP (ORDER BY g.middle)
    FROM public.agent_reading g
    WHERE g.bucket >= date_bin('1 hour', first, 'epoch') AND g.bucket < date_bin('1 hour', last, 'epoch') + interval '1 hour'
      AND date_bin('1 hour', g.bucket, 'epoch') = ANY (hours) AND g.measure <> 'table_bytes'
    GROUP BY g.tenant_id, g.measure, g.agent_id, g.part, date_bin('1 hour', g.bucket, 'epoch');
    RETURN jsonb_build_object('buckets', cardinality(touched), 'readings', made);
END
$$;

-- How far one step of refresh_readings may go from here: an hour, or 20,000 runs where these ended in less, though at least
-- ten minutes; back in time where is_back. Leans on agent_run_by_end.
CREATE FUNCTION agent_private.reading_step(begins timestamptz, is_back boolean)
RETURNS timestamptz
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN is_back THEN
        least(greatest(begins - interval '1 hour', (
            SELECT r.finished_at FROM public.agent_run r
            WHERE r.source = 'live' AND r.finished_at < begins AND r.finished_at >= begins - interval '1 hour'
            ORDER BY r.finished_at DESC OFFSET 20000 LIMIT 1)), begins - interval '10 minutes')
    ELSE
        greatest(least(begins + interval '1 hour', (
            SELECT r.finished_at FROM public.agent_run r
            WHERE r.source = 'live' AND r.finished_at >= begins AND r.finished_at < begins + interval '1 hour'
            ORDER BY r.finished_at OFFSET 20000 LIMIT 1)), begins + interval '10 minutes')
    END;
$$;

-- Bring the readings a step further: what ended or came in since the last time, an hour or about 20,000 runs at once and at
-- most the last 26 hours; then, where readings have only begun, an hour of the seven days before, the latest first. So each
-- call is short, and who is cut off goes on from there: call it until more is false. See make_readings. One caller at a time.
-- Returns {since, buckets, readings, removed, more}.
CREATE FUNCTION public.refresh_readings(target_ms double precision)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    marks jsonb;
    since timestamptz;
    until timestamptz;
    made jsonb;
    more boolean;
    removed bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('agent readings', 0));
    SELECT coalesce(jsonb_object_agg(m.name, m.until), '{}') INTO marks FROM public.agent_monitor_mark m WHERE m.name LIKE 'readings%';
    IF NOT marks ? 'readings' THEN
        -- Nothing is measured yet, or all of it is to be measured anew.
        marks := jsonb_build_object('readings', this_moment - interval '26 hours', 'readings from', this_moment - interval '7 days');
    END IF;
    -- Whoever was writing a run then began a moment before.
    since := greatest((marks ->> 'readings')::timestamptz - interval '5 minutes', this_moment - interval '26 hours');
    until := least(agent_private.reading_step(since, false), this_moment);
    marks := marks || jsonb_build_object('readings', until);
    made := agent_private.make_readings(target_ms, since, until);
    IF until >= this_moment AND marks ? 'readings from' THEN
        until := coalesce((marks ->> 'readings back to')::timestamptz, this_moment - interval '25 hours');
        since := greatest(agent_private.reading_step(until, true), (marks ->> 'readings from')::timestamptz);
        made := made || agent_private.make_readings(target_ms, since, until);
        marks := marks || jsonb_build_object('readings back to', since);
        IF since <= (marks ->> 'readings from')::timestamptz THEN
            marks := marks - '{readings from,readings back to}'::text[];
        END IF;
    END IF;
    more := (marks ->> 'readings')::timestamptz < this_moment OR marks ? 'readings from';
    -- Sizes once an hour.
    WITH sizes AS (
        INSERT INTO public.agent_reading AS g (tenant_id, measure, part, bucket, events, total)
        SELECT '', 'table_bytes', left(z.table_name, 200), date_bin('1 hour', this_moment, 'epoch'), 1, z.bytes
        FROM agent_private.table_sizes() AS z
        WHERE NOT EXISTS (SELECT FROM public.agent_reading o
                          WHERE o.tenant_id = '' AND o.measure = 'table_bytes' AND o.bucket = date_bin('1 hour', this_moment, 'epoch'))
        ON CONFLICT DO NOTHING
        RETURNING g.part, g.bucket, g.total)
    INSERT INTO public.agent_reading_hour (tenant_id, measure, part, hour, events, total)
    SELECT '', 'table_bytes', s.part, s.bucket, 1, s.total FROM sizes s ON CONFLICT DO NOTHING;
    DELETE FROM public.agent_monitor_mark m WHERE m.name LIKE 'readings%' AND NOT marks ? m.name;
    INSERT INTO public.agent_monitor_mark AS m (name, until) SELECT x.key, x.value::timestamptz FROM jsonb_each_text(marks) AS x
    ON CONFLICT ON CONSTRAINT agent_monitor_mark_pkey DO UPDATE SET until = excluded.until;
    DELETE FROM public.agent_reading_hour h WHERE h.hour < this_moment - interval '35 days';
    DELETE FROM public.agent_reading g WHERE g.bucket < this_moment - interval '35 days';
    GET DIAGNOSTICS removed = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN made || jsonb_build_object('since', since, 'removed', removed, 'more', more);
END
$$;

-- The readings of the series that had events lately: five minutes by five minutes for recent_hours, the hours before for
-- history_days, each tenant, agent and measure in turn, of each the busiest series first. A reading is [epoch, events, failures, total, squares, middle].
-- Returns {now, first_at, left_out, series: [{tenant_id, measure, agent_id, part, recent, hours}]}.
CREATE FUNCTION public.monitor_readings(recent_hours integer DEFAULT 12, history_days integer DEFAULT 14, series_limit integer DEFAULT 300)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    recent_from constant timestamptz := date_bin('1 hour', this_moment, 'epoch') - make_interval(hours => recent_hours);
    found jsonb;
    there bigint;
BEGIN
    WITH busy AS (
        SELECT g.tenant_id, g.measure, g.agent_id, g.part, sum(g.events) AS events
        FROM public.agent_reading g WHERE g.bucket >= recent_from
        GROUP BY g.tenant_id, g.measure, g.agent_id, g.part
    ), ranked AS (
        SELECT b.*, row_number() OVER (PARTITION BY b.tenant_id, b.measure, b.agent_id ORDER BY b.events DESC, b.part) AS place FROM busy b
    ), chosen AS (
        -- In turn, so that names which somebody makes up push out those of no other agent or tenant.
        SELECT k.* FROM (
            SELECT r.*, row_number() OVER (PARTITION BY r.tenant_id ORDER BY r.place, r.events DESC, r.measure, r.agent_id) AS turn
            FROM ranked r) AS k
        ORDER BY k.measure = 'table_bytes', k.turn, k.events DESC, k.tenant_id LIMIT series_limit
    ), documents AS (
        SELECT c.events, jsonb_build_object(
            'tenant_id', c.tenant_id, 'measure', c.measure, 'agent_id', c.agent_id, 'part', c.part,
            'recent', (SELECT coalesce(jsonb_agg(jsonb_build_array(extract(epoch FROM g.bucket)::bigint, g.events, g.failures, g.total, g.squares, g.middle) ORDER BY g.bucket), '[]')
                       FROM public.agent_reading g
                       WHERE (g.tenant_id, g.measure, g.agent_id, g.part) = (c.tenant_id, c.measure, c.agent_id, c.part)
                         AND g.bucket >= recent_from),
            'hours', (SELECT coalesce(jsonb_agg(jsonb_build_array(extract(epoch FROM h.hour)::bigint, h.events, h.failures, h.total, h.squares, h.middle) ORDER BY h.hour), '[]')
                      FROM public.agent_reading_hour h
                      WHERE (h.tenant_id, h.measure, h.agent_id, h.part) = (c.tenant_id, c.measure, c.agent_id, c.part)
                        AND h.hour < recent_from AND h.hour >= this_moment - make_interval(days => history_days))) AS document
        FROM chosen c)
    SELECT (SELECT count(*) FROM busy), (SELECT coalesce(jsonb_agg(d.document ORDER BY d.events DESC), '[]') FROM documents d)
    INTO there, found;
    found := jsonb_build_object(
        'now', this_moment, 'first_at', (SELECT min(g.bucket) FROM public.agent_reading g),
        'left_out', there - jsonb_array_length(found), 'series', found);
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- What only the owner sees of the server and the queue; agent_app has no rights on the queue. Of statements those whose text
-- has no values in it, where pg_stat_statements is installed as an extension: its rows are read from no other relation of that name.
CREATE FUNCTION agent_private.watched_server()
RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statements jsonb;
    home text := (SELECT n.nspname
                  FROM pg_extension e
                  JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
                  JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relname = 'pg_stat_statements'
                  JOIN pg_namespace n ON n.oid = c.relnamespace
                  WHERE e.extname = 'pg_stat_statements');
BEGIN
    BEGIN
        IF home = 'extensions' THEN
            SELECT jsonb_agg(to_jsonb(x)) INTO statements
            FROM (SELECT s.queryid::text AS statement_id, sum(s.calls)::bigint AS calls, sum(s.total_exec_time) / sum(s.calls) AS mean_ms, left(min(s.query), 300) AS statement
                  FROM extensions.pg_stat_statements s
                  WHERE s.dbid = (SELECT b.oid FROM pg_database b WHERE b.datname = current_database()) AND s.query ~* '^\s*(select|insert|update|delete|with|merge)\M'
                  GROUP BY s.queryid HAVING sum(s.calls) >= 5
                  ORDER BY 3 DESC LIMIT 20) AS x;
        ELSIF home = 'public' THEN
            SELECT jsonb_agg(to_jsonb(x)) INTO statements
            FROM (SELECT s.queryid::text AS statement_id, sum(s.calls)::bigint AS calls, sum(s.total_exec_time) / sum(s.calls) AS mean_ms, left(min(s.query), 300) AS statement
                  FROM public.pg_stat_statements s
                  WHERE s.dbid = (SELECT b.oid FROM pg_database b WHERE b.datname = current_database()) AND s.query ~* '^\s*(select|insert|update|delete|with|merge)\M'
                  GROUP BY s.queryid HAVING sum(s.calls) >= 5
                  ORDER BY 3 DESC LIMIT 20) AS x;
        END IF;
    EXCEPTION WHEN object_not_in_prerequisite_state OR insufficient_privilege THEN
        NULL;  -- installed but not loaded, or not for this owner: statements stays NULL, which is not seen
    END;
    RETURN jsonb_build_object(
        'queues', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.queue), '[]')
                   FROM (SELECT j.queue_name AS queue, count(*) AS waiting,
                                extract(epoch FROM clock_timestamp() - min(coalesce(j.scheduled_at, (
                                    SELECT min(e.at) FROM agent_queue.procrastinate_events e WHERE e.job_id = j.id)))) AS oldest_seconds
                         FROM agent_queue.procrastinate_jobs j
                         WHERE j.status = 'todo' AND (j.scheduled_at IS NULL OR j.scheduled_at <= clock_timestamp())
                         GROUP BY j.queue_name) AS x),
        'dead_jobs', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.queue, x.task), '[]')
                      FROM (SELECT j.queue_name AS queue, j.task_name AS task, count(*) AS jobs, max(j.attempts) AS attempts,
                                   (array_agg(j.id ORDER BY j.id DESC))[1:10] AS job_ids, max(e.at) AS last_at, min(e.at) AS first_at
                            FROM agent_queue.procrastinate_jobs j
                            LEFT JOIN LATERAL (SELECT max(v.at) AS at FROM agent_queue.procrastinate_events v
                                               WHERE v.job_id = j.id AND v.type = 'failed') AS e ON true
                            WHERE j.status = 'failed'
                            GROUP BY j.queue_name, j.task_name) AS x),
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers w WHERE w.last_heartbeat > clock_timestamp() - interval '30 seconds'),
        'connections', (SELECT count(*) FROM pg_stat_activity a WHERE a.backend_type = 'client backend'),
        'connections_max', current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer,
        'long_transactions', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.seconds DESC), '[]')
                              FROM (SELECT a.pid, a.application_name, a.state, a.xact_start AS since,
                                           extract(epoch FROM clock_timestamp() - a.xact_start) AS seconds
                                    FROM pg_stat_activity a
                                    WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()
                                      AND a.xact_start < clock_timestamp() - interval '1 minute'
                                    ORDER BY a.xact_start LIMIT 20) AS x),
        'slow_statements', statements);
END
$$;
REVOKE ALL ON FUNCTION agent_private.watched_server() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.watched_server() TO agent_app;

-- What is so right now: queue, dead jobs, connections, long transactions, slow statements, how long learning has waited,
-- runs that have been interrupted for longer than paused_seconds while no approval of theirs is open. Leans on
-- agent_run_waiting and agent_run_paused.
CREATE FUNCTION public.monitor_state(paused_seconds double precision DEFAULT 3600)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    found jsonb;
BEGIN
    found := jsonb_build_object(
        'now', this_moment,
        'unlearned', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.tenant_id), '[]')
                      FROM (SELECT r.tenant_id, count(*) AS runs, min(r.recorded_at) AS oldest_at
                            FROM public.agent_run r
                            WHERE r.learned_at IS NULL AND r.status = 'completed' AND r.source = 'live' AND r.user_id IS NOT NULL
                              AND r.recorded_at > this_moment - interval '7 days'
                            GROUP BY r.tenant_id) AS x),
        'paused_runs', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.tenant_id, x.agent_id), '[]')
                        FROM (SELECT r.tenant_id, r.agent_id, count(*) AS runs, min(r.finished_at) AS oldest_at,
                                     (array_agg(r.run_id ORDER BY r.finished_at))[1:20] AS run_ids
                              FROM public.agent_run r
                              WHERE r.status = 'interrupted' AND r.finished_at < this_moment - make_interval(secs => paused_seconds)
                                AND r.finished_at > this_moment - interval '14 days'
                                AND NOT EXISTS (SELECT FROM public.human_approval_queue q
                                                WHERE q.tenant_id = r.tenant_id AND q.session_id = r.session_id
                                                  AND q.state IN ('pending', 'approved', 'executing'))
                              GROUP BY r.tenant_id, r.agent_id) AS x)
    ) || agent_private.watched_server();
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- What bears on safety: refused and forbidden actions by who tried them in the last hour (the 500 that were refused most)
-- beside their latest thousand of history_days before, votes of the same days (the newest 5,000), and memories that came into
-- quarantine in the last day. Who tried is a number that says nothing without the secret of this database; the log has the
-- name. Leans on agent_execution_log_of_all, agent_execution_log_by_user, approval_vote_by_time and agent_memory_quarantined.
CREATE FUNCTION public.monitor_security(history_days integer DEFAULT 14)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    salt constant text := public.server_secret('monitor who') #>> '{}';
    found jsonb;
BEGIN
    found := jsonb_build_object(
        'now', this_moment,
        'refusals', (SELECT coalesce(jsonb_agg(to_jsonb(x) - 'user_id' || to_jsonb(e) ORDER BY x.tenant_id, x.agent_id, x.who), '[]')
            FROM (SELECT l.tenant_id, coalesce(l.agent_id, '') AS agent_id, l.user_id,
                         left(encode(sha256(convert_to(salt || jsonb_build_array(l.tenant_id, l.user_id)::text, 'UTF8')), 'hex'), 12) AS who,
                         count(*) AS actions,
                         count(*) FILTER (WHERE l.state = 'refused' OR l.risk = 'FORBIDDEN') AS refused,
                         count(*) FILTER (WHERE l.risk = 'FORBIDDEN') AS forbidden,
                         min(l.at) FILTER (WHERE l.state = 'refused' OR l.risk = 'FORBIDDEN') AS since,
                         (array_agg(l.log_id ORDER BY l.log_id DESC) FILTER (WHERE l.state = 'refused' OR l.risk = 'FORBIDDEN'))[1:20] AS log_ids
                  FROM public.agent_execution_log l
                  WHERE l.at >= this_moment - interval '1 hour'
                  GROUP BY l.tenant_id, l.agent_id, l.user_id
                  HAVING bool_or(l.state = 'refused' OR l.risk = 'FORBIDDEN')
                  ORDER BY 6 DESC, 1, 2, 4 LIMIT 500) AS x
            -- What they did before, by the index of users: their latest thousand actions. Who is nobody is looked up apart,
            -- because the index is not used for "is not distinct".
            CROSS JOIN LATERAL (
                SELECT count(*) AS earlier_actions, count(*) FILTER (WHERE o.state = 'refused' OR o.risk = 'FORBIDDEN') AS earlier_refused
                FROM ((SELECT l.state, l.risk FROM public.agent_execution_log l
                       WHERE l.tenant_id = x.tenant_id AND l.user_id = x.user_id AND coalesce(l.agent_id, '') = x.agent_id
                         AND l.at < this_moment - interval '1 hour' AND l.at >= this_moment - make_interval(days => history_days)
                       ORDER BY l.at DESC LIMIT 1000)
                      UNION ALL
                      (SELECT l.state, l.risk FROM public.agent_execution_log l
                       WHERE x.user_id IS NULL AND l.tenant_id = x.tenant_id AND l.user_id IS NULL AND coalesce(l.agent_id, '') = x.agent_id
                         AND l.at < this_moment - interval '1 hour' AND l.at >= this_moment - make_interval(days => history_days)
                       ORDER BY l.at DESC LIMIT 1000)) AS o) AS e),
        'votes', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.at), '[]')
            FROM (SELECT v.tenant_id, v.voter, v.verdict, v.channel, v.at, v.approval_id, q.batch_id, q.risk,
                         v.voter = q.requested_by AS is_own, extract(epoch FROM v.at - q.requested_at) AS waited_seconds
                  FROM public.approval_vote v JOIN public.human_approval_queue q ON q.approval_id = v.approval_id
                  WHERE v.at >= this_moment - make_interval(days => history_days)
                  ORDER BY v.at DESC LIMIT 5000) AS x),
        'quarantined', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.tenant_id), '[]')
            FROM (SELECT m.tenant_id, count(*) AS memories, min(m.recorded_at) AS since,
                         (array_agg(m.memory_id ORDER BY m.recorded_at DESC))[1:20] AS memory_ids
                  FROM public.agent_memory m
                  WHERE m.trust = 'external' AND m.superseded_at IS NULL AND m.recorded_at >= this_moment - interval '1 day'
                  GROUP BY m.tenant_id) AS x));
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Errors of tools, by template, in the calls of the last recent_hours that are counted, beside fourteen days before: those
-- that were met at least three times. Calls of imported runs do not count. Leans on agent_tool_call_failed and
-- agent_tool_call_by_tool.
-- Returns {now, errors: [{tenant_id, tool, template, failures, calls, earlier_failures, earlier_calls, since, run_ids}]}.
CREATE FUNCTION public.monitor_errors(recent_hours integer DEFAULT 3)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    recent_from constant timestamptz := this_moment - make_interval(hours => recent_hours);
    found jsonb;
BEGIN
    WITH failed AS (
        SELECT c.tenant_id, c.tool, c.template, c.run_id, count(*) AS failures, max(c.called_at) AS called_at
        FROM public.agent_tool_call c
        WHERE c.template IS NOT NULL AND c.called_at >= recent_from
          AND NOT EXISTS (SELECT FROM public.agent_run r
                          WHERE r.tenant_id = c.tenant_id AND r.run_id = c.run_id AND r.source = 'import')
        GROUP BY c.tenant_id, c.tool, c.template, c.run_id),
    met AS (
        SELECT f.tenant_id, f.tool, f.template, sum(f.failures)::bigint AS failures, min(f.called_at) AS since,
               (array_agg(f.run_id ORDER BY f.called_at DESC))[1:10] AS run_ids
        FROM failed f
        GROUP BY f.tenant_id, f.tool, f.template
        HAVING sum(f.failures) >= 3
        ORDER BY 4 DESC LIMIT 100)
    SELECT coalesce(jsonb_agg(to_jsonb(m) || jsonb_build_object(
               'calls', k.calls, 'earlier_calls', k.earlier_calls, 'earlier_failures', k.earlier_failures)
               ORDER BY m.tenant_id, m.tool, m.template), '[]') INTO found
    FROM met m
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE c.called_at >= recent_from) AS calls,
               count(*) FILTER (WHERE c.called_at < recent_from) AS earlier_calls,
               count(*) FILTER (WHERE c.called_at < recent_from AND c.template = m.template) AS earlier_failures
        FROM public.agent_tool_call c
        WHERE c.tenant_id = m.tenant_id AND c.tool = m.tool AND c.called_at >= this_moment - interval '14 days'
          AND NOT EXISTS (SELECT FROM public.agent_run r
                          WHERE r.tenant_id = c.tenant_id AND r.run_id = c.run_id AND r.source = 'import')) AS k;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('now', this_moment, 'errors', found);
END
$$;

-- Texts of runs that ended or came in since the last scan, oldest first: the first 4,000 characters of what users and tools said, of
-- answers and of errors, of at most run_limit runs and 200 messages of each. Leans on agent_run_by_end.
-- Returns {texts: [{tenant_id, run_id, agent_id, place, role, text}], until, more}; until goes to record_sightings.
CREATE FUNCTION public.unscanned_texts(run_limit integer DEFAULT 100)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    since timestamptz;
    found jsonb;
BEGIN
    SELECT m.until INTO since FROM public.agent_monitor_mark m WHERE m.name = 'texts';
    since := greatest(since, this_moment - interval '1 day');
    WITH ended AS MATERIALIZED (
        SELECT r.tenant_id, r.run_id, r.agent_id, r.messages, r.error, greatest(r.finished_at, r.recorded_at) AS at
        FROM public.agent_run r
        WHERE r.source = 'live' AND r.finished_at > since - interval '1 day'
          AND greatest(r.finished_at, r.recorded_at) > since
          -- Whoever is writing a run right now began a moment ago.
          AND greatest(r.finished_at, r.recorded_at) <= this_moment - interval '2 seconds'
        ORDER BY at FETCH FIRST run_limit ROWS WITH TIES
    ), texts AS (
        SELECT e.tenant_id, e.run_id, e.agent_id, m.message ->> 'message_id' AS place, m.message ->> 'role' AS role,
               left(m.message ->> 'content', 4000) AS text
        FROM ended e, jsonb_array_elements(e.messages) WITH ORDINALITY AS m (message, position)
        WHERE m.position <= 200
        UNION ALL
        SELECT e.tenant_id, e.run_id, e.agent_id, 'run error', 'error', left(e.error, 4000) FROM ended e WHERE e.error IS NOT NULL
    )
    SELECT jsonb_build_object(
        'texts', coalesce((SELECT jsonb_agg(to_jsonb(t)) FROM texts t), '[]'),
        'until', coalesce((SELECT max(e.at) FROM ended e), since),
        'more', (SELECT count(*) FROM ended) >= run_limit) INTO found;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Keep what a scan saw, [{tenant_id, run_id, agent_id, place, kind}], and how far it came; runs that are gone meanwhile are
-- passed over. Returns what was seen in the last day, counted:
-- [{tenant_id, kind, agent_id, texts, since, places: [{run_id, place}]}], of each the newest 20 places.
CREATE FUNCTION public.record_sightings(sightings jsonb, scanned_until text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    this_moment constant timestamptz := clock_timestamp();
    found jsonb;
BEGIN
    sightings := agent_private.document(sightings);
    INSERT INTO public.agent_sighting (tenant_id, run_id, place, kind, agent_id)
    SELECT r.tenant_id, r.run_id, agent_private.short_id(coalesce(nullif(s.place, ''), 'message')), s.kind, r.agent_id
    FROM jsonb_to_recordset(sightings) AS s (tenant_id text, run_id text, place text, kind text)
    JOIN public.agent_run r ON r.tenant_id = s.tenant_id AND r.run_id = s.run_id
    ON CONFLICT DO NOTHING;
    IF scanned_until IS NOT NULL THEN
        INSERT INTO public.agent_monitor_mark AS m (name, until) VALUES ('texts', scanned_until::timestamptz)
        ON CONFLICT ON CONSTRAINT agent_monitor_mark_pkey DO UPDATE SET until = greatest(m.until, excluded.until);
    END IF;
    DELETE FROM public.agent_sighting g WHERE g.seen_at < this_moment - interval '35 days';
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.tenant_id, x.kind, x.agent_id), '[]') INTO found
    FROM (SELECT g.tenant_id, g.kind, g.agent_id, count(*) AS texts, min(g.seen_at) AS since,
                 (SELECT jsonb_agg(to_jsonb(p)) FROM unnest(
                     (array_agg(g.run_id ORDER BY g.seen_at DESC, g.run_id, g.place))[1:20],
                     (array_agg(g.place ORDER BY g.seen_at DESC, g.run_id, g.place))[1:20]) AS p (run_id, place)) AS places
          FROM public.agent_sighting g
          WHERE g.seen_at >= this_moment - interval '1 day'
          GROUP BY g.tenant_id, g.kind, g.agent_id) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Judge a run of the tenant: [{kind, succeeded?, score?, details?}]; a later judgement of the same kind replaces the earlier.
-- Returns how many were kept; PT404 where the run is not recorded (yet).
CREATE FUNCTION public.record_outcomes(identity jsonb, the_run_id text, outcomes jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    kept integer;
BEGIN
    identity := agent_private.document(identity);
    outcomes := agent_private.document(outcomes);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'no tenant whose run could be judged');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT r.user_id INTO person FROM public.agent_run r WHERE r.tenant_id = tenant AND r.run_id = the_run_id;
    IF NOT FOUND THEN
        PERFORM agent_private.refuse('PT404', format('there is no run %s', the_run_id));
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(outcomes) AS o WHERE coalesce(o ->> 'kind', '') = '' OR length(o ->> 'kind') > 200) THEN
        PERFORM agent_private.refuse('PT422', 'a judgement needs a kind of at most 200 characters');
    END IF;
    INSERT INTO public.agent_outcome AS k (tenant_id, run_id, user_id, kind, succeeded, score, details)
    SELECT DISTINCT ON (o.item ->> 'kind') tenant, the_run_id, person, o.item ->> 'kind', (o.item ->> 'succeeded')::boolean,
           (o.item ->> 'score')::double precision, coalesce(o.item -> 'details', '{}')
    FROM jsonb_array_elements(outcomes) WITH ORDINALITY AS o (item, position)
    ORDER BY o.item ->> 'kind', o.position DESC
    ON CONFLICT ON CONSTRAINT agent_outcome_pkey DO UPDATE
    SET succeeded = excluded.succeeded, score = excluded.score, details = excluded.details, recorded_at = now();
    GET DIAGNOSTICS kept = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(kept);
END
$$;

SELECT agent_private.publish(f, 'private') FROM unnest(ARRAY[
    'agent_private.table_sizes()',
    'agent_private.make_readings(double precision, timestamptz, timestamptz)',
    'agent_private.reading_step(timestamptz, boolean)']::regprocedure[]) AS f;
SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.refresh_readings(double precision)',
    'public.monitor_readings(integer, integer, integer)',
    'public.monitor_state(double precision)',
    'public.monitor_security(integer)',
    'public.monitor_errors(integer)',
    'public.unscanned_texts(integer)',
    'public.record_sightings(jsonb, text)',
    'public.record_outcomes(jsonb, text, jsonb)']::regprocedure[]) AS f;

-- ---- schemas/95_alerts.sql

-- Alerts: what the monitor found and still finds, whom it was told, and what is not to be told for a while.
--
-- One lock serialises all reports of a database, so rows of alerts are changed by one transaction at a time; deliveries
-- are taken with a lease and never wait for it.

CREATE TABLE public.agent_alert (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    alert_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    reported_by text NOT NULL CHECK (reported_by <> ''),
    cause text NOT NULL CONSTRAINT agent_alert_cause CHECK (length(cause) BETWEEN 1 AND 200),
    check_name text NOT NULL CHECK (check_name <> ''),
    severity text NOT NULL CONSTRAINT agent_alert_severity CHECK (severity IN ('info', 'warning', 'critical')),
    title text NOT NULL CHECK (title <> ''),
    what text NOT NULL,
    advice text NOT NULL,
    evidence jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(evidence) = 'object'),
    since timestamptz NOT NULL,
    -- open -> resolved; resolved -> open where the cause comes back within the cooldown
    state text NOT NULL DEFAULT 'open' CONSTRAINT agent_alert_state CHECK (state IN ('open', 'resolved')),
    raised_at timestamptz NOT NULL,
    opened_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    resolved_at timestamptz,
    times_seen integer NOT NULL DEFAULT 1 CHECK (times_seen >= 1),
    times_reopened integer NOT NULL DEFAULT 0 CHECK (times_reopened >= 0),
    told text CHECK (told IN ('open', 'resolved')),
    told_severity text CHECK (told_severity IN ('info', 'warning', 'critical')),
    reminded_at timestamptz,
    CONSTRAINT agent_alert_resolved CHECK ((resolved_at IS NOT NULL) = (state = 'resolved')),
    CONSTRAINT agent_alert_told CHECK ((told IS NULL) = (reminded_at IS NULL) AND (told IS NULL) = (told_severity IS NULL))
);
COMMENT ON TABLE public.agent_alert IS 'One cause that the monitor found, from when it was first found until it was found no more. Kept for 90 days after.';
COMMENT ON COLUMN public.agent_alert.reported_by IS 'Tenant of the deployment whose monitor reports it: that one resolves it and tells of it.';
COMMENT ON COLUMN public.agent_alert.check_name IS 'Which check of the monitor finds it.';
COMMENT ON COLUMN public.agent_alert.since IS 'Since when it is so, as far as the readings tell.';
COMMENT ON COLUMN public.agent_alert.opened_at IS 'When it was raised, or came back last.';
COMMENT ON COLUMN public.agent_alert.times_reopened IS 'How often it came back within the cooldown: how much it flaps.';
COMMENT ON COLUMN public.agent_alert.told IS 'What people believe: the state they were told last; NULL where it was silenced from the start.';
COMMENT ON COLUMN public.agent_alert.told_severity IS 'The severity they were told last.';
COMMENT ON COLUMN public.agent_alert.reminded_at IS 'When they were told last.';
CREATE UNIQUE INDEX agent_alert_one_open ON public.agent_alert (tenant_id, cause) WHERE state = 'open';
CREATE INDEX agent_alert_by_cause ON public.agent_alert (tenant_id, cause);
CREATE INDEX agent_alert_by_time ON public.agent_alert (tenant_id, raised_at DESC);
CREATE INDEX agent_alert_over ON public.agent_alert (resolved_at) WHERE state = 'resolved';

CREATE TABLE public.agent_alert_notice (
    tenant_id text NOT NULL,
    notice_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    alert_id uuid NOT NULL REFERENCES public.agent_alert ON DELETE CASCADE,
    kind text NOT NULL CONSTRAINT agent_alert_notice_kind CHECK (kind IN ('raised', 'worsened', 'reminder', 'resolved')),
    alert jsonb NOT NULL,
    at timestamptz NOT NULL
);
COMMENT ON TABLE public.agent_alert_notice IS 'One thing to be told of an alert, with the alert as it was then.';
CREATE INDEX agent_alert_notice_by_alert ON public.agent_alert_notice (alert_id, at);

CREATE TABLE public.agent_alert_delivery (
    tenant_id text NOT NULL,
    notice_id uuid NOT NULL REFERENCES public.agent_alert_notice ON DELETE CASCADE,
    sink text NOT NULL CHECK (sink <> ''),
    alert_id uuid NOT NULL,
    reported_by text NOT NULL,
    at timestamptz NOT NULL,
    -- waiting -> sent | failed | given_up; failed -> sent | failed | given_up
    state text NOT NULL DEFAULT 'waiting'
        CONSTRAINT agent_alert_delivery_state CHECK (state IN ('waiting', 'failed', 'sent', 'given_up')),
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL,
    sent_at timestamptz,
    error text,
    PRIMARY KEY (notice_id, sink),
    CONSTRAINT agent_alert_delivery_sent CHECK ((sent_at IS NOT NULL) = (state = 'sent'))
);
COMMENT ON TABLE public.agent_alert_delivery IS 'One notice on its way to one sink. Those of one alert go to a sink in order.';
COMMENT ON COLUMN public.agent_alert_delivery.next_attempt_at IS 'Not sent before: a lease of who sends right now, or the wait after a failure.';
CREATE INDEX agent_alert_delivery_due ON public.agent_alert_delivery (reported_by, next_attempt_at) WHERE state IN ('waiting', 'failed');
CREATE INDEX agent_alert_delivery_in_order ON public.agent_alert_delivery (alert_id, sink, at);

CREATE TABLE public.agent_alert_silence (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    silence_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    pattern text NOT NULL CONSTRAINT agent_alert_silence_pattern CHECK (length(pattern) BETWEEN 1 AND 200),
    until timestamptz NOT NULL,
    made_by text NOT NULL CHECK (made_by <> ''),
    why text NOT NULL DEFAULT '' CHECK (length(why) <= 2000),
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    ended_by text,
    CONSTRAINT agent_alert_silence_until CHECK (until > made_at)
);
COMMENT ON TABLE public.agent_alert_silence IS 'Alerts that are recorded and not told, by a pattern of their cause or check, for a while.';
COMMENT ON COLUMN public.agent_alert_silence.pattern IS 'With * for any text and ? for any letter; the whole cause or the whole name of the check.';
CREATE INDEX agent_alert_silence_by_tenant ON public.agent_alert_silence (tenant_id, until);

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_alert', 'public.agent_alert_notice', 'public.agent_alert_delivery', 'public.agent_alert_silence']::regclass[]) AS t;
DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_alert', 'agent_alert_notice', 'agent_alert_delivery', 'agent_alert_silence'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_tenant ON public.%I TO agent_app
            USING (
                (SELECT current_setting('agent.reach', true)) = 'everywhere'
                OR (tenant_id = (SELECT current_setting('agent.tenant_id', true))
                    AND (SELECT current_setting('agent.reach', true)) = 'tenant')
            )
        $policy$, target);
    END LOOP;
END
$$;

-- Take on all tenants for the deployment of this identity, whose tenant is put into `own`; PT403 without one.
CREATE FUNCTION agent_private.enter_deployment(identity jsonb, OUT own text, OUT previous text[])
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a deployment has a tenant');
    END IF;
    own := current_setting('agent.tenant_id');
    PERFORM agent_private.enter_everywhere();
END
$$;

-- Severities as numbers, the mildest first.
CREATE FUNCTION agent_private.severity_rank(severity text)
RETURNS integer
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_position(ARRAY['info', 'warning', 'critical'], severity);
$$;

-- The silences that cover an alert by their pattern, those that are over too.
CREATE FUNCTION agent_private.silences_over(a public.agent_alert)
RETURNS SETOF public.agent_alert_silence
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT s.*
    FROM public.agent_alert_silence s
    CROSS JOIN LATERAL (SELECT translate(replace(replace(replace(s.pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*?', '%_') AS shape) AS p
    WHERE s.tenant_id = a.tenant_id AND (a.cause LIKE p.shape OR a.check_name LIKE p.shape);
$$;

-- The silence that holds now and lasts longest for an alert; NULL: none. Nobody silences an alert that is about themselves:
-- a reviewer is named in its evidence as `voter`.
CREATE FUNCTION agent_private.silence_of(a public.agent_alert)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT s.silence_id
    FROM agent_private.silences_over(a) AS s
    WHERE s.ended_at IS NULL AND s.until > clock_timestamp() AND s.made_by IS DISTINCT FROM a.evidence ->> 'voter'
    ORDER BY s.until DESC LIMIT 1;
$$;

-- An alert as programs are given it. silences: the last three that covered it while it lasted, {made_by, why, until,
-- is_own}; one that is_own was made by whom the alert is about, and does not hold.
CREATE FUNCTION agent_private.alert_document(a public.agent_alert)
RETURNS jsonb
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_jsonb(a) - ARRAY['check_name', 'reported_by', 'told', 'told_severity']
           || jsonb_build_object('check', a.check_name, 'silence_id', agent_private.silence_of(a), 'silences', (
               SELECT coalesce(jsonb_agg(jsonb_build_object(
                          'made_by', x.made_by, 'why', x.why, 'until', x.over_at,
                          'is_own', x.made_by IS NOT DISTINCT FROM a.evidence ->> 'voter') ORDER BY x.made_at DESC), '[]')
               FROM (SELECT s.made_by, s.why, s.made_at, coalesce(s.ended_at, s.until) AS over_at
                     FROM agent_private.silences_over(a) AS s
                     WHERE coalesce(s.ended_at, s.until) >= a.raised_at
                     ORDER BY s.made_at DESC LIMIT 3) AS x));
$$;

-- Write down that people are to be told of an alert, by these sinks, and what they believe from then on. Returns the
-- notice. A sink on which an earlier notice of the alert still waits is not reminded as well.
CREATE FUNCTION agent_private.tell_alert(told_of public.agent_alert, the_kind text, sinks text[], moment timestamptz)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    notice public.agent_alert_notice;
BEGIN
    INSERT INTO public.agent_alert_notice (tenant_id, alert_id, kind, alert, at)
    VALUES (told_of.tenant_id, told_of.alert_id, the_kind, agent_private.alert_document(told_of), moment)
    RETURNING * INTO notice;
    INSERT INTO public.agent_alert_delivery (tenant_id, notice_id, sink, alert_id, reported_by, at, next_attempt_at)
    SELECT DISTINCT told_of.tenant_id, notice.notice_id, s.sink, told_of.alert_id, told_of.reported_by, moment, moment
    FROM unnest(sinks) AS s (sink)
    WHERE the_kind <> 'reminder'
       OR NOT EXISTS (SELECT FROM public.agent_alert_delivery d
                      WHERE d.alert_id = told_of.alert_id AND d.sink = s.sink AND d.state IN ('waiting', 'failed'));
    UPDATE public.agent_alert a SET told = told_of.state, told_severity = told_of.severity, reminded_at = moment
    WHERE a.alert_id = told_of.alert_id;
    RETURN to_jsonb(notice);
END
$$;

-- Whether an earlier notice of the same alert is still on its way to the same sink.
CREATE FUNCTION agent_private.has_earlier_delivery(d public.agent_alert_delivery)
RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM public.agent_alert_delivery e
                   WHERE e.alert_id = d.alert_id AND e.sink = d.sink AND e.state IN ('waiting', 'failed') AND e.at < d.at);
$$;

-- Take what a round of checks found: raise what is new, keep what lasts, resolve what was looked for and not found, and
-- write the notices for these sinks. Returns the notices. Waits for other reports of this database.
--
-- findings: [{cause, check, severity, title, what, advice, evidence, since, tenant_id}]; without a tenant_id they are the
--   deployment's own; of two with one cause the graver counts.
-- checked: names of the checks that were made to their end.
-- cooldown_seconds: a cause that comes back so soon after it was resolved is the same alert, told again only once it has
--   lasted as long, or is graver.
-- reminder_seconds: an alert that lasts is told again so often.
CREATE FUNCTION public.report_findings(
    identity jsonb, findings jsonb, checked text[], sinks text[],
    cooldown_seconds double precision, reminder_seconds double precision)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deployment record;
    moment timestamptz;
    cooldown interval := make_interval(secs => cooldown_seconds);
    one record;
    alert public.agent_alert;
    kind text;
    notices jsonb := '[]';
BEGIN
    deployment := agent_private.enter_deployment(agent_private.document(identity));
    findings := agent_private.document(findings);
    PERFORM pg_advisory_xact_lock(hashtextextended('agent_alert', 0));
    moment := clock_timestamp();
    FOR one IN
        SELECT DISTINCT ON (f.tenant, f.cause) f.*
        FROM (SELECT coalesce(nullif(x ->> 'tenant_id', ''), deployment.own) AS tenant, x ->> 'cause' AS cause,
                     agent_private.severity_rank(x ->> 'severity') AS rank, x AS finding
              FROM jsonb_array_elements(findings) AS x) AS f
        ORDER BY f.tenant, f.cause, f.rank DESC NULLS FIRST
    LOOP
        SELECT a.* INTO alert FROM public.agent_alert a
        WHERE a.tenant_id = one.tenant AND a.cause = one.cause AND (a.state = 'open' OR a.resolved_at > moment - cooldown)
        ORDER BY a.state = 'open' DESC, a.resolved_at DESC LIMIT 1;
        IF FOUND THEN
            UPDATE public.agent_alert a
            SET reported_by = deployment.own, check_name = one.finding ->> 'check', severity = one.finding ->> 'severity',
                title = one.finding ->> 'title', what = one.finding ->> 'what', advice = one.finding ->> 'advice',
                evidence = one.finding -> 'evidence', since = least(a.since, (one.finding ->> 'since')::timestamptz),
                state = 'open', resolved_at = NULL, last_seen_at = moment, times_seen = a.times_seen + 1,
                opened_at = CASE a.state WHEN 'open' THEN a.opened_at ELSE moment END,
                times_reopened = a.times_reopened + (a.state <> 'open')::integer
            WHERE a.alert_id = alert.alert_id
            RETURNING a.* INTO alert;
        ELSE
            INSERT INTO public.agent_alert AS a (
                tenant_id, reported_by, cause, check_name, severity, title, what, advice, evidence, since,
                raised_at, opened_at, last_seen_at)
            VALUES (one.tenant, deployment.own, one.cause, one.finding ->> 'check', one.finding ->> 'severity',
                    one.finding ->> 'title', one.finding ->> 'what', one.finding ->> 'advice', one.finding -> 'evidence',
                    (one.finding ->> 'since')::timestamptz, moment, moment, moment)
            RETURNING a.* INTO alert;
        END IF;
        kind := CASE
            WHEN agent_private.silence_of(alert) IS NOT NULL THEN NULL
            WHEN alert.told IS NULL THEN 'raised'
            WHEN one.rank > agent_private.severity_rank(alert.told_severity) THEN 'worsened'
            WHEN alert.told = 'resolved' AND alert.opened_at <= moment - cooldown THEN 'reminder'
            WHEN alert.told = 'open' AND alert.reminded_at <= moment - make_interval(secs => reminder_seconds) THEN 'reminder'
        END;
        IF kind IS NOT NULL THEN
            notices := notices || agent_private.tell_alert(alert, kind, sinks, moment);
        END IF;
    END LOOP;
    FOR alert IN
        UPDATE public.agent_alert a SET state = 'resolved', resolved_at = moment
        WHERE a.state = 'open' AND a.reported_by = deployment.own AND a.check_name = ANY (checked) AND a.last_seen_at < moment
        RETURNING a.*
    LOOP
        IF alert.told = 'open' AND agent_private.silence_of(alert) IS NULL THEN
            notices := notices || agent_private.tell_alert(alert, 'resolved', sinks, moment);
        END IF;
    END LOOP;
    DELETE FROM public.agent_alert a WHERE a.state = 'resolved' AND a.resolved_at < moment - interval '90 days';
    PERFORM agent_private.leave(deployment.previous);
    RETURN notices;
END
$$;

-- Take the notice that is due to one of these sinks, for as long as the lease: what was not tried yet first, and of one alert
-- in order. Returns {delivery: {notice_id, sink, attempt, kind, at, alert} or NULL, next_in_seconds: until another one is due,
-- or NULL}. What could not be sent for a day is given up. Leans on agent_alert_delivery_due; passes over what others take.
CREATE FUNCTION public.take_alert_delivery(identity jsonb, sinks text[], lease_seconds double precision DEFAULT 60)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deployment record;
    moment timestamptz := clock_timestamp();
    taken jsonb;
    next_in double precision;
BEGIN
    deployment := agent_private.enter_deployment(agent_private.document(identity));
    UPDATE public.agent_alert_delivery d SET state = 'given_up', error = coalesce(d.error, 'nobody sent it for a day')
    WHERE (d.notice_id, d.sink) IN (
        SELECT e.notice_id, e.sink FROM public.agent_alert_delivery e
        WHERE e.reported_by = deployment.own AND e.state IN ('waiting', 'failed') AND e.next_attempt_at <= moment
          AND e.at < moment - interval '1 day'
        FOR UPDATE SKIP LOCKED);
    WITH due AS (
        SELECT d.notice_id, d.sink FROM public.agent_alert_delivery d
        WHERE d.reported_by = deployment.own AND d.sink = ANY (sinks) AND d.state IN ('waiting', 'failed')
          AND d.next_attempt_at <= moment AND NOT agent_private.has_earlier_delivery(d)
        ORDER BY d.attempts, d.at, d.notice_id LIMIT 1
        FOR UPDATE OF d SKIP LOCKED
    ), leased AS (
        UPDATE public.agent_alert_delivery d
        SET attempts = d.attempts + 1, next_attempt_at = moment + make_interval(secs => lease_seconds)
        FROM due WHERE d.notice_id = due.notice_id AND d.sink = due.sink
        RETURNING d.*
    )
    SELECT jsonb_build_object('notice_id', n.notice_id, 'sink', l.sink, 'attempt', l.attempts, 'kind', n.kind, 'at', n.at,
                              'alert', n.alert) INTO taken
    FROM leased l JOIN public.agent_alert_notice n ON n.notice_id = l.notice_id;
    SELECT extract(epoch FROM min(d.next_attempt_at) - clock_timestamp()) INTO next_in
    FROM public.agent_alert_delivery d
    WHERE d.reported_by = deployment.own AND d.sink = ANY (sinks) AND d.state IN ('waiting', 'failed')
      AND NOT agent_private.has_earlier_delivery(d);
    PERFORM agent_private.leave(deployment.previous);
    RETURN jsonb_build_object('delivery', taken, 'next_in_seconds', CASE WHEN next_in IS NOT NULL THEN greatest(next_in, 0) END);
END
$$;

-- Write down how an attempt to send ended. error: NULL, it was sent. retry_seconds: how long the other side wants to be left
-- alone, at most an hour counts; NULL: it does not say. Tried 12 times, after 5 seconds, then twice as long each time, up to
-- an hour. Returns the state; NULL where somebody else has taken the notice since.
CREATE FUNCTION public.finish_alert_delivery(
    identity jsonb, the_notice_id uuid, sink text, attempt integer, error text, retry_seconds double precision)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deployment record;
    moment timestamptz := clock_timestamp();
    reached text;
BEGIN
    deployment := agent_private.enter_deployment(agent_private.document(identity));
    UPDATE public.agent_alert_delivery d
    SET state = CASE WHEN finish_alert_delivery.error IS NULL THEN 'sent' WHEN d.attempts >= 12 THEN 'given_up' ELSE 'failed' END,
        error = left(finish_alert_delivery.error, 1000),
        sent_at = CASE WHEN finish_alert_delivery.error IS NULL THEN moment END,
        next_attempt_at = moment + make_interval(secs => least(3600, greatest(5 * 2 ^ (least(d.attempts, 12) - 1), retry_seconds)))
    WHERE d.notice_id = the_notice_id AND d.sink = finish_alert_delivery.sink AND d.attempts = finish_alert_delivery.attempt
      AND d.reported_by = deployment.own AND d.state IN ('waiting', 'failed')
    RETURNING d.state INTO reached;
    PERFORM agent_private.leave(deployment.previous);
    RETURN to_jsonb(reached);
END
$$;

-- Alerts of a tenant: open ones first, the gravest first, then the newest. wanted: state, begins (of the id), limit (100, at
-- most 1,000).
CREATE FUNCTION public.list_alerts(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    previous := agent_private.enter(agent_private.document(identity), 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    wanted := agent_private.document(wanted);
    SELECT coalesce(jsonb_agg(agent_private.alert_document(x.alert) ORDER BY x.place), '[]') INTO found
    FROM (SELECT a AS alert,
                 row_number() OVER (ORDER BY a.state, CASE a.state WHEN 'open' THEN -agent_private.severity_rank(a.severity) END,
                                             coalesce(a.resolved_at, a.opened_at) DESC, a.alert_id) AS place
          FROM public.agent_alert a
          WHERE a.tenant_id = current_setting('agent.tenant_id')
            AND (wanted ->> 'state' IS NULL OR a.state = wanted ->> 'state')
            AND (wanted ->> 'begins' IS NULL OR starts_with(a.alert_id::text, wanted ->> 'begins'))
          ORDER BY place LIMIT least(coalesce((wanted ->> 'limit')::integer, 100), 1000)) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- One alert with what was told of it and where, newest first; NULL where this tenant has none of that id.
CREATE FUNCTION public.get_alert(identity jsonb, the_alert_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    previous := agent_private.enter(agent_private.document(identity), 'tenant');
    IF previous IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT agent_private.alert_document(a) || jsonb_build_object(
               'silence', (SELECT to_jsonb(s) FROM public.agent_alert_silence s WHERE s.silence_id = agent_private.silence_of(a)),
               'notices', coalesce((
                   SELECT jsonb_agg(jsonb_build_object(
                              'notice_id', n.notice_id, 'kind', n.kind, 'at', n.at, 'severity', n.alert ->> 'severity',
                              'deliveries', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                                                 'sink', d.sink, 'state', d.state, 'attempts', d.attempts, 'error', d.error,
                                                 'sent_at', d.sent_at) ORDER BY d.sink), '[]')
                                             FROM public.agent_alert_delivery d WHERE d.notice_id = n.notice_id))
                              ORDER BY n.at DESC)
                   FROM (SELECT * FROM public.agent_alert_notice m WHERE m.alert_id = a.alert_id ORDER BY m.at DESC LIMIT 100) AS n),
                   '[]')) INTO found
    FROM public.agent_alert a WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.alert_id = the_alert_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Make a silence: {pattern, seconds, made_by, why}; at most 30 days. Returns it.
CREATE FUNCTION public.silence_alerts(identity jsonb, silence jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    made public.agent_alert_silence;
    seconds double precision;
BEGIN
    previous := agent_private.enter(agent_private.document(identity), 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a silence belongs to a tenant');
    END IF;
    silence := agent_private.document(silence);
    seconds := (silence ->> 'seconds')::double precision;
    IF coalesce(NOT seconds BETWEEN 1 AND 30 * 86400, true) THEN
        PERFORM agent_private.refuse('PT422', 'a silence lasts from 1 second to 30 days');
    END IF;
    INSERT INTO public.agent_alert_silence (tenant_id, pattern, until, made_by, why)
    VALUES (current_setting('agent.tenant_id'), silence ->> 'pattern', clock_timestamp() + make_interval(secs => seconds),
            silence ->> 'made_by', coalesce(silence ->> 'why', ''))
    RETURNING * INTO made;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(made);
END
$$;

-- End a silence before its time. Returns whether it held until now.
CREATE FUNCTION public.end_alert_silence(identity jsonb, the_silence_id uuid, ended_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    ended boolean;
BEGIN
    previous := agent_private.enter(agent_private.document(identity), 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a silence belongs to a tenant');
    END IF;
    UPDATE public.agent_alert_silence s SET ended_at = clock_timestamp(), ended_by = end_alert_silence.ended_by
    WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.silence_id = the_silence_id
      AND s.ended_at IS NULL AND s.until > clock_timestamp();
    ended := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(ended);
END
$$;

-- The silences of a tenant, the 200 newest first; `holds` says whether one is in force.
CREATE FUNCTION public.list_alert_silences(identity jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    previous := agent_private.enter(agent_private.document(identity), 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x) || jsonb_build_object('holds', x.ended_at IS NULL AND x.until > clock_timestamp())
                              ORDER BY x.made_at DESC, x.silence_id), '[]') INTO found
    FROM (SELECT s.* FROM public.agent_alert_silence s WHERE s.tenant_id = current_setting('agent.tenant_id')
          ORDER BY s.made_at DESC, s.silence_id LIMIT 200) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Delete the alerts that name a user: in their cause, as `…=<user>`, or anywhere in their evidence, as a value or a key.
-- Returns how many went; their notices go with them.
CREATE FUNCTION agent_private.erase_alerts(the_tenant text, the_user text)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gone bigint;
    person jsonb := jsonb_build_object('person', the_user);
BEGIN
    DELETE FROM public.agent_alert a
    WHERE a.tenant_id = the_tenant
      AND (strpos(a.cause || ',', '=' || the_user || ',') > 0
           OR jsonb_path_exists(a.evidence, '$.** ? (@ == $person)', person)
           OR jsonb_path_exists(a.evidence, '$.** ? (@.type() == "object").keyvalue() ? (@.key == $person)', person));
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;

-- What erase_user() erases beside memories and runs. Returns the number of rows changed per table.
CREATE OR REPLACE FUNCTION agent_private.erase_elsewhere(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.erase_executions(the_tenant, the_user)
           || jsonb_build_object('agent_alert', agent_private.erase_alerts(the_tenant, the_user),
                                 'agent_tool_call', agent_private.erase_tool_experience(the_tenant, the_user));
$$;

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private' AND p.proname IN (
    'enter_deployment', 'severity_rank', 'silences_over', 'silence_of', 'alert_document', 'tell_alert', 'has_earlier_delivery', 'erase_alerts');

SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.report_findings(jsonb, jsonb, text[], text[], double precision, double precision)',
    'public.take_alert_delivery(jsonb, text[], double precision)',
    'public.finish_alert_delivery(jsonb, uuid, text, integer, text, double precision)',
    'public.list_alerts(jsonb, jsonb)',
    'public.get_alert(jsonb, uuid)',
    'public.silence_alerts(jsonb, jsonb)',
    'public.end_alert_silence(jsonb, uuid, text)',
    'public.list_alert_silences(jsonb)']::regprocedure[]) AS f;

-- ---- schemas/96_server.sql

-- What a server's routes for probes and metrics read.
SET search_path = public, extensions;

-- The part of server_state on migrations and jobs; no more than job_limit jobs are counted. Runs as its owner, because
-- agent_app has no rights on the queue, nor on the table of migrations.
CREATE FUNCTION agent_private.queue_totals(job_limit integer)
RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
        'migrations', (SELECT coalesce(jsonb_agg(m.name ORDER BY m.name), '[]') FROM public.agent_migration m),
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers w WHERE w.last_heartbeat > now() - interval '30 seconds'),
        'jobs', (
            SELECT jsonb_build_object(
                'due', count(*) FILTER (WHERE j.status = 'todo' AND coalesce(j.scheduled_at <= now(), true)),
                'later', count(*) FILTER (WHERE j.status = 'todo' AND j.scheduled_at > now()),
                'running', count(*) FILTER (WHERE j.status = 'doing'),
                'failed', count(*) FILTER (WHERE j.status = 'failed'))
            FROM (SELECT q.status, q.scheduled_at FROM agent_queue.procrastinate_jobs q
                  WHERE q.status IN ('todo', 'doing', 'failed') LIMIT job_limit) AS j),
        'queue_age_seconds', (
            SELECT coalesce(extract(epoch FROM now() - min(j.scheduled_at)), 0)
            FROM agent_queue.procrastinate_jobs j WHERE j.status = 'todo' AND j.scheduled_at <= now()));
$$;
REVOKE ALL ON FUNCTION agent_private.queue_totals(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.queue_totals(integer) TO agent_app;

-- server_state counts over all tenants.
CREATE POLICY of_servers ON public.agent_clock FOR SELECT TO agent_app
    USING ((SELECT current_setting('agent.reach', true)) = 'everywhere');
CREATE POLICY of_servers ON public.agent_tick FOR SELECT TO agent_app
    USING ((SELECT current_setting('agent.reach', true)) = 'everywhere');

-- How this database and the work on it stand, over all tenants, in numbers alone: {migrations, workers, jobs: {due, later,
-- running, failed}, queue_age_seconds, approvals: {risk: {pending, oldest_seconds}}, clocks: {clock: {replicas,
-- age_seconds}}, alerts: {severity: open}}. age_seconds: since the last cycle that was done, for the tenant that waits
-- longest. For servers. Changes nothing; counts no more than job_limit jobs, and finds approvals by
-- human_approval_queue_open and alerts by agent_alert_one_open.
CREATE FUNCTION public.server_state(job_limit integer)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    found jsonb := agent_private.queue_totals(server_state.job_limit);
BEGIN
    found := found || jsonb_build_object('approvals', (
        SELECT coalesce(jsonb_object_agg(waiting.risk, jsonb_build_object('pending', waiting.pending,
                                                                          'oldest_seconds', waiting.oldest_seconds)), '{}')
        FROM (SELECT q.risk, count(*) AS pending, extract(epoch FROM now() - min(q.requested_at)) AS oldest_seconds
              FROM public.human_approval_queue q
              WHERE q.state = 'pending' AND q.expires_at > now() GROUP BY q.risk) AS waiting));
    found := found || jsonb_build_object('alerts', (
        SELECT coalesce(jsonb_object_agg(a.severity, a.open), '{}')
        FROM (SELECT o.severity, count(*) AS open FROM public.agent_alert o WHERE o.state = 'open' GROUP BY o.severity) AS a));
    found := found || jsonb_build_object('clocks', (
        SELECT coalesce(jsonb_object_agg(x.clock, to_jsonb(x) - 'clock'), '{}')
        FROM (SELECT c.clock, sum(c.replicas) AS replicas,
                     extract(epoch FROM now() - min(coalesce(last.finished_at, c.started_at))) AS age_seconds
              FROM (SELECT k.tenant_id, k.clock, count(*) AS replicas, min(k.started_at) AS started_at
                    FROM public.agent_clock k WHERE k.seen_at > now() - interval '1 minute'
                    GROUP BY k.tenant_id, k.clock) AS c
              LEFT JOIN LATERAL (
                  SELECT t.finished_at FROM public.agent_tick t
                  WHERE t.tenant_id = c.tenant_id AND t.clock = c.clock AND t.state = 'done'
                  ORDER BY t.slot DESC LIMIT 1) AS last ON true
              GROUP BY c.clock) AS x));
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;
SELECT agent_private.publish('public.server_state(integer)'::regprocedure, 'server');

-- ---- registration

INSERT INTO public.agent_migration (name, checksum) VALUES ('20250301000000_discovery_and_monitor.sql', NULL) ON CONFLICT DO NOTHING;
DO $$
DECLARE other text;
BEGIN
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
        EXECUTE format('REVOKE ALL ON TABLE public.agent_migration FROM %I', other);
    END LOOP;
END
$$;
RESET search_path;
