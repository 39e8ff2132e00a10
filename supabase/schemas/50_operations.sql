-- The storage operations: get, list, write, delete and clear, each within one identity.

-- Write one memory: see agent_private.write_memory for the keys of learning. memory_limit: greatest number of memories
-- of this store; the oldest above it are retired. Returns the receipt.
CREATE FUNCTION public.upsert_learning(identity jsonb, learning jsonb, memory_limit integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    learning := agent_private.document(learning);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be written for nobody: the identity has no tenant or no user');
    END IF;
    receipt := agent_private.write_memory(learning || jsonb_strip_nulls(jsonb_build_object(
        'run_id', identity ->> 'run_id',
        'source', coalesce(learning ->> 'source', 'api'))));
    PERFORM agent_private.hold_to_limit(learning ->> 'store', memory_limit);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- Several fields or memories in one transaction, all of them or none: [{action: write|retire, …}].
-- limits: {store: greatest number of memories}. Returns receipts.
CREATE FUNCTION public.upsert_learnings(identity jsonb, learnings jsonb, limits jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    learning jsonb;
    receipts jsonb := '[]';
    stored record;
BEGIN
    identity := agent_private.document(identity);
    learnings := agent_private.document(learnings);
    limits := agent_private.document(limits);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be written for nobody: the identity has no tenant or no user');
    END IF;
    PERFORM agent_private.lock_shared_scopes(learnings);
    FOR learning IN SELECT l FROM jsonb_array_elements(learnings) AS l LOOP
        receipts := receipts || jsonb_build_array(agent_private.apply_operation(
            learning || jsonb_strip_nulls(jsonb_build_object(
                'run_id', identity ->> 'run_id', 'source', coalesce(learning ->> 'source', 'api')))));
    END LOOP;
    FOR stored IN SELECT key AS name, value::integer AS memory_limit FROM jsonb_each_text(limits) LOOP
        PERFORM agent_private.hold_to_limit(stored.name, stored.memory_limit);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN receipts;
END
$$;

-- One memory with its versions and evidence, or NULL where this identity has none of that id.
CREATE FUNCTION public.get_learning(identity jsonb, the_memory_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT to_jsonb(m) - 'content_hash' - 'memory_number' || jsonb_build_object(
        'versions', (SELECT jsonb_agg(jsonb_build_object(
                         'version', v.version, 'content', v.content, 'value', v.value, 'recorded_at', v.recorded_at,
                         'superseded_at', v.superseded_at, 'superseded_reason', v.superseded_reason) ORDER BY v.version)
                     FROM public.agent_memory v WHERE v.tenant_id = m.tenant_id AND v.memory_id = m.memory_id),
        'evidence', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                         'version', e.version, 'run_id', e.run_id, 'message_id', e.message_id,
                         'tool_call_id', e.tool_call_id, 'quote', e.quote, 'recorded_at', e.recorded_at)
                         ORDER BY e.version, e.recorded_at, e.message_id), '[]')
                     FROM public.agent_memory_evidence e WHERE e.tenant_id = m.tenant_id AND e.memory_id = m.memory_id))
    INTO found
    FROM public.agent_memory m
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.memory_id = the_memory_id
    ORDER BY m.version DESC LIMIT 1;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Current memories of an identity, newest first. wanted: any of store, kind, field, session_id and begins (of the id) must
-- fit. Turns of conversations come where the store conversation or an id is wanted; they would hide all else.
CREATE FUNCTION public.get_learnings(identity jsonb, wanted jsonb DEFAULT '{}', memory_limit integer DEFAULT 100, memory_offset integer DEFAULT 0)
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
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x) - 'content_hash' ORDER BY x.memory_number DESC), '[]') INTO found
    FROM (SELECT m.* FROM public.agent_memory m
          WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.superseded_at IS NULL
            AND m.scope = 'user' AND m.owner_id = current_setting('agent.user_id')
            AND (m.store = wanted ->> 'store' OR wanted ->> 'store' IS NULL
                 AND (m.store <> 'conversation' OR wanted ->> 'begins' IS NOT NULL))
            AND (wanted ->> 'begins' IS NULL OR starts_with(m.memory_id::text, wanted ->> 'begins'))
            AND (wanted ->> 'kind' IS NULL OR m.kind = wanted ->> 'kind')
            AND (wanted ->> 'field' IS NULL OR m.field = wanted ->> 'field')
            AND (wanted ->> 'session_id' IS NULL OR m.session_id = wanted ->> 'session_id')
          ORDER BY m.memory_number DESC LIMIT least(memory_limit, 10000) OFFSET memory_offset) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Delete memories for good, all their versions, words, vectors and evidence. Returns how many memories went.
CREATE FUNCTION agent_private.delete_memories(the_ids uuid[])
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target public.agent_memory;
    gone integer;
BEGIN
    PERFORM agent_private.touch_scope('user');
    FOR target IN
        SELECT * FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.memory_id = ANY (the_ids) AND m.superseded_at IS NULL
    LOOP
        PERFORM agent_private.close_memory(target, 'deleted');
    END LOOP;
    WITH deleted AS (
        DELETE FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.memory_id = ANY (the_ids)
        RETURNING m.memory_id)
    SELECT count(DISTINCT d.memory_id) INTO gone FROM deleted d;
    RETURN gone;
END
$$;

-- Delete one memory for good. Returns true, or false where this identity has none of that id.
CREATE FUNCTION public.delete_learning(identity jsonb, the_memory_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be deleted for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(ARRAY[the_memory_id]);
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone > 0);
END
$$;

-- Delete the memories named for good; ids of others are passed over. Returns how many went.
CREATE FUNCTION public.delete_learnings(identity jsonb, the_memory_ids uuid[])
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be deleted for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(the_memory_ids);
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone);
END
$$;

-- Delete all memories of an identity for good, of one store or of all. Returns how many went.
CREATE FUNCTION public.clear_learnings(identity jsonb, the_store text DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be cleared for nobody: the identity has no tenant or no user');
    END IF;
    gone := agent_private.delete_memories(ARRAY(
        SELECT DISTINCT m.memory_id FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND (the_store IS NULL OR m.store = the_store)));
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(gone);
END
$$;

-- Erase what later parts of the schema hold of a user; each of them replaces this. The caller has entered. Returns the
-- number of rows changed per table.
CREATE FUNCTION agent_private.erase_elsewhere(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN '{}';
END
$$;

-- Erase a user: memories with all versions, evidence, words and vectors, runs, exposures, outcomes and waiting jobs.
-- For operators. Returns the number of rows gone per table.
CREATE FUNCTION public.erase_user(identity jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    counts jsonb := '{}';
    known boolean;
    gone integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    tenant := identity ->> 'tenant_id';
    person := nullif(identity ->> 'user_id', '');
    IF previous IS NULL OR person IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'to erase a user, name the tenant and the user');
    END IF;
    known := EXISTS (SELECT FROM public.agent_scope s
                     WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.owner_id = person);
    -- Waits for writers of this user and keeps new ones out until all is gone.
    PERFORM agent_private.touch_scope('user');
    DELETE FROM public.agent_memory_evidence e WHERE e.tenant_id = tenant AND e.scope = 'user' AND e.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_evidence', gone);
    DELETE FROM public.agent_memory_term t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_term', gone);
    DELETE FROM public.agent_memory_past_term t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_past_term', gone);
    DELETE FROM public.agent_term_count t WHERE t.tenant_id = tenant AND t.scope = 'user' AND t.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_term_count', gone);
    DELETE FROM public.agent_memory_embedding e WHERE e.tenant_id = tenant AND e.scope = 'user' AND e.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory_embedding', gone);
    DELETE FROM public.agent_embedding_list l WHERE l.tenant_id = tenant AND l.scope = 'user' AND l.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_embedding_list', gone);
    DELETE FROM public.agent_memory m WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_memory', gone);
    DELETE FROM public.agent_exposure e WHERE e.tenant_id = tenant AND e.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_exposure', gone);
    DELETE FROM public.agent_outcome o WHERE o.tenant_id = tenant AND o.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_outcome', gone);
    DELETE FROM public.agent_run r WHERE r.tenant_id = tenant AND r.user_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_run', gone);
    DELETE FROM public.agent_scope s WHERE s.tenant_id = tenant AND s.scope = 'user' AND s.owner_id = person;
    GET DIAGNOSTICS gone = ROW_COUNT; counts := counts || jsonb_build_object('agent_scope', known::integer);
    gone := agent_private.forget_jobs(tenant, person); counts := counts || jsonb_build_object('procrastinate_jobs', gone);
    counts := counts || agent_private.erase_elsewhere(tenant, person);
    PERFORM agent_private.leave(previous);
    RETURN counts;
END
$$;

-- Take a user's jobs out of the queue, done ones and those at work too: a worker that learns this user right now finds
-- nothing left to apply. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.forget_jobs(the_tenant text, the_user text)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, agent_queue, pg_temp
AS $$
DECLARE
    gone integer;
BEGIN
    DELETE FROM agent_queue.procrastinate_jobs j
    WHERE j.args #>> '{identity,tenant_id}' = the_tenant AND j.args #>> '{identity,user_id}' = the_user;
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END
$$;
REVOKE ALL ON FUNCTION agent_private.forget_jobs(text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.forget_jobs(text, text) TO agent_app;

-- Who has memories in a tenant, how many, and how many turns of conversations beside them; for operators.
CREATE FUNCTION public.list_users(identity jsonb)
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
    SELECT coalesce(jsonb_agg(to_jsonb(x) ORDER BY x.last_recorded_at DESC), '[]') INTO found
    FROM (SELECT m.owner_id AS user_id, count(*) FILTER (WHERE m.store <> 'conversation') AS memories,
                 count(*) FILTER (WHERE m.store = 'conversation') AS turns, max(m.recorded_at) AS last_recorded_at
          FROM public.agent_memory m
          WHERE m.tenant_id = identity ->> 'tenant_id' AND m.scope = 'user' AND m.superseded_at IS NULL
          GROUP BY m.owner_id) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- How far the database is and how much waits; for `agent doctor`. Counts are of one tenant.
CREATE FUNCTION public.learning_status(identity jsonb)
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
        PERFORM agent_private.refuse('PT403', 'no tenant to report on');
    END IF;
    found := jsonb_build_object(
        'memories', (SELECT count(*) FROM public.agent_memory m WHERE m.superseded_at IS NULL AND m.store <> 'conversation'),
        'turns', (SELECT count(*) FROM public.agent_memory m WHERE m.superseded_at IS NULL AND m.store = 'conversation'),
        'runs', (SELECT count(*) FROM public.agent_run),
        'runs_waiting', (SELECT count(*) FROM public.agent_run r
                         WHERE r.learned_at IS NULL AND r.status = 'completed' AND r.user_id IS NOT NULL)
    ) || agent_private.queue_status();
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Jobs by state and workers alive. Runs as its owner, because agent_app has no rights on the queue.
CREATE FUNCTION agent_private.queue_status()
RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object(
        'jobs_waiting', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'todo'),
        'jobs_running', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'doing'),
        'jobs_failed', (SELECT count(*) FROM agent_queue.procrastinate_jobs WHERE status = 'failed'),
        'workers', (SELECT count(*) FROM agent_queue.procrastinate_workers WHERE last_heartbeat > now() - interval '30 seconds'));
$$;
REVOKE ALL ON FUNCTION agent_private.queue_status() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agent_private.queue_status() TO agent_app;
