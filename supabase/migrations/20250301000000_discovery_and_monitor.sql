-- Discovery of the application, the background learner, the monitor and its alerts. Made from supabase/schemas/ by supabase/build_migrations.sh.

-- ---- schemas/90_app_structure.sql

-- What discovery found of the application's database.

-- ---- schemas/92_learner.sql

-- Clocks: what is done once per time slot, however many replicas tick.

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

SELECT agent_private.guard(t) FROM unnest(ARRAY['public.agent_tick', 'public.agent_clock']::regclass[]) AS t;

-- Which queues a worker works on, where it does not work on all of them.
CREATE TABLE agent_queue.agent_worker (
    worker_id bigint PRIMARY KEY REFERENCES agent_queue.procrastinate_workers (id) ON DELETE CASCADE,
    queues text[] NOT NULL
);
COMMENT ON TABLE agent_queue.agent_worker IS 'The queues of a worker that does not work on all; the table of the queue itself does not say.';
GRANT SELECT, INSERT, UPDATE, DELETE ON agent_queue.agent_worker TO agent_server;

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
    IF EXISTS (SELECT FROM agent_queue.procrastinate_jobs j WHERE j.lock = key AND j.status IN ('todo', 'doing')) THEN
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

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_tick', 'agent_clock'] LOOP
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
    'public.clock_status(jsonb, double precision, integer)']::regprocedure[]) AS f;

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

-- How this database and the work on it stand, over all tenants, in numbers alone: {migrations, workers, jobs: {due, later,
-- running, failed}, queue_age_seconds, approvals: {risk: {pending, oldest_seconds}}}. For servers. Changes nothing; counts
-- no more than job_limit jobs, and finds approvals by human_approval_queue_open.
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
