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
