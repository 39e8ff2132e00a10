-- The learning layer, from nothing. Made from supabase/schemas/ by supabase/build_migrations.sh.

-- ---- schemas/00_foundation.sql

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

-- ---- schemas/05_queue.sql

-- The job queue: the schema of procrastinate 3.10 (MIT licence, https://procrastinate.readthedocs.io), unchanged, in a
-- schema of its own that no API exposes. A test compares it with the installed package.

CREATE SCHEMA IF NOT EXISTS agent_queue;
COMMENT ON SCHEMA agent_queue IS 'The queue of the workers (procrastinate).';
SET search_path = agent_queue, pg_catalog;

-- Procrastinate Schema

DO $$
BEGIN
    CREATE EXTENSION IF NOT EXISTS plpgsql WITH SCHEMA pg_catalog;
EXCEPTION
    WHEN OTHERS THEN
        -- On managed PostgreSQL services (e.g. Azure Database for PostgreSQL, Amazon RDS,
        -- Google Cloud SQL), CREATE EXTENSION may fail with various error codes:
        -- insufficient_privilege, feature_not_supported, or provider-specific errors.
        -- Before ignoring, verify the extension actually exists — if it does not exist
        -- and cannot be created, re-raise so the failure is explicit.
        IF EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'plpgsql') THEN
            RAISE NOTICE 'plpgsql extension already exists, skipping creation.';
        ELSE
            RAISE;
        END IF;
END;
$$;

-- Enums

CREATE TYPE procrastinate_job_status AS ENUM (
    'todo',  -- The job is queued
    'doing',  -- The job has been fetched by a worker
    'succeeded',  -- The job ended successfully
    'failed',  -- The job ended with an error
    'cancelled', -- The job was cancelled
    'aborting',  -- legacy, not used anymore since v3.0.0
    'aborted'  -- The job was aborted
);

CREATE TYPE procrastinate_job_event_type AS ENUM (
    'deferred',  -- Job created, in todo
    'started',  -- todo -> doing
    'deferred_for_retry',  -- doing -> todo
    'failed',  -- doing -> failed
    'succeeded',  -- doing -> succeeded
    'cancelled', -- todo -> cancelled
    'abort_requested', -- not a state transition, but set in a separate field
    'aborted', -- doing -> aborted (only allowed when abort_requested field is set)
    'scheduled', -- not a state transition, but recording when a task is scheduled for
    'retried' -- Manually retried failed job
);

-- Composite Types

CREATE TYPE procrastinate_job_to_defer_v1 AS (
    queue_name character varying,
    task_name character varying,
    priority integer,
    lock text,
    queueing_lock text,
    args jsonb,
    scheduled_at timestamp with time zone
);

-- Tables

CREATE TABLE procrastinate_workers(
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    last_heartbeat timestamp with time zone NOT NULL DEFAULT NOW()
);

CREATE TABLE procrastinate_jobs (
    id bigserial PRIMARY KEY,
    queue_name character varying(128) NOT NULL,
    task_name character varying(128) NOT NULL,
    priority integer DEFAULT 0 NOT NULL,
    lock text,
    queueing_lock text,
    args jsonb DEFAULT '{}' NOT NULL,
    status procrastinate_job_status DEFAULT 'todo'::procrastinate_job_status NOT NULL,
    scheduled_at timestamp with time zone NULL,
    attempts integer DEFAULT 0 NOT NULL,
    abort_requested boolean DEFAULT false NOT NULL,
    worker_id bigint REFERENCES procrastinate_workers(id) ON DELETE SET NULL,
    CONSTRAINT check_not_todo_abort_requested CHECK (NOT (status = 'todo' AND abort_requested = true))
);

CREATE TABLE procrastinate_periodic_defers (
    id bigserial PRIMARY KEY,
    task_name character varying(128) NOT NULL,
    defer_timestamp bigint,
    job_id bigint REFERENCES procrastinate_jobs(id) NULL,
    periodic_id character varying(128) NOT NULL DEFAULT '',
    CONSTRAINT procrastinate_periodic_defers_unique UNIQUE (task_name, periodic_id, defer_timestamp)
);

CREATE TABLE procrastinate_events (
    id bigserial PRIMARY KEY,
    job_id bigint NOT NULL REFERENCES procrastinate_jobs ON DELETE CASCADE,
    type procrastinate_job_event_type,
    at timestamp with time zone DEFAULT NOW() NULL
);

-- Constraints & Indices

-- this prevents from having several jobs with the same queueing lock in the "todo" state
CREATE UNIQUE INDEX procrastinate_jobs_queueing_lock_idx_v1 ON procrastinate_jobs (queueing_lock) WHERE status = 'todo';
-- this prevents from having several jobs with the same lock in the "doing" state
CREATE UNIQUE INDEX procrastinate_jobs_lock_idx_v1 ON procrastinate_jobs (lock) WHERE status = 'doing';

-- Index for select_stalled_jobs_by_heartbeat query
CREATE INDEX idx_procrastinate_jobs_worker_not_null ON procrastinate_jobs(worker_id) WHERE worker_id IS NOT NULL AND status = 'doing'::procrastinate_job_status;

CREATE INDEX procrastinate_jobs_queue_name_idx_v1 ON procrastinate_jobs(queue_name);
CREATE INDEX procrastinate_jobs_id_lock_idx_v1 ON procrastinate_jobs (id, lock) WHERE status = ANY (ARRAY['todo'::procrastinate_job_status, 'doing'::procrastinate_job_status]);
CREATE INDEX procrastinate_jobs_priority_idx_v1 ON procrastinate_jobs(priority desc, id asc) WHERE (status = 'todo'::procrastinate_job_status);

CREATE INDEX procrastinate_events_job_id_fkey_v1 ON procrastinate_events(job_id);

CREATE INDEX procrastinate_periodic_defers_job_id_fkey_v1 ON procrastinate_periodic_defers(job_id);

CREATE INDEX idx_procrastinate_workers_last_heartbeat ON procrastinate_workers(last_heartbeat);

-- Functions
CREATE FUNCTION procrastinate_defer_jobs_v1(
    jobs procrastinate_job_to_defer_v1[]
)
    RETURNS bigint[]
    LANGUAGE plpgsql
AS $$
DECLARE
    job_ids bigint[];
BEGIN
    WITH inserted_jobs AS (
        INSERT INTO procrastinate_jobs (queue_name, task_name, priority, lock, queueing_lock, args, scheduled_at)
        SELECT (job).queue_name,
               (job).task_name,
               (job).priority,
               (job).lock,
               (job).queueing_lock,
               (job).args,
               (job).scheduled_at
        FROM unnest(jobs) AS job
        RETURNING id
    )
    SELECT array_agg(id) FROM inserted_jobs INTO job_ids;

    RETURN job_ids;
END;
$$;

CREATE FUNCTION procrastinate_defer_periodic_job_v2(
    _queue_name character varying,
    _lock character varying,
    _queueing_lock character varying,
    _task_name character varying,
    _priority integer,
    _periodic_id character varying,
    _defer_timestamp bigint,
    _args jsonb
)
    RETURNS bigint
    LANGUAGE plpgsql
AS $$
DECLARE
	_job_id bigint;
	_defer_id bigint;
BEGIN
    INSERT
        INTO procrastinate_periodic_defers (task_name, periodic_id, defer_timestamp)
        VALUES (_task_name, _periodic_id, _defer_timestamp)
        ON CONFLICT DO NOTHING
        RETURNING id into _defer_id;

    IF _defer_id IS NULL THEN
        RETURN NULL;
    END IF;

    UPDATE procrastinate_periodic_defers
        SET job_id = (
            SELECT COALESCE((
                SELECT unnest(procrastinate_defer_jobs_v1(
                    ARRAY[
                        ROW(
                            _queue_name,
                            _task_name,
                            _priority,
                            _lock,
                            _queueing_lock,
                            _args,
                            NULL::timestamptz
                        )
                    ]::procrastinate_job_to_defer_v1[]
                ))
            ), NULL)
        )
        WHERE id = _defer_id
        RETURNING job_id INTO _job_id;

    DELETE
        FROM procrastinate_periodic_defers
        USING (
            SELECT id
            FROM procrastinate_periodic_defers
            WHERE procrastinate_periodic_defers.task_name = _task_name
            AND procrastinate_periodic_defers.periodic_id = _periodic_id
            AND procrastinate_periodic_defers.defer_timestamp < _defer_timestamp
            ORDER BY id
            FOR UPDATE
        ) to_delete
        WHERE procrastinate_periodic_defers.id = to_delete.id;

    RETURN _job_id;
END;
$$;

CREATE FUNCTION procrastinate_fetch_job_v2(
    target_queue_names character varying[],
    p_worker_id bigint
)
    RETURNS procrastinate_jobs
    LANGUAGE plpgsql
AS $$
DECLARE
	found_jobs procrastinate_jobs;
BEGIN
    WITH candidate AS (
        SELECT jobs.*
            FROM procrastinate_jobs AS jobs
            WHERE
                -- reject the job if its lock has earlier or higher priority jobs
                NOT EXISTS (
                    SELECT 1
                        FROM procrastinate_jobs AS other_jobs
                        WHERE
                            jobs.lock IS NOT NULL
                            AND other_jobs.lock = jobs.lock
                            AND (
                                -- job with same lock is already running
                                other_jobs.status = 'doing'
                                OR
                                -- job with same lock is waiting and has higher priority (or same priority but was queued first)
                                (
                                    other_jobs.status = 'todo'
                                    AND (
                                        other_jobs.priority > jobs.priority
                                        OR (
                                        other_jobs.priority = jobs.priority
                                        AND other_jobs.id < jobs.id
                                        )
                                    )
                                )
                            )
                )
                AND jobs.status = 'todo'
                AND (target_queue_names IS NULL OR jobs.queue_name = ANY( target_queue_names ))
                AND (jobs.scheduled_at IS NULL OR jobs.scheduled_at <= now())
            ORDER BY jobs.priority DESC, jobs.id ASC LIMIT 1
            FOR UPDATE OF jobs SKIP LOCKED
    )
    UPDATE procrastinate_jobs
        SET status = 'doing', worker_id = p_worker_id
        FROM candidate
        WHERE procrastinate_jobs.id = candidate.id
        RETURNING procrastinate_jobs.* INTO found_jobs;

 RETURN found_jobs;
END;
$$;

CREATE FUNCTION procrastinate_finish_job_v1(job_id bigint, end_status procrastinate_job_status, delete_job boolean)
    RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    _job_id bigint;
BEGIN
    IF end_status NOT IN ('succeeded', 'failed', 'aborted') THEN
        RAISE 'End status should be either "succeeded", "failed" or "aborted" (job id: %)', job_id;
    END IF;
    IF delete_job THEN
        DELETE FROM procrastinate_jobs
        WHERE id = job_id AND status IN ('todo', 'doing')
        RETURNING id INTO _job_id;
    ELSE
        UPDATE procrastinate_jobs
        SET status = end_status,
            abort_requested = false,
            attempts = CASE status
                WHEN 'doing' THEN attempts + 1 ELSE attempts
            END
        WHERE id = job_id AND status IN ('todo', 'doing')
        RETURNING id INTO _job_id;
    END IF;
    IF _job_id IS NULL THEN
        RAISE 'Job was not found or not in "doing" or "todo" status (job id: %)', job_id;
    END IF;
END;
$$;

CREATE FUNCTION procrastinate_cancel_job_v1(job_id bigint, abort boolean, delete_job boolean)
    RETURNS bigint
    LANGUAGE plpgsql
AS $$
DECLARE
    _job_id bigint;
BEGIN
    IF delete_job THEN
        DELETE FROM procrastinate_jobs
        WHERE id = job_id AND status = 'todo'
        RETURNING id INTO _job_id;
    END IF;
    IF _job_id IS NULL THEN
        IF abort THEN
            UPDATE procrastinate_jobs
            SET abort_requested = true,
                status = CASE status
                    WHEN 'todo' THEN 'cancelled'::procrastinate_job_status ELSE status
                END
            WHERE id = job_id AND status IN ('todo', 'doing')
            RETURNING id INTO _job_id;
        ELSE
            UPDATE procrastinate_jobs
            SET status = 'cancelled'::procrastinate_job_status
            WHERE id = job_id AND status = 'todo'
            RETURNING id INTO _job_id;
        END IF;
    END IF;
    RETURN _job_id;
END;
$$;

CREATE FUNCTION procrastinate_retry_job_v1(
    job_id bigint,
    retry_at timestamp with time zone,
    new_priority integer,
    new_queue_name character varying,
    new_lock character varying
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    _job_id bigint;
    _abort_requested boolean;
BEGIN
    SELECT abort_requested FROM procrastinate_jobs
    WHERE id = job_id AND status = 'doing'
    FOR UPDATE
    INTO _abort_requested;
    IF _abort_requested THEN
        UPDATE procrastinate_jobs
        SET status = 'failed'::procrastinate_job_status
        WHERE id = job_id AND status = 'doing'
        RETURNING id INTO _job_id;
    ELSE
        UPDATE procrastinate_jobs
        SET status = 'todo'::procrastinate_job_status,
            attempts = attempts + 1,
            scheduled_at = retry_at,
            priority = COALESCE(new_priority, priority),
            queue_name = COALESCE(new_queue_name, queue_name),
            lock = COALESCE(new_lock, lock)
        WHERE id = job_id AND status = 'doing'
        RETURNING id INTO _job_id;
    END IF;

    IF _job_id IS NULL THEN
        RAISE 'Job was not found or not in "doing" status (job id: %)', job_id;
    END IF;
END;
$$;

CREATE FUNCTION procrastinate_retry_job_v2(
    job_id bigint,
    retry_at timestamp with time zone,
    new_priority integer,
    new_queue_name character varying,
    new_lock character varying
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    _job_id bigint;
    _abort_requested boolean;
    _current_status procrastinate_job_status;
BEGIN
    SELECT status, abort_requested FROM procrastinate_jobs
    WHERE id = job_id AND status IN ('doing', 'failed')
    FOR UPDATE
    INTO _current_status, _abort_requested;
    IF _current_status = 'doing' AND _abort_requested THEN
        UPDATE procrastinate_jobs
        SET status = 'failed'::procrastinate_job_status
        WHERE id = job_id AND status = 'doing'
        RETURNING id INTO _job_id;
    ELSE
        UPDATE procrastinate_jobs
        SET status = 'todo'::procrastinate_job_status,
            attempts = attempts + 1,
            scheduled_at = retry_at,
            priority = COALESCE(new_priority, priority),
            queue_name = COALESCE(new_queue_name, queue_name),
            lock = COALESCE(new_lock, lock)
        WHERE id = job_id AND status IN ('doing', 'failed')
        RETURNING id INTO _job_id;
    END IF;

    IF _job_id IS NULL THEN
        RAISE 'Job was not found or has an invalid status to retry (job id: %)', job_id;
    END IF;

END;
$$;

CREATE FUNCTION procrastinate_notify_queue_job_inserted_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
DECLARE
    payload TEXT;
BEGIN
    SELECT json_build_object('type', 'job_inserted', 'job_id', NEW.id)::text INTO payload;
	PERFORM pg_notify('procrastinate_queue_v1#' || NEW.queue_name, payload);
	PERFORM pg_notify('procrastinate_any_queue_v1', payload);
	RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_notify_queue_abort_job_v1()
RETURNS trigger
    LANGUAGE plpgsql
AS $$
DECLARE
    payload TEXT;
BEGIN
    SELECT json_build_object('type', 'abort_job_requested', 'job_id', NEW.id)::text INTO payload;
	PERFORM pg_notify('procrastinate_queue_v1#' || NEW.queue_name, payload);
	PERFORM pg_notify('procrastinate_any_queue_v1', payload);
	RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_trigger_function_status_events_insert_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO procrastinate_events(job_id, type)
        VALUES (NEW.id, 'deferred'::procrastinate_job_event_type);
	RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_trigger_function_status_events_update_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    WITH t AS (
        SELECT CASE
            WHEN OLD.status = 'todo'::procrastinate_job_status
                AND NEW.status = 'doing'::procrastinate_job_status
                THEN 'started'::procrastinate_job_event_type
            WHEN OLD.status = 'doing'::procrastinate_job_status
                AND NEW.status = 'todo'::procrastinate_job_status
                THEN 'deferred_for_retry'::procrastinate_job_event_type
            WHEN OLD.status = 'doing'::procrastinate_job_status
                AND NEW.status = 'failed'::procrastinate_job_status
                THEN 'failed'::procrastinate_job_event_type
            WHEN OLD.status = 'doing'::procrastinate_job_status
                AND NEW.status = 'succeeded'::procrastinate_job_status
                THEN 'succeeded'::procrastinate_job_event_type
            WHEN OLD.status = 'todo'::procrastinate_job_status
                AND (
                    NEW.status = 'cancelled'::procrastinate_job_status
                    OR NEW.status = 'failed'::procrastinate_job_status
                    OR NEW.status = 'succeeded'::procrastinate_job_status
                )
                THEN 'cancelled'::procrastinate_job_event_type
            WHEN OLD.status = 'doing'::procrastinate_job_status
                AND NEW.status = 'aborted'::procrastinate_job_status
                THEN 'aborted'::procrastinate_job_event_type
            WHEN OLD.status = 'failed'::procrastinate_job_status
                AND NEW.status = 'todo'::procrastinate_job_status
                THEN 'retried'::procrastinate_job_event_type
            ELSE NULL
        END as event_type
    )
    INSERT INTO procrastinate_events(job_id, type)
        SELECT NEW.id, t.event_type
        FROM t
        WHERE t.event_type IS NOT NULL;
	RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_trigger_function_scheduled_events_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO procrastinate_events(job_id, type, at)
        VALUES (NEW.id, 'scheduled'::procrastinate_job_event_type, NEW.scheduled_at);

	RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_trigger_abort_requested_events_procedure_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO procrastinate_events(job_id, type)
        VALUES (NEW.id, 'abort_requested'::procrastinate_job_event_type);
    RETURN NEW;
END;
$$;

CREATE FUNCTION procrastinate_unlink_periodic_defers_v1()
    RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    UPDATE procrastinate_periodic_defers
    SET job_id = NULL
    WHERE job_id = OLD.id;
    RETURN OLD;
END;
$$;

CREATE FUNCTION procrastinate_register_worker_v1()
    RETURNS TABLE(worker_id bigint)
    LANGUAGE plpgsql
AS $$
BEGIN
    RETURN QUERY
    INSERT INTO procrastinate_workers DEFAULT VALUES
    RETURNING procrastinate_workers.id;
END;
$$;

CREATE FUNCTION procrastinate_unregister_worker_v1(worker_id bigint)
    RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    DELETE FROM procrastinate_workers
    WHERE id = worker_id;
END;
$$;

CREATE FUNCTION procrastinate_update_heartbeat_v1(worker_id bigint)
    RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    UPDATE procrastinate_workers
    SET last_heartbeat = NOW()
    WHERE id = worker_id;
END;
$$;

CREATE FUNCTION procrastinate_prune_stalled_workers_v1(seconds_since_heartbeat float)
    RETURNS TABLE(worker_id bigint)
    LANGUAGE plpgsql
AS $$
BEGIN
    RETURN QUERY
    DELETE FROM procrastinate_workers
    WHERE last_heartbeat < NOW() - (seconds_since_heartbeat || 'SECOND')::INTERVAL
    RETURNING procrastinate_workers.id;
END;
$$;

-- Triggers

CREATE TRIGGER procrastinate_jobs_notify_queue_job_inserted_v1
    AFTER INSERT ON procrastinate_jobs
    FOR EACH ROW WHEN ((new.status = 'todo'::procrastinate_job_status))
    EXECUTE PROCEDURE procrastinate_notify_queue_job_inserted_v1();

CREATE TRIGGER procrastinate_jobs_notify_queue_job_aborted_v1
    AFTER UPDATE OF abort_requested ON procrastinate_jobs
    FOR EACH ROW WHEN ((old.abort_requested = false AND new.abort_requested = true AND new.status = 'doing'::procrastinate_job_status))
    EXECUTE PROCEDURE procrastinate_notify_queue_abort_job_v1();

CREATE TRIGGER procrastinate_trigger_status_events_update_v1
    AFTER UPDATE OF status ON procrastinate_jobs
    FOR EACH ROW
    EXECUTE PROCEDURE procrastinate_trigger_function_status_events_update_v1();

CREATE TRIGGER procrastinate_trigger_status_events_insert_v1
    AFTER INSERT ON procrastinate_jobs
    FOR EACH ROW WHEN ((new.status = 'todo'::procrastinate_job_status))
    EXECUTE PROCEDURE procrastinate_trigger_function_status_events_insert_v1();

CREATE TRIGGER procrastinate_trigger_scheduled_events_v1
    AFTER UPDATE OR INSERT ON procrastinate_jobs
    FOR EACH ROW WHEN ((new.scheduled_at IS NOT NULL AND new.status = 'todo'::procrastinate_job_status))
    EXECUTE PROCEDURE procrastinate_trigger_function_scheduled_events_v1();

CREATE TRIGGER procrastinate_trigger_abort_requested_events_v1
    AFTER UPDATE OF abort_requested ON procrastinate_jobs
    FOR EACH ROW WHEN ((new.abort_requested = true))
    EXECUTE PROCEDURE procrastinate_trigger_abort_requested_events_procedure_v1();

CREATE TRIGGER procrastinate_trigger_delete_jobs_v1
    BEFORE DELETE ON procrastinate_jobs
    FOR EACH ROW EXECUTE PROCEDURE procrastinate_unlink_periodic_defers_v1();

SET search_path = public, extensions;

-- Workers log in as servers; no API role sees the queue.
GRANT USAGE ON SCHEMA agent_queue TO agent_server;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA agent_queue TO agent_server;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA agent_queue TO agent_server;
-- One job of ours per learned session is deleted when done; the rest of the table stays small, so look often.
ALTER TABLE agent_queue.procrastinate_jobs SET (autovacuum_vacuum_scale_factor = 0.05);

-- ---- schemas/10_memory.sql

-- Memories: one row per version, its evidence, its words, its vectors.

CREATE TABLE public.agent_memory (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    memory_id uuid NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    memory_number bigint GENERATED ALWAYS AS IDENTITY,
    store text NOT NULL CHECK (store <> ''),
    kind text NOT NULL DEFAULT '',
    scope text NOT NULL DEFAULT 'user' CHECK (scope IN ('user', 'agent', 'tenant')),
    owner_id text NOT NULL,
    session_id text,
    field text,
    content text NOT NULL CHECK (length(content) BETWEEN 1 AND 20000),
    content_hash bytea NOT NULL,
    tags text[] NOT NULL DEFAULT '{}',
    turn integer,
    speaker text,
    value jsonb,
    trust text NOT NULL CHECK (trust IN ('user', 'tool', 'model', 'external')),
    valid_from timestamptz NOT NULL DEFAULT now(),
    valid_to timestamptz,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    superseded_at timestamptz,
    superseded_reason text,
    source text NOT NULL DEFAULT 'extraction',
    run_id text,
    PRIMARY KEY (tenant_id, memory_id, version),
    CONSTRAINT agent_memory_tags CHECK (cardinality(tags) <= 32 AND array_position(tags, NULL) IS NULL),
    CONSTRAINT agent_memory_turn CHECK ((turn IS NOT NULL) = (store = 'conversation')
                                        AND (turn IS NULL OR (turn BETWEEN 1 AND 1048575 AND session_id IS NOT NULL AND field IS NULL))),
    CONSTRAINT agent_memory_speaker CHECK (length(speaker) BETWEEN 1 AND 200),
    CONSTRAINT agent_memory_owner CHECK ((scope = 'tenant') = (owner_id = '')),
    CONSTRAINT agent_memory_valid_period CHECK (valid_to IS NULL OR valid_to >= valid_from),
    CONSTRAINT agent_memory_superseded_after_recorded CHECK (superseded_at IS NULL OR superseded_at >= recorded_at),
    CONSTRAINT agent_memory_superseded_has_reason CHECK ((superseded_at IS NULL) = (superseded_reason IS NULL))
);
COMMENT ON TABLE public.agent_memory IS 'What the agents know. A change is a new version; the old one keeps its row with superseded_at set.';
COMMENT ON COLUMN public.agent_memory.memory_id IS 'Stays the same over all versions of one memory.';
COMMENT ON COLUMN public.agent_memory.memory_number IS 'Order of recording, unique over all tenants; joins words and vectors to a version.';
COMMENT ON COLUMN public.agent_memory.owner_id IS 'User id for scope user, agent id for scope agent, empty for scope tenant.';
COMMENT ON COLUMN public.agent_memory.field IS 'Profile or session field; NULL for memories that are no fields.';
COMMENT ON COLUMN public.agent_memory.content IS 'The text that is searched and rendered.';
COMMENT ON COLUMN public.agent_memory.tags IS 'At most 32 words of the user''s own to filter by, of at most 100 characters.';
COMMENT ON COLUMN public.agent_memory.turn IS 'Place of a message in its session, from 1; NULL for what is no turn of a conversation.';
COMMENT ON COLUMN public.agent_memory.speaker IS 'Name of who said it; NULL where it was not said by somebody named.';
COMMENT ON COLUMN public.agent_memory.value IS 'The typed value of a field.';
COMMENT ON COLUMN public.agent_memory.valid_from IS 'Since when it is true in the world; recorded_at is since when we believe it.';

-- One current version of a memory, one current answer per field, one current memory per text and per turn.
CREATE UNIQUE INDEX agent_memory_one_current ON public.agent_memory (tenant_id, memory_id)
    WHERE superseded_at IS NULL;
CREATE UNIQUE INDEX agent_memory_one_answer_per_field
    ON public.agent_memory (tenant_id, scope, owner_id, store, coalesce(session_id, ''), field)
    WHERE superseded_at IS NULL AND field IS NOT NULL;
CREATE UNIQUE INDEX agent_memory_no_duplicate_text
    ON public.agent_memory (tenant_id, scope, owner_id, store, content_hash)
    WHERE superseded_at IS NULL AND field IS NULL;
CREATE UNIQUE INDEX agent_memory_one_per_turn ON public.agent_memory (tenant_id, scope, owner_id, session_id, turn)
    WHERE superseded_at IS NULL AND turn IS NOT NULL;
-- Newest first within a scope.
CREATE INDEX agent_memory_by_scope ON public.agent_memory (tenant_id, scope, owner_id, store, memory_number DESC)
    WHERE superseded_at IS NULL;
-- History of an owner, in the order of recording.
CREATE INDEX agent_memory_past ON public.agent_memory (tenant_id, scope, owner_id, memory_number)
    WHERE superseded_at IS NOT NULL;
CREATE UNIQUE INDEX agent_memory_by_number ON public.agent_memory (memory_number);

CREATE TABLE public.agent_memory_evidence (
    tenant_id text NOT NULL,
    memory_id uuid NOT NULL,
    version integer NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    run_id text NOT NULL,
    message_id text NOT NULL DEFAULT '',
    tool_call_id text NOT NULL DEFAULT '',
    quote text NOT NULL DEFAULT '' CHECK (length(quote) <= 1000),
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, memory_id, version, run_id, message_id, tool_call_id),
    FOREIGN KEY (tenant_id, memory_id, version) REFERENCES public.agent_memory ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_memory_evidence IS 'Which messages or tool calls of which runs a memory was learned from.';
CREATE INDEX agent_memory_evidence_by_run ON public.agent_memory_evidence (tenant_id, run_id);

CREATE TABLE public.agent_scope (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    version bigint NOT NULL DEFAULT 0,
    memory_count integer NOT NULL DEFAULT 0,
    word_count bigint NOT NULL DEFAULT 0,
    languages text[] NOT NULL DEFAULT '{}',
    reindexing text,
    reindexed_to bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, scope, owner_id)
);
COMMENT ON TABLE public.agent_scope IS 'One row per owner: its version rises with every write, so that learning can tell whether what it read is still so; its counts are those of the searchable memories.';
COMMENT ON COLUMN public.agent_scope.languages IS 'The languages that its words are in: more than one while a change is under way.';
COMMENT ON COLUMN public.agent_scope.reindexing IS 'To which language its words are being changed, up to the memory of number reindexed_to.';

-- Let storage functions see of a table with tenant_id, scope and owner_id what the identity may see. The settings are read
-- once per query, not once per row.
CREATE FUNCTION agent_private.own_scope(target regclass)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format($policy$
        CREATE POLICY own_scope ON %s TO agent_app
        USING (
            tenant_id = (SELECT current_setting('agent.tenant_id', true))
            AND (
                (scope = 'user' AND owner_id = (SELECT current_setting('agent.user_id', true)))
                OR (scope = 'agent' AND owner_id = (SELECT current_setting('agent.agent_id', true)))
                OR scope = 'tenant'
                OR (SELECT current_setting('agent.reach', true)) = 'tenant'
            )
        )
    $policy$, target);
END
$$;
REVOKE ALL ON FUNCTION agent_private.own_scope(regclass) FROM PUBLIC;

SELECT agent_private.guard(t), agent_private.own_scope(t) FROM unnest(ARRAY[
    'public.agent_memory', 'public.agent_memory_evidence', 'public.agent_scope']::regclass[]) AS t;

-- A text in Unicode's form NFKC, a thousand characters at a time: Postgres takes as long as the square of a run of accents.
CREATE FUNCTION agent_private.composed(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(content) = length(content) THEN content
                WHEN length(content) <= 1000 THEN normalize(content, NFKC)
                ELSE (SELECT string_agg(normalize(substr(content, s.at, 1000), NFKC), '' ORDER BY s.at)
                      FROM generate_series(1, length(content), 1000) AS s (at)) END;
$$;

-- A text as it is compared: upper and lower case and white space do not count. Empty for white space alone.
CREATE FUNCTION agent_private.plain_text(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT btrim(regexp_replace(lower(agent_private.composed(content)), '\s+', ' ', 'g'));
$$;

-- Equal texts have equal hashes; final stops do not count either, unless there is nothing else. Equal messages of a
-- conversation stay apart: there the session and the turn count too.
CREATE FUNCTION agent_private.content_hash(content text, session_id text DEFAULT NULL, turn integer DEFAULT NULL)
RETURNS bytea
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sha256(convert_to(coalesce(nullif(rtrim(p.plain, ' .!'), ''), p.plain)
                             || CASE WHEN turn IS NULL THEN '' ELSE format(E'\n%s\n%s', turn, session_id) END, 'UTF8'))
    FROM (SELECT agent_private.plain_text(content)) AS p (plain);
$$;

-- Where a turn stands among all turns: neighbours of one conversation differ by 1, and a session is place >> 20. NULL
-- for what is no turn. 42 bits of the session's hash and 20 of the turn. Without a search_path of its own, so that the
-- planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.place_of(session_id text, turn integer)
RETURNS bigint
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN turn IS NOT NULL THEN
    (('x' || left(encode(sha256(convert_to(session_id, 'UTF8')), 'hex'), 16))::bit(64) >> 22)::bigint << 20 | turn END;

-- The stores whose memories are searched by their words.
CREATE FUNCTION agent_private.is_searched(store text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT store IN ('user_memory', 'application', 'conversation');
$$;

-- The text of a memory as it is searched: a turn is found by its speaker's name too.
CREATE FUNCTION agent_private.searched_text(memory public.agent_memory)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(memory.speaker || ': ', '') || memory.content;
$$;

-- The tags of a learning, sorted, each once; PT422 where they are none.
CREATE FUNCTION agent_private.tags_of(learning jsonb)
RETURNS text[]
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    told jsonb := coalesce(nullif(learning -> 'tags', 'null'), '[]');
BEGIN
    IF jsonb_typeof(told) <> 'array' OR jsonb_array_length(told) > 32 OR EXISTS (
        SELECT FROM jsonb_array_elements(told) AS t
        WHERE jsonb_typeof(t) <> 'string' OR length(t #>> '{}') NOT BETWEEN 1 AND 100) THEN
        PERFORM agent_private.refuse('PT422', 'tags are a list of at most 32 texts of 1 to 100 characters');
    END IF;
    RETURN ARRAY(SELECT DISTINCT t FROM jsonb_array_elements_text(told) AS t ORDER BY t);
END
$$;

-- An id of somebody else's making, short enough for an index: the end of a long one is its hash.
CREATE FUNCTION agent_private.short_id(id text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(id) <= 400 THEN id
                ELSE left(id, 60) || ' ' || encode(sha256(convert_to(id, 'UTF8')), 'hex') END;
$$;

-- Lock the scope of a write, raise its version and return its owner; the lock keeps writers of one owner in line.
CREATE FUNCTION agent_private.touch_scope(wanted_scope text)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    owner text := CASE wanted_scope WHEN 'user' THEN current_setting('agent.user_id')
                                    WHEN 'agent' THEN current_setting('agent.agent_id')
                                    WHEN 'tenant' THEN '' END;
BEGIN
    IF owner IS NULL OR (owner = '' AND wanted_scope <> 'tenant') THEN
        PERFORM agent_private.refuse('PT403', format('no %s in the identity', wanted_scope));
    END IF;
    IF wanted_scope <> 'user' AND current_setting('agent.reach') = 'claims' THEN
        RAISE EXCEPTION 'only a server may write for more than one user' USING ERRCODE = 'insufficient_privilege';
    END IF;
    INSERT INTO public.agent_scope AS s (tenant_id, scope, owner_id, version)
    VALUES (tenant, wanted_scope, owner, 1)
    ON CONFLICT (tenant_id, scope, owner_id) DO UPDATE SET version = s.version + 1;
    RETURN owner;
END
$$;

-- Lock the scopes that operations are of, but for the user's, which is locked last: in one order, so that writers of
-- several do not wait for each other in a circle. curate_memories and reindex_words lock in this order too.
CREATE FUNCTION agent_private.lock_shared_scopes(operations jsonb)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shared text;
BEGIN
    FOR shared IN SELECT DISTINCT o ->> 'scope' FROM jsonb_array_elements(operations) AS o WHERE o ->> 'scope' <> 'user' ORDER BY 1 LOOP
        PERFORM agent_private.touch_scope(shared);
    END LOOP;
END
$$;

-- Close a current version: it stays as history but is no longer found. The caller holds the scope.
CREATE FUNCTION agent_private.close_memory(target public.agent_memory, reason text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE public.agent_memory m
    SET superseded_at = greatest(clock_timestamp(), m.recorded_at), superseded_reason = reason  -- clocks are set back
    WHERE m.memory_number = target.memory_number AND m.tenant_id = target.tenant_id;
    DELETE FROM public.agent_memory_embedding e WHERE e.memory_number = target.memory_number;
    PERFORM agent_private.unindex_memory(target);
END
$$;

-- Those of some runs that are recorded for another user of the tenant. It looks past the caller's reach and gives it back.
CREATE FUNCTION agent_private.runs_of_others(run_ids text[])
RETURNS text[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    reach text := current_setting('agent.reach');
    found text[];
BEGIN
    PERFORM set_config('agent.reach', 'tenant', true);
    SELECT coalesce(array_agg(r.run_id), '{}') INTO found
    FROM public.agent_run r
    WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.run_id = ANY (run_ids)
      AND r.user_id IS DISTINCT FROM current_setting('agent.user_id');
    PERFORM set_config('agent.reach', reach, true);
    RETURN found;
END
$$;

-- Attach evidence; an item that is there already is kept as it is. A run may not be recorded yet, because tools write
-- during it; what names a run of somebody else is dropped.
CREATE FUNCTION agent_private.attach_evidence(target public.agent_memory, evidence jsonb)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    of_others text[];
BEGIN
    IF coalesce(evidence, '[]') = '[]' THEN
        RETURN;
    END IF;
    of_others := agent_private.runs_of_others(ARRAY(SELECT DISTINCT e ->> 'run_id' FROM jsonb_array_elements(evidence) AS e));
    INSERT INTO public.agent_memory_evidence
        (tenant_id, memory_id, version, scope, owner_id, run_id, message_id, tool_call_id, quote)
    SELECT target.tenant_id, target.memory_id, target.version, target.scope, target.owner_id,
           e ->> 'run_id', agent_private.short_id(coalesce(e ->> 'message_id', '')),
           agent_private.short_id(coalesce(e ->> 'tool_call_id', '')), left(coalesce(e ->> 'quote', ''), 1000)
    FROM jsonb_array_elements(evidence) AS e
    WHERE e ->> 'run_id' IS NOT NULL AND NOT e ->> 'run_id' = ANY (of_others)
    ON CONFLICT DO NOTHING;
END
$$;

-- Write one memory as a new row: a new memory, a new version, or nothing where the text is known already.
-- Returns the receipt {status: created|updated|unchanged, memory_id, version, store, field, content}.
-- learning: store, content, and optionally memory_id, expected_version, kind, scope, session_id, field, value, tags,
-- turn (place in the session, which it needs then; the same turn with another text is a new version), speaker, trust,
-- evidence, valid_from, source, run_id.
CREATE FUNCTION agent_private.write_memory(learning jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_scope text := coalesce(learning ->> 'scope', 'user');
    owner text := agent_private.touch_scope(the_scope);
    tenant text := current_setting('agent.tenant_id');
    the_turn integer := (learning ->> 'turn')::integer;
    tags text[] := agent_private.tags_of(learning);
    the_session text := learning ->> 'session_id';
    the_speaker text := nullif(btrim(left(learning ->> 'speaker', 200)), '');
    hash bytea;
    current_row public.agent_memory;
    written public.agent_memory;
    outcome text := 'created';
BEGIN
    IF coalesce(agent_private.plain_text(learning ->> 'content'), '') = '' OR coalesce(learning ->> 'store', '') = '' THEN
        PERFORM agent_private.refuse('PT422', 'a memory needs a store and a content');
    END IF;
    IF the_turn IS NOT NULL AND (the_turn NOT BETWEEN 1 AND 1048575 OR learning ->> 'store' <> 'conversation'
                                 OR the_session IS NULL OR octet_length(the_session) > 1000 OR learning ->> 'field' IS NOT NULL) THEN
        PERFORM agent_private.refuse('PT422', 'a turn is a number from 1 to 1048575, in store conversation, with a session_id of at most '
                                              '1000 bytes and without a field');
    END IF;
    IF learning ->> 'memory_id' IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.memory_id = (learning ->> 'memory_id')::uuid AND m.superseded_at IS NULL
          AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store';
        IF NOT FOUND THEN
            PERFORM agent_private.refuse('PT404', format('no current memory %s in store %s', learning ->> 'memory_id', learning ->> 'store'));
        END IF;
    ELSIF learning ->> 'field' IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store'
          AND coalesce(m.session_id, '') = coalesce(learning ->> 'session_id', '')
          AND m.field = learning ->> 'field' AND m.superseded_at IS NULL;
    ELSIF the_turn IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner
          AND m.session_id = the_session AND m.turn = the_turn AND m.superseded_at IS NULL;
    END IF;
    IF current_row.turn IS NOT NULL THEN  -- a turn stays where it was said
        the_turn := current_row.turn;
        the_session := current_row.session_id;
    END IF;
    IF the_turn IS NULL AND learning ->> 'store' = 'conversation' THEN
        PERFORM agent_private.refuse('PT422', 'a memory of store conversation is a turn: it needs its number');
    END IF;
    hash := agent_private.content_hash(learning ->> 'content', the_session, the_turn);
    IF learning -> 'tags' IS NULL THEN
        tags := coalesce(current_row.tags, '{}');
    END IF;
    IF learning ->> 'expected_version' IS NOT NULL
       AND (learning ->> 'expected_version')::integer IS DISTINCT FROM current_row.version THEN
        PERFORM agent_private.refuse('PT409', format('memory %s is at version %s, not %s', learning ->> 'memory_id',
                                                     coalesce(current_row.version::text, 'none'), learning ->> 'expected_version'));
    END IF;
    IF current_row.memory_id IS NOT NULL AND current_row.content_hash = hash
       AND current_row.value IS NOT DISTINCT FROM nullif(learning -> 'value', 'null')
       AND current_row.kind = coalesce(learning ->> 'kind', current_row.kind) AND current_row.tags = tags
       AND current_row.speaker IS NOT DISTINCT FROM coalesce(the_speaker, current_row.speaker) THEN
        outcome := 'unchanged';
        written := current_row;
    ELSIF coalesce(current_row.field, learning ->> 'field') IS NULL THEN
        SELECT * INTO written FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store'
          AND m.content_hash = hash AND m.field IS NULL AND m.superseded_at IS NULL
          AND m.memory_id IS DISTINCT FROM current_row.memory_id;
        IF FOUND THEN
            outcome := 'unchanged';
            IF current_row.memory_id IS NOT NULL THEN
                PERFORM agent_private.close_memory(current_row, 'merged into ' || written.memory_id);
            END IF;
        END IF;
    END IF;
    IF outcome <> 'unchanged' THEN
        IF current_row.memory_id IS NOT NULL THEN
            outcome := 'updated';
            PERFORM agent_private.close_memory(current_row, 'updated');
        END IF;
        INSERT INTO public.agent_memory (
            tenant_id, memory_id, version, store, kind, scope, owner_id, session_id, field, content, content_hash,
            tags, turn, speaker, value, trust, valid_from, source, run_id)
        VALUES (
            tenant,
            coalesce(current_row.memory_id, gen_random_uuid()),
            coalesce(current_row.version, 0) + 1,
            learning ->> 'store',
            coalesce(learning ->> 'kind', current_row.kind, ''),
            the_scope,
            owner,
            coalesce(the_session, current_row.session_id),
            coalesce(learning ->> 'field', current_row.field),
            left(learning ->> 'content', 20000),
            hash,
            tags,
            the_turn,
            coalesce(the_speaker, current_row.speaker),
            nullif(learning -> 'value', 'null'),
            coalesce(learning ->> 'trust', 'user'),
            coalesce((learning ->> 'valid_from')::timestamptz, now()),
            coalesce(learning ->> 'source', 'extraction'),
            learning ->> 'run_id')
        RETURNING * INTO written;
        IF agent_private.is_searched(written.store) THEN
            PERFORM agent_private.index_memories(the_scope, owner, ARRAY[written.memory_number]);
        END IF;
    END IF;
    PERFORM agent_private.attach_evidence(written, learning -> 'evidence');
    RETURN jsonb_build_object('status', outcome, 'memory_id', written.memory_id, 'version', written.version,
                              'memory_number', written.memory_number, 'store', written.store, 'kind', written.kind,
                              'field', written.field, 'content', written.content, 'value', written.value);
END
$$;

-- Retire the current version of a memory, named by id or by field. Returns the receipt, status retired or absent.
CREATE FUNCTION agent_private.retire_memory(learning jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_scope text := coalesce(learning ->> 'scope', 'user');
    owner text := agent_private.touch_scope(the_scope);
    target public.agent_memory;
BEGIN
    SELECT * INTO target FROM public.agent_memory m
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
      AND m.store = learning ->> 'store' AND m.superseded_at IS NULL
      AND CASE WHEN learning ->> 'memory_id' IS NOT NULL THEN m.memory_id = (learning ->> 'memory_id')::uuid
               ELSE m.field = learning ->> 'field'
                    AND coalesce(m.session_id, '') = coalesce(learning ->> 'session_id', '') END;
    IF NOT FOUND THEN
        IF learning ->> 'memory_id' IS NOT NULL THEN
            PERFORM agent_private.refuse('PT404', format('no current memory %s in store %s', learning ->> 'memory_id', learning ->> 'store'));
        END IF;
        RETURN jsonb_build_object('status', 'absent', 'store', learning ->> 'store', 'field', learning ->> 'field');
    END IF;
    IF learning ->> 'expected_version' IS NOT NULL AND (learning ->> 'expected_version')::integer <> target.version THEN
        PERFORM agent_private.refuse('PT409', format('memory %s is at version %s, not %s', target.memory_id, target.version, learning ->> 'expected_version'));
    END IF;
    PERFORM agent_private.attach_evidence(target, learning -> 'evidence');
    PERFORM agent_private.close_memory(target, coalesce(learning ->> 'reason', 'retired'));
    RETURN jsonb_build_object('status', 'retired', 'memory_id', target.memory_id, 'version', target.version,
                              'store', target.store, 'field', target.field, 'content', target.content);
END
$$;

-- Write or retire, as the operation's action says; without one it writes. Returns the receipt.
CREATE FUNCTION agent_private.apply_operation(operation jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CASE coalesce(operation ->> 'action', 'write')
        WHEN 'write' THEN RETURN agent_private.write_memory(operation);
        WHEN 'retire' THEN RETURN agent_private.retire_memory(operation);
        ELSE PERFORM agent_private.refuse('PT422', format('action %s is neither write nor retire', operation ->> 'action'));
    END CASE;
END
$$;

-- Retire the oldest memories of a store above a limit; NULL is no limit. Returns how many.
CREATE FUNCTION agent_private.hold_to_limit(the_store text, memory_limit integer)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    surplus public.agent_memory;
    retired integer := 0;
BEGIN
    IF memory_limit IS NULL OR (agent_private.is_searched(the_store) AND NOT EXISTS (
        SELECT FROM public.agent_scope s
        WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.scope = 'user'
          AND s.owner_id = current_setting('agent.user_id') AND s.memory_count > memory_limit)) THEN
        RETURN 0;
    END IF;
    FOR surplus IN
        SELECT * FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.store = the_store AND m.superseded_at IS NULL
        ORDER BY m.memory_number DESC OFFSET memory_limit
    LOOP
        PERFORM agent_private.close_memory(surplus, 'over max_memories');
        retired := retired + 1;
    END LOOP;
    RETURN retired;
END
$$;

-- ---- schemas/12_words.sql

-- Words: what a text is searched by, in its language; postings and statistics of each scope; reading them.

CREATE TABLE public.agent_memory_term (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    occurrences smallint NOT NULL,
    impact smallint NOT NULL,
    word_count integer NOT NULL,
    place bigint,
    PRIMARY KEY (memory_number, lexeme)
);
COMMENT ON TABLE public.agent_memory_term IS 'Words of the current memories that are searched. A table and not a GIN index, because row level security keeps the planner from using an index on an operator that is not leakproof, as @@ is not.';
COMMENT ON COLUMN public.agent_memory_term.impact IS 'How much the word says of this memory: see agent_private.impact. What a long list is read by, best first.';
COMMENT ON COLUMN public.agent_memory_term.word_count IS 'How many words the memory has, repeated ones too.';
COMMENT ON COLUMN public.agent_memory_term.place IS 'Where a turn stands: see agent_private.place_of; NULL for what is no turn.';
-- All that reading a list needs, so that the table itself is not read.
CREATE INDEX agent_memory_term_best ON public.agent_memory_term
    (tenant_id, scope, owner_id, lexeme, impact DESC, memory_number DESC) INCLUDE (occurrences, word_count, place);

CREATE TABLE public.agent_memory_past_term (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    occurrences smallint NOT NULL,
    impact smallint NOT NULL,
    word_count integer NOT NULL,
    place bigint,
    PRIMARY KEY (memory_number, lexeme)
);
COMMENT ON TABLE public.agent_memory_past_term IS 'Words of the versions that are history, for questions about what was believed at a time.';
CREATE INDEX agent_memory_past_term_best ON public.agent_memory_past_term
    (tenant_id, scope, owner_id, lexeme, impact DESC, memory_number DESC);

CREATE TABLE public.agent_term_count (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_count integer NOT NULL,
    PRIMARY KEY (tenant_id, scope, owner_id, lexeme),
    CONSTRAINT agent_term_count_positive CHECK (memory_count > 0)
) WITH (fillfactor = 80);  -- so that a count changes where it stands
COMMENT ON TABLE public.agent_term_count IS 'How many current memories of a scope have a word. Changed under the lock that writers of one owner share anyway, so that no row waits for writers of another.';

CREATE TABLE public.agent_text_language (
    tenant_id text PRIMARY KEY,
    language text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE public.agent_text_language IS 'In which language a tenant''s texts are searched: the name of a text search configuration of Postgres. A tenant without a row: english.';

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_memory_term', 'public.agent_memory_past_term', 'public.agent_term_count',
    'public.agent_text_language']::regclass[]) AS t;
SELECT agent_private.own_scope(t) FROM unnest(ARRAY[
    'public.agent_memory_term', 'public.agent_memory_past_term', 'public.agent_term_count']::regclass[]) AS t;
CREATE POLICY own_tenant ON public.agent_text_language TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true)))
    WITH CHECK (tenant_id = (SELECT current_setting('agent.tenant_id', true))
                AND (SELECT current_setting('agent.reach', true)) = 'tenant');

-- Which of these scripts a text has, and the language whose stemmer knows its words: a word of Greek letters is Greek,
-- one of Cyrillic letters is taken for Russian. Hebrew has no stemmer. The letters are as inside [] of a regular expression.
CREATE FUNCTION agent_private.scripts()
RETURNS TABLE (letters text, language text)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    VALUES ('\u0400-\u052F', 'russian'), ('\u05D0-\u05EA', 'hebrew'), ('\u0620-\u063F\u0641-\u064A\u066E-\u06D3\u06D5\u06FA-\u06FC', 'arabic'),
           ('\u0370-\u037D\u037F-\u03FF\u1F00-\u1FFF', 'greek'), ('\u0900-\u0963\u0966-\u097F', 'hindi'),
           ('\u0B80-\u0BFF', 'tamil'), ('\u0531-\u0556\u0561-\u0587', 'armenian');
$$;

-- A lexeme without its accents, of at most 100 characters: an index takes no long ones.
CREATE FUNCTION agent_private.folded(lexeme text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(lexeme) = length(lexeme) THEN left(lexeme, 100)
                ELSE left(normalize(regexp_replace(normalize(lexeme, NFD), '[\u0300-\u036F]', '', 'g'), NFC), 100) END;
$$;

-- A text with a space after each 255 characters without one: Postgres's parser of words takes as long as the square of some.
CREATE FUNCTION agent_private.spaced(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN length(content) > 255 THEN regexp_replace(content, '(\S{255})', '\1 ', 'g') ELSE content END;
$$;

-- The words of a text, at most 20,000 characters of it, in one of Postgres's languages ('simple': words as they are).
-- Of a longer word the first 100 characters count. A text of other than ASCII characters is taken apart by script, which
-- does not depend on the locale of the database: words of the scripts of agent_private.scripts by that language, unless
-- all is 'simple'; Hebrew words as they are and without a prefix of one letter, or of two where the first is "and" or
-- "that"; runs of Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese characters, which have no spaces between words,
-- as pairs of neighbours, and Chinese characters singly too; emoji as words. Accents do not count, nor do vowel signs of
-- Hebrew and Arabic, nor whether a character is composed or of full width.
CREATE FUNCTION agent_private.lexemes(content text, language text DEFAULT 'english')
RETURNS TABLE (lexeme text, occurrences integer)
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    plain text := left(content, 20000);
    unspaced constant text := '\u0E01-\u0E3A\u0E40-\u0E4E\u0E81-\u0EDF\u1000-\u103F\u1050-\u109F\u1780-\u17D3\u3005-\u3007\u3041-\u3096'
        '\u309D-\u309F\u30A1-\u30FA\u30FC-\u30FF\u3400-\u4DBF\u4E00-\u9FFF\uAC00-\uD7A3\uF900-\uFAFF\U00020000-\U0003FFFF';
    emoji constant text := '\u2600-\u27BF\u2B00-\u2BFF\U0001F000-\U0001F3FA\U0001F400-\U0001FAFF';
    other_scripts text;
BEGIN
    IF octet_length(plain) = length(plain) THEN
        RETURN QUERY
        SELECT left(t.lexeme, 100), sum(coalesce(array_length(t.positions, 1), 1))::integer
        FROM unnest(to_tsvector(language::regconfig, agent_private.spaced(plain))) AS t
        GROUP BY 1;
        RETURN;
    END IF;
    plain := left(lower(agent_private.composed(plain)), 20000);
    plain := replace(replace(plain, '’', ''''), 'ʼ', '''');
    -- What stands inside words and is no letter; then what stands between them.
    plain := regexp_replace(plain, '[\u00AD\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u05F3\u05F4\u0640\u064B-\u065F\u0670'
        '\u200B-\u200F\u2060\uFE00-\uFE0F\uFEFF\U0001F3FB-\U0001F3FF]', '', 'g');
    plain := regexp_replace(plain, '[\u0080-\u00A9\u00AB-\u00B4\u00B6-\u00B9\u00BB-\u00BF\u00D7\u00F7\u05BE\u05C0\u05C3\u060C\u061B\u061F'
        '\u066A-\u066D\u06D4\u0964\u0965\u2000-\u206F\u20A0-\u20CF\u2190-\u25FF\u27C0-\u2AFF\u3000-\u3004\u3008-\u3040\u30A0\u30FB\uFF00-\uFFFF]', ' ', 'g');
    SELECT string_agg(s.letters, '') INTO other_scripts FROM agent_private.scripts() AS s;
    RETURN QUERY
    SELECT agent_private.folded(x.word), sum(x.times)::integer
    FROM (
        SELECT t.lexeme, coalesce(array_length(t.positions, 1), 1)
        FROM unnest(to_tsvector(language::regconfig, agent_private.spaced(
            regexp_replace(plain, '[' || other_scripts || unspaced || emoji || ']+', ' ', 'g')))) AS t
        UNION ALL
        SELECT h.form, coalesce(array_length(t.positions, 1), 1)
        FROM agent_private.scripts() AS s
        CROSS JOIN LATERAL unnest(to_tsvector(
            (CASE WHEN lexemes.language = 'simple' OR s.language = 'hebrew' THEN 'simple'
                  WHEN s.language = 'russian' AND lexemes.language = 'serbian' THEN 'serbian' ELSE s.language END)::regconfig,
            regexp_replace(plain, '[^' || s.letters || ']+', ' ', 'g'))) AS t
        CROSS JOIN LATERAL (
            SELECT t.lexeme AS form
            UNION ALL
            SELECT substr(t.lexeme, 2) WHERE s.language = 'hebrew' AND t.lexeme ~ '^[והבכלמש].{2}'
            UNION ALL
            SELECT substr(t.lexeme, 3) WHERE s.language = 'hebrew' AND t.lexeme ~ '^[וש][הבכלמש].{2}'
        ) AS h
        WHERE plain ~ ('[' || s.letters || ']')
        UNION ALL
        SELECT f.form, 1
        FROM regexp_matches(plain, '[' || unspaced || ']+', 'g') AS r (run)
        CROSS JOIN LATERAL (
            SELECT c.letter, lead(c.letter) OVER (ORDER BY c.at) AS following, count(*) OVER () AS length
            FROM unnest(string_to_array(r.run[1], NULL)) WITH ORDINALITY AS c (letter, at)
        ) AS p
        CROSS JOIN LATERAL (
            SELECT p.letter || p.following AS form WHERE p.following IS NOT NULL
            UNION ALL
            SELECT p.letter WHERE p.length = 1 OR p.letter ~ '[\u3005-\u3007\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U0003FFFF]'
        ) AS f
        UNION ALL
        SELECT e.letter[1], 1 FROM regexp_matches(plain, '[' || emoji || ']', 'g') AS e (letter)
    ) AS x (word, times)
    GROUP BY 1
    HAVING agent_private.folded(x.word) <> '';
END
$$;

-- How much a word says of a memory, in thousandths: the part of BM25 that does not depend on the scope, for memories of
-- 20 words in the mean. Lists are read in this order; scores are computed anew. Without a search_path of its own, so that
-- the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.impact(occurrences integer, word_count integer)
RETURNS smallint
LANGUAGE sql IMMUTABLE
RETURN (2200 * occurrences / (occurrences + 0.3::double precision + 0.045::double precision * word_count))::smallint;

-- The language of the tenant's texts.
CREATE FUNCTION agent_private.text_language()
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce((SELECT l.language FROM public.agent_text_language l WHERE l.tenant_id = current_setting('agent.tenant_id')), 'english');
$$;

-- Take the words of a current version out of postings and counts; what was believed is still found by them, unless it
-- is forgotten. The caller holds the scope.
CREATE FUNCTION agent_private.unindex_memory(target public.agent_memory, is_forgotten boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    lexemes text[];
    words integer;
BEGIN
    IF NOT agent_private.is_searched(target.store) THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM public.agent_memory_term t
        WHERE t.memory_number = target.memory_number AND t.tenant_id = target.tenant_id
        RETURNING t.*
    ), kept AS (
        INSERT INTO public.agent_memory_past_term SELECT g.* FROM gone g WHERE NOT is_forgotten
    )
    SELECT coalesce(sum(g.occurrences), 0), array_agg(g.lexeme) INTO words, lexemes FROM gone g;
    DELETE FROM public.agent_term_count c
    WHERE c.tenant_id = target.tenant_id AND c.scope = target.scope AND c.owner_id = target.owner_id AND c.lexeme = ANY (lexemes)
      AND c.memory_count = 1;
    UPDATE public.agent_term_count c SET memory_count = c.memory_count - 1
    WHERE c.tenant_id = target.tenant_id AND c.scope = target.scope AND c.owner_id = target.owner_id AND c.lexeme = ANY (lexemes);
    UPDATE public.agent_scope s
    SET memory_count = s.memory_count - 1, word_count = s.word_count - words
    WHERE (s.tenant_id, s.scope, s.owner_id) = (target.tenant_id, target.scope, target.owner_id);
END
$$;

-- Index the words of current versions of one scope that have none yet, and count them. The caller holds the scope.
CREATE FUNCTION agent_private.index_memories(the_scope text, the_owner text, the_numbers bigint[])
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    the_language text := agent_private.text_language();
    words bigint;
BEGIN
    WITH words AS MATERIALIZED (
        SELECT m.memory_number, l.lexeme, l.occurrences, m.place,
               (sum(l.occurrences) OVER (PARTITION BY m.memory_number))::integer AS word_count
        FROM unnest(the_numbers) AS n (memory_number)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, agent_private.searched_text(x) AS words_of, agent_private.place_of(x.session_id, x.turn) AS place
            FROM public.agent_memory x WHERE x.memory_number = n.memory_number AND x.tenant_id = tenant
            LIMIT 1  -- a look-up per memory, whatever the planner believes of tables that nobody has analyzed yet
        ) AS m
        CROSS JOIN LATERAL agent_private.lexemes(m.words_of, the_language) AS l
    ), posted AS (
        INSERT INTO public.agent_memory_term (tenant_id, scope, owner_id, lexeme, memory_number, occurrences, impact, word_count, place)
        SELECT tenant, the_scope, the_owner, w.lexeme, w.memory_number, w.occurrences,
               agent_private.impact(w.occurrences, w.word_count), w.word_count, w.place
        FROM words w
    ), counted AS (
        INSERT INTO public.agent_term_count AS c (tenant_id, scope, owner_id, lexeme, memory_count)
        SELECT tenant, the_scope, the_owner, w.lexeme, count(*) FROM words w GROUP BY w.lexeme
        ON CONFLICT (tenant_id, scope, owner_id, lexeme) DO UPDATE SET memory_count = c.memory_count + excluded.memory_count
    )
    SELECT coalesce(sum(w.occurrences), 0) INTO words FROM words w;
    UPDATE public.agent_scope s
    SET memory_count = s.memory_count + cardinality(the_numbers), word_count = s.word_count + words,
        languages = CASE WHEN the_language = ANY (s.languages) THEN s.languages ELSE s.languages || the_language END
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
END
$$;

-- What a question is searched by in one scope: its rarest 32 words that the scope has, the rarest first, in how many of its
-- memories each is, how many memories it has and of how many words they are in the mean. as_of: words of history alone
-- count too. NULL for words where there is no such scope.
CREATE FUNCTION agent_private.question_words(
    the_scope text, the_owner text, question text, as_of timestamptz DEFAULT NULL,
    OUT words text[], OUT frequencies double precision[], OUT memories double precision, OUT mean_words double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    languages text[];
    asked text[];
BEGIN
    SELECT greatest(s.memory_count, 1), greatest(s.word_count::double precision / greatest(s.memory_count, 1), 1), s.languages
    INTO memories, mean_words, languages
    FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
    IF memories IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(languages) < 2 THEN
        asked := ARRAY(SELECT l.lexeme FROM agent_private.lexemes(left(question, 4000), coalesce(languages[1], 'english')) AS l);
    ELSE  -- while a change of language is under way
        asked := ARRAY(SELECT DISTINCT l.lexeme FROM unnest(languages) AS g (language)
                       CROSS JOIN LATERAL agent_private.lexemes(left(question, 4000), g.language) AS l);
    END IF;
    SELECT coalesce(array_agg(x.lexeme ORDER BY x.frequency, x.lexeme), '{}'), coalesce(array_agg(x.frequency ORDER BY x.frequency, x.lexeme), '{}')
    INTO words, frequencies
    FROM (SELECT a.lexeme, coalesce(c.memory_count, 0)::double precision AS frequency
          FROM unnest(asked) AS a (lexeme)
          LEFT JOIN LATERAL (SELECT t.memory_count FROM public.agent_term_count t
                             WHERE t.tenant_id = tenant AND t.scope = the_scope AND t.owner_id = the_owner AND t.lexeme = a.lexeme
                             LIMIT 1) AS c ON true
          WHERE c.memory_count IS NOT NULL OR as_of IS NOT NULL
          ORDER BY 2, 1 LIMIT 32) AS x;
END
$$;

-- Whether all postings of a question's words are read, because they are few.
CREATE FUNCTION agent_private.are_few(frequencies double precision[], memories double precision)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT memories <= 10000 OR coalesce((SELECT sum(u.frequency) FROM unnest(frequencies) AS u (frequency)), 0) <= 8000;
$$;

-- Whether the memories themselves tell which postings are wanted. Which store it is of, a posting tells by its place, but
-- for stores that no turn is of. Without a search_path of its own, so that its expression stands in the place of the call.
CREATE FUNCTION agent_private.are_looked_up(the_scope text, filters jsonb, as_of timestamptz)
RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN as_of IS NOT NULL OR filters - 'stores' <> '{}'
    OR coalesce(the_scope = 'tenant' OR ((filters -> 'stores') - 'user_memory' - 'conversation') <> '[]', false) AND filters ? 'stores';

-- All postings of these words in one scope, words by their place in the list; only those of turns, or only others, or
-- all (NULL). Without a search_path of its own, so that the planner puts its query in the place of the call: a row
-- costs half as much as one that a function returns.
CREATE FUNCTION agent_private.postings(tenant text, the_scope text, the_owner text, words text[], turns_wanted boolean)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE sql STABLE ROWS 1000
BEGIN ATOMIC
    SELECT t.memory_number, t.place, w.at::integer, t.occurrences, t.word_count
    FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
    CROSS JOIN LATERAL (
        SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
        WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
          AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
        ORDER BY x.impact DESC OFFSET 0
    ) AS t;
END;

-- The postings of a question's words in one scope, words by their place in the list: rarest first, with their frequencies, as
-- question_words gives them. Complete where the scope has at most 10,000 memories, or the words at most 8,000 postings.
-- Above that the rarest words of up to 4,000 postings (the rarest of all: its best 20,000) and the best 500 of each other
-- word say which memories are looked at; of other words, up to 60,000 postings in all, the lists are read for these. The
-- 1,000 that the words speak for most then remain, and for them the postings of the commonest words are looked up.
-- Only what fits the filters and was believed as_of; then the best 500 of a common word are sought among its best 50,000.
-- Leans on agent_memory_term_best and on the primary key; locks nothing.
CREATE FUNCTION agent_private.word_hits(
    the_scope text, the_owner text, words text[], frequencies double precision[], memories double precision,
    filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE plpgsql STABLE ROWS 1000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    stores jsonb := filters -> 'stores';
    turns_wanted boolean := CASE WHEN stores IS NULL THEN NULL WHEN stores <@ '["conversation"]' THEN true
                                 WHEN NOT stores ? 'conversation' THEN false END;
    is_looked_up boolean := agent_private.are_looked_up(the_scope, filters, as_of);
    never constant boolean := false;  -- makes of an IN a look into a hash table, whatever the planner expects to be in it
    word_limit integer := cardinality(words);
    whole integer := word_limit;  -- so many of the rarest words are read in full,
    listed integer := word_limit;  -- and so many for the memories that these speak for
    is_complete boolean := agent_private.are_few(frequencies, memories);
    weights double precision[];
BEGIN
    IF NOT is_complete THEN
        SELECT count(*) FILTER (WHERE f.postings <= 4000 OR f.at = 1), count(*) FILTER (WHERE f.postings <= 60000 OR f.at = 1)
        INTO whole, listed
        FROM (SELECT u.at, sum(u.frequency) OVER (ORDER BY u.at) AS postings FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at)) AS f;
    END IF;
    IF is_complete AND NOT is_looked_up THEN
        RETURN QUERY SELECT p.* FROM agent_private.postings(tenant, the_scope, the_owner, words, turns_wanted) AS p;
        RETURN;
    END IF;
    weights := ARRAY(SELECT ln(1 + memories / (u.frequency + 1)) FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at) ORDER BY u.at);
    RETURN QUERY
    WITH rare AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words[:whole]) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
              AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
            ORDER BY x.impact DESC, x.memory_number DESC LIMIT CASE WHEN is_looked_up THEN 50000 ELSE 20000 END
        ) AS t
        WHERE NOT is_looked_up OR EXISTS (
            SELECT FROM public.agent_memory m WHERE m.memory_number = t.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
    ), past AS (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.* FROM public.agent_memory_past_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
            ORDER BY x.impact DESC, x.memory_number DESC LIMIT 50000
        ) AS t
        WHERE as_of IS NOT NULL AND EXISTS (
            SELECT FROM public.agent_memory m WHERE m.memory_number = t.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
    ), best AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT y.* FROM (
                SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
                WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
                  AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
                ORDER BY x.impact DESC, x.memory_number DESC LIMIT CASE WHEN is_looked_up THEN 50000 ELSE 500 END
            ) AS y
            WHERE NOT is_looked_up OR EXISTS (
                SELECT FROM public.agent_memory m WHERE m.memory_number = y.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
            LIMIT 500
        ) AS t
        WHERE w.at > whole
    ), looked_at AS MATERIALIZED (
        SELECT r.memory_number FROM rare r WHERE whole < word_limit
        UNION
        SELECT b.memory_number FROM best b
    ), lists AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words[:listed]) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
              AND (never OR x.memory_number IN (SELECT l.memory_number FROM looked_at l))
            ORDER BY x.impact DESC OFFSET 0
        ) AS t
        WHERE w.at > whole
    ), spoken_for AS MATERIALIZED (
        SELECT x.memory_number
        FROM (SELECT * FROM rare UNION ALL SELECT * FROM lists UNION ALL SELECT * FROM best b WHERE b.word > listed) AS x
        WHERE NOT is_complete
        GROUP BY x.memory_number
        ORDER BY sum(weights[x.word] * x.occurrences / (x.occurrences + 0.3::double precision + 0.045::double precision * x.word_count)) DESC
        LIMIT 1000
    )
    SELECT x.* FROM (SELECT * FROM rare UNION ALL SELECT * FROM lists) AS x
    WHERE is_complete OR x.memory_number IN (SELECT s.memory_number FROM spoken_for s)
    UNION ALL
    SELECT p.* FROM past p
    UNION ALL
    SELECT t.memory_number, t.place, array_position(words, t.lexeme), t.occurrences, t.word_count
    FROM spoken_for s
    CROSS JOIN LATERAL (
        SELECT x.* FROM public.agent_memory_term x
        WHERE x.memory_number = s.memory_number AND x.lexeme = ANY (words[listed + 1:])
          AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner OFFSET 0
    ) AS t
    WHERE listed < word_limit;
END
$$;

-- What word_hits returns, read in place where all postings are read: is_whole says so, which is are_few and not
-- are_looked_up. Without a search_path of its own, as postings.
CREATE FUNCTION agent_private.hits(
    tenant text, the_scope text, the_owner text, words text[], frequencies double precision[], memories double precision,
    filters jsonb, as_of timestamptz, is_whole boolean, turns_wanted boolean)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE sql STABLE ROWS 1000
BEGIN ATOMIC
    SELECT p.memory_number, p.place, p.word, p.occurrences, p.word_count
    FROM agent_private.postings(tenant, the_scope, the_owner, words, turns_wanted) AS p WHERE is_whole
    UNION ALL
    SELECT h.memory_number, h.place, h.word, h.occurrences, h.word_count
    FROM agent_private.word_hits(the_scope, the_owner, words, frequencies, memories, filters, as_of) AS h WHERE NOT is_whole;
END;

-- ---- schemas/14_languages.sql

-- The language of a tenant's texts: setting it, and changing the words that were indexed before.

-- Say in which language a tenant's texts are searched: the name of a text search configuration of Postgres, such as
-- 'german'; 'simple' (words as they are) for what Postgres has none of. For operators. What was indexed before is found by
-- its old words until reindex_words has changed them. Returns {language, scopes_waiting}.
CREATE FUNCTION public.set_text_language(identity jsonb, the_language text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    waiting bigint;
    known text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a language is set for a tenant');
    END IF;
    SELECT c.cfgname INTO known FROM pg_ts_config c
    WHERE c.cfgnamespace = 'pg_catalog'::regnamespace AND c.cfgname::text = lower(btrim(the_language));
    known := coalesce(known, 'simple');
    INSERT INTO public.agent_text_language AS l (tenant_id, language) VALUES (current_setting('agent.tenant_id'), known)
    ON CONFLICT (tenant_id) DO UPDATE SET language = excluded.language, changed_at = clock_timestamp()
    WHERE l.language <> excluded.language;
    SELECT count(*) INTO waiting FROM public.agent_scope s
    WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.languages <> ARRAY[known] AND s.languages <> '{}';
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('language', known, 'scopes_waiting', waiting);
END
$$;

-- Change the words of at most row_limit versions to the tenant's language, scope by scope; nothing where all are. For
-- operators; the learner does it. Locks the scopes one after the other. Returns {reindexed, scopes_waiting}.
CREATE FUNCTION public.reindex_words(identity jsonb, row_limit integer DEFAULT 1000)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    the_language text;
    due public.agent_scope;
    target public.agent_memory;
    done integer := 0;
    done_here integer;
    waiting bigint;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'words are changed for a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    the_language := agent_private.text_language();
    FOR due IN
        SELECT * FROM public.agent_scope s
        WHERE s.tenant_id = tenant AND s.languages <> ARRAY[the_language] AND s.languages <> '{}'
        ORDER BY s.scope, s.owner_id LIMIT row_limit
    LOOP
        EXIT WHEN done >= row_limit;
        -- Its version stays as it is: what is known does not change.
        SELECT * INTO due FROM public.agent_scope s
        WHERE s.tenant_id = tenant AND s.scope = due.scope AND s.owner_id = due.owner_id FOR UPDATE;
        CONTINUE WHEN NOT FOUND;  -- erased meanwhile
        IF due.reindexing IS DISTINCT FROM the_language THEN
            due.reindexed_to := 0;
        END IF;
        done_here := 0;
        FOR target IN
            SELECT x.* FROM unnest(ARRAY['user_memory', 'application', 'conversation']) AS o (store)
            CROSS JOIN LATERAL (
                SELECT * FROM public.agent_memory m
                WHERE m.tenant_id = tenant AND m.scope = due.scope AND m.owner_id = due.owner_id AND m.store = o.store
                  AND m.superseded_at IS NULL AND m.memory_number > due.reindexed_to
                ORDER BY m.memory_number LIMIT row_limit - done
            ) AS x
            UNION ALL
            (SELECT * FROM public.agent_memory m
             WHERE m.tenant_id = tenant AND m.scope = due.scope AND m.owner_id = due.owner_id AND m.superseded_at IS NOT NULL
               AND agent_private.is_searched(m.store) AND m.memory_number > due.reindexed_to
             ORDER BY m.memory_number LIMIT row_limit - done)
            ORDER BY memory_number LIMIT row_limit - done
        LOOP
            done_here := done_here + 1;
            due.reindexed_to := target.memory_number;
            IF target.superseded_at IS NULL THEN
                PERFORM agent_private.unindex_memory(target, true);
                PERFORM agent_private.index_memories(due.scope, due.owner_id, ARRAY[target.memory_number]);
            ELSE
                DELETE FROM public.agent_memory_past_term t WHERE t.memory_number = target.memory_number AND t.tenant_id = tenant;
                INSERT INTO public.agent_memory_past_term (tenant_id, scope, owner_id, lexeme, memory_number, occurrences, impact, word_count, place)
                SELECT tenant, due.scope, due.owner_id, l.lexeme, target.memory_number, l.occurrences,
                       agent_private.impact(l.occurrences, l.word_count), l.word_count, agent_private.place_of(target.session_id, target.turn)
                FROM (SELECT w.lexeme, w.occurrences, (sum(w.occurrences) OVER ())::integer AS word_count
                      FROM agent_private.lexemes(agent_private.searched_text(target), the_language) AS w) AS l;
            END IF;
        END LOOP;
        UPDATE public.agent_scope s
        SET reindexing = the_language, reindexed_to = due.reindexed_to,
            languages = CASE WHEN done_here < row_limit - done THEN ARRAY[the_language] ELSE s.languages END
        WHERE s.tenant_id = tenant AND s.scope = due.scope AND s.owner_id = due.owner_id;
        done := done + done_here;
    END LOOP;
    SELECT count(*) INTO waiting FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.languages <> ARRAY[the_language] AND s.languages <> '{}';
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('reindexed', done, 'scopes_waiting', waiting);
END
$$;

-- ---- schemas/20_runs.sql

-- Runs: what happened, what was shown, what became of it; and the order to learn it.

CREATE TABLE public.agent_run (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    run_id text NOT NULL CHECK (run_id <> ''),
    user_id text CHECK (user_id <> ''),
    session_id text NOT NULL,
    agent_id text NOT NULL DEFAULT '',
    status text NOT NULL,
    source text NOT NULL DEFAULT 'live' CHECK (source IN ('live', 'import')),
    messages jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(messages) = 'array'),
    tool_errors jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(tool_errors) = 'array'),
    error text,
    facts jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(facts) = 'object'),
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz NOT NULL DEFAULT now(),
    recorded_at timestamptz NOT NULL DEFAULT now(),
    learned_at timestamptz,
    PRIMARY KEY (tenant_id, run_id),
    -- interrupted -> completed | blocked | failed | cancelled; failed, cancelled -> completed | blocked (a retry)
    CONSTRAINT agent_run_status CHECK (status IN ('interrupted', 'failed', 'cancelled', 'blocked', 'completed'))
);
COMMENT ON TABLE public.agent_run IS 'One run of an agent as it was recorded: once per run id, whatever is delivered twice.';
COMMENT ON COLUMN public.agent_run.messages IS 'The messages of this run alone, not the history before it: {message_id, role, content, tool_calls?, tool_call_id?, name?, is_error?}.';
COMMENT ON COLUMN public.agent_run.tool_errors IS 'Tool results that are errors: {tool, tool_call_id, message}.';
COMMENT ON COLUMN public.agent_run.learned_at IS 'When learning was done with it; NULL while it waits, or where there is nothing to learn from it.';
CREATE INDEX agent_run_by_time ON public.agent_run (tenant_id, recorded_at DESC);
CREATE INDEX agent_run_by_user ON public.agent_run (tenant_id, user_id, session_id, finished_at);
CREATE INDEX agent_run_waiting ON public.agent_run (tenant_id, user_id, session_id)
    WHERE learned_at IS NULL AND status = 'completed';

CREATE TABLE public.agent_exposure (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    user_id text,
    memory_id uuid NOT NULL,
    version integer NOT NULL,
    position integer NOT NULL,
    PRIMARY KEY (tenant_id, run_id, memory_id, version)
);
COMMENT ON TABLE public.agent_exposure IS 'Which memory versions were rendered in which run, in which order. A memory that was deleted keeps its exposures without its text. No foreign key to the run: one function writes both, and the check of each row took three times as long as all else in recording a run.';
CREATE INDEX agent_exposure_by_memory ON public.agent_exposure (tenant_id, memory_id);

CREATE TABLE public.agent_outcome (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    user_id text,
    kind text NOT NULL CHECK (kind <> ''),
    succeeded boolean,
    score double precision,
    details jsonb NOT NULL DEFAULT '{}',
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, run_id, kind),
    FOREIGN KEY (tenant_id, run_id) REFERENCES public.agent_run ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_outcome IS 'What became of a run, one row per kind of judgement: reward of an imported run, later feedback and corrections.';

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_run', 'public.agent_exposure', 'public.agent_outcome']::regclass[]) AS t;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_run', 'agent_exposure', 'agent_outcome'] LOOP
        EXECUTE format($policy$
            CREATE POLICY own_runs ON public.%I TO agent_app
            USING (
                tenant_id = (SELECT current_setting('agent.tenant_id', true))
                AND (user_id = (SELECT current_setting('agent.user_id', true))
                     OR (SELECT current_setting('agent.reach', true)) = 'tenant')
            )
        $policy$, target);
    END LOOP;
END
$$;

-- The one key of a session in the queue: its lock, so that it is learned by one worker at a time, and its queueing lock,
-- so that it waits once. The queue's columns are text; the JSON array cannot be read in two ways.
CREATE FUNCTION agent_private.learning_key(the_tenant text, the_user text, the_session text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'learn ' || encode(sha256(convert_to(jsonb_build_array(the_tenant, the_user, the_session)::text, 'UTF8')), 'hex');
$$;

-- Order the learning of a session once it has been quiet, at the latest after fifteen quiet periods.
-- Runs as its owner, because agent_app has no rights on the queue. The update of a waiting job locks its row, so a
-- worker cannot take it before the caller's run is committed and visible to that worker.
CREATE FUNCTION agent_private.enqueue_learning(
    the_tenant text, the_user text, the_session text, the_agent text, the_queue text, quiet interval)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    key text := agent_private.learning_key(the_tenant, the_user, the_session);
    due timestamptz := clock_timestamp() + quiet;
BEGIN
    FOR attempt IN 1..10 LOOP
        UPDATE agent_queue.procrastinate_jobs j
        SET scheduled_at = least(due, (j.args ->> 'first_at')::timestamptz + 15 * quiet)
        WHERE j.queueing_lock = key AND j.status = 'todo';
        IF FOUND THEN
            RETURN;
        END IF;
        BEGIN
            PERFORM agent_queue.procrastinate_defer_jobs_v1(ARRAY[ROW(
                left(the_queue, 128), 'agent.learn_session', 0, key, key,
                jsonb_build_object('identity', jsonb_strip_nulls(jsonb_build_object(
                    'tenant_id', the_tenant, 'user_id', the_user, 'session_id', the_session, 'agent_id', nullif(the_agent, ''))),
                    'first_at', clock_timestamp()),
                due)::agent_queue.procrastinate_job_to_defer_v1]);
            RETURN;
        EXCEPTION WHEN unique_violation THEN
            NULL;  -- another run of this session has just ordered it: update that order
        END;
    END LOOP;
    RAISE EXCEPTION 'could not order the learning of session %', the_session USING ERRCODE = 'serialization_failure';
END
$$;
REVOKE ALL ON FUNCTION agent_private.enqueue_learning(text, text, text, text, text, interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.enqueue_learning(text, text, text, text, text, interval) TO agent_app;

-- Messages of two deliveries of one run: those of the first in their order, changed where the second knows better,
-- then what is new. The planner guesses a hundred messages; were there as few, a nested loop would do.
CREATE FUNCTION agent_private.merge_messages(earlier jsonb, later jsonb)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
AS $$
    WITH known AS MATERIALIZED (
        SELECT e.message, e.position, e.message ->> 'message_id' AS message_id
        FROM jsonb_array_elements(earlier) WITH ORDINALITY AS e (message, position)
    ), given AS MATERIALIZED (
        SELECT e.message, e.position, e.message ->> 'message_id' AS message_id
        FROM jsonb_array_elements(later) WITH ORDINALITY AS e (message, position)
    ), better AS MATERIALIZED (
        SELECT DISTINCT ON (g.message_id) g.message_id, g.message FROM given g ORDER BY g.message_id, g.position
    )
    SELECT coalesce(jsonb_agg(m.message ORDER BY m.part, m.position), '[]')
    FROM (
        SELECT 1 AS part, k.position, coalesce(b.message, k.message) AS message
        FROM known k LEFT JOIN better b ON b.message_id = k.message_id
        UNION ALL
        SELECT 2, g.position, g.message
        FROM given g
        WHERE NOT EXISTS (SELECT FROM known k WHERE k.message_id = g.message_id)
    ) AS m;
$$;

-- What is wrong with a run that is handed in, in words; NULL where it can be kept. What is kept is read by programs that
-- lean on its form: one run of another form would break the listing of all.
CREATE FUNCTION agent_private.fault_of_run(run jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    part text;
BEGIN
    IF coalesce(run ->> 'run_id', '') !~ '\S' THEN
        RETURN 'a run needs a run_id';
    END IF;
    -- As Identity has it: a longer one could be recorded and never be learned.
    FOREACH part IN ARRAY ARRAY['run_id', 'session_id', 'agent_id'] LOOP
        IF length(run ->> part) > 512 OR octet_length(run ->> part) > 800 THEN
            RETURN format('the %s of a run has at most 512 characters and 800 bytes', part);
        END IF;
    END LOOP;
    IF run ? 'facts' AND jsonb_typeof(run -> 'facts') <> 'object' THEN
        RETURN 'the facts of a run are an object';
    END IF;
    FOREACH part IN ARRAY ARRAY['messages', 'tool_errors', 'exposures', 'outcomes'] LOOP
        IF run ? part AND jsonb_typeof(run -> part) <> 'array' THEN
            RETURN format('the %s of a run are a list of objects', part);
        END IF;
        IF EXISTS (SELECT FROM jsonb_array_elements(run -> part) AS e WHERE jsonb_typeof(e) <> 'object') THEN
            RETURN format('the %s of a run are a list of objects', part);
        END IF;
    END LOOP;
    IF jsonb_array_length(run -> 'messages') > 20000 THEN
        RETURN 'a run has at most 20,000 messages';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(run -> 'messages') AS m
               WHERE m ->> 'message_id' IS NULL OR m ->> 'role' IS NULL) THEN
        RETURN 'every message of a run needs a message_id and a role';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(run -> 'messages') AS m
               WHERE jsonb_typeof(m -> 'message_id') <> 'string' OR jsonb_typeof(m -> 'role') <> 'string'
                  OR jsonb_typeof(m -> 'content') IS DISTINCT FROM 'string'
                  OR coalesce(jsonb_typeof(m -> 'name'), 'null') NOT IN ('string', 'null')
                  OR coalesce(jsonb_typeof(m -> 'tool_call_id'), 'null') NOT IN ('string', 'null')) THEN
        RETURN 'message_id, role, content, name and tool_call_id of a message are texts';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(run -> 'messages') AS m
               WHERE m ? 'tool_calls'
                 AND CASE WHEN jsonb_typeof(m -> 'tool_calls') <> 'array' THEN true
                          ELSE EXISTS (SELECT FROM jsonb_array_elements(m -> 'tool_calls') AS c
                                       WHERE jsonb_typeof(c -> 'name') IS DISTINCT FROM 'string') END) THEN
        RETURN 'the tool_calls of a message are a list of objects with a name';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(run -> 'tool_errors') AS e
               WHERE jsonb_typeof(e -> 'tool') IS DISTINCT FROM 'string'
                  OR jsonb_typeof(e -> 'message') IS DISTINCT FROM 'string') THEN
        RETURN 'every tool error of a run needs a tool and a message, as texts';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(run -> 'exposures') AS e
               WHERE e ->> 'memory_id' IS NULL OR e ->> 'version' IS NULL) THEN
        RETURN 'every exposure of a run needs a memory_id and a version';
    END IF;
    RETURN NULL;
END
$$;

-- Order the learning of the session of a run, as the run says.
CREATE FUNCTION agent_private.order_learning(run jsonb)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.enqueue_learning(
        current_setting('agent.tenant_id'), current_setting('agent.user_id'),
        coalesce(run ->> 'session_id', run ->> 'run_id'), run ->> 'agent_id', coalesce(run ->> 'queue', 'learning'),
        make_interval(secs => greatest(coalesce((run ->> 'quiet_seconds')::double precision, 20), 0)));
$$;

-- Store one run; the work of record_run and import_runs. A live one's learning is ordered.
CREATE FUNCTION agent_private.store_run(run jsonb, the_source text)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    person text := nullif(current_setting('agent.user_id'), '');
    fault text := agent_private.fault_of_run(run);
    status_before text;
    all_messages jsonb;
    recorded boolean;
BEGIN
    IF fault IS NOT NULL THEN
        PERFORM agent_private.refuse('PT422', fault);
    END IF;
    INSERT INTO public.agent_run AS r (
        tenant_id, run_id, user_id, session_id, agent_id, status, source, messages, tool_errors, error, facts,
        started_at, finished_at)
    VALUES (
        tenant, run ->> 'run_id', person, coalesce(run ->> 'session_id', run ->> 'run_id'),
        coalesce(run ->> 'agent_id', ''), run ->> 'status', the_source,
        coalesce(run -> 'messages', '[]'), coalesce(run -> 'tool_errors', '[]'), run ->> 'error',
        coalesce(run -> 'facts', '{}'),
        coalesce((run ->> 'started_at')::timestamptz, now()), coalesce((run ->> 'finished_at')::timestamptz, now()))
    ON CONFLICT (tenant_id, run_id) DO NOTHING;
    recorded := FOUND;
    IF NOT recorded THEN
        IF the_source = 'import' AND person IS NOT NULL THEN
            -- A log that was looked at first may be given to its user later, and is learned then.
            UPDATE public.agent_run r SET user_id = person
            WHERE r.tenant_id = tenant AND r.run_id = run ->> 'run_id' AND r.user_id IS NULL AND r.source = 'import';
            recorded := FOUND;
            UPDATE public.agent_outcome o SET user_id = person
            WHERE o.tenant_id = tenant AND o.run_id = run ->> 'run_id' AND o.user_id IS NULL AND recorded;
        END IF;
        SELECT r.status, r.messages INTO status_before, all_messages FROM public.agent_run r
        WHERE r.tenant_id = tenant AND r.run_id = run ->> 'run_id' AND r.user_id IS NOT DISTINCT FROM person
        FOR UPDATE;
        IF NOT FOUND THEN
            PERFORM agent_private.refuse('PT422', format('run %s belongs to somebody else', run ->> 'run_id'));
        END IF;
        -- A pause may end in anything, a failure only in a retry that went through; what is final stays.
        IF (status_before = 'interrupted')
           OR (status_before IN ('failed', 'cancelled') AND run ->> 'status' IN ('completed', 'blocked')) THEN
            all_messages := agent_private.merge_messages(all_messages, coalesce(run -> 'messages', '[]'));
            IF jsonb_array_length(all_messages) > 20000 THEN
                PERFORM agent_private.refuse('PT422', 'a run has at most 20,000 messages');
            END IF;
            UPDATE public.agent_run r SET
                status = run ->> 'status',
                messages = all_messages,
                tool_errors = (SELECT coalesce(jsonb_agg(DISTINCT e), '[]') FROM jsonb_array_elements(
                    r.tool_errors || coalesce(run -> 'tool_errors', '[]')) AS e),
                error = run ->> 'error',
                -- Its time holds a wait for a person then.
                facts = r.facts || coalesce(run -> 'facts', '{}')
                    || CASE status_before WHEN 'interrupted' THEN '{"paused": true}' ELSE '{}' END::jsonb,
                finished_at = coalesce((run ->> 'finished_at')::timestamptz, now())
            WHERE r.tenant_id = tenant AND r.run_id = run ->> 'run_id';
            recorded := status_before <> run ->> 'status';
        END IF;
    END IF;
    INSERT INTO public.agent_exposure (tenant_id, run_id, user_id, memory_id, version, position)
    SELECT tenant, run ->> 'run_id', person, m.memory_id, m.version, e.position
    FROM jsonb_array_elements(coalesce(run -> 'exposures', '[]')) WITH ORDINALITY AS e (item, position)
    -- What this user could not have been shown was not shown. The limit makes it one look at the primary key each.
    CROSS JOIN LATERAL (
        SELECT s.memory_id, s.version FROM public.agent_memory s
        WHERE s.tenant_id = tenant AND s.memory_id = (e.item ->> 'memory_id')::uuid
          AND s.version = (e.item ->> 'version')::integer
          AND (s.scope, s.owner_id) IN (('user', person), ('agent', run ->> 'agent_id'), ('tenant', ''))
        LIMIT 1) AS m
    ON CONFLICT DO NOTHING;
    INSERT INTO public.agent_outcome (tenant_id, run_id, user_id, kind, succeeded, score, details)
    SELECT tenant, run ->> 'run_id', person, o ->> 'kind', (o ->> 'succeeded')::boolean, (o ->> 'score')::double precision,
           coalesce(o -> 'details', '{}')
    FROM jsonb_array_elements(coalesce(run -> 'outcomes', '[]')) AS o
    ON CONFLICT DO NOTHING;
    IF recorded AND person IS NOT NULL AND run ->> 'status' = 'completed' AND the_source = 'live' THEN
        PERFORM agent_private.order_learning(run);
    END IF;
    RETURN jsonb_build_object('run_id', run ->> 'run_id', 'recorded', recorded,
                              'status', coalesce(CASE WHEN recorded THEN run ->> 'status' END, status_before));
END
$$;

-- Record a finished, failed, interrupted or blocked run and order its learning, in one transaction.
-- Idempotent by run_id. run: run_id, status, session_id?, agent_id?, messages, tool_errors?, error?, facts?,
-- exposures? [{memory_id, version}], outcomes?, started_at?, finished_at?,
-- queue? (default learning), quiet_seconds? (default 20), durable? (false: the whole transaction does not wait for the
-- disk). Exposures of memories that the user cannot see are dropped. The queue, its time and the outcomes are a server's
-- to say: those of a caller with a user's token are passed over.
-- Returns {run_id, recorded, status}; recorded is false where this was known already.
CREATE FUNCTION public.record_run(identity jsonb, run jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    run := agent_private.document(run);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a run can only be recorded for a tenant and a user');
    END IF;
    -- The commit comes after this function and then need not wait for the disk.
    IF run ->> 'durable' = 'false' THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
    IF current_setting('agent.reach') = 'claims' THEN
        run := run - '{queue,quiet_seconds,outcomes}'::text[];
    END IF;
    receipt := agent_private.store_run(
        run || jsonb_strip_nulls(jsonb_build_object('session_id', identity ->> 'session_id', 'agent_id', identity ->> 'agent_id')),
        'live');
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- Record runs from a log, of this tenant and with or without a user; for operators.
-- runs: as in record_run. Returns {recorded, known}.
CREATE FUNCTION public.import_runs(identity jsonb, runs jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    run jsonb;
    to_learn jsonb := '{}';
    recorded integer := 0;
    known integer := 0;
BEGIN
    identity := agent_private.document(identity);
    runs := agent_private.document(runs);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'no tenant to import runs for');
    END IF;
    -- Runs by their ids, then orders by their sessions: importers at once wait for each other and do not deadlock.
    FOR run IN SELECT r FROM jsonb_array_elements(runs) AS r ORDER BY r ->> 'run_id' LOOP
        IF (agent_private.store_run(run, 'import') ->> 'recorded')::boolean THEN
            recorded := recorded + 1;
            IF current_setting('agent.user_id') <> '' AND run ->> 'status' = 'completed' THEN
                to_learn := to_learn || jsonb_build_object(
                    coalesce(run ->> 'session_id', run ->> 'run_id'), run - '{messages,tool_errors,facts}'::text[]);
            END IF;
        ELSE
            known := known + 1;
        END IF;
    END LOOP;
    FOR run IN SELECT e.value FROM jsonb_each(to_learn) AS e ORDER BY e.key LOOP
        PERFORM agent_private.order_learning(run);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('recorded', recorded, 'known', known);
END
$$;

-- Runs of a tenant, newest first; for operators. wanted: all of its given keys must fit (user_id, session_id, agent_id,
-- status, source, failed: true for runs that failed, were blocked, judged a failure or met a tool error).
-- Returns [{run_id, …, outcomes, message_count}] without the messages.
CREATE FUNCTION public.list_runs(identity jsonb, wanted jsonb DEFAULT '{}', run_limit integer DEFAULT 50, run_offset integer DEFAULT 0)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.recorded_at DESC, x.run_id), '[]') INTO found
    FROM (
        SELECT r.run_id, r.user_id, r.session_id, r.agent_id, r.status, r.source, r.tool_errors, r.error, r.facts,
               r.started_at, r.finished_at, r.recorded_at, r.learned_at, jsonb_array_length(r.messages) AS message_count,
               (SELECT coalesce(jsonb_agg(jsonb_build_object('kind', o.kind, 'succeeded', o.succeeded, 'score', o.score)), '[]')
                FROM public.agent_outcome o WHERE o.tenant_id = r.tenant_id AND o.run_id = r.run_id) AS outcomes
        FROM public.agent_run r
        WHERE r.tenant_id = identity ->> 'tenant_id'
          AND (wanted ->> 'user_id' IS NULL OR r.user_id = wanted ->> 'user_id')
          AND (wanted ->> 'session_id' IS NULL OR r.session_id = wanted ->> 'session_id')
          AND (wanted ->> 'agent_id' IS NULL OR r.agent_id = wanted ->> 'agent_id')
          AND (wanted ->> 'status' IS NULL OR r.status = wanted ->> 'status')
          AND (wanted ->> 'source' IS NULL OR r.source = wanted ->> 'source')
          AND (NOT coalesce((wanted ->> 'failed')::boolean, false)
               OR r.status IN ('failed', 'blocked') OR r.tool_errors <> '[]'
               OR EXISTS (SELECT FROM public.agent_outcome o
                          WHERE o.tenant_id = r.tenant_id AND o.run_id = r.run_id AND NOT o.succeeded))
        ORDER BY r.recorded_at DESC, r.run_id
        LIMIT least(run_limit, 10000) OFFSET run_offset
    ) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- One run of a tenant with messages, exposures, outcomes and what was learned from it; NULL where there is none.
CREATE FUNCTION public.get_run(identity jsonb, the_run_id text)
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
    SELECT to_jsonb(r) || jsonb_build_object(
        'outcomes', (SELECT coalesce(jsonb_agg(to_jsonb(o) - 'tenant_id' - 'run_id' - 'user_id'), '[]') FROM public.agent_outcome o
                     WHERE o.tenant_id = r.tenant_id AND o.run_id = r.run_id),
        'exposures', (SELECT coalesce(jsonb_agg(jsonb_build_object('memory_id', e.memory_id, 'version', e.version, 'content', m.content)
                                                ORDER BY e.position), '[]')
                      FROM public.agent_exposure e
                      LEFT JOIN public.agent_memory m
                          ON m.tenant_id = e.tenant_id AND m.memory_id = e.memory_id AND m.version = e.version
                          AND (m.scope, m.owner_id) IN (('user', r.user_id), ('agent', r.agent_id), ('tenant', ''))
                      WHERE e.tenant_id = r.tenant_id AND e.run_id = r.run_id),
        'learned', (SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_object('memory_id', m.memory_id, 'version', m.version,
                                                                          'store', m.store, 'content', m.content)), '[]')
                    FROM public.agent_memory_evidence v
                    JOIN public.agent_memory m USING (tenant_id, memory_id, version)
                    WHERE v.tenant_id = r.tenant_id AND v.run_id = r.run_id
                      AND (m.scope <> 'user' OR m.owner_id = r.user_id)
                      AND m.store <> 'conversation'))  -- those are its messages
    INTO found
    FROM public.agent_run r
    WHERE r.tenant_id = identity ->> 'tenant_id' AND r.run_id = the_run_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- ---- schemas/28_ranking.sql

-- Ranking: which memories of one scope fit a question best.

-- Whether a text ends as a question: what somebody asked tells less than what was stated. Without a search_path of its
-- own, so that the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.is_question(content text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN right(rtrim(content), 1) IN ('?', '？', '؟');

-- The numbers of the ranking, learned once on two conversations of LoCoMo (benchmarks/retrieval_quality.py measures them
-- on others); the unit of all is the best score by words. What is 0 is off.
--   saturation, length_share: k1 and b of BM25, for a turn; length_share_alone: b for what is no turn;
--   session_saturation, session_length_share: the same for a session
--   beside, near: what a word counts in the turns one and two places from where it was said
--   answer: what it counts in the turn that follows a question in which it was said
--   certainty: power of the share of the question's weight that the best has, by which all scores by words are lowered
--   session: what the words of the whole session add; vector: what the vector adds, at most, for the nearest
--   vector_beside, vector_near, vector_answer: as beside, near and answer, of the vector
--   speaker: added where the question names who said it; asked: taken from what is a question
--   updated: taken from the older of those that share the same words with the question, where these are nearly all that any
--   memory shares with it, most from the oldest
--   newness: added to the newest candidate, of turns and of others
CREATE FUNCTION agent_private.ranking_weights(
    OUT saturation double precision, OUT length_share double precision, OUT length_share_alone double precision,
    OUT session_saturation double precision, OUT session_length_share double precision,
    OUT beside double precision, OUT near double precision, OUT answer double precision, OUT certainty double precision,
    OUT session double precision, OUT vector double precision,
    OUT vector_beside double precision, OUT vector_near double precision, OUT vector_answer double precision,
    OUT speaker double precision, OUT asked double precision, OUT updated double precision,
    OUT newness_of_turns double precision, OUT newness double precision)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 0.9, 0.1, 0.75, 1.2, 0.5, 0.5, 0.3, 1.0, 0.3, 0.3, 0.42, 0.4, 0.1, 0.7, 0.15, 0.2, 0.1, 0.03, 0.1;
$$;

-- The best memories for a question within one scope of one owner. Three lists find them, each divided by its best: the
-- words of a memory (BM25; for a turn of a conversation with the words of the turns around it, each word counting most
-- where it counts most), the words of the whole session, and vectors, again with those of the turns around. Their sum
-- decides, with what ranking_weights() adds and takes. What is no turn of a conversation has no neighbours and no
-- session; for that the newest fill up. At most 200, best first. Returns columns and no documents: those cost as much as
-- the ranking, and recall needs fewer fields than search. Only what fits the filters (see agent_private.wanted) and was
-- believed as_of (NULL: now). lists names the lists that found a memory, with list_ranks and list_scores in the same
-- order; it is empty for what only fills up. Where no turn is searched and no vector given, a shorter query finds the
-- same: the long one takes three times as long to set up. Leans on hits(), on nearest(), on agent_memory_by_number,
-- agent_memory_one_per_turn and agent_memory_by_scope; locks nothing.
CREATE FUNCTION agent_private.rank_memories(
    the_scope text, the_owner text, question text, question_embedding vector, embedding_model text, session_now text,
    memory_limit integer, filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
RETURNS TABLE (memory_id uuid, version integer, store text, kind text, content text, trust text, tags text[], speaker text,
               session_id text, turn integer, recorded_at timestamptz, valid_from timestamptz, score double precision,
               lists text[], list_ranks integer[], list_scores double precision[], place bigint)
LANGUAGE plpgsql ROWS 40
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_sort = off  -- on tables that nobody has analyzed yet the newest would be found by sorting all
SET jit = off  -- to compile takes longer than any search
AS $$
#variable_conflict use_column
DECLARE
    tenant text := current_setting('agent.tenant_id');
    stores_to_fill_up text[] := CASE the_scope WHEN 'tenant' THEN '{application}' ELSE '{user_memory,conversation}' END;
    is_alone boolean;  -- whether no turn of a conversation is among what is searched
    is_whole boolean;  -- whether all postings of the words are read
    -- Of the rules what is read once per posting or candidate: a field of a record costs several times as much.
    length_of_turns double precision;  -- saturation and length of BM25: so much, and so much for each word
    length_per_word_of_turns double precision;
    length_alone double precision;
    length_per_word double precision;
    updated double precision;
    newness double precision;
    newness_of_turns double precision;
    asked double precision;
    certainty double precision;
    everything boolean := filters = '{}' AND as_of IS NULL;
    rules record;
    words text[];
    frequencies double precision[];
    weights double precision[];
    all_weights double precision;
    memories double precision;
    mean_words double precision;
BEGIN
    SELECT * INTO rules FROM agent_private.ranking_weights();
    SELECT q.* INTO words, frequencies, memories, mean_words
    FROM agent_private.question_words(the_scope, the_owner, question, as_of) AS q;
    IF memories IS NULL THEN
        RETURN;
    END IF;
    IF filters ? 'stores' THEN
        stores_to_fill_up := ARRAY(SELECT u.store FROM unnest(stores_to_fill_up) AS u (store) WHERE filters -> 'stores' ? u.store);
    END IF;
    is_whole := agent_private.are_few(frequencies, memories) AND NOT agent_private.are_looked_up(the_scope, filters, as_of);
    is_alone := as_of IS NULL AND (filters ? 'stores' AND NOT filters -> 'stores' ? 'conversation' OR NOT EXISTS (
        SELECT FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner AND m.store >= 'conversation' AND m.store <= 'conversation'
          AND m.superseded_at IS NULL
        ORDER BY m.store, m.memory_number DESC LIMIT 1));
    weights := ARRAY(SELECT ln(1 + (greatest(memories, u.frequency) - u.frequency + 0.5::double precision) / (u.frequency + 0.5::double precision))
                     FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at) ORDER BY u.at);
    all_weights := coalesce((SELECT sum(u.weight) FROM unnest(weights) AS u (weight)), 1);
    length_of_turns := rules.saturation * (1 - rules.length_share);
    length_per_word_of_turns := rules.saturation * rules.length_share / mean_words;
    length_alone := rules.saturation * (1 - rules.length_share_alone);
    length_per_word := rules.saturation * rules.length_share_alone / mean_words;
    updated := rules.updated;
    newness := rules.newness;
    newness_of_turns := rules.newness_of_turns;
    asked := rules.asked;
    certainty := rules.certainty;
    IF is_alone AND question_embedding IS NULL THEN
        RETURN QUERY
        WITH by_words AS MATERIALIZED (
            SELECT h.memory_number, sum(weights[h.word] * h.occurrences / (h.occurrences + length_alone + length_per_word * h.word_count)) AS points,
                   bit_or(1::bigint << h.word) AS own_words, sum(weights[h.word]) AS own_weight
            FROM agent_private.hits(tenant, the_scope, the_owner, words, frequencies, memories, filters, as_of, is_whole, false) AS h
            GROUP BY h.memory_number
            ORDER BY points DESC, h.memory_number DESC LIMIT greatest(100, least(memory_limit, 200))
        ), newest AS (
            SELECT n.memory_number FROM (SELECT greatest(10, least(50, memory_limit - count(*))) AS many FROM by_words) AS f
            CROSS JOIN LATERAL (
                SELECT n.memory_number
                FROM unnest(stores_to_fill_up) AS s (store)
                CROSS JOIN LATERAL (
                    SELECT m.memory_number FROM public.agent_memory m
                    WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner
                      AND m.store >= s.store AND m.store <= s.store
                      AND m.superseded_at IS NULL AND agent_private.fits(m, filters, NULL)
                    ORDER BY m.store, m.memory_number DESC LIMIT f.many) AS n
                ORDER BY n.memory_number DESC LIMIT f.many) AS n
            WHERE n.memory_number NOT IN (SELECT w.memory_number FROM by_words w)
        ), found AS MATERIALIZED (  -- narrow, for it is sorted four times; what is returned is looked up for the best alone
            SELECT w.*, m.valid_from, m.is_asked, m.is_stated
            FROM (SELECT * FROM by_words UNION ALL SELECT n.memory_number, 0, 0, 0 FROM newest n) AS w
            CROSS JOIN LATERAL (
                SELECT x.valid_from, x.kind = 'conversation' AND agent_private.is_question(x.content) AS is_asked,
                       x.store <> 'application' AS is_stated
                FROM public.agent_memory x
                WHERE x.memory_number = w.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
                  AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
                  AND (x.session_id IS NULL OR x.session_id <> coalesce(session_now, ''))
                LIMIT 1
            ) AS m
        ), scored AS (
            SELECT f.memory_number, f.points / b.points * least(1, b.points / all_weights) ^ certainty
                   - CASE WHEN f.is_asked THEN asked ELSE 0 END
                   + percent_rank() OVER (ORDER BY f.valid_from, f.memory_number) * newness
                   - CASE WHEN f.own_words > 0 AND f.is_stated AND f.own_weight >= b.own_weight
                          THEN updated * (1 - cume_dist() OVER (PARTITION BY f.own_words ORDER BY f.valid_from, f.memory_number)) ELSE 0 END
                   AS sum_of_points,
                   f.points / b.points AS word_points, rank() OVER (ORDER BY f.points DESC)::integer AS word_rank
            FROM found f
            CROSS JOIN (SELECT (SELECT coalesce(nullif(max(x.points), 0), 1) FROM by_words x) AS points,
                               (SELECT 0.9::double precision * max(x.own_weight) FROM found x) AS own_weight) AS b
        ), best AS (
            SELECT s.*, row_number() OVER (ORDER BY s.sum_of_points DESC, s.memory_number DESC) AS place
            FROM scored s
            ORDER BY s.sum_of_points DESC, s.memory_number DESC
            LIMIT least(memory_limit, 200)
        )
        SELECT m.memory_id, m.version, m.store, m.kind, m.content, m.trust, m.tags, m.speaker, m.session_id, m.turn,
               m.recorded_at, m.valid_from, b.sum_of_points,
               CASE WHEN b.word_points > 0 THEN '{words}'::text[] ELSE '{}' END,
               CASE WHEN b.word_points > 0 THEN ARRAY[b.word_rank] ELSE '{}' END,
               CASE WHEN b.word_points > 0 THEN ARRAY[b.word_points] ELSE '{}' END, b.place
        FROM best b
        CROSS JOIN LATERAL (
            SELECT * FROM public.agent_memory x WHERE x.memory_number = b.memory_number AND x.tenant_id = tenant LIMIT 1) AS m;
        RETURN;
    END IF;
    RETURN QUERY
    WITH hits AS MATERIALIZED (  -- double precision throughout: numeric arithmetic costs ten times as much
        SELECT h.word, h.memory_number, h.place, h.occurrences,
               weights[h.word] * h.occurrences / (h.occurrences + CASE WHEN h.place IS NULL THEN length_alone + length_per_word * h.word_count
                   ELSE length_of_turns + length_per_word_of_turns * h.word_count END) AS points
        FROM agent_private.hits(tenant, the_scope, the_owner, words, frequencies, memories, filters, as_of, is_whole,
                                CASE WHEN filters -> 'stores' <@ '["conversation"]' THEN true END) AS h
    ), by_words AS MATERIALIZED (
        SELECT h.memory_number, max(h.place) AS place, sum(h.points) AS points, bit_or(1::bigint << h.word) AS own_words, sum(weights[h.word]) AS own_weight
        FROM hits h GROUP BY h.memory_number
        ORDER BY points DESC, h.memory_number DESC LIMIT (SELECT greatest(100, least(memory_limit, 200)))
    ), by_vector AS MATERIALIZED (  -- how far above the last of the list, which varies with the model
        SELECT n.memory_number, CASE WHEN n.best = n.last THEN 1
                   ELSE (n.similarity - n.last + (n.best - n.last) / n.many) / ((n.best - n.last) * (1 + 1 / n.many)) END AS points
        FROM (SELECT v.memory_number, v.similarity, max(v.similarity) OVER () AS best, min(v.similarity) OVER () AS last,
                     (count(*) OVER ())::double precision AS many
              FROM agent_private.nearest(the_scope, the_owner, question_embedding, embedding_model, 100) AS v) AS n
    ), heard AS MATERIALIZED (  -- turns of conversations that were found themselves, and what neighbours need of them
        SELECT c.memory_number, c.own_words, c.own_weight, c.vector_points, m.session_id, m.turn, m.asked,
               coalesce(c.place, agent_private.place_of(m.session_id, m.turn)) AS place
        FROM (SELECT f.memory_number, max(f.place) AS place, max(f.own_words) AS own_words, max(f.own_weight) AS own_weight,
                     max(f.vector_points) AS vector_points
              FROM (SELECT w.memory_number, w.place, w.own_words, w.own_weight, 0::double precision AS vector_points FROM by_words w WHERE w.place IS NOT NULL
                    UNION ALL
                    SELECT v.memory_number, NULL, 0, 0, v.points FROM by_vector v) AS f
              GROUP BY f.memory_number) AS c
        CROSS JOIN LATERAL (
            SELECT x.session_id, x.turn, agent_private.is_question(x.content) AS asked FROM public.agent_memory x
            WHERE x.memory_number = c.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
            LIMIT 1  -- a look-up per candidate, whatever the planner believes of tables that nobody has analyzed yet
        ) AS m
        WHERE m.turn IS NOT NULL
    ), shares AS MATERIALIZED (
        SELECT s.step, (s.words ^ 3) AS words_cubed, (s.answer ^ 3) AS answer_cubed, s.vector
        FROM (VALUES (-2, rules.near, rules.near, rules.vector_near), (-1, rules.beside, rules.beside, rules.vector_beside), (0, 1, 1, 1),
                     (1, rules.beside, rules.answer, rules.vector_beside), (2, rules.near, rules.near, rules.vector_near)) AS s (step, words, answer, vector)
    ), around AS (  -- the cubic mean of a word's points: near the largest, and more for more
        SELECT x.place, sum(x.points) AS points
        FROM (SELECT e.place + s.step AS place, h.word,
                     cbrt(sum(h.points * h.points * h.points * CASE WHEN e.asked THEN s.answer_cubed ELSE s.words_cubed END)) AS points
              FROM heard e JOIN hits h ON h.memory_number = e.memory_number CROSS JOIN shares s
              GROUP BY e.place + s.step, h.word) AS x
        GROUP BY x.place
    ), around_vector AS (
        SELECT e.place + s.step AS place,
               sum(e.vector_points * CASE WHEN s.step = 1 AND e.asked THEN rules.vector_answer ELSE s.vector END) AS points
        FROM heard e CROSS JOIN shares s
        WHERE e.vector_points > 0
        GROUP BY e.place + s.step
    ), said AS MATERIALIZED (
        SELECT h.place >> 20 AS session, h.word, sum(h.occurrences) AS occurrences, max(h.place & 1048575)::double precision AS turns
        FROM hits h WHERE h.place IS NOT NULL GROUP BY h.place >> 20, h.word
    ), sessions AS (  -- BM25 of sessions, as long as their last turn with a word of the question
        SELECT s.session, sum(w.weight * s.occurrences / (s.occurrences + rules.session_saturation
                   * (1 - rules.session_length_share + rules.session_length_share * l.turns / l.mean_turns))) AS points
        FROM said s
        JOIN (SELECT x.session, max(x.turns) AS turns, avg(max(x.turns)) OVER () AS mean_turns, count(*) OVER () AS sessions
              FROM said x GROUP BY x.session) AS l ON l.session = s.session
        JOIN (SELECT x.word, count(*) AS frequency,
                     ln(1 + (max(a.sessions) - count(*) + 0.5::double precision) / (count(*) + 0.5::double precision)) AS weight
              FROM said x CROSS JOIN (SELECT count(DISTINCT y.session) AS sessions FROM said y) AS a
              GROUP BY x.word) AS w ON w.word = s.word
        GROUP BY s.session
    ), newest AS (
        SELECT n.memory_number, n.place
        FROM (SELECT greatest(10, least(50, memory_limit - count(*))) AS many FROM by_words) AS l
        CROSS JOIN unnest(stores_to_fill_up) AS f (store)
        CROSS JOIN LATERAL (  -- the newest of each store by the index, then those of both; of turns what users stated
            SELECT m.memory_number, agent_private.place_of(m.session_id, m.turn) AS place
            FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner
              -- Both bounds and no equality: then no index but agent_memory_by_scope has this order. By number alone all
              -- memories would be read where a store has none.
              AND m.store >= f.store AND m.store <= f.store
              AND m.superseded_at IS NULL AND (everything OR agent_private.fits(m, filters, as_of))
              AND (m.store <> 'conversation' OR m.kind = 'user' AND NOT agent_private.is_question(m.content))
            ORDER BY m.store, m.memory_number DESC LIMIT l.many) AS n
        -- To fill up what words leave free; a few always, for the newest may matter more than the last of many words.
        ORDER BY n.memory_number DESC LIMIT (SELECT greatest(10, least(50, memory_limit - count(*))) FROM by_words)
    ), candidates AS (  -- what is no turn by its number, turns by their place, with the number of those found themselves
        SELECT max(c.memory_number) AS memory_number, c.place, max(c.own_words) AS own_words, max(c.own_weight) AS own_weight,
               max(c.word_points) AS word_points, max(c.vector_points) AS vector_points
        FROM (SELECT w.memory_number, NULL::bigint AS place, w.own_words, w.own_weight, w.points AS word_points, 0::double precision AS vector_points
              FROM by_words w WHERE w.place IS NULL
              UNION ALL
              SELECT v.memory_number, NULL, 0, 0, 0, v.points FROM by_vector v
              WHERE NOT EXISTS (SELECT FROM heard e WHERE e.memory_number = v.memory_number)
              UNION ALL
              SELECT n.memory_number, n.place, 0, 0, 0, 0 FROM newest n
              UNION ALL
              SELECT NULL, a.place, 0, 0, a.points, 0 FROM around a
              UNION ALL
              SELECT NULL, a.place, 0, 0, 0, a.points FROM around_vector a
              UNION ALL
              SELECT e.memory_number, e.place, e.own_words, e.own_weight, 0, 0 FROM heard e) AS c
        GROUP BY coalesce(c.place, -c.memory_number), c.place
    ), weighed AS MATERIALIZED (
        SELECT c.memory_number, c.place, c.own_words, c.own_weight, c.word_points / b.words AS word_points, coalesce(s.points / b.session, 0) AS session_points,
               c.vector_points / b.vector AS vector_points,
               c.word_points / b.words * least(1, b.words / all_weights) ^ rules.certainty
                   + coalesce(s.points / b.session, 0) * rules.session + c.vector_points * rules.vector AS points
        FROM candidates c
        CROSS JOIN (SELECT coalesce(nullif(max(x.word_points), 0), 1) AS words, coalesce(nullif(max(x.vector_points), 0), 1) AS vector,
                           (SELECT coalesce(nullif(max(y.points), 0), 1) FROM sessions y) AS session
                    FROM candidates x) AS b
        LEFT JOIN sessions s ON s.session = c.place >> 20
        ORDER BY points DESC, c.memory_number DESC LIMIT (SELECT greatest(150, least(memory_limit, 200) + 50))
    ), found AS MATERIALIZED (  -- narrow, for it is sorted six times; what is returned is looked up for the best alone
        SELECT m.*, w.own_words, w.own_weight, w.word_points, w.session_points, w.vector_points, w.points
        FROM weighed w
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.valid_from, x.speaker, x.turn IS NOT NULL AS is_turn, x.store <> 'application' AS is_stated,
                   (x.turn IS NOT NULL OR x.kind = 'conversation') AND agent_private.is_question(x.content) AS is_asked
            FROM public.agent_memory x
            WHERE x.memory_number = w.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
              AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
              AND (x.session_id IS NULL OR x.session_id <> coalesce(session_now, ''))
            LIMIT 1
        ) AS m
        WHERE w.memory_number IS NOT NULL
        UNION ALL
        SELECT m.*, w.own_words, w.own_weight, w.word_points, w.session_points, w.vector_points, w.points
        FROM weighed w
        JOIN (SELECT e.place >> 20 AS session, min(e.session_id) AS session_id FROM heard e GROUP BY e.place >> 20) AS s
          ON w.memory_number IS NULL AND s.session = w.place >> 20 AND s.session_id <> coalesce(session_now, '')
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.valid_from, x.speaker, x.turn IS NOT NULL, x.store <> 'application', agent_private.is_question(x.content)
            FROM public.agent_memory x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
              AND x.session_id = s.session_id AND x.turn = (w.place & 1048575)::integer AND x.superseded_at IS NULL
              AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
            LIMIT 1
        ) AS m
    ), named AS (
        SELECT s.speaker FROM (SELECT DISTINCT f.speaker FROM found f WHERE f.speaker IS NOT NULL) AS s
        WHERE EXISTS (SELECT FROM agent_private.lexemes(s.speaker, agent_private.text_language()) l WHERE l.lexeme = ANY (words))
    ), scored AS (
        SELECT f.memory_number, f.points + CASE WHEN n.speaker IS NULL THEN 0 ELSE rules.speaker END
               - CASE WHEN f.is_asked THEN asked ELSE 0 END
               + percent_rank() OVER (ORDER BY f.valid_from, f.memory_number) * CASE WHEN f.is_turn THEN newness_of_turns ELSE newness END
               - CASE WHEN f.own_words > 0 AND f.is_stated AND f.own_weight >= (SELECT 0.9::double precision * max(x.own_weight) FROM found x)
                      THEN updated * (1 - cume_dist() OVER (PARTITION BY f.own_words ORDER BY f.valid_from, f.memory_number)) ELSE 0 END
               AS sum_of_points, f.word_points, f.session_points, f.vector_points,
               rank() OVER (ORDER BY f.word_points DESC)::integer AS word_rank,
               rank() OVER (ORDER BY f.session_points DESC)::integer AS session_rank,
               rank() OVER (ORDER BY f.vector_points DESC)::integer AS vector_rank
        FROM found f
        LEFT JOIN named n ON n.speaker = f.speaker
    ), best AS (
        SELECT s.*, row_number() OVER (ORDER BY s.sum_of_points DESC, s.memory_number DESC) AS place
        FROM scored s
        ORDER BY s.sum_of_points DESC, s.memory_number DESC
        LIMIT least(memory_limit, 200)
    )
    SELECT m.memory_id, m.version, m.store, m.kind, m.content, m.trust, m.tags, m.speaker, m.session_id, m.turn,
           m.recorded_at, m.valid_from, b.sum_of_points,
           CASE WHEN b.word_points > 0 THEN '{words}'::text[] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN '{session}'::text[] END
               || CASE WHEN b.vector_points > 0 THEN '{vector}'::text[] END,
           CASE WHEN b.word_points > 0 THEN ARRAY[b.word_rank] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN ARRAY[b.session_rank] END
               || CASE WHEN b.vector_points > 0 THEN ARRAY[b.vector_rank] END,
           CASE WHEN b.word_points > 0 THEN ARRAY[b.word_points] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN ARRAY[b.session_points] END
               || CASE WHEN b.vector_points > 0 THEN ARRAY[b.vector_points] END,
           b.place
    FROM best b
    CROSS JOIN LATERAL (
        SELECT * FROM public.agent_memory x WHERE x.memory_number = b.memory_number AND x.tenant_id = tenant LIMIT 1) AS m;
END
$$;

-- ---- schemas/30_recall.sql

-- Recall: what is known that bears on a question, within the scopes of one identity.

-- Filters as they are asked with: {stores, kinds, tags, trust: lists of texts, session_id, since, until}. A memory fits
-- that has one of the stores, kinds and trusts, all of the tags, that session, and since <= valid_from < until. What is
-- absent or null does not count. PT422 for other keys, for values that are none and for more than 20,000 bytes.
CREATE FUNCTION agent_private.wanted(filters jsonb)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_key text;
    the_value jsonb;
BEGIN
    IF coalesce(filters, '{}') = '{}' THEN
        RETURN '{}';
    ELSIF jsonb_typeof(filters) <> 'object' THEN
        PERFORM agent_private.refuse('PT422', 'filters are an object');
    ELSIF octet_length(filters::text) > 20000 THEN  -- they are looked into for every memory
        PERFORM agent_private.refuse('PT422', 'filters have at most 20,000 bytes');
    END IF;
    filters := jsonb_strip_nulls(filters);
    FOR the_key, the_value IN SELECT f.key, f.value FROM jsonb_each(filters) AS f LOOP
        IF the_key IN ('stores', 'kinds', 'tags', 'trust') THEN
            IF jsonb_typeof(the_value) <> 'array' OR EXISTS (
                SELECT FROM jsonb_array_elements(the_value) AS v WHERE jsonb_typeof(v) <> 'string') THEN
                PERFORM agent_private.refuse('PT422', format('filter %s is a list of texts', the_key));
            END IF;
        ELSIF the_key IN ('session_id', 'since', 'until') THEN
            IF jsonb_typeof(the_value) <> 'string' THEN
                PERFORM agent_private.refuse('PT422', format('filter %s is a text', the_key));
            END IF;
            IF the_key <> 'session_id' THEN
                BEGIN  -- once here and not for every memory
                    filters := filters || jsonb_build_object(the_key, (the_value #>> '{}')::timestamptz);
                EXCEPTION WHEN invalid_datetime_format OR datetime_field_overflow OR invalid_parameter_value THEN
                    PERFORM agent_private.refuse('PT422', format('filter %s is a time', the_key));
                END;
            END IF;
        ELSE
            PERFORM agent_private.refuse('PT422', format(
                'no filter %s; there are stores, kinds, tags, trust, session_id, since and until', the_key));
        END IF;
    END LOOP;
    RETURN filters;
END
$$;

-- Whether a version was believed as_of (NULL: is current), was true then, and fits filters that wanted() has seen.
-- Without a search_path of its own, so that the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.fits(memory public.agent_memory, filters jsonb, as_of timestamptz)
RETURNS boolean
LANGUAGE sql STABLE
RETURN CASE WHEN as_of IS NULL THEN memory.superseded_at IS NULL
            ELSE memory.recorded_at <= as_of AND (memory.superseded_at IS NULL OR memory.superseded_at > as_of) END
       AND (memory.valid_to IS NULL OR memory.valid_to > coalesce(as_of, now()))
       AND (filters = '{}' OR (
           (NOT filters ? 'stores' OR filters -> 'stores' ? memory.store)
           AND (NOT filters ? 'kinds' OR filters -> 'kinds' ? memory.kind)
           AND (NOT filters ? 'trust' OR filters -> 'trust' ? memory.trust)
           AND (NOT filters ? 'tags' OR to_jsonb(memory.tags) @> (filters -> 'tags'))
           AND (NOT filters ? 'session_id' OR filters ->> 'session_id' = memory.session_id)
           AND (NOT filters ? 'since' OR memory.valid_from >= (filters ->> 'since')::timestamptz)
           AND (NOT filters ? 'until' OR memory.valid_from < (filters ->> 'until')::timestamptz)));

-- Everything known that bears on a question, in one call: {profile, session, memories}, each a list of
-- {memory_id, version, store, kind, field, content, trust, recorded_at, …}; empty lists where nobody asks.
-- stores says which are wanted. question_embedding is '[…]' as text, with the model that made it. json and not jsonb:
-- it is written once and never looked into here.
CREATE FUNCTION public.recall_context(
    identity jsonb, question text DEFAULT '', stores text[] DEFAULT '{user_profile,user_memory,session_context}',
    memory_limit integer DEFAULT 40, question_embedding text DEFAULT NULL, embedding_model text DEFAULT NULL)
RETURNS json
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    fields jsonb := '[]';
    memories json := '[]';
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    tenant := current_setting('agent.tenant_id', true);
    person := current_setting('agent.user_id', true);
    IF previous IS NULL THEN
        RETURN '{"profile": [], "session": [], "memories": []}';
    END IF;
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'memory_id', m.memory_id, 'version', m.version, 'store', m.store, 'field', m.field, 'value', m.value,
        'content', m.content, 'trust', m.trust, 'recorded_at', m.recorded_at) ORDER BY m.memory_number), '[]')
    INTO fields
    FROM public.agent_memory m
    WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.superseded_at IS NULL
      AND m.field IS NOT NULL
      AND ((m.store = 'user_profile' AND 'user_profile' = ANY (stores))
           OR (m.store = 'session_context' AND 'session_context' = ANY (stores)
               AND m.session_id = identity ->> 'session_id'));
    IF stores && '{user_memory,conversation}' THEN
        SELECT coalesce(json_agg(m), '[]') INTO memories  -- rows and not json_build_object, which costs twice as much
        FROM (SELECT r.memory_id, r.version, r.store, r.kind, r.content, r.trust, r.recorded_at, r.speaker, r.session_id, r.turn, r.valid_from
              FROM agent_private.rank_memories(
                  'user', person, question, agent_private.as_vector(question_embedding), embedding_model,
                  identity ->> 'session_id', memory_limit,
                  CASE WHEN stores @> '{user_memory,conversation}' THEN '{}'
                       ELSE jsonb_build_object('stores', ARRAY(SELECT s FROM unnest(stores) AS s WHERE s IN ('user_memory', 'conversation'))) END
                  ) AS r
              ORDER BY r.place) AS m;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN json_build_object(
        'profile', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'user_profile'),
        'session', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'session_context'),
        'memories', memories);
END
$$;

-- Whose the memories of a scope are, for the identity that was taken on: the user's, the agent's, or '' for those that all
-- of a tenant share. PT422 for another scope.
CREATE FUNCTION agent_private.owner_of_scope(the_scope text)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner text := CASE the_scope WHEN 'user' THEN current_setting('agent.user_id')
                                 WHEN 'agent' THEN current_setting('agent.agent_id')
                                 WHEN 'tenant' THEN '' END;
BEGIN
    IF owner IS NULL THEN
        PERFORM agent_private.refuse('PT422', format('scope %s is not user, agent or tenant', the_scope));
    END IF;
    RETURN owner;
END
$$;

-- The memories that fit a question best, for search: as in recall_context, over all sessions; [] where nobody asks or
-- where nothing has a word or a vector in common with it. the_scope: 'user' those of the user, 'agent' those of the
-- agent, 'tenant' what all of a tenant share, such as what discovery learned of the application; the last two for servers.
-- filters: see agent_private.wanted. as_of: what was believed at that time; NULL is now. why tells of each list that
-- found a memory, 'words' and 'vector' and others, its rank there and its score, 1 being the best of the list.
CREATE FUNCTION public.match_memories(
    identity jsonb, question text, memory_limit integer DEFAULT 5, question_embedding text DEFAULT NULL,
    embedding_model text DEFAULT NULL, the_scope text DEFAULT 'user', filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    previous text[];
    owner text;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    filters := agent_private.wanted(agent_private.document(filters));
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    owner := agent_private.owner_of_scope(the_scope);
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'memory_id', r.memory_id, 'version', r.version, 'store', r.store, 'kind', r.kind, 'content', r.content,
        'trust', r.trust, 'tags', r.tags, 'speaker', r.speaker, 'session_id', r.session_id, 'turn', r.turn,
        'recorded_at', r.recorded_at, 'valid_from', r.valid_from, 'score', round(r.score::numeric, 4),
        'why', (SELECT jsonb_object_agg(w.list, jsonb_build_object('rank', w.rank, 'score', round(w.score::numeric, 4)))
                FROM unnest(r.lists, r.list_ranks, r.list_scores) AS w (list, rank, score))) ORDER BY r.place), '[]')
    INTO found
    FROM agent_private.rank_memories(
        the_scope, owner, question, agent_private.as_vector(question_embedding), embedding_model, NULL, memory_limit,
        filters, as_of) AS r
    WHERE cardinality(r.lists) > 0;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- ---- schemas/35_conversation.sql

-- Conversations: what was said, message by message, as memories of store 'conversation'.

-- A text without blocks of recalled knowledge and without lines of one, so that what was recalled is not remembered
-- again; the same as without_recalled() in agent.learning.rendering.
CREATE FUNCTION agent_private.without_recalled(said text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- {1,1}? makes the whole take as little as it can; Postgres goes by the first part that has a preference.
    block CONSTANT text := '(?:(<|&lt;)\s{0,8}?learned_knowledge\s{0,8}?(>|&gt;).*?((<|&lt;)\s{0,8}?/\s{0,8}?learned_knowledge\s{0,8}?(>|&gt;)|\Z)){1,1}?';
    shown CONSTANT text := '^[ \t]*- .*\m\d{4}-\d\d-\d\d, (user|tool|model|external), id [0-9a-f]{8}\][ \t]*$';
    remaining text := said;
BEGIN
    IF strpos(lower(said), 'learned_knowledge') > 0 THEN
        remaining := regexp_replace(remaining, block, '', 'gi');
        -- Taking out a block may have made another of what was around it.
        remaining := left(remaining, coalesce(nullif(regexp_instr(remaining, block, 1, 1, 0, 'i'), 0) - 1, length(remaining)));
    END IF;
    IF strpos(remaining, ', id ') > 0 THEN
        remaining := regexp_replace(remaining, shown, '', 'gn');
    END IF;
    RETURN CASE WHEN remaining = said THEN said ELSE btrim(remaining, E' \t\n\r\f\v') END;
END
$$;

-- What is kept of a message: at most 20,000 characters, cut between words where there are any. NULL where it says
-- nothing: white space, punctuation and pictographs alone.
CREATE FUNCTION agent_private.turn_content(said text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN said !~ '[^\s[:punct:][:cntrl:]\u0080-\u00bf\u2000-\u2bff\u3000-\u3004\ufe00-\ufe0f\ufeff\U0001f000-\U0001faff\U000e0000-\U000e0fff]' THEN NULL
        WHEN length(said) <= 20000 THEN said
        ELSE left(said, 19700) || regexp_replace(substr(said, 19701, 300), '\s+\S*$', '') END;
$$;

-- Insert turns that are new, with evidence and words. turns: an array of {memory_id, session_id, turn, kind, speaker,
-- content, tags, trust, valid_from, source, run_id, message_id} in their order; version is 1 unless they say otherwise.
-- The caller holds the scope and has made sure that none of them is there. Returns how many.
CREATE FUNCTION agent_private.insert_turns(turns jsonb)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    person text := current_setting('agent.user_id');
    numbers bigint[];
BEGIN
    WITH inserted AS (
        INSERT INTO public.agent_memory (
            tenant_id, memory_id, version, store, kind, scope, owner_id, session_id, content, content_hash, tags, turn,
            speaker, trust, valid_from, source, run_id)
        SELECT tenant, t.memory_id, coalesce(t.version, 1), 'conversation', t.kind, 'user', person, t.session_id,
               t.content, agent_private.content_hash(t.content, t.session_id, t.turn), coalesce(t.tags, '{}'), t.turn,
               t.speaker, t.trust, coalesce(t.valid_from, now()), t.source, t.run_id
        FROM jsonb_array_elements(turns) WITH ORDINALITY AS e (item, position)
        CROSS JOIN LATERAL jsonb_populate_record(NULL::public.agent_memory, e.item) AS t
        ORDER BY e.position
        RETURNING memory_number)
    SELECT array_agg(i.memory_number) INTO numbers FROM inserted i;
    INSERT INTO public.agent_memory_evidence (tenant_id, memory_id, version, scope, owner_id, run_id, message_id)
    SELECT tenant, (e.item ->> 'memory_id')::uuid, coalesce((e.item ->> 'version')::integer, 1), 'user', person,
           e.item ->> 'run_id', agent_private.short_id(coalesce(e.item ->> 'message_id', ''))
    FROM jsonb_array_elements(turns) AS e (item)
    WHERE e.item ->> 'run_id' IS NOT NULL
    ON CONFLICT DO NOTHING;
    PERFORM agent_private.index_memories('user', person, numbers);
    RETURN coalesce(cardinality(numbers), 0);
END
$$;

-- Remember what was said in these runs, by the user and by the assistant, after what is remembered of their sessions.
-- What an earlier run of the session has told already, under the same message id and in the same words, is passed over.
-- Turns are numbered in the order in which runs are learned: where an older run comes late, its turns stand at the end,
-- with their date. Leans on the primary keys of agent_run and agent_memory and on agent_memory_one_per_turn. The caller
-- holds the scope; its version does not rise, because nothing that is learned rests on turns. Returns how many.
CREATE FUNCTION agent_private.remember_turns(run_ids text[])
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    person text := current_setting('agent.user_id');
    turns jsonb;
BEGIN
    WITH said AS MATERIALIZED (
        SELECT r.run_id, r.session_id, r.started_at, r.finished_at, e.position, e.message ->> 'role' AS kind,
               e.message ->> 'message_id' AS message_id, e.message ->> 'name' AS name,
               CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line,
               agent_private.turn_content(agent_private.without_recalled(e.message ->> 'content')) AS content
        FROM public.agent_run r
        CROSS JOIN LATERAL jsonb_array_elements(r.messages) WITH ORDINALITY AS e (message, position)
        WHERE r.tenant_id = tenant AND r.user_id = person AND r.run_id = ANY (run_ids)
          AND e.message ->> 'role' IN ('user', 'assistant')
    ), identified AS MATERIALIZED (
        -- The id comes from the message. One without an id of its own is named after its words, which may be said again.
        SELECT s.*, encode(substr(sha256(convert_to(jsonb_build_array(
                   tenant, person, s.session_id, CASE WHEN s.message_id LIKE 'said-%' THEN s.run_id ELSE '' END, s.message_id,
                   s.content)::text, 'UTF8')), 1, 16), 'hex')::uuid AS memory_id
        FROM said s WHERE s.content IS NOT NULL
    ), fresh AS (
        SELECT DISTINCT ON (i.memory_id) i.* FROM identified i
        WHERE NOT EXISTS (SELECT FROM public.agent_memory m WHERE m.tenant_id = tenant AND m.memory_id = i.memory_id)
        ORDER BY i.memory_id, i.finished_at, i.line, i.run_id, i.position
    ), placed AS (
        SELECT f.*, coalesce(last.turn, 0)
                    + row_number() OVER (PARTITION BY f.session_id ORDER BY f.finished_at, f.line, f.run_id, f.position) AS turn
        FROM fresh f
        LEFT JOIN LATERAL (
            SELECT m.turn FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.session_id = f.session_id
              AND m.superseded_at IS NULL AND m.turn IS NOT NULL
            ORDER BY m.turn DESC LIMIT 1) AS last ON true
    )
    SELECT jsonb_agg(jsonb_build_object(
        'memory_id', p.memory_id, 'session_id', p.session_id, 'turn', p.turn, 'kind', p.kind,
        'speaker', nullif(btrim(left(p.name, 200)), ''), 'content', p.content,
        'trust', CASE p.kind WHEN 'user' THEN 'user' ELSE 'model' END,
        'valid_from', CASE p.kind WHEN 'user' THEN least(p.started_at, p.finished_at) ELSE p.finished_at END,
        'source', 'verbatim', 'run_id', p.run_id, 'message_id', p.message_id) ORDER BY p.session_id, p.turn)
    INTO turns
    FROM placed p
    WHERE p.turn <= 1048575;  -- the number of a turn has 20 bits
    RETURN CASE WHEN turns IS NULL THEN 0 ELSE agent_private.insert_turns(turns) END;
END
$$;

-- What is wrong with the turns of a conversation that are handed in, in words; NULL where they can be kept.
CREATE FUNCTION agent_private.fault_of_turns(the_session text, turns jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF coalesce(the_session, '') !~ '\S' OR length(the_session) > 512 OR octet_length(the_session) > 800 THEN
        RETURN 'a conversation needs a session of at most 512 characters and 800 bytes';
    END IF;
    IF coalesce(jsonb_typeof(turns), 'null') <> 'array' OR jsonb_array_length(turns) > 5000 THEN
        RETURN 'turns are a list of at most 5,000 objects';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(turns) AS t
               WHERE coalesce(jsonb_typeof(t), 'null') <> 'object' OR coalesce(t ->> 'kind', '') NOT IN ('user', 'assistant')
                  OR jsonb_typeof(t -> 'content') IS DISTINCT FROM 'string'
                  OR jsonb_typeof(t -> 'turn') IS DISTINCT FROM 'number'
                  OR coalesce(jsonb_typeof(t -> 'speaker'), 'null') NOT IN ('string', 'null')
                  OR coalesce(jsonb_typeof(t -> 'valid_from'), 'null') NOT IN ('string', 'null')) THEN
        RETURN 'every turn needs its number, a kind (user or assistant) and a content; speaker and valid_from are texts';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(turns) AS t
               WHERE (t ->> 'turn')::numeric NOT BETWEEN 1 AND 1048575 OR (t ->> 'turn')::numeric % 1 <> 0)
       OR EXISTS (SELECT FROM jsonb_array_elements(turns) AS t GROUP BY (t ->> 'turn')::numeric HAVING count(*) > 1) THEN
        RETURN 'the turns of a session are numbers from 1 to 1048575, each once';
    END IF;
    RETURN NULL;
END
$$;

-- Remember a conversation that happened elsewhere, or a part of it: turns: [{turn, kind: user|assistant, content,
-- speaker?, tags?, valid_from?}], at most 5,000 in a call. A turn of the session that is there already stays as it is,
-- or gets a new version where it differs; what says nothing (see agent_private.turn_content) is left out. memory_limit:
-- greatest number of turns of the user; the oldest above it are retired. Leans on agent_memory_one_per_turn; locks the
-- scope. Returns {added, changed, unchanged, empty, retired_over_limit}.
CREATE FUNCTION public.add_turns(identity jsonb, the_session text, turns jsonb, memory_limit integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    fault text;
    compared record;
    changed public.agent_memory;
    retired integer;
BEGIN
    identity := agent_private.document(identity);
    turns := agent_private.document(turns);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be remembered for nobody: the identity has no tenant or no user');
    END IF;
    fault := agent_private.fault_of_turns(the_session, turns);
    IF fault IS NOT NULL THEN
        PERFORM agent_private.refuse('PT422', fault);
    END IF;
    tenant := current_setting('agent.tenant_id');
    person := agent_private.touch_scope('user');
    WITH given AS MATERIALIZED (
        SELECT (e.item ->> 'turn')::integer AS turn, e.item ->> 'kind' AS kind,
               agent_private.turn_content(agent_private.without_recalled(e.item ->> 'content')) AS content,
               nullif(btrim(left(e.item ->> 'speaker', 200)), '') AS speaker, agent_private.tags_of(e.item) AS tags,
               (e.item ->> 'valid_from')::timestamptz AS valid_from
        FROM jsonb_array_elements(turns) AS e (item)
    ), placed AS MATERIALIZED (
        SELECT g.*, m.memory_id, m.version, m.memory_number,
               CASE WHEN m.memory_id IS NOT NULL THEN  -- NULL for what is new
                   m.content_hash = agent_private.content_hash(g.content, the_session, g.turn) AND m.kind = g.kind
                   AND m.speaker IS NOT DISTINCT FROM g.speaker AND m.tags = g.tags
                   AND m.valid_from = coalesce(g.valid_from, m.valid_from) END AS is_same
        FROM given g
        LEFT JOIN public.agent_memory m
            ON m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.session_id = the_session
            AND m.turn = g.turn AND m.superseded_at IS NULL
        WHERE g.content IS NOT NULL
    )
    SELECT count(*) FILTER (WHERE p.is_same) AS unchanged,
           array_agg(p.memory_number) FILTER (WHERE NOT p.is_same) AS changed,
           count(*) FILTER (WHERE p.is_same IS NULL) AS added,
           jsonb_agg(jsonb_build_object(
               'memory_id', coalesce(p.memory_id, gen_random_uuid()), 'version', coalesce(p.version, 0) + 1,
               'session_id', the_session, 'turn', p.turn, 'kind', p.kind, 'speaker', p.speaker, 'content', p.content,
               'tags', to_jsonb(p.tags), 'trust', CASE p.kind WHEN 'user' THEN 'user' ELSE 'model' END,
               'valid_from', p.valid_from, 'source', 'import') ORDER BY p.turn) FILTER (WHERE p.is_same IS NOT TRUE) AS to_write
    INTO compared
    FROM placed p;
    FOR changed IN SELECT m.* FROM unnest(compared.changed) AS n JOIN public.agent_memory m ON m.memory_number = n LOOP
        PERFORM agent_private.close_memory(changed, 'updated');
    END LOOP;
    IF compared.to_write IS NOT NULL THEN
        PERFORM agent_private.insert_turns(compared.to_write);
    END IF;
    retired := agent_private.hold_to_limit('conversation', memory_limit);
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object(
        'added', compared.added, 'changed', coalesce(cardinality(compared.changed), 0), 'unchanged', compared.unchanged,
        'empty', jsonb_array_length(turns) - compared.added - compared.unchanged - coalesce(cardinality(compared.changed), 0),
        'retired_over_limit', retired);
END
$$;

-- ---- schemas/40_learning.sql

-- Learning: what waits, and the one transaction that applies what was learned from it.

-- The runs of a session that wait to be learned, oldest first, with what is known now and the version it was read at.
-- Returns {runs, scope_version, profile, session, memories}; memories are those nearest to what was said.
CREATE FUNCTION public.pending_learning(identity jsonb, run_limit integer DEFAULT 20, memory_limit integer DEFAULT 40)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    runs jsonb;
    known jsonb;
    said text;
    version_read bigint;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'learning needs a tenant and a user');
    END IF;
    -- The version is read before the memories: a write in between makes the check of apply_learning fail, never pass.
    SELECT s.version INTO version_read FROM public.agent_scope s
    WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.scope = 'user'
      AND s.owner_id = current_setting('agent.user_id');
    SELECT coalesce(jsonb_agg(jsonb_build_object(
               'run_id', r.run_id, 'agent_id', r.agent_id, 'status', r.status, 'messages', r.messages,
               'tool_errors', r.tool_errors, 'finished_at', r.finished_at) ORDER BY r.finished_at, r.line, r.run_id), '[]')
    INTO runs
    FROM (SELECT w.*, CASE WHEN jsonb_typeof(w.facts -> 'line') = 'number' THEN (w.facts ->> 'line')::numeric END AS line
          FROM public.agent_run w
          WHERE w.tenant_id = current_setting('agent.tenant_id') AND w.user_id = current_setting('agent.user_id')
            AND w.session_id = identity ->> 'session_id' AND w.learned_at IS NULL AND w.status = 'completed'
          ORDER BY w.finished_at, line, w.run_id LIMIT run_limit) AS r;
    SELECT left(string_agg(m ->> 'content', ' '), 4000) INTO said
    FROM jsonb_array_elements(runs) AS r, jsonb_array_elements(r -> 'messages') AS m
    WHERE m ->> 'role' = 'user';
    known := public.recall_context(identity - 'session_id', coalesce(said, ''),
                                   '{user_profile,user_memory}', memory_limit);
    known := known || jsonb_build_object('session', public.recall_context(
        identity, '', '{session_context}') -> 'session');
    PERFORM agent_private.leave(previous);
    RETURN known || jsonb_build_object('runs', runs, 'scope_version', coalesce(version_read, 0));
END
$$;

-- Apply what was learned from these runs and mark them learned: all of it or nothing.
-- operations: [{action: write|retire, …learning of write_memory or retire_memory}]. expected_version is the
-- scope_version that pending_learning gave (NULL: the operations rest on nothing that was known): if anything was written
-- since, or a run was learned already, it raises PT409 and changes nothing. limits: {store: greatest number of memories}.
-- keep_turns: whether what was said in the runs is remembered word for word. Returns {receipts, turns, retired_over_limit};
-- turns is how many.
CREATE FUNCTION public.apply_learning(
    identity jsonb, run_ids text[], operations jsonb, expected_version bigint, limits jsonb DEFAULT '{}',
    keep_turns boolean DEFAULT true)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    version_now bigint;
    marked integer;
    operation jsonb;
    receipts jsonb := '[]';
    turns integer := 0;
    over_limit integer := 0;
    stored record;
BEGIN
    identity := agent_private.document(identity);
    operations := agent_private.document(operations);
    limits := agent_private.document(limits);
    previous := agent_private.enter(identity);
    tenant := current_setting('agent.tenant_id', true);
    person := current_setting('agent.user_id', true);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'learning needs a tenant and a user');
    END IF;
    PERFORM agent_private.lock_shared_scopes(operations);
    INSERT INTO public.agent_scope (tenant_id, scope, owner_id) VALUES (tenant, 'user', person)
    ON CONFLICT DO NOTHING;
    SELECT s.version INTO version_now FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.owner_id = person FOR UPDATE;
    IF version_now <> expected_version THEN
        PERFORM agent_private.refuse('PT409', format('the memories are at version %s, these were read at %s', version_now, expected_version));
    END IF;
    UPDATE public.agent_run r SET learned_at = clock_timestamp()
    WHERE r.tenant_id = tenant AND r.user_id = person AND r.run_id = ANY (run_ids) AND r.learned_at IS NULL;
    GET DIAGNOSTICS marked = ROW_COUNT;
    IF marked <> cardinality(run_ids) THEN
        PERFORM agent_private.refuse('PT409', format('%s of %s runs were learned already', cardinality(run_ids) - marked, cardinality(run_ids)));
    END IF;
    FOR operation IN SELECT o FROM jsonb_array_elements(operations) AS o LOOP
        receipts := receipts || jsonb_build_array(agent_private.apply_operation(operation));
    END LOOP;
    IF keep_turns THEN
        turns := agent_private.remember_turns(run_ids);
    END IF;
    FOR stored IN SELECT key AS name, value::integer AS memory_limit FROM jsonb_each_text(limits) LOOP
        over_limit := over_limit + agent_private.hold_to_limit(stored.name, stored.memory_limit);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('receipts', receipts, 'turns', turns, 'retired_over_limit', over_limit);
END
$$;

-- Make waiting jobs due and wake the workers. Runs as its owner, because agent_app has no rights on the queue.
-- A first try and one after a failure are hurried; what failed twice waits for its time.
-- Returns {waiting: keys with a job that waits or runs, delayed: those of them that wait for their time}.
CREATE FUNCTION agent_private.expedite_jobs(keys text[])
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    woken bigint;
BEGIN
    WITH due AS (
        UPDATE agent_queue.procrastinate_jobs j SET scheduled_at = now()
        WHERE j.queueing_lock = ANY (keys) AND j.status = 'todo' AND j.scheduled_at > now()
          AND coalesce((j.args ->> 'attempt')::integer, 1) <= 2
        RETURNING j.id, j.queue_name)
    SELECT count(pg_notify('procrastinate_queue_v1#' || d.queue_name,
                           json_build_object('type', 'job_inserted', 'job_id', d.id)::text))
         + count(pg_notify('procrastinate_any_queue_v1', json_build_object('type', 'job_inserted', 'job_id', d.id)::text))
    INTO woken FROM due d;
    RETURN (SELECT jsonb_build_object('waiting', count(*),
                                      'delayed', count(*) FILTER (WHERE j.status = 'todo' AND j.scheduled_at > now()))
            FROM agent_queue.procrastinate_jobs j
            WHERE j.lock = ANY (keys) AND j.status IN ('todo', 'doing'));
END
$$;
REVOKE ALL ON FUNCTION agent_private.expedite_jobs(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.expedite_jobs(text[]) TO agent_app;

-- Have these sessions learned now rather than when they have been quiet, and tell how many are not learned yet.
-- sessions: [identity]. Returns {waiting, delayed}: see expedite_jobs.
CREATE FUNCTION public.expedite_learning(sessions jsonb)
RETURNS jsonb
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.expedite_jobs(ARRAY(
        SELECT agent_private.learning_key(s ->> 'tenant_id', s ->> 'user_id', s ->> 'session_id')
        FROM jsonb_array_elements(agent_private.document(sessions)) AS s));
$$;

-- The work of queue_state. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.queue_state(the_queue text)
RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers WHERE last_heartbeat > now() - interval '30 seconds'),
        'overdue_seconds', (SELECT coalesce(extract(epoch FROM now() - min(j.scheduled_at)), 0)
                            FROM agent_queue.procrastinate_jobs j
                            WHERE j.queue_name = the_queue AND j.status = 'todo' AND j.scheduled_at <= now()));
$$;
REVOKE ALL ON FUNCTION agent_private.queue_state(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.queue_state(text) TO agent_app;

-- How the queue of this process stands: {workers, overdue_seconds}; overdue is how long its oldest due job has waited.
CREATE FUNCTION public.queue_state(the_queue text)
RETURNS jsonb
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.queue_state(the_queue);
$$;

-- The work of retry_learning. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.reorder_learning(identity jsonb, the_queue text, delay_seconds double precision, attempt integer)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    key text := agent_private.learning_key(identity ->> 'tenant_id', identity ->> 'user_id', identity ->> 'session_id');
BEGIN
    PERFORM agent_queue.procrastinate_defer_jobs_v1(ARRAY[ROW(
        left(the_queue, 128), 'agent.learn_session', 0, key, key,
        jsonb_build_object('identity', identity, 'first_at', clock_timestamp(), 'attempt', attempt),
        clock_timestamp() + make_interval(secs => delay_seconds))::agent_queue.procrastinate_job_to_defer_v1]);
    RETURN true;
EXCEPTION WHEN unique_violation THEN
    RETURN false;
END
$$;
REVOKE ALL ON FUNCTION agent_private.reorder_learning(jsonb, text, double precision, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.reorder_learning(jsonb, text, double precision, integer) TO agent_app;

-- The work of rescue_learning: a dead worker's job is ordered anew, unless another job of its session waits already.
-- The new order is a new row, so that a worker that was only thought dead cannot finish it.
-- Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.rescue_jobs(stalled_seconds double precision)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    stalled record;
    rescued integer := 0;
BEGIN
    FOR stalled IN
        SELECT j.* FROM agent_queue.procrastinate_jobs j
        LEFT JOIN agent_queue.procrastinate_workers w ON w.id = j.worker_id
        WHERE j.status = 'doing'
          AND (w.id IS NULL OR w.last_heartbeat < now() - make_interval(secs => stalled_seconds))
        FOR UPDATE OF j SKIP LOCKED
    LOOP
        DELETE FROM agent_queue.procrastinate_jobs j WHERE j.id = stalled.id;
        BEGIN
            INSERT INTO agent_queue.procrastinate_jobs
                (queue_name, task_name, priority, lock, queueing_lock, args, scheduled_at, attempts)
            VALUES (stalled.queue_name, stalled.task_name, stalled.priority, stalled.lock, stalled.queueing_lock,
                    stalled.args, now(), stalled.attempts + 1);
        EXCEPTION WHEN unique_violation THEN
            NULL;
        END;
        rescued := rescued + 1;
    END LOOP;
    RETURN rescued;
END
$$;
REVOKE ALL ON FUNCTION agent_private.rescue_jobs(double precision) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.rescue_jobs(double precision) TO agent_app;

-- Order the learning of a session again after a failure, unless it is ordered already. Returns true where it was not.
CREATE FUNCTION public.retry_learning(identity jsonb, the_queue text, delay_seconds double precision, attempt integer)
RETURNS jsonb
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_jsonb(agent_private.reorder_learning(agent_private.document(identity), the_queue, delay_seconds, attempt));
$$;

-- The work of retry_failed_learning: what failed for good waits again from its first try, or goes where another job of
-- its session waits already. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.retry_failed_jobs(the_queues text[])
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    failed record;
    again integer := 0;
BEGIN
    FOR failed IN
        SELECT j.id FROM agent_queue.procrastinate_jobs j
        WHERE j.status = 'failed' AND j.task_name = 'agent.learn_session'
          AND (the_queues IS NULL OR j.queue_name = ANY (the_queues))
        FOR UPDATE OF j SKIP LOCKED
    LOOP
        BEGIN
            UPDATE agent_queue.procrastinate_jobs j
            SET status = 'todo', scheduled_at = now(), worker_id = NULL, args = j.args - 'attempt'
            WHERE j.id = failed.id;
            again := again + 1;
        EXCEPTION WHEN unique_violation THEN
            DELETE FROM agent_queue.procrastinate_jobs j WHERE j.id = failed.id;
        END;
    END LOOP;
    RETURN again;
END
$$;
REVOKE ALL ON FUNCTION agent_private.retry_failed_jobs(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.retry_failed_jobs(text[]) TO agent_app;

-- Have what failed for good tried again, of these queues or of all; a worker that starts may be better equipped than
-- the one before. Returns how many.
CREATE FUNCTION public.retry_failed_learning(the_queues text[] DEFAULT NULL)
RETURNS jsonb
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_jsonb(agent_private.retry_failed_jobs(the_queues));
$$;

-- Give the jobs of workers without a heartbeat for so long to others. Returns how many.
CREATE FUNCTION public.rescue_learning(stalled_seconds double precision)
RETURNS jsonb
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_jsonb(agent_private.rescue_jobs(stalled_seconds));
$$;

-- ---- schemas/45_embeddings.sql

-- Vectors: keeping them, the nearest to a question, and the lists by which large scopes are searched.

CREATE TABLE public.agent_memory_embedding (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    model text NOT NULL CHECK (model <> ''),
    dimensions integer NOT NULL,
    space text NOT NULL GENERATED ALWAYS AS (dimensions::text || ' ' || model) STORED,
    list integer NOT NULL DEFAULT 0,
    embedding halfvec NOT NULL,
    code bit varying NOT NULL GENERATED ALWAYS AS (agent_private.sign_code(embedding)) STORED,
    PRIMARY KEY (memory_number, model, dimensions),
    CONSTRAINT agent_memory_embedding_dimensions CHECK (vector_dims(embedding) = dimensions)
);
COMMENT ON TABLE public.agent_memory_embedding IS 'Vectors of the current memories that are searched, one per embedding model.';
COMMENT ON COLUMN public.agent_memory_embedding.space IS 'Dimensions and model: only vectors of one space are compared. In one column that only the index of codes has, so that a search cannot be planned over the primary key.';
COMMENT ON COLUMN public.agent_memory_embedding.embedding IS 'Of length 1, in half precision.';
COMMENT ON COLUMN public.agent_memory_embedding.list IS 'Which agent_embedding_list of its scope it is in; 0 for none yet.';
COMMENT ON COLUMN public.agent_memory_embedding.code IS 'The signs of its numbers: what a search looks at first.';
-- In the row itself up to a page, about 3900 numbers: a search reads a thousand of them.
ALTER TABLE public.agent_memory_embedding ALTER COLUMN embedding SET STORAGE MAIN;
-- Everything that a search and its row policy look at, so that it reads this index alone: 20,000 codes in 3 ms.
CREATE INDEX agent_memory_embedding_codes ON public.agent_memory_embedding
    (tenant_id, scope, owner_id, space, list, memory_number) INCLUDE (code);
-- Reading an index alone needs pages that vacuum has seen.
ALTER TABLE public.agent_memory_embedding SET (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE public.agent_embedding_list (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    list integer NOT NULL CHECK (list > 0),
    generation integer NOT NULL,
    centroid halfvec NOT NULL,
    PRIMARY KEY (tenant_id, scope, owner_id, model, dimensions, list)
);
COMMENT ON TABLE public.agent_embedding_list IS 'How the vectors of a large scope are parted: each is in the list whose centroid is nearest. Scopes of fewer than 100,000 memories have none.';
COMMENT ON COLUMN public.agent_embedding_list.generation IS 'Lists are made anew when a scope has grown fourfold; vectors move from the older generation bit by bit.';
ALTER TABLE public.agent_embedding_list ALTER COLUMN centroid SET STORAGE MAIN;

SELECT agent_private.guard(t), agent_private.own_scope(t)
FROM unnest(ARRAY['public.agent_memory_embedding', 'public.agent_embedding_list']::regclass[]) AS t;

-- The memories of one scope of one owner whose vectors are nearest to a question's, by this model and of the question's
-- dimensions: at most how_many, best first, with the cosine of the angle (0 for a vector of zeros, which has none).
-- Exact in scopes of up to 2000 memories and for vectors of fewer than 128 dimensions. In larger ones the vectors whose
-- codes differ least from the question's are compared, one in 25, at least 500 and at most 1000; in scopes with lists only
-- the codes in the nearest lists are looked at, about 128,000, and 3000 vectors are compared. Leans on
-- agent_memory_embedding_codes and on the primary keys; locks nothing.
-- STABLE: lists and vectors are read as of one moment, and no vector is missed that moves from list to list meanwhile.
CREATE FUNCTION agent_private.nearest(
    the_scope text, the_owner text, question_embedding vector, embedding_model text, how_many integer)
RETURNS TABLE (memory_number bigint, similarity double precision)
LANGUAGE plpgsql STABLE ROWS 100
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off  -- on tables that nobody has analyzed yet the planner would not read the index of codes
SET enable_bitmapscan = off
SET max_parallel_workers_per_gather = 0  -- to start a worker takes longer than most searches
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    size integer := agent_private.vector_dimensions(question_embedding);
    the_space text := size || ' ' || embedding_model;
    wanted public.agent_memory_embedding.embedding%TYPE := agent_private.unit_vector(question_embedding);
    wanted_code bit varying := agent_private.sign_code(wanted);
    memories integer;
    lists integer[];
    candidates bigint[];
BEGIN
    IF question_embedding IS NULL OR embedding_model IS NULL THEN
        RETURN;
    END IF;
    SELECT s.memory_count INTO memories FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
    IF size < 128 OR coalesce(memories, 0) <= 2000 THEN  -- a code of few bits tells little, and such vectors are small
        RETURN QUERY
        SELECT e.memory_number, -agent_private.divergence(e.embedding, wanted)
        FROM public.agent_memory_embedding e
        WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
        ORDER BY agent_private.divergence(e.embedding, wanted), e.memory_number DESC LIMIT how_many;
        RETURN;
    END IF;
    SELECT array_agg(l.list ORDER BY agent_private.divergence(l.centroid, wanted)) INTO lists
    FROM public.agent_embedding_list l
    WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = the_owner
      AND l.model = embedding_model AND l.dimensions = size;
    IF lists IS NULL THEN
        candidates := ARRAY(
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
            ORDER BY agent_private.code_distance(e.code, wanted_code) LIMIT greatest(how_many, 500, least(memories / 25, 1000)));
    ELSE
        lists := lists[1:greatest(16, ceil(128000.0 * cardinality(lists) / memories)::integer)] || 0;
        candidates := ARRAY(
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
              AND e.list = ANY (lists)
            ORDER BY agent_private.code_distance(e.code, wanted_code) LIMIT greatest(3000, how_many));
    END IF;
    RETURN QUERY
    SELECT e.memory_number, -agent_private.divergence(e.embedding, wanted)
    FROM public.agent_memory_embedding e
    WHERE e.memory_number = ANY (candidates) AND e.model = embedding_model AND e.dimensions = size
    ORDER BY agent_private.divergence(e.embedding, wanted), e.memory_number DESC LIMIT how_many;
END
$$;

-- Memories of a scope that are searched and have no vector of this model, and of these dimensions where they are given:
-- behind one name a server may put another model. Newest first: [{memory_number, content}], content being the text that
-- is searched, of a turn with who said it. the_scope as in match_memories. Reads all memories of the scope.
CREATE FUNCTION public.memories_without_embedding(
    identity jsonb, model text, memory_limit integer DEFAULT 100, dimensions integer DEFAULT NULL,
    the_scope text DEFAULT 'user')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    owner text;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    owner := agent_private.owner_of_scope(the_scope);
    SELECT coalesce(jsonb_agg(jsonb_build_object('memory_number', x.memory_number, 'content', x.content)), '[]') INTO found
    FROM (SELECT m.memory_number, agent_private.searched_text(m) AS content FROM public.agent_memory m
          WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
            AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
            AND NOT EXISTS (SELECT FROM public.agent_memory_embedding e
                            WHERE e.memory_number = m.memory_number
                              AND e.model = memories_without_embedding.model
                              AND e.dimensions = coalesce(memories_without_embedding.dimensions, e.dimensions))
          ORDER BY m.memory_number DESC LIMIT memory_limit) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The owners in a tenant who have memories that are searched and have no vector of this model: [{scope, owner_id}], at
-- most so many. Reads all memories of the tenant where none is missing.
CREATE FUNCTION public.owners_without_embedding(identity jsonb, model text, owner_limit integer DEFAULT 1000)
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
    SELECT coalesce(jsonb_agg(jsonb_build_object('scope', o.scope, 'owner_id', o.owner_id)), '[]') INTO found
    FROM (SELECT s.scope, s.owner_id FROM public.agent_scope s
          WHERE s.tenant_id = current_setting('agent.tenant_id')
            AND EXISTS (SELECT FROM public.agent_memory m
                        WHERE m.tenant_id = s.tenant_id AND m.scope = s.scope AND m.owner_id = s.owner_id
                          AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
                          AND NOT EXISTS (SELECT FROM public.agent_memory_embedding e
                                          WHERE e.memory_number = m.memory_number
                                            AND e.model = owners_without_embedding.model))
          ORDER BY s.scope, s.owner_id LIMIT owner_limit) AS o;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Store vectors: [{memory_number, embedding: '[…]'}]; those of memories that are gone meanwhile are dropped.
-- Returns how many were stored. the_scope as in match_memories.
CREATE FUNCTION public.store_embeddings(identity jsonb, model text, embeddings jsonb, the_scope text DEFAULT 'user')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    owner text;
    stored integer;
BEGIN
    identity := agent_private.document(identity);
    embeddings := agent_private.document(embeddings);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'storing vectors needs a tenant and a user');
    END IF;
    owner := agent_private.owner_of_scope(the_scope);
    INSERT INTO public.agent_memory_embedding (tenant_id, scope, owner_id, memory_number, model, dimensions, embedding)
    SELECT m.tenant_id, m.scope, m.owner_id, m.memory_number, store_embeddings.model,
           agent_private.vector_dimensions(v.given), agent_private.unit_vector(v.given)
    FROM jsonb_array_elements(embeddings) AS e
    CROSS JOIN LATERAL (SELECT agent_private.as_vector(e ->> 'embedding') OFFSET 0) AS v (given)
    JOIN public.agent_memory m ON m.memory_number = (e ->> 'memory_number')::bigint
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
      AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS stored = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(stored);
END
$$;

DO $do$
DECLARE
    home text := (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector');
BEGIN
    EXECUTE format($function$
-- Make lists for a scope: centroids of as many parts as it has thousands of vectors, by one step of k-means over a sample
-- of ten vectors a list. Measured on vectors of all-MiniLM-L6-v2, more steps find little more.
CREATE FUNCTION agent_private.make_lists(the_scope text, the_owner text, the_model text, the_dimensions integer, vectors integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    lists integer := greatest(1, least(vectors / 1000, 4000));
    last_list integer;
    last_generation integer;
BEGIN
    SELECT coalesce(max(l.list), 0), coalesce(max(l.generation), 0) INTO last_list, last_generation
    FROM public.agent_embedding_list l
    WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = the_owner
      AND l.model = the_model AND l.dimensions = the_dimensions;
    INSERT INTO public.agent_embedding_list (tenant_id, scope, owner_id, model, dimensions, list, generation, centroid)
    WITH chosen AS MATERIALIZED (
        SELECT e.memory_number, row_number() OVER () AS place
        FROM (SELECT x.memory_number FROM public.agent_memory_embedding x
              WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
                AND x.space = the_dimensions || ' ' || the_model
              ORDER BY random() LIMIT 10 * lists) AS e
    ), sample AS MATERIALIZED (
        SELECT c.place, e.embedding
        FROM chosen c
        JOIN public.agent_memory_embedding e
          ON e.memory_number = c.memory_number AND e.model = the_model AND e.dimensions = the_dimensions
    ), seeds AS MATERIALIZED (
        SELECT s.place, s.embedding FROM sample s WHERE s.place <= lists
    ), parted AS (
        SELECT (SELECT p.place FROM seeds p ORDER BY agent_private.divergence(p.embedding, s.embedding), p.place LIMIT 1) AS place, s.embedding
        FROM sample s
    )
    SELECT tenant, the_scope, the_owner, the_model, the_dimensions, last_list + row_number() OVER (), last_generation + 1, p.mean
    FROM (SELECT %1$I.avg(parted.embedding) AS mean FROM parted GROUP BY parted.place) AS p;
END
$$
    $function$, home);
END
$do$;

-- Part the vectors of a large scope into lists, or bring new vectors into theirs, at most row_limit of them: called
-- again and again, in the background, until it returns fewer. Returns how many were moved; 0 for a scope of fewer than
-- 100,000 memories and while another call does it. the_scope as in match_memories. Locks only the vectors it moves.
CREATE FUNCTION public.arrange_embeddings(
    identity jsonb, model text, dimensions integer, the_scope text DEFAULT 'user', row_limit integer DEFAULT 2000)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    owner text;
    vectors integer;
    newest record;
    moved integer := 0;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '0';
    END IF;
    tenant := current_setting('agent.tenant_id');
    owner := agent_private.owner_of_scope(the_scope);
    SELECT s.memory_count INTO vectors FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = owner;
    IF coalesce(vectors, 0) >= 100000
       AND pg_try_advisory_xact_lock(hashtextextended(concat_ws(chr(31), 'agent_embedding_list', tenant, the_scope, owner, model, dimensions), 0)) THEN
        FOR attempt IN 1..2 LOOP
            SELECT max(l.generation) AS generation, min(l.list) AS first_list, count(*) AS lists INTO newest
            FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation = (SELECT max(g.generation) FROM public.agent_embedding_list g
                                  WHERE g.tenant_id = tenant AND g.scope = the_scope AND g.owner_id = owner
                                    AND g.model = arrange_embeddings.model AND g.dimensions = arrange_embeddings.dimensions);
            EXIT WHEN newest.lists > 0 AND (vectors <= 4000 * newest.lists OR newest.lists >= 4000);
            PERFORM agent_private.make_lists(the_scope, owner, model, dimensions, vectors);
        END LOOP;
        WITH centroids AS MATERIALIZED (
            SELECT l.list, l.centroid FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation = newest.generation
        ), waiting AS MATERIALIZED (
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = owner
              AND e.space = arrange_embeddings.dimensions || ' ' || arrange_embeddings.model
              AND e.list < newest.first_list
            ORDER BY e.list, e.memory_number LIMIT row_limit
        )
        UPDATE public.agent_memory_embedding e
        SET list = (SELECT c.list FROM centroids c ORDER BY agent_private.divergence(c.centroid, e.embedding), c.list LIMIT 1)
        FROM waiting w
        WHERE e.memory_number = w.memory_number AND e.model = arrange_embeddings.model AND e.dimensions = arrange_embeddings.dimensions;
        GET DIAGNOSTICS moved = ROW_COUNT;
        IF moved < row_limit THEN
            DELETE FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation < newest.generation;
        END IF;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(moved);
END
$$;

-- ---- schemas/50_operations.sql

-- The storage operations: get, list, write, delete and clear, each within one identity.

-- Write one memory: see agent_private.write_memory for the keys of learning. memory_limit: greatest number of memories
-- of this store; the oldest above it are retired. Returns the receipt.
CREATE FUNCTION public.upsert_learning(identity jsonb, learning jsonb, memory_limit integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    learning := agent_private.document(learning);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be written for nobody: the identity has no tenant or no user');
    END IF;
    receipt := agent_private.write_memory(learning || jsonb_strip_nulls(jsonb_build_object(
        'run_id', identity ->> 'run_id',
        'source', coalesce(learning ->> 'source', 'api'))));
    PERFORM agent_private.hold_to_limit(learning ->> 'store', memory_limit);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- Several fields or memories in one transaction, all of them or none: [{action: write|retire, …}].
-- limits: {store: greatest number of memories}. Returns receipts.
CREATE FUNCTION public.upsert_learnings(identity jsonb, learnings jsonb, limits jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    learning jsonb;
    receipts jsonb := '[]';
    stored record;
BEGIN
    identity := agent_private.document(identity);
    learnings := agent_private.document(learnings);
    limits := agent_private.document(limits);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be written for nobody: the identity has no tenant or no user');
    END IF;
    PERFORM agent_private.lock_shared_scopes(learnings);
    FOR learning IN SELECT l FROM jsonb_array_elements(learnings) AS l LOOP
        receipts := receipts || jsonb_build_array(agent_private.apply_operation(
            learning || jsonb_strip_nulls(jsonb_build_object(
                'run_id', identity ->> 'run_id', 'source', coalesce(learning ->> 'source', 'api')))));
    END LOOP;
    FOR stored IN SELECT key AS name, value::integer AS memory_limit FROM jsonb_each_text(limits) LOOP
        PERFORM agent_private.hold_to_limit(stored.name, stored.memory_limit);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN receipts;
END
$$;

-- One memory with its versions and evidence, or NULL where this identity has none of that id.
CREATE FUNCTION public.get_learning(identity jsonb, the_memory_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT to_jsonb(m) - 'content_hash' - 'memory_number' || jsonb_build_object(
        'versions', (SELECT jsonb_agg(jsonb_build_object(
                         'version', v.version, 'content', v.content, 'value', v.value, 'recorded_at', v.recorded_at,
                         'superseded_at', v.superseded_at, 'superseded_reason', v.superseded_reason) ORDER BY v.version)
                     FROM public.agent_memory v WHERE v.tenant_id = m.tenant_id AND v.memory_id = m.memory_id),
        'evidence', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                         'version', e.version, 'run_id', e.run_id, 'message_id', e.message_id,
                         'tool_call_id', e.tool_call_id, 'quote', e.quote, 'recorded_at', e.recorded_at)
                         ORDER BY e.version, e.recorded_at, e.message_id), '[]')
                     FROM public.agent_memory_evidence e WHERE e.tenant_id = m.tenant_id AND e.memory_id = m.memory_id))
    INTO found
    FROM public.agent_memory m
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.memory_id = the_memory_id
    ORDER BY m.version DESC LIMIT 1;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Current memories of an identity, newest first. wanted: any of store, kind, field, session_id and begins (of the id) must
-- fit. Turns of conversations come where the store conversation or an id is wanted; they would hide all else.
CREATE FUNCTION public.get_learnings(identity jsonb, wanted jsonb DEFAULT '{}', memory_limit integer DEFAULT 100, memory_offset integer DEFAULT 0)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x) - 'content_hash' ORDER BY x.memory_number DESC), '[]') INTO found
    FROM (SELECT m.* FROM public.agent_memory m
          WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.superseded_at IS NULL
            AND m.scope = 'user' AND m.owner_id = current_setting('agent.user_id')
            AND (m.store = wanted ->> 'store' OR wanted ->> 'store' IS NULL
                 AND (m.store <> 'conversation' OR wanted ->> 'begins' IS NOT NULL))
            AND (wanted ->> 'begins' IS NULL OR starts_with(m.memory_id::text, wanted ->> 'begins'))
            AND (wanted ->> 'kind' IS NULL OR m.kind = wanted ->> 'kind')
            AND (wanted ->> 'field' IS NULL OR m.field = wanted ->> 'field')
            AND (wanted ->> 'session_id' IS NULL OR m.session_id = wanted ->> 'session_id')
          ORDER BY m.memory_number DESC LIMIT least(memory_limit, 10000) OFFSET memory_offset) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Delete memories for good, all their versions, words, vectors and evidence. Returns how many memories went.
CREATE FUNCTION agent_private.delete_memories(the_ids uuid[])
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target public.agent_memory;
    gone integer;
BEGIN
    PERFORM agent_private.touch_scope('user');
    FOR target IN
        SELECT * FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.memory_id = ANY (the_ids) AND m.superseded_at IS NULL
    LOOP
        PERFORM agent_private.close_memory(target, 'deleted');
    END LOOP;
    WITH deleted AS (
        DELETE FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.memory_id = ANY (the_ids)
        RETURNING m.memory_id)
    SELECT count(DISTINCT d.memory_id) INTO gone FROM deleted d;
    RETURN gone;
END
$$;

-- Delete one memory for good. Returns true, or false where this identity has none of that id.
CREATE FUNCTION public.delete_learning(identity jsonb, the_memory_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be deleted for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(ARRAY[the_memory_id]);
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone > 0);
END
$$;

-- Delete the memories named for good; ids of others are passed over. Returns how many went.
CREATE FUNCTION public.delete_learnings(identity jsonb, the_memory_ids uuid[])
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be deleted for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(the_memory_ids);
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone);
END
$$;

-- Delete all memories of an identity for good, of one store or of all. Returns how many went.
CREATE FUNCTION public.clear_learnings(identity jsonb, the_store text DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be cleared for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(ARRAY(
        SELECT DISTINCT m.memory_id FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND (the_store IS NULL OR m.store = the_store)));
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone);
END
$$;

-- Erase what later parts of the schema hold of a user; each of them replaces this. The caller has entered. Returns the
-- number of rows changed per table.
CREATE FUNCTION agent_private.erase_elsewhere(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN '{}';
END
$$;

-- Erase a user: memories with all versions, evidence, words and vectors, runs, exposures, outcomes and waiting jobs.
-- For operators. Returns the number of rows gone per table.
CREATE FUNCTION public.erase_user(identity jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    counts jsonb := '{}';
    known boolean;
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    tenant := identity ->> 'tenant_id';
    person := nullif(identity ->> 'user_id', '');
    IF previous IS NULL OR person IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'to erase a user, name the tenant and the user');
    END IF;
    known := EXISTS (SELECT FROM public.agent_scope s
                     WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.owner_id = person);
    -- Waits for writers of this user and keeps new ones out until all is gone.
    PERFORM agent_private.touch_scope('user');
    DELETE FROM public.agent_memory_evidence e WHERE e.tenant_id = tenant AND e.scope = 'user' AND e.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_evidence', gone);
    DELETE FROM public.agent_memory_term t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_term', gone);
    DELETE FROM public.agent_memory_past_term t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_past_term', gone);
    DELETE FROM public.agent_term_count t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_term_count', gone);
    DELETE FROM public.agent_memory_embedding e WHERE e.tenant_id = tenant AND e.scope = 'user' AND e.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_embedding', gone);
    DELETE FROM public.agent_embedding_list l WHERE l.tenant_id = tenant AND l.scope = 'user' AND l.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_embedding_list', gone);
    DELETE FROM public.agent_memory m WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory', gone);
    DELETE FROM public.agent_exposure e WHERE e.tenant_id = tenant AND e.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_exposure', gone);
    DELETE FROM public.agent_outcome o WHERE o.tenant_id = tenant AND o.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_outcome', gone);
    DELETE FROM public.agent_run r WHERE r.tenant_id = tenant AND r.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_run', gone);
    DELETE FROM public.agent_scope s WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_scope', known::integer);
    gone := agent_private.forget_jobs(tenant, person); counts := counts || jsonb_build_object('procrastinate_jobs', gone);
    counts := counts || agent_private.erase_elsewhere(tenant, person);
    PERFORM agent_private.leave(previous);
    RETURN counts;
END
$$;

-- Take a user's jobs out of the queue, done ones and those at work too: a worker that learns this user right now finds
-- nothing left to apply. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.forget_jobs(the_tenant text, the_user text)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    gone integer;
BEGIN
    DELETE FROM agent_queue.procrastinate_jobs j
    WHERE j.args #>> '{identity,tenant_id}' = the_tenant AND j.args #>> '{identity,user_id}' = the_user;
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;
REVOKE ALL ON FUNCTION agent_private.forget_jobs(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.forget_jobs(text, text) TO agent_app;

-- Who has memories in a tenant, how many, and how many turns of conversations beside them; for operators.
CREATE FUNCTION public.list_users(identity jsonb)
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
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.last_recorded_at DESC), '[]') INTO found
    FROM (SELECT m.owner_id AS user_id, count(*) FILTER (WHERE m.store <> 'conversation') AS memories,
                 count(*) FILTER (WHERE m.store = 'conversation') AS turns, max(m.recorded_at) AS last_recorded_at
          FROM public.agent_memory m
          WHERE m.tenant_id = identity ->> 'tenant_id' AND m.scope = 'user' AND m.superseded_at IS NULL
          GROUP BY m.owner_id) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- How far the database is and how much waits; for `agent doctor`. Counts are of one tenant.
CREATE FUNCTION public.learning_status(identity jsonb)
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
        PERFORM agent_private.refuse('PT403', 'no tenant to report on');
    END IF;
    found := jsonb_build_object(
        'memories', (SELECT count(*) FROM public.agent_memory m WHERE m.superseded_at IS NULL AND m.store <> 'conversation'),
        'turns', (SELECT count(*) FROM public.agent_memory m WHERE m.superseded_at IS NULL AND m.store = 'conversation'),
        'runs', (SELECT count(*) FROM public.agent_run),
        'runs_waiting', (SELECT count(*) FROM public.agent_run r
                         WHERE r.learned_at IS NULL AND r.status = 'completed' AND r.user_id IS NOT NULL)
    ) || agent_private.queue_status();
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Jobs by state and workers alive. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.queue_status()
RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
        'jobs_waiting', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'todo'),
        'jobs_running', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'doing'),
        'jobs_failed', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'failed'),
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers WHERE last_heartbeat > now() - interval '30 seconds'));
$$;
REVOKE ALL ON FUNCTION agent_private.queue_status() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.queue_status() TO agent_app;

-- ---- schemas/60_grants.sql

-- Who may call what. Everything belongs to agent_app; nothing is for anon.

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private'
  AND p.proname NOT IN ('publish', 'guard', 'own_scope', 'enqueue_learning', 'forget_jobs', 'queue_status', 'expedite_jobs', 'queue_state',
                        'reorder_learning', 'rescue_jobs', 'retry_failed_jobs');

-- A user with a JWT may recall and search, record runs, and look after their own memories.
SELECT agent_private.publish(f, 'user') FROM unnest(ARRAY[
    'public.recall_context(jsonb, text, text[], integer, text, text)',
    'public.match_memories(jsonb, text, integer, text, text, text, jsonb, timestamptz)',
    'public.record_run(jsonb, jsonb)',
    'public.upsert_learning(jsonb, jsonb, integer)',
    'public.upsert_learnings(jsonb, jsonb, jsonb)',
    'public.get_learning(jsonb, uuid)',
    'public.get_learnings(jsonb, jsonb, integer, integer)',
    'public.delete_learning(jsonb, uuid)',
    'public.delete_learnings(jsonb, uuid[])',
    'public.clear_learnings(jsonb, text)',
    'public.add_turns(jsonb, text, jsonb, integer)']::regprocedure[]) AS f;

-- Learning, importing, listing over users and erasing are for servers.
SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.pending_learning(jsonb, integer, integer)',
    'public.apply_learning(jsonb, text[], jsonb, bigint, jsonb, boolean)',
    'public.expedite_learning(jsonb)',
    'public.queue_state(text)',
    'public.retry_learning(jsonb, text, double precision, integer)',
    'public.rescue_learning(double precision)',
    'public.retry_failed_learning(text[])',
    'public.memories_without_embedding(jsonb, text, integer, integer, text)',
    'public.store_embeddings(jsonb, text, jsonb, text)',
    'public.arrange_embeddings(jsonb, text, integer, text, integer)',
    'public.owners_without_embedding(jsonb, text, integer)',
    'public.import_runs(jsonb, jsonb)',
    'public.list_runs(jsonb, jsonb, integer, integer)',
    'public.get_run(jsonb, text)',
    'public.list_users(jsonb)',
    'public.erase_user(jsonb)',
    'public.set_text_language(jsonb, text)',
    'public.reindex_words(jsonb, integer)',
    'public.learning_status(jsonb)']::regprocedure[]) AS f;

-- ---- registration

INSERT INTO public.agent_migration (name, checksum) VALUES ('20250101000000_agent_learning_system.sql', NULL) ON CONFLICT DO NOTHING;
DO $$
DECLARE other text;
BEGIN
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
        EXECUTE format('REVOKE ALL ON TABLE public.agent_migration FROM %I', other);
    END LOOP;
END
$$;
RESET search_path;
