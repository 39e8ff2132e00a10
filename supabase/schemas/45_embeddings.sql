-- Vectors: keeping them, the nearest to a question, and the lists by which large scopes are searched.

CREATE TABLE public.agent_memory_embedding (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    model text NOT NULL CHECK (model <> ''),
    dimensions integer NOT NULL,
    space text NOT NULL GENERATED ALWAYS AS (dimensions::text || ' ' || model) STORED,
    list integer NOT NULL DEFAULT 0,
    embedding halfvec NOT NULL,
    code bit varying NOT NULL GENERATED ALWAYS AS (agent_private.sign_code(embedding)) STORED,
    PRIMARY KEY (memory_number, model, dimensions),
    CONSTRAINT agent_memory_embedding_dimensions CHECK (vector_dims(embedding) = dimensions)
);
COMMENT ON TABLE public.agent_memory_embedding IS 'Vectors of the current memories that are searched, one per embedding model.';
COMMENT ON COLUMN public.agent_memory_embedding.space IS 'Dimensions and model: only vectors of one space are compared. In one column that only the index of codes has, so that a search cannot be planned over the primary key.';
COMMENT ON COLUMN public.agent_memory_embedding.embedding IS 'Of length 1, in half precision.';
COMMENT ON COLUMN public.agent_memory_embedding.list IS 'Which agent_embedding_list of its scope it is in; 0 for none yet.';
COMMENT ON COLUMN public.agent_memory_embedding.code IS 'The signs of its numbers: what a search looks at first.';
-- In the row itself up to a page, about 3900 numbers: a search reads a thousand of them.
ALTER TABLE public.agent_memory_embedding ALTER COLUMN embedding SET STORAGE MAIN;
-- Everything that a search and its row policy look at, so that it reads this index alone: 20,000 codes in 3 ms.
CREATE INDEX agent_memory_embedding_codes ON public.agent_memory_embedding
    (tenant_id, scope, owner_id, space, list, memory_number) INCLUDE (code);
-- Reading an index alone needs pages that vacuum has seen.
ALTER TABLE public.agent_memory_embedding SET (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE public.agent_embedding_list (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    list integer NOT NULL CHECK (list > 0),
    generation integer NOT NULL,
    centroid halfvec NOT NULL,
    PRIMARY KEY (tenant_id, scope, owner_id, model, dimensions, list)
);
COMMENT ON TABLE public.agent_embedding_list IS 'How the vectors of a large scope are parted: each is in the list whose centroid is nearest. Scopes of fewer than 100,000 memories have none.';
COMMENT ON COLUMN public.agent_embedding_list.generation IS 'Lists are made anew when a scope has grown fourfold; vectors move from the older generation bit by bit.';
ALTER TABLE public.agent_embedding_list ALTER COLUMN centroid SET STORAGE MAIN;

SELECT agent_private.guard(t), agent_private.own_scope(t)
FROM unnest(ARRAY['public.agent_memory_embedding', 'public.agent_embedding_list']::regclass[]) AS t;

-- The memories of one scope of one owner whose vectors are nearest to a question's, by this model and of the question's
-- dimensions: at most how_many, best first, with the cosine of the angle (0 for a vector of zeros, which has none).
-- Exact in scopes of up to 2000 memories and for vectors of fewer than 128 dimensions. In larger ones the vectors whose
-- codes differ least from the question's are compared, one in 25, at least 500 and at most 1000; in scopes with lists only
-- the codes in the nearest lists are looked at, about 128,000, and 3000 vectors are compared. Leans on
-- agent_memory_embedding_codes and on the primary keys; locks nothing.
-- STABLE: lists and vectors are read as of one moment, and no vector is missed that moves from list to list meanwhile.
CREATE FUNCTION agent_private.nearest(
    the_scope text, the_owner text, question_embedding vector, embedding_model text, how_many integer)
RETURNS TABLE (memory_number bigint, similarity double precision)
LANGUAGE plpgsql STABLE ROWS 100
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off  -- on tables that nobody has analyzed yet the planner would not read the index of codes
SET enable_bitmapscan = off
SET max_parallel_workers_per_gather = 0  -- to start a worker takes longer than most searches
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    size integer := agent_private.vector_dimensions(question_embedding);
    the_space text := size || ' ' || embedding_model;
    wanted public.agent_memory_embedding.embedding%TYPE := agent_private.unit_vector(question_embedding);
    wanted_code bit varying := agent_private.sign_code(wanted);
    memories integer;
    lists integer[];
    candidates bigint[];
BEGIN
    IF question_embedding IS NULL OR embedding_model IS NULL THEN
        RETURN;
    END IF;
    SELECT s.memory_count INTO memories FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
    IF size < 128 OR coalesce(memories, 0) <= 2000 THEN  -- a code of few bits tells little, and such vectors are small
        RETURN QUERY
        SELECT e.memory_number, -agent_private.divergence(e.embedding, wanted)
        FROM public.agent_memory_embedding e
        WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
        ORDER BY agent_private.divergence(e.embedding, wanted), e.memory_number DESC LIMIT how_many;
        RETURN;
    END IF;
    SELECT array_agg(l.list ORDER BY agent_private.divergence(l.centroid, wanted)) INTO lists
    FROM public.agent_embedding_list l
    WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = the_owner
      AND l.model = embedding_model AND l.dimensions = size;
    IF lists IS NULL THEN
        candidates := ARRAY(
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
            ORDER BY agent_private.code_distance(e.code, wanted_code) LIMIT greatest(how_many, 500, least(memories / 25, 1000)));
    ELSE
        lists := lists[1:greatest(16, ceil(128000.0 * cardinality(lists) / memories)::integer)] || 0;
        candidates := ARRAY(
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = the_owner AND e.space = the_space
              AND e.list = ANY (lists)
            ORDER BY agent_private.code_distance(e.code, wanted_code) LIMIT greatest(3000, how_many));
    END IF;
    RETURN QUERY
    SELECT e.memory_number, -agent_private.divergence(e.embedding, wanted)
    FROM public.agent_memory_embedding e
    WHERE e.memory_number = ANY (candidates) AND e.model = embedding_model AND e.dimensions = size
    ORDER BY agent_private.divergence(e.embedding, wanted), e.memory_number DESC LIMIT how_many;
END
$$;

-- Memories of a scope that are searched and have no vector of this model, and of these dimensions where they are given:
-- behind one name a server may put another model. Newest first: [{memory_number, content}], content being the text that
-- is searched, of a turn with who said it. the_scope as in match_memories. Reads all memories of the scope.
CREATE FUNCTION public.memories_without_embedding(
    identity jsonb, model text, memory_limit integer DEFAULT 100, dimensions integer DEFAULT NULL,
    the_scope text DEFAULT 'user')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
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
    owner := agent_private.owner_of_scope(the_scope);
    SELECT coalesce(jsonb_agg(jsonb_build_object('memory_number', x.memory_number, 'content', x.content)), '[]') INTO found
    FROM (SELECT m.memory_number, agent_private.searched_text(m) AS content FROM public.agent_memory m
          WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
            AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
            AND NOT EXISTS (SELECT FROM public.agent_memory_embedding e
                            WHERE e.memory_number = m.memory_number
                              AND e.model = memories_without_embedding.model
                              AND e.dimensions = coalesce(memories_without_embedding.dimensions, e.dimensions))
          ORDER BY m.memory_number DESC LIMIT memory_limit) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The owners in a tenant who have memories that are searched and have no vector of this model: [{scope, owner_id}], at
-- most so many. Reads all memories of the tenant where none is missing.
CREATE FUNCTION public.owners_without_embedding(identity jsonb, model text, owner_limit integer DEFAULT 1000)
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
    SELECT coalesce(jsonb_agg(jsonb_build_object('scope', o.scope, 'owner_id', o.owner_id)), '[]') INTO found
    FROM (SELECT s.scope, s.owner_id FROM public.agent_scope s
          WHERE s.tenant_id = current_setting('agent.tenant_id')
            AND EXISTS (SELECT FROM public.agent_memory m
                        WHERE m.tenant_id = s.tenant_id AND m.scope = s.scope AND m.owner_id = s.owner_id
                          AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
                          AND NOT EXISTS (SELECT FROM public.agent_memory_embedding e
                                          WHERE e.memory_number = m.memory_number
                                            AND e.model = owners_without_embedding.model))
          ORDER BY s.scope, s.owner_id LIMIT owner_limit) AS o;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Store vectors: [{memory_number, embedding: '[…]'}]; those of memories that are gone meanwhile are dropped.
-- Returns how many were stored. the_scope as in match_memories.
CREATE FUNCTION public.store_embeddings(identity jsonb, model text, embeddings jsonb, the_scope text DEFAULT 'user')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    owner text;
    stored integer;
BEGIN
    identity := agent_private.document(identity);
    embeddings := agent_private.document(embeddings);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'storing vectors needs a tenant and a user');
    END IF;
    owner := agent_private.owner_of_scope(the_scope);
    INSERT INTO public.agent_memory_embedding (tenant_id, scope, owner_id, memory_number, model, dimensions, embedding)
    SELECT m.tenant_id, m.scope, m.owner_id, m.memory_number, store_embeddings.model,
           agent_private.vector_dimensions(v.given), agent_private.unit_vector(v.given)
    FROM jsonb_array_elements(embeddings) AS e
    CROSS JOIN LATERAL (SELECT agent_private.as_vector(e ->> 'embedding') OFFSET 0) AS v (given)
    JOIN public.agent_memory m ON m.memory_number = (e ->> 'memory_number')::bigint
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
      AND agent_private.is_searched(m.store) AND m.superseded_at IS NULL
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS stored = ROW_COUNT;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(stored);
END
$$;

DO $do$
DECLARE
    home text := (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector');
BEGIN
    EXECUTE format($function$
-- Make lists for a scope: centroids of as many parts as it has thousands of vectors, by one step of k-means over a sample
-- of ten vectors a list. Measured on vectors of all-MiniLM-L6-v2, more steps find little more.
CREATE FUNCTION agent_private.make_lists(the_scope text, the_owner text, the_model text, the_dimensions integer, vectors integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    lists integer := greatest(1, least(vectors / 1000, 4000));
    last_list integer;
    last_generation integer;
BEGIN
    SELECT coalesce(max(l.list), 0), coalesce(max(l.generation), 0) INTO last_list, last_generation
    FROM public.agent_embedding_list l
    WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = the_owner
      AND l.model = the_model AND l.dimensions = the_dimensions;
    INSERT INTO public.agent_embedding_list (tenant_id, scope, owner_id, model, dimensions, list, generation, centroid)
    WITH chosen AS MATERIALIZED (
        SELECT e.memory_number, row_number() OVER () AS place
        FROM (SELECT x.memory_number FROM public.agent_memory_embedding x
              WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
                AND x.space = the_dimensions || ' ' || the_model
              ORDER BY random() LIMIT 10 * lists) AS e
    ), sample AS MATERIALIZED (
        SELECT c.place, e.embedding
        FROM chosen c
        JOIN public.agent_memory_embedding e
          ON e.memory_number = c.memory_number AND e.model = the_model AND e.dimensions = the_dimensions
    ), seeds AS MATERIALIZED (
        SELECT s.place, s.embedding FROM sample s WHERE s.place <= lists
    ), parted AS (
        SELECT (SELECT p.place FROM seeds p ORDER BY agent_private.divergence(p.embedding, s.embedding), p.place LIMIT 1) AS place, s.embedding
        FROM sample s
    )
    SELECT tenant, the_scope, the_owner, the_model, the_dimensions, last_list + row_number() OVER (), last_generation + 1, p.mean
    FROM (SELECT %1$I.avg(parted.embedding) AS mean FROM parted GROUP BY parted.place) AS p;
END
$$
    $function$, home);
END
$do$;

-- Part the vectors of a large scope into lists, or bring new vectors into theirs, at most row_limit of them: called
-- again and again, in the background, until it returns fewer. Returns how many were moved; 0 for a scope of fewer than
-- 100,000 memories and while another call does it. the_scope as in match_memories. Locks only the vectors it moves.
CREATE FUNCTION public.arrange_embeddings(
    identity jsonb, model text, dimensions integer, the_scope text DEFAULT 'user', row_limit integer DEFAULT 2000)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    owner text;
    vectors integer;
    newest record;
    moved integer := 0;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, CASE the_scope WHEN 'user' THEN 'user' ELSE 'tenant' END);
    IF previous IS NULL THEN
        RETURN '0';
    END IF;
    tenant := current_setting('agent.tenant_id');
    owner := agent_private.owner_of_scope(the_scope);
    SELECT s.memory_count INTO vectors FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = owner;
    IF coalesce(vectors, 0) >= 100000
       AND pg_try_advisory_xact_lock(hashtextextended(concat_ws(chr(31), 'agent_embedding_list', tenant, the_scope, owner, model, dimensions), 0)) THEN
        FOR attempt IN 1..2 LOOP
            SELECT max(l.generation) AS generation, min(l.list) AS first_list, count(*) AS lists INTO newest
            FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation = (SELECT max(g.generation) FROM public.agent_embedding_list g
                                  WHERE g.tenant_id = tenant AND g.scope = the_scope AND g.owner_id = owner
                                    AND g.model = arrange_embeddings.model AND g.dimensions = arrange_embeddings.dimensions);
            EXIT WHEN newest.lists > 0 AND (vectors <= 4000 * newest.lists OR newest.lists >= 4000);
            PERFORM agent_private.make_lists(the_scope, owner, model, dimensions, vectors);
        END LOOP;
        WITH centroids AS MATERIALIZED (
            SELECT l.list, l.centroid FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation = newest.generation
        ), waiting AS MATERIALIZED (
            SELECT e.memory_number FROM public.agent_memory_embedding e
            WHERE e.tenant_id = tenant AND e.scope = the_scope AND e.owner_id = owner
              AND e.space = arrange_embeddings.dimensions || ' ' || arrange_embeddings.model
              AND e.list < newest.first_list
            ORDER BY e.list, e.memory_number LIMIT row_limit
        )
        UPDATE public.agent_memory_embedding e
        SET list = (SELECT c.list FROM centroids c ORDER BY agent_private.divergence(c.centroid, e.embedding), c.list LIMIT 1)
        FROM waiting w
        WHERE e.memory_number = w.memory_number AND e.model = arrange_embeddings.model AND e.dimensions = arrange_embeddings.dimensions;
        GET DIAGNOSTICS moved = ROW_COUNT;
        IF moved < row_limit THEN
            DELETE FROM public.agent_embedding_list l
            WHERE l.tenant_id = tenant AND l.scope = the_scope AND l.owner_id = owner
              AND l.model = arrange_embeddings.model AND l.dimensions = arrange_embeddings.dimensions
              AND l.generation < newest.generation;
        END IF;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(moved);
END
$$;
