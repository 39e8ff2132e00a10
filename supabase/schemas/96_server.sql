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
