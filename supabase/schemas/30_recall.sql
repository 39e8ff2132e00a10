-- Recall: what is known that bears on a question, within the scopes of one identity.

-- Everything known that bears on a question, in one call: {profile, session, memories}, each a list of
-- {memory_id, version, store, kind, field, content, trust, recorded_at, …}; empty lists where nobody asks.
-- stores says which are wanted. question_embedding is '[…]' as text, with the model that made it. json and not jsonb:
-- it is written once and never looked into here.
CREATE FUNCTION public.recall_context(
    identity jsonb, question text DEFAULT '', stores text[] DEFAULT '{user_profile,user_memory,session_context}',
    memory_limit integer DEFAULT 40, question_embedding text DEFAULT NULL, embedding_model text DEFAULT NULL)
RETURNS json
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    fields jsonb := '[]';
    memories json := '[]';
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity);
    tenant := current_setting('agent.tenant_id', true);
    person := current_setting('agent.user_id', true);
    IF previous IS NULL THEN
        RETURN '{"profile": [], "session": [], "memories": []}';
    END IF;
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'memory_id', m.memory_id, 'version', m.version, 'store', m.store, 'field', m.field, 'value', m.value,
        'content', m.content, 'trust', m.trust, 'recorded_at', m.recorded_at) ORDER BY m.memory_number), '[]')
    INTO fields
    FROM public.agent_memory m
    WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.superseded_at IS NULL
      AND m.field IS NOT NULL
      AND ((m.store = 'user_profile' AND 'user_profile' = ANY (stores))
           OR (m.store = 'session_context' AND 'session_context' = ANY (stores)
               AND m.session_id = identity ->> 'session_id'));
    IF 'user_memory' = ANY (stores) THEN
        SELECT coalesce(json_agg(json_build_object(
            'memory_id', r.memory_id, 'version', r.version, 'store', r.store, 'kind', r.kind, 'content', r.content,
            'trust', r.trust, 'recorded_at', r.recorded_at) ORDER BY r.place), '[]') INTO memories
        FROM agent_private.rank_memories(
            'user', person, question, agent_private.as_vector(question_embedding), embedding_model,
            identity ->> 'session_id', memory_limit) AS r;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN json_build_object(
        'profile', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'user_profile'),
        'session', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'session_context'),
        'memories', memories);
END
$$;

-- The memories that fit a question best, for search: as in recall_context, over all sessions; [] where nobody asks or
-- where nothing has a word or a vector in common with it. the_scope: 'user' those of the user, 'agent' those of the
-- agent, 'tenant' what all of a tenant share, such as what discovery learned of the application; the last two for servers.
CREATE FUNCTION public.match_memories(
    identity jsonb, question text, memory_limit integer DEFAULT 5, question_embedding text DEFAULT NULL,
    embedding_model text DEFAULT NULL, the_scope text DEFAULT 'user')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    previous text[];
    owner text;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    owner := CASE the_scope WHEN 'user' THEN current_setting('agent.user_id')
                            WHEN 'agent' THEN current_setting('agent.agent_id')
                            WHEN 'tenant' THEN '' END;
    IF owner IS NULL THEN
        PERFORM agent_private.refuse('PT422', format('scope %s is not user, agent or tenant', the_scope));
    END IF;
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'memory_id', r.memory_id, 'version', r.version, 'store', r.store, 'kind', r.kind, 'content', r.content,
        'trust', r.trust, 'recorded_at', r.recorded_at, 'valid_from', r.valid_from, 'score', round(r.score::numeric, 4),
        'word_score', round(r.word_score::numeric, 4), 'vector_score', round(r.vector_score::numeric, 4)) ORDER BY r.place), '[]')
    INTO found
    FROM agent_private.rank_memories(
        the_scope, owner, question, agent_private.as_vector(question_embedding), embedding_model, NULL, memory_limit) AS r
    WHERE r.word_score > 0 OR r.vector_score > 0;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;
