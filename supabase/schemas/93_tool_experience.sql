-- What runs teach about tools: their errors as templates, and what tells a call that fails from one that does not.

CREATE TABLE public.agent_tool_run (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    run_id text NOT NULL,
    user_id text,
    status text NOT NULL,
    finished_at timestamptz NOT NULL,
    learned_at timestamptz NOT NULL DEFAULT now(),
    risk_limit double precision NOT NULL CHECK (risk_limit BETWEEN 0 AND 1),
    PRIMARY KEY (tenant_id, run_id)
);
COMMENT ON TABLE public.agent_tool_run IS 'Runs whose tool calls are counted, each once; one that was delivered again with another status, or given to a user, is counted anew.';
COMMENT ON COLUMN public.agent_tool_run.risk_limit IS 'From which risk calls are warned of, as the learner had it after this run: that of the latest run holds.';
CREATE INDEX agent_tool_run_by_user ON public.agent_tool_run (tenant_id, user_id);
CREATE INDEX agent_tool_run_by_time ON public.agent_tool_run (tenant_id, learned_at DESC);

CREATE TABLE public.agent_tool_call (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    call_number integer NOT NULL,
    user_id text,
    tool text NOT NULL CHECK (tool <> ''),
    template text,
    tool_call_id text NOT NULL DEFAULT '',
    message_id text NOT NULL DEFAULT '',
    called_at timestamptz NOT NULL,
    conditions jsonb NOT NULL CHECK (jsonb_typeof(conditions) = 'object'),
    risk double precision NOT NULL,
    is_repeat boolean NOT NULL,
    was_warned boolean NOT NULL,
    call_order bigint GENERATED ALWAYS AS IDENTITY,
    PRIMARY KEY (tenant_id, run_id, call_number)
);
COMMENT ON TABLE public.agent_tool_call IS 'Tool calls of runs: what held before each of them, as numbers that say nothing of its values, and what became of it.';
COMMENT ON COLUMN public.agent_tool_call.template IS 'The template of its error; NULL where it succeeded.';
COMMENT ON COLUMN public.agent_tool_call.called_at IS 'When its run began; calls of a run have no time of their own.';
COMMENT ON COLUMN public.agent_tool_call.conditions IS 'Weight of each condition, by its number.';
COMMENT ON COLUMN public.agent_tool_call.risk IS 'The highest risk of any error by what was known before the call was learned.';
COMMENT ON COLUMN public.agent_tool_call.was_warned IS 'Whether that would have warned: of this very error where it failed, of any where it did not.';
CREATE INDEX agent_tool_call_by_tool ON public.agent_tool_call (tenant_id, tool, call_order DESC);
CREATE INDEX agent_tool_call_by_user ON public.agent_tool_call (tenant_id, user_id);

CREATE TABLE public.agent_tool_error (
    tenant_id text NOT NULL,
    error_id uuid NOT NULL DEFAULT gen_random_uuid(),
    tool text NOT NULL,
    template text NOT NULL CHECK (length(template) BETWEEN 1 AND 300),
    failures integer NOT NULL CHECK (failures >= 0),
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    base double precision,
    fitted_to bigint NOT NULL DEFAULT 0,
    reasons jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(reasons) = 'array'),
    memory_id uuid,
    PRIMARY KEY (tenant_id, error_id),
    UNIQUE (tenant_id, tool, template)
);
COMMENT ON TABLE public.agent_tool_error IS 'Errors of tools, as templates, and the model that tells which calls run into them.';
COMMENT ON COLUMN public.agent_tool_error.base IS 'Log odds of the error where no condition is known; NULL before a model was fitted.';
COMMENT ON COLUMN public.agent_tool_error.fitted_to IS 'The last call that the models of the tool were fitted to.';
COMMENT ON COLUMN public.agent_tool_error.reasons IS 'What calls that fail with it have in common, in words: {text, failures, calls}, the most telling first.';

CREATE TABLE public.agent_tool_weight (
    tenant_id text NOT NULL,
    error_id uuid NOT NULL,
    condition bigint NOT NULL,
    weight double precision NOT NULL,
    PRIMARY KEY (tenant_id, error_id, condition),
    FOREIGN KEY (tenant_id, error_id) REFERENCES public.agent_tool_error ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_tool_weight IS 'How much each condition adds to the log odds of an error.';

CREATE TABLE public.agent_tool_condition (
    tenant_id text NOT NULL,
    tool text NOT NULL,
    condition bigint NOT NULL,
    kind text NOT NULL,
    shown text NOT NULL,
    opened text NOT NULL DEFAULT '',
    contributor text NOT NULL,
    PRIMARY KEY (tenant_id, tool, condition)
);
COMMENT ON TABLE public.agent_tool_condition IS 'Conditions of calls that failed, in words.';
COMMENT ON COLUMN public.agent_tool_condition.opened IS 'The words with a value: empty until runs of two people had it, and always where it looks personal.';
COMMENT ON COLUMN public.agent_tool_condition.contributor IS 'Hash of whose run had it first; empty once somebody else had it too.';

CREATE TABLE public.agent_tool_mark (
    tenant_id text PRIMARY KEY CHECK (tenant_id <> ''),
    counted_until timestamptz NOT NULL
);
COMMENT ON TABLE public.agent_tool_mark IS 'Runs of the tenant that were recorded before this are counted, except those of agent_tool_recount.';

CREATE TABLE public.agent_tool_recount (
    tenant_id text NOT NULL,
    run_id text NOT NULL,
    PRIMARY KEY (tenant_id, run_id),
    FOREIGN KEY (tenant_id, run_id) REFERENCES public.agent_run ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_tool_recount IS 'Runs that changed after they were recorded: paused ones that ended, retries, logs that were given to a user. Their calls are to be counted, or counted anew.';

-- Note a run that changed. As whoever records it, whose tenant it is.
CREATE FUNCTION agent_private.note_changed_run()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO public.agent_tool_recount (tenant_id, run_id) VALUES (NEW.tenant_id, NEW.run_id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER note_changed_run AFTER UPDATE OF status, finished_at, user_id ON public.agent_run
    FOR EACH ROW WHEN (NEW.status <> 'interrupted'
                       AND (OLD.status, OLD.finished_at, OLD.user_id) IS DISTINCT FROM (NEW.status, NEW.finished_at, NEW.user_id))
    EXECUTE FUNCTION agent_private.note_changed_run();

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_tool_mark', 'public.agent_tool_recount', 'public.agent_tool_run', 'public.agent_tool_call', 'public.agent_tool_error', 'public.agent_tool_weight',
    'public.agent_tool_condition']::regclass[]) AS t;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY['agent_tool_run', 'agent_tool_call', 'agent_tool_error', 'agent_tool_weight',
                                  'agent_tool_condition', 'agent_tool_mark'] LOOP
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

-- Whoever records a run notes that it changed; nobody but the learner reads it.
CREATE POLICY of_the_tenant ON public.agent_tool_recount TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true)));

-- Keep learners of one tenant in line until the transaction ends.
CREATE FUNCTION agent_private.hold_tool_experience(the_tenant text)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_advisory_xact_lock(hashtextextended('agent tool experience ' || the_tenant, 0));
$$;

-- Runs whose tool calls are not counted yet, or that changed since, the oldest first, at most 100 and about 8 MB of
-- messages; `since` leaves out runs that were recorded earlier. Runs at rest only: a paused one comes when it ends.
-- Returns [{run_id, user_id, session_id, status, started_at, finished_at, messages}]. Leans on agent_run_by_time, from the first
-- run on that was not counted the last time, which it keeps where since is NULL, and on agent_tool_recount.
CREATE FUNCTION public.tool_runs_to_learn(identity jsonb, since timestamptz DEFAULT NULL, run_limit integer DEFAULT 50)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
    -- Whoever was recording a run then began a moment before.
    safely constant timestamptz := clock_timestamp() - interval '5 minutes';
    begins timestamptz;
    first_at timestamptz;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT least(m.counted_until, safely) INTO begins FROM public.agent_tool_mark m WHERE m.tenant_id = tenant;
    WITH uncounted AS (
        (SELECT r.run_id, r.recorded_at, false AS is_changed, CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line
         FROM public.agent_run r
         LEFT JOIN public.agent_tool_run t ON t.tenant_id = r.tenant_id AND t.run_id = r.run_id
         WHERE r.tenant_id = tenant AND r.status <> 'interrupted'
           AND r.recorded_at >= greatest(coalesce(begins, '-infinity'), coalesce(tool_runs_to_learn.since, '-infinity'))
           AND (t.run_id IS NULL OR t.status <> r.status OR t.finished_at <> r.finished_at OR t.user_id IS DISTINCT FROM r.user_id)
         ORDER BY r.recorded_at, line, r.run_id LIMIT least(run_limit, 100))
        UNION ALL
        (SELECT r.run_id, r.recorded_at, true, CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line
         FROM public.agent_tool_recount c
         JOIN public.agent_run r ON r.tenant_id = c.tenant_id AND r.run_id = c.run_id
         WHERE c.tenant_id = tenant AND r.status <> 'interrupted' AND r.recorded_at < begins
           AND (tool_runs_to_learn.since IS NULL OR r.recorded_at >= tool_runs_to_learn.since)
         ORDER BY r.recorded_at, line, r.run_id LIMIT least(run_limit, 100))
    ), sized AS (
        SELECT r.run_id, r.user_id, r.session_id, r.status, r.started_at, r.finished_at, u.recorded_at, r.messages, u.line,
               sum(pg_column_size(r.messages)) OVER (ORDER BY u.recorded_at, u.line, u.run_id) - pg_column_size(r.messages) AS size_before
        FROM (SELECT * FROM uncounted n ORDER BY n.recorded_at, n.line, n.run_id LIMIT least(run_limit, 100)) AS u
        JOIN public.agent_run r ON r.tenant_id = tenant AND r.run_id = u.run_id
    )
    SELECT (SELECT coalesce(jsonb_agg(to_jsonb(s) - '{line,recorded_at,size_before}'::text[] ORDER BY s.recorded_at, s.line, s.run_id), '[]')
            FROM sized s WHERE s.size_before < 8 * 1024 * 1024),
           (SELECT min(u.recorded_at) FROM uncounted u WHERE NOT u.is_changed)
    INTO found, first_at;
    IF tool_runs_to_learn.since IS NULL THEN
        INSERT INTO public.agent_tool_mark AS m (tenant_id, counted_until) VALUES (tenant, least(first_at, safely))
        ON CONFLICT ON CONSTRAINT agent_tool_mark_pkey DO UPDATE SET counted_until = excluded.counted_until
        WHERE m.counted_until < excluded.counted_until;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Take the calls of some runs out again, with what they count for. The caller holds the tenant's experience.
CREATE FUNCTION agent_private.forget_tool_calls(the_tenant text, run_ids text[])
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    WITH gone AS (
        DELETE FROM public.agent_tool_call c WHERE c.tenant_id = the_tenant AND c.run_id = ANY (run_ids)
        RETURNING c.tool, c.template
    )
    UPDATE public.agent_tool_error e SET failures = greatest(e.failures - g.failures, 0)
    FROM (SELECT x.tool, x.template, count(*) AS failures FROM gone x WHERE x.template IS NOT NULL GROUP BY 1, 2) AS g
    WHERE e.tenant_id = the_tenant AND e.tool = g.tool AND e.template = g.template;
    DELETE FROM public.agent_tool_run r WHERE r.tenant_id = the_tenant AND r.run_id = ANY (run_ids);
END
$$;

-- Count the calls of one run: {run_id, user_id, session_id, status, started_at, finished_at, risk_limit, calls: [{tool, template, tool_call_id, message_id,
-- conditions, risk, is_repeat, was_warned}], words: [{tool, condition, kind, shown, opened}]}. A run that somebody else counted
-- meanwhile in this form is passed over. Of a tool the latest 2,000 calls are kept, and of the tenant the latest 1,000 errors.
-- Returns whether it was counted.
CREATE FUNCTION public.store_tool_calls(identity jsonb, run jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    whose text;
    target text;
BEGIN
    identity := agent_private.document(identity);
    run := agent_private.document(run);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'tool calls belong to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM agent_private.hold_tool_experience(tenant);
    -- Unless it changed once more since it was read.
    DELETE FROM public.agent_tool_recount c
    WHERE c.tenant_id = tenant AND c.run_id = run ->> 'run_id'
      AND EXISTS (SELECT FROM public.agent_run r
                  WHERE r.tenant_id = tenant AND r.run_id = c.run_id AND r.status = run ->> 'status'
                    AND r.finished_at = (run ->> 'finished_at')::timestamptz AND r.user_id IS NOT DISTINCT FROM run ->> 'user_id');
    -- It may have been erased, or counted by another learner, since it was read.
    PERFORM FROM public.agent_run r
    WHERE r.tenant_id = tenant AND r.run_id = run ->> 'run_id' AND r.user_id IS NOT DISTINCT FROM run ->> 'user_id';
    IF NOT FOUND OR EXISTS (
        SELECT FROM public.agent_tool_run t
        WHERE t.tenant_id = tenant AND t.run_id = run ->> 'run_id' AND t.status = run ->> 'status'
          AND t.finished_at = (run ->> 'finished_at')::timestamptz AND t.user_id IS NOT DISTINCT FROM run ->> 'user_id') THEN
        PERFORM agent_private.leave(previous);
        RETURN 'false';
    END IF;
    PERFORM agent_private.forget_tool_calls(tenant, ARRAY[run ->> 'run_id']);
    INSERT INTO public.agent_tool_run (tenant_id, run_id, user_id, status, finished_at, risk_limit)
    VALUES (tenant, run ->> 'run_id', run ->> 'user_id', run ->> 'status', (run ->> 'finished_at')::timestamptz,
            (run ->> 'risk_limit')::double precision);
    INSERT INTO public.agent_tool_call (
        tenant_id, run_id, call_number, user_id, tool, template, tool_call_id, message_id, called_at, conditions, risk, is_repeat,
        was_warned)
    SELECT tenant, run ->> 'run_id', c.number, run ->> 'user_id', c.item ->> 'tool', c.item ->> 'template',
           agent_private.short_id(coalesce(c.item ->> 'tool_call_id', '')),
           agent_private.short_id(coalesce(c.item ->> 'message_id', '')), (run ->> 'started_at')::timestamptz,
           c.item -> 'conditions', (c.item ->> 'risk')::double precision, (c.item ->> 'is_repeat')::boolean,
           (c.item ->> 'was_warned')::boolean
    FROM jsonb_array_elements(run -> 'calls') WITH ORDINALITY AS c (item, number) ORDER BY c.number;
    INSERT INTO public.agent_tool_error AS e (tenant_id, tool, template, failures, first_seen_at, last_seen_at)
    SELECT tenant, c.item ->> 'tool', c.item ->> 'template', count(*), (run ->> 'started_at')::timestamptz, (run ->> 'started_at')::timestamptz
    FROM jsonb_array_elements(run -> 'calls') AS c (item)
    WHERE c.item ->> 'template' IS NOT NULL
    GROUP BY 2, 3
    ON CONFLICT (tenant_id, tool, template) DO UPDATE SET
        failures = e.failures + excluded.failures,
        first_seen_at = least(e.first_seen_at, excluded.first_seen_at),
        last_seen_at = greatest(e.last_seen_at, excluded.last_seen_at);
    whose := encode(sha256(convert_to(jsonb_build_array(
        tenant, coalesce(run ->> 'user_id', ''), CASE WHEN run ->> 'user_id' IS NULL THEN run ->> 'session_id' END)::text, 'UTF8')), 'hex');
    INSERT INTO public.agent_tool_condition AS t (tenant_id, tool, condition, kind, shown, contributor)
    SELECT tenant, w ->> 'tool', (w ->> 'condition')::bigint, w ->> 'kind', left(w ->> 'shown', 300), whose
    FROM jsonb_array_elements(run -> 'words') AS w
    ON CONFLICT (tenant_id, tool, condition) DO NOTHING;
    UPDATE public.agent_tool_condition t SET contributor = '', opened = left(w ->> 'opened', 300)
    FROM jsonb_array_elements(run -> 'words') AS w
    WHERE t.tenant_id = tenant AND t.tool = w ->> 'tool' AND t.condition = (w ->> 'condition')::bigint
      AND t.contributor NOT IN ('', whose);
    FOR target IN SELECT DISTINCT c ->> 'tool' FROM jsonb_array_elements(run -> 'calls') AS c LOOP
        DELETE FROM public.agent_tool_call c
        WHERE c.tenant_id = tenant AND c.tool = target AND c.call_order <= (
            SELECT k.call_order FROM public.agent_tool_call k WHERE k.tenant_id = tenant AND k.tool = target
            ORDER BY k.call_order DESC OFFSET 2000 LIMIT 1);
    END LOOP;
    DELETE FROM public.agent_tool_error e
    WHERE e.tenant_id = tenant AND e.error_id IN (
        SELECT k.error_id FROM public.agent_tool_error k WHERE k.tenant_id = tenant
        ORDER BY k.failures > 0 DESC, k.last_seen_at DESC, k.failures DESC, k.template OFFSET 1000);
    PERFORM agent_private.leave(previous);
    RETURN 'true';
END
$$;

-- The latest calls of a tool to fit models to, oldest first, the number of the last, and conditions in words: {calls: [{template,
-- conditions}], last, words: {condition: {kind, text}}}. Where no tool is named: the tools that are known, those whose models
-- have not seen the last calls, and of the latest calls that succeeded (at most 5,000) risk and whether they were warned of:
-- {tools, stale, clean: [[risk, was_warned]]}. call_limit: calls of a tool, at most 2,000, or calls that succeeded.
CREATE FUNCTION public.tool_examples(identity jsonb, the_tool text DEFAULT NULL, call_limit integer DEFAULT 1000)
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
        RETURN '{}';
    END IF;
    IF the_tool IS NULL THEN
        found := jsonb_build_object(
            'tools', (SELECT coalesce(jsonb_agg(DISTINCT e.tool), '[]') FROM public.agent_tool_error e
                      WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.failures > 0),
            'stale', (SELECT coalesce(jsonb_agg(DISTINCT e.tool), '[]') FROM public.agent_tool_error e
                      WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.failures > 0
                        AND EXISTS (SELECT FROM public.agent_tool_call c
                                    WHERE c.tenant_id = e.tenant_id AND c.tool = e.tool AND c.call_order > e.fitted_to)),
            'clean', (SELECT coalesce(jsonb_agg(jsonb_build_array(x.risk, x.was_warned) ORDER BY x.call_order), '[]')
                      FROM (SELECT c.risk, c.was_warned, c.call_order FROM public.agent_tool_call c
                            WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.template IS NULL
                            ORDER BY c.call_order DESC LIMIT least(call_limit, 5000)) AS x));
    ELSE
        found := jsonb_build_object(
            'calls', (SELECT coalesce(jsonb_agg(jsonb_build_object('template', x.template, 'conditions', x.conditions) ORDER BY x.call_order), '[]')
                      FROM (SELECT c.template, c.conditions, c.call_order FROM public.agent_tool_call c
                            WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.tool = the_tool
                            ORDER BY c.call_order DESC LIMIT least(call_limit, 2000)) AS x),
            'last', (SELECT coalesce(max(c.call_order), 0) FROM public.agent_tool_call c
                     WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.tool = the_tool),
            'words', (SELECT coalesce(jsonb_object_agg(t.condition::text, jsonb_build_object(
                          'kind', t.kind, 'text', coalesce(nullif(t.opened, ''), t.shown))), '{}')
                      FROM public.agent_tool_condition t
                      WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.tool = the_tool));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Put fitted models in the place of those before: models: [{template, base, weights: {condition: weight}, reasons, memory,
-- said}], where memory is the text to remember it by and said stands for what it says: only another one makes a new version of the
-- memory, which is the tenant's, in store learned_knowledge, with the latest calls that failed as its evidence.
-- last is the last call that they were fitted to; models that saw a later one stay.
-- Returns how many errors have a new model.
CREATE FUNCTION public.store_tool_models(identity jsonb, the_tool text, models jsonb, last bigint)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    model jsonb;
    target public.agent_tool_error;
    receipt jsonb;
    the_memory uuid;
    stored integer := 0;
BEGIN
    identity := agent_private.document(identity);
    models := agent_private.document(models);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'models of tools belong to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM agent_private.hold_tool_experience(tenant);
    FOR model IN SELECT m FROM jsonb_array_elements(models) AS m LOOP
        SELECT * INTO target FROM public.agent_tool_error e
        WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.template = model ->> 'template' AND e.failures > 0 AND e.fitted_to < last;
        CONTINUE WHEN NOT FOUND;
        DELETE FROM public.agent_tool_weight w WHERE w.tenant_id = tenant AND w.error_id = target.error_id;
        INSERT INTO public.agent_tool_weight (tenant_id, error_id, condition, weight)
        SELECT tenant, target.error_id, w.key::bigint, w.value::double precision
        FROM jsonb_each_text(model -> 'weights') AS w;
        the_memory := target.memory_id;
        IF NOT EXISTS (SELECT FROM public.agent_memory m
                       WHERE m.tenant_id = tenant AND m.memory_id = target.memory_id AND m.superseded_at IS NULL
                         AND m.value ->> 'said' = model ->> 'said') THEN
            receipt := agent_private.write_memory(jsonb_build_object(
                'scope', 'tenant', 'store', 'learned_knowledge', 'kind', 'tool_error', 'trust', 'tool', 'source', 'tool_experience',
                'field', 'tool_error ' || target.error_id, 'content', model ->> 'memory', 'valid_from', target.first_seen_at,
                'value', jsonb_build_object('said', model ->> 'said', 'tool', the_tool)));
            the_memory := (receipt ->> 'memory_id')::uuid;
            -- Not by attach_evidence: what a whole tenant knows comes from runs of many users.
            INSERT INTO public.agent_memory_evidence (tenant_id, memory_id, version, scope, owner_id, run_id, message_id, tool_call_id)
            SELECT tenant, the_memory, (receipt ->> 'version')::integer, 'tenant', '', c.run_id, c.message_id, c.tool_call_id
            FROM public.agent_tool_call c
            WHERE c.tenant_id = tenant AND c.tool = the_tool AND c.template = target.template
            ORDER BY c.call_order DESC LIMIT 5
            ON CONFLICT DO NOTHING;
        END IF;
        UPDATE public.agent_tool_error e
        SET base = (model ->> 'base')::double precision, reasons = model -> 'reasons', memory_id = the_memory
        WHERE e.tenant_id = tenant AND e.error_id = target.error_id;
        stored := stored + 1;
    END LOOP;
    UPDATE public.agent_tool_error e SET fitted_to = last WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.fitted_to < last;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(stored);
END
$$;

-- How likely a call is to run into each known error of its tool, the most likely first: conditions: {condition: weight}.
-- Returns {risks: [{template, risk, failures, first_seen_at, last_seen_at, reasons}], limit}: warn where the highest risk is at
-- least the limit, which is that of the learner after the latest run; null where nothing was learned.
-- Leans on the primary key of agent_tool_weight and on agent_tool_run_by_time; locks nothing.
CREATE FUNCTION public.match_tool_warnings(identity jsonb, the_tool text, conditions jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
    the_limit double precision;
BEGIN
    identity := agent_private.document(identity);
    conditions := agent_private.document(conditions);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '{"risks": [], "limit": null}';
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'template', x.template, 'risk', x.risk, 'failures', x.failures, 'first_seen_at', x.first_seen_at,
        'last_seen_at', x.last_seen_at, 'reasons', x.reasons) ORDER BY x.risk DESC, x.template), '[]')
    INTO found
    FROM (
        SELECT e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons,
               1 / (1 + exp(least(greatest(-e.base - coalesce(sum(w.weight * c.value::double precision), 0), -60), 60))) AS risk
        FROM public.agent_tool_error e
        LEFT JOIN (jsonb_each_text(match_tool_warnings.conditions) AS c
                   JOIN public.agent_tool_weight w ON w.tenant_id = tenant AND w.condition = c.key::bigint)
            ON w.error_id = e.error_id
        WHERE e.tenant_id = tenant AND e.tool = the_tool AND e.base IS NOT NULL AND e.failures > 0
        GROUP BY e.error_id, e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons, e.base
    ) AS x;
    SELECT r.risk_limit INTO the_limit FROM public.agent_tool_run r WHERE r.tenant_id = tenant
    ORDER BY r.learned_at DESC LIMIT 1;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('risks', found, 'limit', the_limit);
END
$$;

-- What is known of tools: {errors: [{tool, template, failures, first_seen_at, last_seen_at, reasons, evidence}], warnings: {templates,
-- errors, repeats, repeats_warned, clean, clean_warned}, slow: [{tool, calls, median_ms, p95_ms, latest_median_ms}], sequences:
-- [{tools, runs, succeeded, lift}]}. wanted: tool, errors_only (true: nothing else is looked up). Slow tools are those of the execution log whose median of the latest 20 calls is twice
-- that of the up to 500 before them. Sequences are of 2 to 5 tools, called one after the other in at least 3 of the latest
-- 1,000 runs whose outcome is known; lift is their share of successes by that of all these runs.
CREATE FUNCTION public.list_tool_experience(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '{"errors": [], "warnings": {}, "slow": [], "sequences": []}';
    END IF;
    tenant := current_setting('agent.tenant_id');
    found := jsonb_build_object('errors', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.failures DESC, x.tool, x.template), '[]') FROM (
            SELECT e.tool, e.template, e.failures, e.first_seen_at, e.last_seen_at, e.reasons, e.memory_id,
                   (SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]') FROM (
                       SELECT c.run_id, c.tool_call_id FROM public.agent_tool_call c
                       WHERE c.tenant_id = tenant AND c.tool = e.tool AND c.template = e.template
                       ORDER BY c.call_order DESC LIMIT 5) AS c) AS evidence
            FROM public.agent_tool_error e
            WHERE e.tenant_id = tenant AND e.failures > 0 AND (wanted ->> 'tool' IS NULL OR e.tool = wanted ->> 'tool')
            ORDER BY e.failures DESC, e.tool, e.template LIMIT 1000) AS x));
    IF coalesce((wanted ->> 'errors_only')::boolean, false) THEN
        PERFORM agent_private.leave(previous);
        RETURN found;
    END IF;
    found := found || jsonb_build_object(
        'warnings', (SELECT jsonb_build_object(
                'templates', (SELECT count(*) FROM public.agent_tool_error e WHERE e.tenant_id = tenant AND e.failures > 0),
                'errors', count(*) FILTER (WHERE c.template IS NOT NULL),
                'repeats', count(*) FILTER (WHERE c.template IS NOT NULL AND c.is_repeat),
                'repeats_warned', count(*) FILTER (WHERE c.template IS NOT NULL AND c.is_repeat AND c.was_warned),
                'clean', count(*) FILTER (WHERE c.template IS NULL),
                'clean_warned', count(*) FILTER (WHERE c.template IS NULL AND c.was_warned))
            FROM public.agent_tool_call c WHERE c.tenant_id = tenant AND (wanted ->> 'tool' IS NULL OR c.tool = wanted ->> 'tool')),
        'slow', (SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.latest_median_ms DESC, x.tool), '[]') FROM (
            SELECT l.tool, count(*) AS calls,
                   round((percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place > 20))::numeric, 1) AS median_ms,
                   round((percentile_cont(0.95) WITHIN GROUP (ORDER BY l.duration_ms))::numeric, 1) AS p95_ms,
                   round((percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place <= 20))::numeric, 1) AS latest_median_ms
            FROM (SELECT g.tool, g.duration_ms::double precision AS duration_ms, row_number() OVER (PARTITION BY g.tool ORDER BY g.log_id DESC) AS place
                  FROM public.agent_execution_log g
                  WHERE g.tenant_id = tenant AND g.duration_ms IS NOT NULL AND (wanted ->> 'tool' IS NULL OR g.tool = wanted ->> 'tool')) AS l
            WHERE l.place <= 520
            GROUP BY l.tool
            HAVING count(*) >= 40
               AND percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place <= 20)
                   >= 2 * greatest(percentile_cont(0.5) WITHIN GROUP (ORDER BY l.duration_ms) FILTER (WHERE l.place > 20), 1)) AS x),
        'sequences', agent_private.tool_sequences(tenant, wanted ->> 'tool'));
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Sequences of tools and how the runs that had them ended; see list_tool_experience. The caller has entered.
CREATE FUNCTION agent_private.tool_sequences(the_tenant text, the_tool text)
RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    WITH judged AS MATERIALIZED (
        SELECT t.run_id, o.succeeded
        FROM public.agent_tool_run t
        CROSS JOIN LATERAL (SELECT bool_and(x.succeeded) AS succeeded FROM public.agent_outcome x
                            WHERE x.tenant_id = t.tenant_id AND x.run_id = t.run_id) AS o
        WHERE t.tenant_id = the_tenant AND o.succeeded IS NOT NULL
        ORDER BY t.learned_at DESC, t.run_id LIMIT 1000
    ), steps AS (
        SELECT c.run_id, c.call_number, array_agg(c.tool) OVER (
                   PARTITION BY c.run_id ORDER BY c.call_number ROWS BETWEEN CURRENT ROW AND 4 FOLLOWING) AS tools
        FROM public.agent_tool_call c JOIN judged j ON j.run_id = c.run_id
        WHERE c.tenant_id = the_tenant
    ), sequences AS (
        SELECT s.tools[1:n] AS tools, count(DISTINCT s.run_id) AS runs,
               count(DISTINCT s.run_id) FILTER (WHERE j.succeeded) AS succeeded
        FROM steps s JOIN judged j ON j.run_id = s.run_id CROSS JOIN generate_series(2, 5) AS n
        WHERE cardinality(s.tools) >= n AND (the_tool IS NULL OR the_tool = ANY (s.tools[1:n]))
        GROUP BY 1 HAVING count(DISTINCT s.run_id) >= 3
    )
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.lift DESC NULLS LAST, x.runs DESC, x.tools), '[]')
    FROM (SELECT q.tools, q.runs, q.succeeded,
                 round((q.succeeded::numeric / q.runs) / nullif((SELECT avg(j.succeeded::integer) FROM judged j), 0), 2) AS lift
          FROM sequences q ORDER BY lift DESC NULLS LAST, q.runs DESC, q.tools LIMIT 50) AS x;
$$;

-- Take out what a user's runs taught about tools: calls, their counts, the words and weights of conditions that nobody else's
-- calls had, and errors that nobody else met, with their memories. Returns how many calls went.
CREATE FUNCTION agent_private.erase_tool_experience(the_tenant text, the_user text)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    runs text[];
    only_theirs bigint[];
    calls integer;
    target public.agent_memory;
BEGIN
    PERFORM agent_private.hold_tool_experience(the_tenant);
    SELECT coalesce(array_agg(r.run_id), '{}') INTO runs FROM public.agent_tool_run r
    WHERE r.tenant_id = the_tenant AND r.user_id = the_user;
    SELECT count(*) INTO calls FROM public.agent_tool_call c WHERE c.tenant_id = the_tenant AND c.run_id = ANY (runs);
    IF runs = '{}' THEN
        RETURN 0;
    END IF;
    SELECT coalesce(array_agg(x.condition), '{}') INTO only_theirs FROM (
        SELECT k.condition::bigint FROM public.agent_tool_call c CROSS JOIN jsonb_object_keys(c.conditions) AS k (condition)
        WHERE c.tenant_id = the_tenant AND c.run_id = ANY (runs)
        EXCEPT
        SELECT k.condition::bigint FROM public.agent_tool_call c CROSS JOIN jsonb_object_keys(c.conditions) AS k (condition)
        WHERE c.tenant_id = the_tenant AND NOT c.run_id = ANY (runs)) AS x (condition);
    DELETE FROM public.agent_tool_weight w WHERE w.tenant_id = the_tenant AND w.condition = ANY (only_theirs);
    DELETE FROM public.agent_tool_condition t WHERE t.tenant_id = the_tenant AND t.condition = ANY (only_theirs);
    PERFORM agent_private.forget_tool_calls(the_tenant, runs);
    DELETE FROM public.agent_memory_evidence e WHERE e.tenant_id = the_tenant AND e.scope = 'tenant' AND e.run_id = ANY (runs);
    FOR target IN
        SELECT m.* FROM public.agent_memory m
        JOIN public.agent_tool_error e ON e.tenant_id = m.tenant_id AND e.memory_id = m.memory_id
        WHERE m.tenant_id = the_tenant AND e.failures = 0
    LOOP
        DELETE FROM public.agent_memory m WHERE m.tenant_id = the_tenant AND m.memory_id = target.memory_id;
    END LOOP;
    DELETE FROM public.agent_tool_error e WHERE e.tenant_id = the_tenant AND e.failures = 0;
    RETURN calls;
END
$$;

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private'
  AND p.proname IN ('note_changed_run', 'hold_tool_experience', 'forget_tool_calls', 'tool_sequences', 'erase_tool_experience');

SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.tool_runs_to_learn(jsonb, timestamptz, integer)',
    'public.store_tool_calls(jsonb, jsonb)',
    'public.tool_examples(jsonb, text, integer)',
    'public.store_tool_models(jsonb, text, jsonb, bigint)',
    'public.match_tool_warnings(jsonb, text, jsonb)',
    'public.list_tool_experience(jsonb, jsonb)']::regprocedure[]) AS f;
