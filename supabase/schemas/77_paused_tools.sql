-- Runs of agent-written tools that wait for an approval in the middle of their work: put away, taken up, ended.

-- Keep a paused program with its approval until that is decided; the first one saved stays. Nobody but who waits for it
-- goes on with it for wait_seconds. replaces: the approval that the same program waited for before, whose pause ends in
-- the same transaction. Returns whether it was kept.
CREATE FUNCTION public.save_continuation(
    identity jsonb, the_approval_id uuid, payload text, mac text, wait_seconds double precision DEFAULT 0, replaces uuid DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    kept boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    IF NOT EXISTS (SELECT FROM public.human_approval_queue a
                   WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.approval_id = the_approval_id) THEN
        PERFORM agent_private.refuse('PT404', 'there is no approval of this id');
    END IF;
    INSERT INTO public.approval_continuation (tenant_id, approval_id, payload, mac, due_at)
    VALUES (current_setting('agent.tenant_id'), the_approval_id, save_continuation.payload, save_continuation.mac,
            clock_timestamp() + make_interval(secs => wait_seconds))
    ON CONFLICT DO NOTHING;
    kept := FOUND;
    DELETE FROM public.approval_continuation c
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = replaces;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(kept);
END
$$;

-- Take up a paused program for lease_seconds: {payload, mac}, or NULL where there is none or somebody else has it.
CREATE FUNCTION public.take_continuation(identity jsonb, the_approval_id uuid, lease_seconds double precision DEFAULT 900)
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
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    UPDATE public.approval_continuation c SET taken_until = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id
      AND (c.taken_until IS NULL OR c.taken_until <= clock_timestamp())
    RETURNING jsonb_build_object('payload', c.payload, 'mac', c.mac) INTO found;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Give back a paused program that could not go on now. Keepers try again after 2, 4, 8, … at most 300 seconds. Returns
-- whether it was there.
CREATE FUNCTION public.release_continuation(identity jsonb, the_approval_id uuid, error text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    there boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    UPDATE public.approval_continuation c
    SET taken_until = NULL, attempts = c.attempts + 1, error = left(release_continuation.error, 1000),
        due_at = clock_timestamp() + make_interval(secs => least(300, 2 ^ least(c.attempts + 1, 9)))
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id;
    there := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(there);
END
$$;

-- End a paused program that went on, and log how: entry as for record_execution. entry.result, JSON text, is kept under
-- the_key for get_execution_result. In one transaction, so that of any number of callers one ends it; the others raise
-- PT409. Returns {log_id}.
CREATE FUNCTION public.finish_continuation(identity jsonb, the_approval_id uuid, the_key text, entry jsonb)
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
    IF entry ->> 'decision' = 'approved' THEN
        PERFORM agent_private.refuse('PT422', 'what was approved and executed is logged with its ticket');
    END IF;
    DELETE FROM public.approval_continuation c
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id;
    IF NOT FOUND THEN
        PERFORM agent_private.refuse('PT409', 'this paused program has ended already');
    END IF;
    the_log_id := agent_private.append_execution(current_setting('agent.tenant_id'), identity, entry);
    PERFORM agent_private.keep_result(current_setting('agent.tenant_id'), the_key, nullif(identity ->> 'user_id', ''), the_log_id,
                                      entry ->> 'result');
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('log_id', the_log_id);
END
$$;

-- Paused programs whose approvals are decided and that nobody works on or waits for: [{approval_id, tenant_id, user_id,
-- agent_id, session_id}], leased to the caller. One that could not go on within a day is given up.
CREATE FUNCTION public.take_tool_resumes(lease_seconds double precision DEFAULT 60)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    taken jsonb := '[]';
    due record;
BEGIN
    FOR due IN
        SELECT c.approval_id, a.tenant_id, a.requested_by, a.agent_id, a.session_id
        FROM public.approval_continuation c
        JOIN public.human_approval_queue a ON a.approval_id = c.approval_id
        CROSS JOIN LATERAL (
            WITH RECURSIVE edits AS (
                SELECT e.state, e.replaced_by, e.changed_at FROM public.human_approval_queue e WHERE e.approval_id = c.approval_id
                UNION ALL
                SELECT e.state, e.replaced_by, e.changed_at FROM edits x
                JOIN public.human_approval_queue e ON e.approval_id = x.replaced_by)
            SELECT x.state, x.changed_at FROM edits x WHERE x.replaced_by IS NULL) AS last
        WHERE c.due_at <= clock_timestamp() AND (c.taken_until IS NULL OR c.taken_until <= clock_timestamp())
          AND last.state NOT IN ('pending', 'executing') AND last.changed_at > clock_timestamp() - interval '1 day'
        ORDER BY c.approval_id LIMIT 50
        FOR UPDATE OF c SKIP LOCKED
    LOOP
        UPDATE public.approval_continuation c SET due_at = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE c.approval_id = due.approval_id;
        taken := taken || jsonb_build_object(
            'approval_id', due.approval_id, 'tenant_id', due.tenant_id, 'user_id', due.requested_by, 'agent_id', due.agent_id,
            'session_id', due.session_id);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN taken;
END
$$;
