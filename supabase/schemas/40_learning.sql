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
