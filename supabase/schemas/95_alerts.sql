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
