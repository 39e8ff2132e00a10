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
