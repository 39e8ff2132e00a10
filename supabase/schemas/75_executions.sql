-- Executions: the claim of an approval, the log that is only added to, budgets and the kill switch.

CREATE TABLE public.agent_execution_log (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    log_id bigint NOT NULL,
    at timestamptz NOT NULL,
    user_id text,
    agent_id text,
    session_id text,
    run_id text,
    tool text NOT NULL CHECK (tool <> ''),
    tool_version text NOT NULL,
    risk text NOT NULL CHECK (risk IN ('READ', 'WRITE', 'DESTRUCTIVE', 'FORBIDDEN')),
    decision text NOT NULL CHECK (decision IN ('allowed', 'approved', 'denied', 'refused', 'undone')),
    state text NOT NULL CHECK (state IN ('executed', 'failed', 'unknown', 'refused', 'denied', 'rejected', 'expired', 'cancelled')),
    approval_id uuid,
    decided_by text[] NOT NULL,
    rows jsonb NOT NULL CHECK (jsonb_typeof(rows) = 'object'),
    row_count bigint,
    result_bytes bigint,
    duration_ms numeric,
    undoes bigint,
    details_hash text NOT NULL,
    previous_hash text NOT NULL,
    row_hash text NOT NULL,
    PRIMARY KEY (tenant_id, log_id),
    UNIQUE (tenant_id, previous_hash)
);
COMMENT ON TABLE public.agent_execution_log IS 'What agents did, tried and were refused: only added to, numbered and hash-chained per tenant.';
COMMENT ON COLUMN public.agent_execution_log.rows IS 'Rows touched, by table: {table: {inserted, updated, deleted}}.';
COMMENT ON COLUMN public.agent_execution_log.details_hash IS 'sha256 of the row of agent_execution_details, which can be erased without breaking the chain.';
CREATE INDEX agent_execution_log_by_time ON public.agent_execution_log (tenant_id, at DESC);
CREATE INDEX agent_execution_log_by_user ON public.agent_execution_log (tenant_id, user_id, at DESC);
CREATE INDEX agent_execution_log_by_approval ON public.agent_execution_log (approval_id);
CREATE UNIQUE INDEX agent_execution_log_undone ON public.agent_execution_log (tenant_id, undoes) WHERE undoes IS NOT NULL AND state = 'executed';

CREATE TABLE public.agent_execution_details (
    tenant_id text NOT NULL,
    log_id bigint NOT NULL,
    user_id text,
    salt text NOT NULL,
    arguments_shown jsonb,
    arguments_run jsonb,
    error text,
    pre_image jsonb,
    PRIMARY KEY (tenant_id, log_id),
    FOREIGN KEY (tenant_id, log_id) REFERENCES public.agent_execution_log
);
COMMENT ON TABLE public.agent_execution_details IS 'The part of the log that may hold personal data: arguments, error, and rows as they were before. Erased with its user.';
COMMENT ON COLUMN public.agent_execution_details.salt IS 'Keeps the hash that stays behind from telling what was erased.';
CREATE INDEX agent_execution_details_by_user ON public.agent_execution_details (tenant_id, user_id);

CREATE TABLE public.agent_execution_budget (
    tenant_id text NOT NULL,
    limit_key text NOT NULL CHECK (limit_key <> ''),
    minute timestamptz NOT NULL,
    used integer NOT NULL,
    PRIMARY KEY (tenant_id, limit_key, minute)
);
COMMENT ON TABLE public.agent_execution_budget IS 'How often something that is limited was begun, by minute, for the last hour.';

CREATE TABLE public.agent_execution_halt (
    tenant_id text NOT NULL,
    halt_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    agent_id text,
    tool text,
    reason text NOT NULL,
    halted_by text NOT NULL CHECK (halted_by <> ''),
    halted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    resumed_at timestamptz,
    resumed_by text
);
COMMENT ON TABLE public.agent_execution_halt IS 'The kill switch: while a row has no resumed_at, what it names does not run. No agent or no tool means every one.';
CREATE INDEX agent_execution_halt_in_force ON public.agent_execution_halt (tenant_id) WHERE resumed_at IS NULL;

CREATE TABLE public.agent_execution_result (
    tenant_id text NOT NULL,
    result_key text NOT NULL,
    user_id text,
    log_id bigint NOT NULL,
    result text NOT NULL CONSTRAINT agent_execution_result_size CHECK (octet_length(result) <= 65536),
    saved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, result_key)
);
COMMENT ON TABLE public.agent_execution_result IS 'What an approved call gave, as JSON, for whoever comes back with the very same call, or a run that went on after a pause: kept for 7 days, and erased with its user.';
COMMENT ON COLUMN public.agent_execution_result.result_key IS 'Id of the approval of a call, or key of a run.';
CREATE INDEX agent_execution_result_by_time ON public.agent_execution_result (saved_at);
CREATE INDEX agent_execution_result_by_user ON public.agent_execution_result (tenant_id, user_id);

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_execution_log', 'public.agent_execution_details', 'public.agent_execution_budget',
    'public.agent_execution_halt', 'public.agent_execution_result']::regclass[]) AS t;
REVOKE UPDATE, DELETE ON public.agent_execution_log FROM agent_app;
REVOKE UPDATE ON public.agent_execution_details FROM agent_app;
REVOKE DELETE ON public.agent_execution_halt FROM agent_app;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY[
        'agent_execution_log', 'agent_execution_details', 'agent_execution_budget', 'agent_execution_halt',
        'agent_execution_result'] LOOP
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

CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON public.agent_execution_log
    FOR EACH STATEMENT EXECUTE FUNCTION agent_private.refuse_change();
ALTER TABLE public.agent_execution_log ENABLE ALWAYS TRIGGER only_added_to;
CREATE TRIGGER never_changed BEFORE UPDATE OR TRUNCATE ON public.agent_execution_details
    FOR EACH STATEMENT EXECUTE FUNCTION agent_private.refuse_change();
ALTER TABLE public.agent_execution_details ENABLE ALWAYS TRIGGER never_changed;

-- The hash of the part of a log row that can be erased.
CREATE FUNCTION agent_private.details_hash(d public.agent_execution_details)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.chain_hash(d.salt, jsonb_build_array(
        d.tenant_id, d.log_id, d.user_id, d.arguments_shown, d.arguments_run, d.error, d.pre_image)::text);
$$;

-- The text of a log row as its hash covers it; times as numbers, because their text depends on the session.
CREATE FUNCTION agent_private.execution_text(l public.agent_execution_log)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_array(
        l.tenant_id, l.log_id, extract(epoch FROM l.at), l.user_id, l.agent_id, l.session_id, l.run_id, l.tool, l.tool_version, l.risk,
        l.decision, l.state, l.approval_id, l.decided_by, l.rows, l.row_count, l.result_bytes, l.duration_ms, l.undoes, l.details_hash)::text;
$$;

-- Add a row to the log of a tenant; locks the head of its chain. who: {user_id, agent_id, session_id, run_id}.
CREATE FUNCTION agent_private.append_execution(the_tenant text, who jsonb, entry jsonb, the_deciders text[] DEFAULT '{}')
RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    head public.agent_chain;
    l public.agent_execution_log;
    d public.agent_execution_details;
BEGIN
    head := agent_private.next_of_chain(the_tenant, 'agent_execution_log');
    d.tenant_id := the_tenant;
    d.log_id := head.number;
    d.user_id := nullif(who ->> 'user_id', '');
    d.salt := encode(uuid_send(gen_random_uuid()), 'hex');
    d.arguments_shown := nullif(entry -> 'arguments_shown', 'null');
    d.arguments_run := nullif(entry -> 'arguments_run', 'null');
    d.error := entry ->> 'error';
    d.pre_image := nullif(entry -> 'pre_image', 'null');
    l.tenant_id := the_tenant;
    l.log_id := head.number;
    l.at := clock_timestamp();
    l.user_id := d.user_id;
    l.agent_id := nullif(who ->> 'agent_id', '');
    l.session_id := nullif(who ->> 'session_id', '');
    l.run_id := nullif(who ->> 'run_id', '');
    l.tool := entry ->> 'tool';
    l.tool_version := coalesce(entry ->> 'tool_version', '1');
    l.risk := entry ->> 'risk';
    l.decision := entry ->> 'decision';
    l.state := entry ->> 'state';
    l.approval_id := (entry ->> 'approval_id')::uuid;
    l.decided_by := the_deciders;
    l.rows := coalesce(nullif(entry -> 'rows', 'null'), '{}');
    l.row_count := (entry ->> 'row_count')::bigint;
    l.result_bytes := (entry ->> 'result_bytes')::bigint;
    l.duration_ms := (entry ->> 'duration_ms')::numeric;
    l.undoes := (entry ->> 'undoes')::bigint;
    l.details_hash := agent_private.details_hash(d);
    l.previous_hash := head.row_hash;
    l.row_hash := agent_private.chain_hash(head.row_hash, agent_private.execution_text(l));
    INSERT INTO public.agent_execution_log SELECT (l).*;
    INSERT INTO public.agent_execution_details SELECT (d).*;
    UPDATE public.agent_chain c SET row_hash = l.row_hash WHERE c.tenant_id = the_tenant AND c.chain = 'agent_execution_log';
    RETURN l.log_id;
END
$$;

-- Keep what an execution gave, if it is not too long, for get_execution_result; the first one under a key stays.
CREATE FUNCTION agent_private.keep_result(the_tenant text, the_key text, the_user text, the_log_id bigint, the_result text)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO public.agent_execution_result (tenant_id, result_key, user_id, log_id, result)
    SELECT the_tenant, the_key, the_user, the_log_id, the_result WHERE octet_length(the_result) <= 65536
    ON CONFLICT DO NOTHING;
$$;

-- What stops a tool of an agent in a tenant: {halt_id, reason, by}, or NULL.
CREATE FUNCTION agent_private.halted(the_tenant text, the_agent text, the_tool text)
RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object('halt_id', h.halt_id, 'reason', h.reason, 'by', h.halted_by)
    FROM public.agent_execution_halt h
    WHERE h.tenant_id = the_tenant AND h.resumed_at IS NULL
      AND (h.agent_id IS NULL OR h.agent_id = the_agent) AND (h.tool IS NULL OR h.tool = the_tool)
    ORDER BY h.halted_at LIMIT 1;
$$;

-- Take an approved call to execute it: the first of any number of callers wins. Returns {claimed, ticket, state, why};
-- the ticket is needed to finish it and is kept by nobody else. What the kill switch stops is not claimed.
CREATE FUNCTION public.claim_approval(identity jsonb, the_approval_id uuid, args_hash text, claimed_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    the_ticket text := encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'hex');
    a public.human_approval_queue;
    why text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT q.* INTO a FROM public.human_approval_queue q
    WHERE q.tenant_id = tenant AND q.approval_id = the_approval_id FOR UPDATE;
    why := CASE
        WHEN a.approval_id IS NULL THEN 'there is no such approval'
        WHEN a.args_hash IS DISTINCT FROM claim_approval.args_hash THEN 'it was given for other arguments'
        WHEN agent_private.approval_state(a) <> 'approved' THEN format('it is %s', agent_private.approval_state(a))
        WHEN agent_private.approval_digest(a) IS DISTINCT FROM (
            SELECT e.details ->> 'content_hash' FROM public.approval_event e
            WHERE e.tenant_id = tenant AND e.approval_id = a.approval_id AND e.what = 'requested' ORDER BY e.number LIMIT 1)
            THEN 'its row was changed after it was asked for'
        WHEN agent_private.halted(tenant, a.agent_id, a.tool) IS NOT NULL THEN 'execution is halted'
    END;
    IF why IS NULL THEN
        UPDATE public.human_approval_queue q
        SET state = 'executing', ticket_hash = agent_private.chain_hash('', the_ticket), claimed_by = claim_approval.claimed_by,
            claimed_at = clock_timestamp()
        WHERE q.approval_id = the_approval_id
        RETURNING q.* INTO a;
    END IF;
    IF a.approval_id IS NOT NULL THEN
        PERFORM agent_private.append_event(tenant, a.approval_id, CASE WHEN why IS NULL THEN 'claimed' ELSE 'claim_refused' END,
                                           claim_approval.claimed_by, jsonb_strip_nulls(jsonb_build_object('args_hash', a.args_hash, 'why', why)));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('claimed', why IS NULL, 'ticket', CASE WHEN why IS NULL THEN the_ticket END,
                              'state', agent_private.approval_state(a), 'why', why);
END
$$;

-- End the execution of the approval of this ticket in the tenant (NULL: of any) and log it. Returns {log_id, state}.
-- An execution that was given up as unknown stays so, but what became of it is logged. entry.result, the JSON of what it
-- gave, is kept for get_execution_result.
CREATE FUNCTION agent_private.finish(the_tenant text, ticket text, entry jsonb, only_executing boolean)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    a public.human_approval_queue;
    the_log_id bigint;
    final text := entry ->> 'state';
BEGIN
    IF final IS NULL OR final NOT IN ('executed', 'failed', 'unknown') THEN
        PERFORM agent_private.refuse('PT422', 'an execution ends as executed, failed or unknown');
    END IF;
    SELECT q.* INTO a FROM public.human_approval_queue q
    WHERE q.ticket_hash = agent_private.chain_hash('', ticket) AND (the_tenant IS NULL OR q.tenant_id = the_tenant) FOR UPDATE;
    IF a.approval_id IS NULL THEN
        PERFORM agent_private.refuse('PT404', 'there is no execution of this ticket');
    END IF;
    IF a.state <> 'executing' THEN
        IF only_executing THEN
            PERFORM agent_private.refuse('PT409', format('this execution is over: it is %s', a.state));
        ELSIF a.state = final THEN  -- told twice
            RETURN jsonb_build_object('log_id', a.log_id, 'state', a.state);
        ELSIF a.state <> 'unknown' THEN
            PERFORM agent_private.refuse('PT409', format('this execution is over: it is %s', a.state));
        END IF;
    END IF;
    entry := jsonb_build_object('arguments_shown', a.arguments_shown) || entry || jsonb_build_object(
        'approval_id', a.approval_id, 'tool', a.tool, 'tool_version', a.tool_version, 'risk', a.risk,
        'decision', CASE WHEN entry ->> 'undoes' IS NULL THEN 'approved' ELSE 'undone' END);
    IF a.state = 'executing' THEN
        UPDATE public.human_approval_queue q SET state = final, finished_at = clock_timestamp() WHERE q.approval_id = a.approval_id;
    END IF;
    the_log_id := agent_private.append_execution(a.tenant_id, jsonb_build_object(
        'user_id', a.requested_by, 'agent_id', a.agent_id, 'session_id', a.session_id, 'run_id', a.run_id), entry, a.decided_by);
    -- The row is this transaction's already; nobody can wait for it and hold the head of the chain.
    UPDATE public.human_approval_queue q SET log_id = the_log_id WHERE q.approval_id = a.approval_id;
    IF a.arguments_shown IS NULL THEN  -- its user was erased while it ran: that it was done stays, nothing else
        DELETE FROM public.agent_execution_details d WHERE d.tenant_id = a.tenant_id AND d.log_id = the_log_id;
        PERFORM agent_private.append_event(a.tenant_id, NULL, 'erased', NULL,
                                           jsonb_build_object('log_ids', jsonb_build_array(the_log_id)));
    ELSIF a.state = 'executing' AND final = 'executed' THEN
        PERFORM agent_private.keep_result(a.tenant_id, a.approval_id::text, a.requested_by, the_log_id, entry ->> 'result');
    END IF;
    PERFORM agent_private.append_event(a.tenant_id, a.approval_id, final, a.claimed_by, jsonb_build_object('log_id', the_log_id));
    RETURN jsonb_build_object('log_id', the_log_id, 'state', CASE WHEN a.state = 'executing' THEN final ELSE a.state END);
END
$$;

-- Tell how the execution of a claimed approval ended, in entry.state: executed, failed or unknown; the log row is
-- written in the same transaction. Told twice it answers the same. Returns {log_id, state}.
CREATE FUNCTION public.finish_execution(identity jsonb, ticket text, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    entry := agent_private.document(entry);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    receipt := agent_private.finish(current_setting('agent.tenant_id'), ticket, entry, false);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- finish_execution for the login that writes, inside the transaction of its write: both are committed or neither. The
-- tenant is that of the login, and of the ticket for an owner who takes the role; an execution that was given up meanwhile raises PT409, which undoes the write.
CREATE FUNCTION public.finish_write(ticket text, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_everywhere();
    receipt jsonb;
BEGIN
    receipt := agent_private.finish(agent_private.sql_tenant(), ticket, agent_private.document(entry), true);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- What the call of an approval gave, or a run that went on after a pause, for the user who asked for it: {log_id, result},
-- result as JSON text. the_key: id of the approval, or key of the run. NULL where nothing was kept, it was too long ago, or
-- it is another's.
CREATE FUNCTION public.get_execution_result(identity jsonb, the_key text)
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
    SELECT jsonb_build_object('log_id', r.log_id, 'result', r.result) INTO found FROM public.agent_execution_result r
    WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.result_key = the_key
      AND r.user_id IS NOT DISTINCT FROM nullif(identity ->> 'user_id', '');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Log what needed no approval: reads, what a policy allowed, refusals. Returns {log_id}.
CREATE FUNCTION public.record_execution(identity jsonb, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    the_log_id bigint;
BEGIN
    identity := agent_private.document(identity);
    entry := agent_private.document(entry);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    IF entry ->> 'decision' = 'approved' AND entry ->> 'state' = 'executed' THEN
        PERFORM agent_private.refuse('PT422', 'what was approved and executed is logged with its ticket');
    END IF;
    the_log_id := agent_private.append_execution(current_setting('agent.tenant_id'), identity, entry);
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('log_id', the_log_id);
END
$$;

-- Take one from the budget of the last hour. per_hour NULL: no limit. Returns {allowed, halted: {reason, by} or NULL, used}.
-- Locks the budget until the end of the transaction.
CREATE FUNCTION public.reserve_execution(identity jsonb, the_tool text, limit_key text, per_hour integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    stopped jsonb;
    already integer := 0;
    fits boolean := true;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    stopped := agent_private.halted(tenant, nullif(identity ->> 'agent_id', ''), the_tool);
    IF per_hour IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('agent budget ' || jsonb_build_array(tenant, reserve_execution.limit_key)::text, 0));
        DELETE FROM public.agent_execution_budget b
        WHERE b.tenant_id = tenant AND b.limit_key = reserve_execution.limit_key AND b.minute <= clock_timestamp() - interval '1 hour';
        SELECT coalesce(sum(b.used), 0) INTO already FROM public.agent_execution_budget b
        WHERE b.tenant_id = tenant AND b.limit_key = reserve_execution.limit_key;
        fits := already < per_hour;
        IF fits AND stopped IS NULL THEN
            INSERT INTO public.agent_execution_budget AS b (tenant_id, limit_key, minute, used)
            VALUES (tenant, reserve_execution.limit_key, date_trunc('minute', clock_timestamp()), 1)
            ON CONFLICT ON CONSTRAINT agent_execution_budget_pkey DO UPDATE SET used = b.used + 1;
            already := already + 1;
        END IF;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('allowed', fits AND stopped IS NULL, 'halted', stopped, 'used', already);
END
$$;

-- Stop executions: {agent_id, tool, reason, halted_by}; no agent_id or no tool means every one. Returns the halt.
CREATE FUNCTION public.halt_executions(identity jsonb, halt jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    made public.agent_execution_halt;
BEGIN
    identity := agent_private.document(identity);
    halt := agent_private.document(halt);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a halt needs a tenant');
    END IF;
    INSERT INTO public.agent_execution_halt (tenant_id, agent_id, tool, reason, halted_by)
    VALUES (current_setting('agent.tenant_id'), nullif(halt ->> 'agent_id', ''), nullif(halt ->> 'tool', ''),
            coalesce(halt ->> 'reason', ''), halt ->> 'halted_by')
    RETURNING * INTO made;
    PERFORM agent_private.append_event(made.tenant_id, NULL, 'halted', made.halted_by, jsonb_build_object(
        'halt_id', made.halt_id, 'agent_id', made.agent_id, 'tool', made.tool, 'reason', made.reason));
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(made);
END
$$;

-- End a halt. Returns whether it was in force until now.
CREATE FUNCTION public.resume_executions(identity jsonb, halt_id uuid, resumed_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    ended boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a halt needs a tenant');
    END IF;
    UPDATE public.agent_execution_halt h SET resumed_at = clock_timestamp(), resumed_by = resume_executions.resumed_by
    WHERE h.tenant_id = current_setting('agent.tenant_id') AND h.halt_id = resume_executions.halt_id AND h.resumed_at IS NULL;
    ended := FOUND;
    IF ended THEN
        PERFORM agent_private.append_event(current_setting('agent.tenant_id'), NULL, 'halt_ended', resume_executions.resumed_by,
                                           jsonb_build_object('halt_id', resume_executions.halt_id));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(ended);
END
$$;

-- The halts of a tenant, newest first; those in force have no resumed_at.
CREATE FUNCTION public.list_halts(identity jsonb)
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
    SELECT coalesce(jsonb_agg(to_jsonb(h) ORDER BY h.halted_at DESC, h.halt_id), '[]') INTO found
    FROM public.agent_execution_halt h WHERE h.tenant_id = current_setting('agent.tenant_id');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The log of a tenant, newest first, without pre-images. wanted: limit (at most 1,000; else 100), tool, state, since, user_id.
CREATE FUNCTION public.list_executions(identity jsonb, wanted jsonb DEFAULT '{}')
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
    SELECT coalesce(jsonb_agg(to_jsonb(x.l) - ARRAY['details_hash', 'previous_hash', 'row_hash'] || jsonb_build_object(
               'arguments_shown', d.arguments_shown, 'error', d.error, 'erased', d.log_id IS NULL) ORDER BY x.log_id DESC), '[]')
    INTO found
    FROM (SELECT l, l.tenant_id, l.log_id FROM public.agent_execution_log l
          WHERE l.tenant_id = current_setting('agent.tenant_id')
            AND (wanted ->> 'tool' IS NULL OR l.tool = wanted ->> 'tool')
            AND (wanted ->> 'state' IS NULL OR l.state = wanted ->> 'state')
            AND (wanted ->> 'since' IS NULL OR l.at >= (wanted ->> 'since')::timestamptz)
            AND (wanted ->> 'user_id' IS NULL OR l.user_id = wanted ->> 'user_id')
          ORDER BY l.log_id DESC LIMIT least(coalesce((wanted ->> 'limit')::integer, 100), 1000)) AS x
    LEFT JOIN public.agent_execution_details d ON d.tenant_id = x.tenant_id AND d.log_id = x.log_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- One row of the log with arguments, pre-image and hashes; undone_by is the row that undid it. NULL where there is none.
CREATE FUNCTION public.get_execution(identity jsonb, the_log_id bigint)
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
    SELECT to_jsonb(l) || jsonb_build_object(
               'arguments_shown', d.arguments_shown, 'arguments_run', d.arguments_run, 'error', d.error, 'pre_image', d.pre_image,
               'erased', d.log_id IS NULL,
               'undone_by', (SELECT min(u.log_id) FROM public.agent_execution_log u
                             WHERE u.tenant_id = l.tenant_id AND u.undoes = l.log_id AND u.state = 'executed'))
    INTO found
    FROM public.agent_execution_log l
    LEFT JOIN public.agent_execution_details d ON d.tenant_id = l.tenant_id AND d.log_id = l.log_id
    WHERE l.tenant_id = current_setting('agent.tenant_id') AND l.log_id = the_log_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Compute both chains of a tenant anew: {rows, intact, first_broken, approvals: {rows, first_broken}}. first_broken is
-- the number of the first row that is not what was written or is missing; one past the last where the end was cut off.
-- The events also say what an approval was for, who asked and who decided: of one whose row or votes say otherwise, the
-- event that asked for it counts as broken, and one past the last where nothing asked for it.
-- Arguments may be missing where a user was erased.
CREATE FUNCTION public.verify_executions(identity jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    log_rows bigint;
    log_broken bigint;
    log_hash text;
    event_rows bigint;
    event_broken bigint;
    event_hash text;
    changed bigint;
    head_number bigint;
    head_hash text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a log belongs to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT count(*), min(x.should) FILTER (WHERE NOT x.fine), (array_agg(x.row_hash ORDER BY x.should DESC))[1]
    INTO event_rows, event_broken, event_hash
    FROM (SELECT row_number() OVER w AS should, e.row_hash,
                 e.number = row_number() OVER w AND e.previous_hash = coalesce(lag(e.row_hash) OVER w, '')
                 AND e.row_hash = agent_private.chain_hash(e.previous_hash, agent_private.event_text(e)) AS fine
          FROM public.approval_event e WHERE e.tenant_id = tenant
          WINDOW w AS (ORDER BY e.number)) AS x;
    SELECT max(c.number), max(c.row_hash) INTO head_number, head_hash FROM public.agent_chain c
    WHERE c.tenant_id = tenant AND c.chain = 'approval_event';
    IF event_broken IS NULL AND (coalesce(head_number, 0), coalesce(head_hash, '')) <> (event_rows, coalesce(event_hash, '')) THEN
        event_broken := event_rows + 1;
    END IF;
    WITH events AS (SELECT e.* FROM public.approval_event e WHERE e.tenant_id = tenant),
    asked AS (SELECT e.* FROM events e WHERE e.what = 'requested'),
    ended AS (SELECT DISTINCT ON (e.approval_id) e.approval_id, e.what, e.details -> 'decided_by' AS decided_by
              FROM events e WHERE e.details ? 'decided_by' ORDER BY e.approval_id, e.number DESC),
    said AS (SELECT DISTINCT ON (e.approval_id, e.actor) e.approval_id, e.actor, e.details ->> 'verdict' AS verdict
             FROM events e WHERE e.what = 'voted' ORDER BY e.approval_id, e.actor, e.number DESC),
    miscounted AS (SELECT coalesce(s.approval_id, v.approval_id) AS approval_id
                   FROM said s
                   FULL JOIN (SELECT o.* FROM public.approval_vote o WHERE o.tenant_id = tenant) v
                       ON v.approval_id = s.approval_id AND v.voter = s.actor
                   WHERE v.verdict IS DISTINCT FROM s.verdict),
    erased AS (SELECT t::uuid AS approval_id FROM events e, jsonb_array_elements_text(e.details -> 'approval_ids') AS t
               WHERE e.what = 'erased')
    SELECT min(coalesce(k.number, event_rows + 1)) INTO changed
    FROM asked k
    FULL JOIN (SELECT q.* FROM public.human_approval_queue q WHERE q.tenant_id = tenant) a ON a.approval_id = k.approval_id
    LEFT JOIN ended d ON d.approval_id = a.approval_id
    WHERE k.number IS NULL OR a.approval_id IS NULL
       OR (a.requested_by, a.tool, a.tool_version, a.risk, a.args_hash, a.required_votes::text, a.edited_by) IS DISTINCT FROM
          (k.actor, k.details ->> 'tool', k.details ->> 'tool_version', k.details ->> 'risk', k.details ->> 'args_hash',
           k.details ->> 'required_votes', k.details ->> 'edited_by')
       OR to_jsonb(a.decided_by) <> coalesce(d.decided_by, '[]')
       OR (a.state IN ('approved', 'executing', 'executed', 'failed', 'unknown') AND d.what IS DISTINCT FROM 'approved')
       OR (a.state = 'rejected' AND d.what IS DISTINCT FROM 'rejected')
       OR a.approval_id IN (SELECT m.approval_id FROM miscounted m)
       OR (k.details ->> 'content_hash' IS DISTINCT FROM agent_private.approval_digest((
               SELECT q FROM public.human_approval_queue q WHERE q.approval_id = a.approval_id))
           AND NOT (a.arguments = '{}' AND a.arguments_shown IS NULL
                    AND a.approval_id IN (SELECT x.approval_id FROM erased x)));
    event_broken := least(event_broken, changed);
    SELECT count(*), min(x.should) FILTER (WHERE NOT x.fine), (array_agg(x.row_hash ORDER BY x.should DESC))[1]
    INTO log_rows, log_broken, log_hash
    FROM (SELECT row_number() OVER w AS should, l.row_hash,
                 l.log_id = row_number() OVER w AND l.previous_hash = coalesce(lag(l.row_hash) OVER w, '')
                 AND l.row_hash = agent_private.chain_hash(l.previous_hash, agent_private.execution_text(l))
                 AND CASE WHEN d.log_id IS NOT NULL THEN agent_private.details_hash(d) = l.details_hash
                          ELSE gone.log_id IS NOT NULL
                     END AS fine
          FROM public.agent_execution_log l
          LEFT JOIN public.agent_execution_details d ON d.tenant_id = l.tenant_id AND d.log_id = l.log_id
          LEFT JOIN (SELECT DISTINCT g.id::bigint AS log_id
                     FROM public.approval_event e CROSS JOIN LATERAL jsonb_array_elements_text(e.details -> 'log_ids') AS g (id)
                     WHERE e.tenant_id = tenant AND e.what = 'erased') AS gone ON gone.log_id = l.log_id
          WHERE l.tenant_id = tenant
          WINDOW w AS (ORDER BY l.log_id)) AS x;
    SELECT max(c.number), max(c.row_hash) INTO head_number, head_hash FROM public.agent_chain c
    WHERE c.tenant_id = tenant AND c.chain = 'agent_execution_log';
    IF log_broken IS NULL AND (coalesce(head_number, 0), coalesce(head_hash, '')) <> (log_rows, coalesce(log_hash, '')) THEN
        log_broken := log_rows + 1;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object(
        'rows', log_rows, 'intact', log_broken IS NULL AND event_broken IS NULL, 'first_broken', log_broken,
        'approvals', jsonb_build_object('rows', event_rows, 'first_broken', event_broken));
END
$$;

-- What the clock does: expire what is due, remind, and give up as unknown what has been executing for longer than
-- executing_seconds. For all tenants; what somebody works on right now is passed over. Returns how many changed.
CREATE FUNCTION public.tend_approvals(executing_seconds double precision DEFAULT 900)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    due public.human_approval_queue;
    told jsonb := '[]';
    changed integer := 0;
    next_one record;
    the_log_id bigint;
BEGIN
    DELETE FROM public.approval_seen s WHERE (s.channel, s.delivery_key) IN (
        SELECT o.channel, o.delivery_key FROM public.approval_seen o
        WHERE o.seen_at < clock_timestamp() - interval '1 day'
          -- LangGraph gives a node its earlier answers again as long as an approval lives, which is 7 days at most.
          AND (o.channel NOT IN ('interrupt', 'decision interrupt') OR o.seen_at < clock_timestamp() - interval '8 days')
        ORDER BY o.seen_at LIMIT 1000 FOR UPDATE SKIP LOCKED);
    DELETE FROM public.agent_execution_result r WHERE (r.tenant_id, r.result_key) IN (
        SELECT o.tenant_id, o.result_key FROM public.agent_execution_result o
        WHERE o.saved_at < clock_timestamp() - interval '7 days' ORDER BY o.saved_at LIMIT 1000 FOR UPDATE SKIP LOCKED);
    FOR due IN
        SELECT a.* FROM public.human_approval_queue a
        WHERE (a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= clock_timestamp())
           OR (a.state = 'pending' AND a.escalated_at IS NULL AND a.escalate_at <= clock_timestamp())
           OR (a.state = 'executing' AND a.claimed_at <= clock_timestamp() - make_interval(secs => executing_seconds))
        ORDER BY a.approval_id LIMIT 500
        FOR UPDATE SKIP LOCKED
    LOOP
        changed := changed + 1;
        IF due.state = 'executing' THEN
            UPDATE public.human_approval_queue a SET state = 'unknown', finished_at = clock_timestamp()
            WHERE a.approval_id = due.approval_id;
        ELSIF due.expires_at <= clock_timestamp() THEN
            UPDATE public.human_approval_queue a SET state = 'expired', decided_at = coalesce(a.decided_at, clock_timestamp())
            WHERE a.approval_id = due.approval_id;
        ELSE
            UPDATE public.human_approval_queue a SET escalated_at = clock_timestamp() WHERE a.approval_id = due.approval_id;
        END IF;
        told := told || jsonb_build_object('tenant_id', due.tenant_id, 'approval_id', due.approval_id, 'what', CASE
            WHEN due.state = 'executing' THEN 'unknown' WHEN due.expires_at <= clock_timestamp() THEN 'expired' ELSE 'escalated' END);
    END LOOP;
    -- Heads of chains last, tenant by tenant in one order.
    FOR next_one IN
        SELECT t.tenant_id, t.approval_id, t.what FROM jsonb_to_recordset(told) AS t (tenant_id text, approval_id uuid, what text)
        ORDER BY t.tenant_id, t.what <> 'unknown', t.approval_id
    LOOP
        the_log_id := NULL;
        IF next_one.what = 'unknown' THEN
            SELECT a.* INTO due FROM public.human_approval_queue a WHERE a.approval_id = next_one.approval_id;
            the_log_id := agent_private.append_execution(due.tenant_id, jsonb_build_object(
                'user_id', due.requested_by, 'agent_id', due.agent_id, 'session_id', due.session_id, 'run_id', due.run_id),
                jsonb_build_object(
                    'state', 'unknown', 'decision', 'approved', 'tool', due.tool, 'tool_version', due.tool_version, 'risk', due.risk,
                    'approval_id', due.approval_id, 'arguments_shown', due.arguments_shown,
                    'error', 'nobody told how it ended'), due.decided_by);
            UPDATE public.human_approval_queue a SET log_id = the_log_id WHERE a.approval_id = due.approval_id;
        END IF;
    END LOOP;
    FOR next_one IN
        SELECT t.tenant_id, t.approval_id, t.what FROM jsonb_to_recordset(told) AS t (tenant_id text, approval_id uuid, what text)
        ORDER BY t.tenant_id, t.approval_id
    LOOP
        PERFORM agent_private.append_event(next_one.tenant_id, next_one.approval_id, next_one.what, NULL);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(changed);
END
$$;

-- Erase what approvals and the log hold of a user: arguments, errors, results, rows as they were before, paused programs; what
-- still waited is cancelled. That something was done, by which tool and with which risk, stays. The caller has entered.
-- Returns the number of rows changed per table.
CREATE FUNCTION agent_private.erase_executions(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked bigint;
    details bigint;
    paused bigint;
    results bigint;
    gone bigint[];
    emptied uuid[];
    closed uuid[];
    closed_id uuid;
BEGIN
    PERFORM FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user ORDER BY a.approval_id FOR UPDATE;
    SELECT coalesce(array_agg(a.approval_id ORDER BY a.approval_id), '{}') INTO closed FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user AND a.state IN ('pending', 'approved');
    SELECT coalesce(array_agg(a.approval_id ORDER BY a.approval_id), '{}') INTO emptied FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user AND a.arguments_shown IS NOT NULL;
    UPDATE public.human_approval_queue a
    SET arguments = '{}', arguments_shown = NULL, summary = '', reason = '', effects = NULL, bounds = NULL,
        state = CASE a.state WHEN 'pending' THEN 'cancelled' WHEN 'approved' THEN 'expired' ELSE a.state END
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user;
    GET DIAGNOSTICS asked = ROW_COUNT;
    DELETE FROM public.approval_continuation c USING public.human_approval_queue a
    WHERE a.approval_id = c.approval_id AND a.tenant_id = the_tenant AND a.requested_by = the_user;
    GET DIAGNOSTICS paused = ROW_COUNT;
    DELETE FROM public.agent_execution_result r WHERE r.tenant_id = the_tenant AND r.user_id = the_user;
    GET DIAGNOSTICS results = ROW_COUNT;
    WITH deleted AS (
        DELETE FROM public.agent_execution_details d WHERE d.tenant_id = the_tenant AND d.user_id = the_user
        RETURNING d.log_id)
    SELECT count(*), coalesce(array_agg(x.log_id ORDER BY x.log_id), '{}') INTO details, gone FROM deleted x;
    FOREACH closed_id IN ARRAY closed LOOP
        PERFORM agent_private.append_event(the_tenant, closed_id, a.state, NULL, '{"why": "its user was erased"}')
        FROM public.human_approval_queue a WHERE a.approval_id = closed_id;
    END LOOP;
    IF gone <> '{}' OR emptied <> '{}' THEN
        PERFORM agent_private.append_event(the_tenant, NULL, 'erased', NULL,
                                           jsonb_build_object('log_ids', gone, 'approval_ids', emptied));
    END IF;
    RETURN jsonb_build_object('human_approval_queue', asked, 'approval_continuation', paused, 'agent_execution_details', details,
                              'agent_execution_result', results);
END
$$;

-- What erase_user() erases beside memories and runs. Returns the number of rows changed per table.
CREATE OR REPLACE FUNCTION agent_private.erase_elsewhere(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.erase_executions(the_tenant, the_user);
$$;
