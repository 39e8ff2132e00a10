-- Recall: what is known that bears on a question, within the scopes of one identity.

-- Filters as they are asked with: {stores, kinds, tags, trust: lists of texts, session_id, since, until}. A memory fits
-- that has one of the stores, kinds and trusts, all of the tags, that session, and since <= valid_from < until. What is
-- absent or null does not count. PT422 for other keys, for values that are none and for more than 20,000 bytes.
CREATE FUNCTION agent_private.wanted(filters jsonb)
RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_key text;
    the_value jsonb;
BEGIN
    IF coalesce(filters, '{}') = '{}' THEN
        RETURN '{}';
    ELSIF jsonb_typeof(filters) <> 'object' THEN
        PERFORM agent_private.refuse('PT422', 'filters are an object');
    ELSIF octet_length(filters::text) > 20000 THEN  -- they are looked into for every memory
        PERFORM agent_private.refuse('PT422', 'filters have at most 20,000 bytes');
    END IF;
    filters := jsonb_strip_nulls(filters);
    FOR the_key, the_value IN SELECT f.key, f.value FROM jsonb_each(filters) AS f LOOP
        IF the_key IN ('stores', 'kinds', 'tags', 'trust') THEN
            IF jsonb_typeof(the_value) <> 'array' OR EXISTS (
                SELECT FROM jsonb_array_elements(the_value) AS v WHERE jsonb_typeof(v) <> 'string') THEN
                PERFORM agent_private.refuse('PT422', format('filter %s is a list of texts', the_key));
            END IF;
        ELSIF the_key IN ('session_id', 'since', 'until') THEN
            IF jsonb_typeof(the_value) <> 'string' THEN
                PERFORM agent_private.refuse('PT422', format('filter %s is a text', the_key));
            END IF;
            IF the_key <> 'session_id' THEN
                BEGIN  -- once here and not for every memory
                    filters := filters || jsonb_build_object(the_key, (the_value #>> '{}')::timestamptz);
                EXCEPTION WHEN invalid_datetime_format OR datetime_field_overflow OR invalid_parameter_value THEN
                    PERFORM agent_private.refuse('PT422', format('filter %s is a time', the_key));
                END;
            END IF;
        ELSE
            PERFORM agent_private.refuse('PT422', format(
                'no filter %s; there are stores, kinds, tags, trust, session_id, since and until', the_key));
        END IF;
    END LOOP;
    RETURN filters;
END
$$;

-- Whether a version was believed as_of (NULL: is current), was true then, and fits filters that wanted() has seen.
-- Without a search_path of its own, so that the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.fits(memory public.agent_memory, filters jsonb, as_of timestamptz)
RETURNS boolean
LANGUAGE sql STABLE
RETURN CASE WHEN as_of IS NULL THEN memory.superseded_at IS NULL
            ELSE memory.recorded_at <= as_of AND (memory.superseded_at IS NULL OR memory.superseded_at > as_of) END
       AND (memory.valid_to IS NULL OR memory.valid_to > coalesce(as_of, now()))
       AND (filters = '{}' OR (
           (NOT filters ? 'stores' OR filters -> 'stores' ? memory.store)
           AND (NOT filters ? 'kinds' OR filters -> 'kinds' ? memory.kind)
           AND (NOT filters ? 'trust' OR filters -> 'trust' ? memory.trust)
           AND (NOT filters ? 'tags' OR to_jsonb(memory.tags) @> (filters -> 'tags'))
           AND (NOT filters ? 'session_id' OR filters ->> 'session_id' = memory.session_id)
           AND (NOT filters ? 'since' OR memory.valid_from >= (filters ->> 'since')::timestamptz)
           AND (NOT filters ? 'until' OR memory.valid_from < (filters ->> 'until')::timestamptz)));

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
    IF stores && '{user_memory,conversation}' THEN
        SELECT coalesce(json_agg(m), '[]') INTO memories  -- rows and not json_build_object, which costs twice as much
        FROM (SELECT r.memory_id, r.version, r.store, r.kind, r.content, r.trust, r.recorded_at, r.speaker, r.session_id, r.turn, r.valid_from
              FROM agent_private.rank_memories(
                  'user', person, question, agent_private.as_vector(question_embedding), embedding_model,
                  identity ->> 'session_id', memory_limit,
                  CASE WHEN stores @> '{user_memory,conversation}' THEN '{}'
                       ELSE jsonb_build_object('stores', ARRAY(SELECT s FROM unnest(stores) AS s WHERE s IN ('user_memory', 'conversation'))) END
                  ) AS r
              ORDER BY r.place) AS m;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN json_build_object(
        'profile', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'user_profile'),
        'session', (SELECT coalesce(jsonb_agg(f), '[]') FROM jsonb_array_elements(fields) AS f WHERE f ->> 'store' = 'session_context'),
        'memories', memories);
END
$$;

-- Whose the memories of a scope are, for the identity that was taken on: the user's, the agent's, or '' for those that all
-- of a tenant share. PT422 for another scope.
CREATE FUNCTION agent_private.owner_of_scope(the_scope text)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner text := CASE the_scope WHEN 'user' THEN current_setting('agent.user_id')
                                 WHEN 'agent' THEN current_setting('agent.agent_id')
                                 WHEN 'tenant' THEN '' END;
BEGIN
    IF owner IS NULL THEN
        PERFORM agent_private.refuse('PT422', format('scope %s is not user, agent or tenant', the_scope));
    END IF;
    RETURN owner;
END
$$;

-- The memories that fit a question best, for search: as in recall_context, over all sessions; [] where nobody asks or
-- where nothing has a word or a vector in common with it. the_scope: 'user' those of the user, 'agent' those of the
-- agent, 'tenant' what all of a tenant share, such as what discovery learned of the application; the last two for servers.
-- filters: see agent_private.wanted. as_of: what was believed at that time; NULL is now. why tells of each list that
-- found a memory, 'words' and 'vector' and others, its rank there and its score, 1 being the best of the list.
CREATE FUNCTION public.match_memories(
    identity jsonb, question text, memory_limit integer DEFAULT 5, question_embedding text DEFAULT NULL,
    embedding_model text DEFAULT NULL, the_scope text DEFAULT 'user', filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
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
    filters := agent_private.wanted(agent_private.document(filters));
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    owner := agent_private.owner_of_scope(the_scope);
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'memory_id', r.memory_id, 'version', r.version, 'store', r.store, 'kind', r.kind, 'content', r.content,
        'trust', r.trust, 'tags', r.tags, 'speaker', r.speaker, 'session_id', r.session_id, 'turn', r.turn,
        'recorded_at', r.recorded_at, 'valid_from', r.valid_from, 'score', round(r.score::numeric, 4),
        'why', (SELECT jsonb_object_agg(w.list, jsonb_build_object('rank', w.rank, 'score', round(w.score::numeric, 4)))
                FROM unnest(r.lists, r.list_ranks, r.list_scores) AS w (list, rank, score))) ORDER BY r.place), '[]')
    INTO found
    FROM agent_private.rank_memories(
        the_scope, owner, question, agent_private.as_vector(question_embedding), embedding_model, NULL, memory_limit,
        filters, as_of) AS r
    WHERE cardinality(r.lists) > 0;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;
