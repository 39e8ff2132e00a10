-- Roles, schemas and the identity of a call.
--
-- agent_app     owns the storage functions and nothing else: no login, no bypass of row level security.
--               A storage function runs as it (SECURITY DEFINER owned by agent_app), whoever calls.
-- agent_server  those who may say for whom they act: our own server login and Supabase's service_role.
--               Everybody else is who their JWT says they are.

CREATE TABLE IF NOT EXISTS public.agent_migration (
    name text PRIMARY KEY,
    checksum text,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE public.agent_migration IS 'Which of our migration files this database has seen; checksum is NULL where psql or another tool applied the file.';
ALTER TABLE public.agent_migration ENABLE ROW LEVEL SECURITY;

DO $$
DECLARE
    -- Since Postgres 16 the maker of a role may grant it, but becomes it only once it is granted to them.
    needed text := CASE WHEN current_setting('server_version_num')::integer >= 160000 THEN 'SET' ELSE 'MEMBER' END;
BEGIN
    IF current_setting('server_version_num')::integer < 150000 THEN
        RAISE EXCEPTION 'PostgreSQL 15 or newer is needed, this is %', current_setting('server_version');
    END IF;
    BEGIN
        CREATE ROLE agent_app NOLOGIN NOINHERIT;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- roles belong to the cluster: another database of it made this one
    END;
    BEGIN
        CREATE ROLE agent_server NOLOGIN;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;
    END;
    IF NOT pg_has_role(current_user, 'agent_app', needed) THEN
        EXECUTE format('GRANT agent_app TO %I', current_user);
    END IF;
    IF NOT pg_has_role(current_user, 'agent_server', needed) THEN
        EXECUTE format('GRANT agent_server TO %I', current_user);
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role')
       AND NOT pg_has_role('service_role', 'agent_server', 'MEMBER') THEN
        GRANT agent_server TO service_role;
    END IF;
END
$$;

-- Supabase keeps extensions in a schema of their own; elsewhere they go where the owner's path says.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') THEN
        IF to_regnamespace('extensions') IS NOT NULL THEN
            CREATE EXTENSION vector WITH SCHEMA extensions;
        ELSE
            CREATE EXTENSION vector WITH SCHEMA public;
        END IF;
    END IF;
END
$$;
SET search_path = public, extensions;

CREATE SCHEMA IF NOT EXISTS agent_private;
COMMENT ON SCHEMA agent_private IS 'Parts of the storage functions; nobody calls them from outside, and no API exposes this schema.';
GRANT USAGE ON SCHEMA agent_private TO agent_app;
GRANT USAGE ON SCHEMA public TO agent_app, agent_server;
DO $$
BEGIN
    IF to_regnamespace('extensions') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA extensions TO agent_app;
    END IF;
END
$$;

-- Make a function the property of agent_app and say who may call it.
-- audience: 'private' agent_app alone; 'server' agent_server; 'user' agent_server and holders of a user's JWT.
CREATE OR REPLACE FUNCTION agent_private.publish(target regprocedure, audience text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    home text := (SELECT n.nspname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.oid = target);
    other text;
BEGIN
    IF audience NOT IN ('private', 'server', 'user') THEN
        RAISE EXCEPTION 'audience % is not private, server or user', audience;
    END IF;
    EXECUTE format('GRANT CREATE ON SCHEMA %I TO agent_app', home);
    EXECUTE format('ALTER FUNCTION %s OWNER TO agent_app', target);
    EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM agent_app', home);
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', target);
    -- Supabase grants every new function of schema public to these three by default privileges.
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated', 'service_role') LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %I', target, other);
        IF audience = 'user' AND other = 'authenticated' THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', target, other);
        END IF;
        IF audience <> 'private' AND other = 'service_role' THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', target, other);
        END IF;
    END LOOP;
    IF audience <> 'private' THEN
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO agent_server', target);
    END IF;
END
$$;
REVOKE ALL ON FUNCTION agent_private.publish(regprocedure, text) FROM PUBLIC;

-- Close a table and its sequences to everybody but the storage functions and hold those to row level security.
CREATE OR REPLACE FUNCTION agent_private.guard(target regclass)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    other text;
    sequence regclass;
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', target);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', target);
    EXECUTE format('REVOKE ALL ON TABLE %s FROM PUBLIC', target);
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated', 'service_role') LOOP
        EXECUTE format('REVOKE ALL ON TABLE %s FROM %I', target, other);
    END LOOP;
    -- Supabase grants new sequences of schema public too; an identity column needs no right on its own.
    FOR sequence IN
        SELECT c.oid::regclass FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = target
          AND d.deptype IN ('a', 'i')
    LOOP
        EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM PUBLIC', sequence);
        FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated', 'service_role') LOOP
            EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM %I', sequence, other);
        END LOOP;
    END LOOP;
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE %s TO agent_app', target);
END
$$;
REVOKE ALL ON FUNCTION agent_private.guard(regclass) FROM PUBLIC;

-- A JSON argument as a document: some clients of PostgREST's protocol hand it over as a string that holds it.
CREATE OR REPLACE FUNCTION agent_private.document(argument jsonb)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN jsonb_typeof(argument) = 'string' THEN (argument #>> '{}')::jsonb ELSE argument END;
$$;

-- Take on the identity of a call for the rest of it. Returns what was set before, to be given to leave(), or
-- NULL where there is no tenant or no user: then nothing may be read or written.
-- reach 'user' sees what that user may see; 'tenant' is for operators: all of one tenant, told identities only.
-- A caller outside agent_server is whom the claims of the JWT name, whatever the argument says, and no agent: their
-- reach is set as 'claims'.
CREATE OR REPLACE FUNCTION agent_private.enter(identity jsonb, reach text DEFAULT 'user')
RETURNS text[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    caller text := coalesce(nullif(current_setting('role', true), 'none'), session_user);
    claims jsonb := nullif(current_setting('request.jwt.claims', true), '')::jsonb;
    tenant text;
    person text;
    previous text[] := ARRAY[
        coalesce(current_setting('agent.tenant_id', true), ''),
        coalesce(current_setting('agent.user_id', true), ''),
        coalesce(current_setting('agent.agent_id', true), ''),
        coalesce(current_setting('agent.reach', true), '')
    ];
BEGIN
    IF pg_has_role(caller, 'agent_server', 'MEMBER')
       AND coalesce(claims ->> 'role', 'service_role') NOT IN ('anon', 'authenticated') THEN
        tenant := nullif(identity ->> 'tenant_id', '');
        person := nullif(identity ->> 'user_id', '');
    ELSE
        IF reach <> 'user' THEN
            RAISE EXCEPTION 'only a server may act for a whole tenant' USING ERRCODE = 'insufficient_privilege';
        END IF;
        tenant := coalesce(nullif(claims #>> '{app_metadata,tenant_id}', ''), 'default');
        person := nullif(claims ->> 'sub', '');
        reach := 'claims';
        identity := NULL;
    END IF;
    IF tenant IS NULL OR (person IS NULL AND reach <> 'tenant') THEN
        RETURN NULL;
    END IF;
    PERFORM set_config('agent.tenant_id', tenant, true),
            set_config('agent.user_id', coalesce(person, ''), true),
            set_config('agent.agent_id', coalesce(identity ->> 'agent_id', ''), true),
            set_config('agent.reach', reach, true);
    RETURN previous;
END
$$;

-- Put back what was set before enter(). An error needs no leave(): the rollback restores the settings.
CREATE OR REPLACE FUNCTION agent_private.leave(previous text[])
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT set_config('agent.tenant_id', previous[1], true),
           set_config('agent.user_id', previous[2], true),
           set_config('agent.agent_id', previous[3], true),
           set_config('agent.reach', previous[4], true);
$$;

-- The errors that Python tells apart by their code. Codes that begin with PT are an HTTP status to PostgREST, and Supabase's
-- interfaces hand them on as they are.
CREATE OR REPLACE FUNCTION agent_private.refuse(code text, message text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- PT403 nobody; PT409 changed meanwhile; PT404 not found; PT422 invalid
    RAISE EXCEPTION '%', message USING ERRCODE = code;
END
$$;

-- What we need of pgvector, wherever it is installed: storage functions look for names in pg_catalog alone, so that
-- nobody who may create things in another schema puts theirs in the place of ours. Without a search_path of their
-- own, so that the planner puts their expression in the place of the call; they are read here, once, and name everything.
DO $$
DECLARE
    home text := (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector');
BEGIN
    EXECUTE format($function$
-- A vector from its text, '[…]'.
CREATE FUNCTION agent_private.as_vector(digits text)
RETURNS %1$I.vector
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN digits::%1$I.vector
    $function$, home);
    EXECUTE format($function$
-- A vector of length 1 in the same direction, in half precision; zeros stay zeros.
CREATE FUNCTION agent_private.unit_vector(one %1$I.vector)
RETURNS %1$I.halfvec
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN %1$I.l2_normalize(one)::%1$I.halfvec
    $function$, home);
    EXECUTE format($function$
-- How far two vectors of length 1 point apart: from -1, the same direction, to 1; 0 where one is of zeros.
CREATE FUNCTION agent_private.divergence(one %1$I.halfvec, other %1$I.halfvec)
RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN one OPERATOR(%1$I.<#>) other
    $function$, home);
    EXECUTE format($function$
-- The signs of the first 4096 numbers of a vector, a bit each.
CREATE FUNCTION agent_private.sign_code(one %1$I.halfvec)
RETURNS bit varying
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN %1$I.binary_quantize(%1$I.subvector(one, 1, 4096))
    $function$, home);
    EXECUTE format($function$
-- In how many bits two codes of one length differ.
CREATE FUNCTION agent_private.code_distance(one bit varying, other bit varying)
RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN one OPERATOR(%1$I.<~>) other
    $function$, home);
    EXECUTE format($function$
-- How many numbers a vector has.
CREATE FUNCTION agent_private.vector_dimensions(one %1$I.vector)
RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN %1$I.vector_dims(one)
    $function$, home);
END
$$;
