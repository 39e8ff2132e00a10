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
