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
