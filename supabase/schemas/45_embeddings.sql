-- Vectors: which memories want one, keeping them, and the nearest to a question.

-- The memories of one scope of one owner whose vectors are nearest to a question's, by this model and of the question's
-- dimensions: at most how_many, best first, with the cosine of the angle (0 for a vector of zeros, which has none).
-- Exact: it compares all vectors of the scope. Leans on the primary key; locks nothing. Nothing without an embedding.
CREATE FUNCTION agent_private.nearest(
    the_scope text, the_owner text, question_embedding vector, embedding_model text, how_many integer)
RETURNS TABLE (memory_number bigint, similarity double precision)
LANGUAGE plpgsql ROWS 100
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    IF question_embedding IS NULL OR embedding_model IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT e.memory_number, coalesce(1 - nullif(agent_private.vector_distance(e.embedding, question_embedding), 'NaN'), 0)
    FROM public.agent_memory_embedding e
    WHERE e.tenant_id = current_setting('agent.tenant_id') AND e.scope = the_scope AND e.owner_id = the_owner
      AND e.model = embedding_model AND e.dimensions = agent_private.vector_dimensions(question_embedding)
    ORDER BY agent_private.vector_distance(e.embedding, question_embedding) LIMIT how_many;
END
$$;

-- Memories of an owner that have no vector of this model, and of these dimensions where they are given: behind one name
-- a server may put another model. Newest first: [{memory_number, content}].
CREATE FUNCTION public.memories_without_embedding(
    identity jsonb, model text, memory_limit integer DEFAULT 100, dimensions integer DEFAULT NULL)
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
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(jsonb_build_object('memory_number', x.memory_number, 'content', x.content)), '[]') INTO found
    FROM (SELECT m.memory_number, m.content FROM public.agent_memory m
          WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
            AND m.owner_id = current_setting('agent.user_id') AND m.store = 'user_memory' AND m.superseded_at IS NULL
            AND NOT EXISTS (SELECT FROM public.agent_memory_embedding e
                            WHERE e.memory_number = m.memory_number
                              AND e.model = memories_without_embedding.model
                              AND e.dimensions = coalesce(memories_without_embedding.dimensions, e.dimensions))
          ORDER BY m.memory_number DESC LIMIT memory_limit) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Store vectors: [{memory_number, embedding: '[…]'}]; those of memories that are gone meanwhile are dropped.
-- Returns how many were stored.
CREATE FUNCTION public.store_embeddings(identity jsonb, model text, embeddings jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    stored integer;
BEGIN
    identity := agent_private.document(identity);
    embeddings := agent_private.document(embeddings);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'storing vectors needs a tenant and a user');
    END IF;
    INSERT INTO public.agent_memory_embedding (tenant_id, scope, owner_id, memory_number, model, dimensions, embedding)
    SELECT m.tenant_id, m.scope, m.owner_id, m.memory_number, store_embeddings.model,
           agent_private.vector_dimensions(agent_private.as_vector(e ->> 'embedding')), agent_private.as_vector(e ->> 'embedding')
    FROM jsonb_array_elements(embeddings) AS e
    JOIN public.agent_memory m ON m.memory_number = (e ->> 'memory_number')::bigint
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
      AND m.owner_id = current_setting('agent.user_id') AND m.superseded_at IS NULL
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS stored = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(stored);
END
$$;
