-- Ranking: which memories of one scope fit a question best.

-- Whether a text ends as a question: what a user asked tells less of them than what they stated.
CREATE FUNCTION agent_private.is_question(content text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT right(rtrim(content), 1) IN ('?', '？', '؟');
$$;

-- The best memories for a question within one scope of one owner, by words (BM25 over word_hits), by vectors where one
-- is given (exact, within the scope) and, to fill up, by recency. Each score is divided by the best of its list; the
-- sum decides, recency counting a tenth; what
-- was asked in a conversation counts less than what was stated, and does not fill up. At most 200, best first. Returns
-- columns and no documents: those cost as much as the ranking, and recall needs fewer fields than search. Only what fits
-- the filters (see agent_private.wanted) and was believed as_of (NULL: now). lists names the lists that found a memory,
-- with list_ranks and list_scores in the same order; it is empty for what only fills up. Leans on the
-- word_hits, on nearest() and on agent_memory_by_scope; locks nothing.
CREATE FUNCTION agent_private.rank_memories(
    the_scope text, the_owner text, question text, question_embedding vector, embedding_model text, session_now text,
    memory_limit integer, filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
RETURNS TABLE (memory_id uuid, version integer, store text, kind text, content text, trust text, tags text[], speaker text,
               session_id text, turn integer, recorded_at timestamptz, valid_from timestamptz, score double precision,
               lists text[], list_ranks integer[], list_scores double precision[], place bigint)
LANGUAGE plpgsql ROWS 40
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_sort = off  -- on tables that nobody has analyzed yet the newest would be found by sorting all
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    store_to_fill_up text := CASE the_scope WHEN 'tenant' THEN 'application' ELSE 'user_memory' END;
    everything boolean := filters = '{}' AND as_of IS NULL;
    words text[];
    frequencies double precision[];
    weights double precision[];
    memories double precision;
    mean_words double precision;
BEGIN
    SELECT q.* INTO words, frequencies, memories, mean_words
    FROM agent_private.question_words(the_scope, the_owner, question, as_of) AS q;
    IF memories IS NULL THEN
        RETURN;
    END IF;
    weights := ARRAY(SELECT ln(1 + (greatest(memories, u.frequency) - u.frequency + 0.5::double precision) / (u.frequency + 0.5::double precision))
                     FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at) ORDER BY u.at);
    RETURN QUERY
    WITH hits AS (  -- double precision throughout: numeric arithmetic costs ten times as much
        SELECT h.memory_number, weights[h.word] * h.occurrences * 2.2::double precision
               / (h.occurrences + 0.3::double precision + 0.9::double precision * h.word_count / mean_words) AS points
        FROM agent_private.word_hits(the_scope, the_owner, words, frequencies, memories, filters, as_of) AS h
    ), by_words AS (
        SELECT h.memory_number, sum(h.points) AS points,
               (row_number() OVER (ORDER BY sum(h.points) DESC, h.memory_number DESC))::integer AS rank
        FROM hits h GROUP BY h.memory_number
        ORDER BY points DESC, h.memory_number DESC LIMIT (SELECT greatest(60, least(memory_limit, 100)))
    ), by_vector AS (
        SELECT n.memory_number, n.similarity AS points, (row_number() OVER (ORDER BY n.similarity DESC))::integer AS rank
        FROM agent_private.nearest(the_scope, the_owner, question_embedding, embedding_model, 100) AS n
    ), newest AS (
        SELECT m.memory_number
        FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner AND m.store = store_to_fill_up
          AND m.superseded_at IS NULL AND (everything OR agent_private.fits(m, filters, as_of))
          AND NOT (m.kind = 'conversation' AND agent_private.is_question(m.content))
        -- To fill up what words leave free; a few always, for the newest may matter more than the last of many words.
        ORDER BY m.memory_number DESC LIMIT (SELECT greatest(10, least(50, memory_limit - count(*))) FROM by_words)
    ), candidates AS (
        SELECT c.memory_number, c.word_points, c.vector_points, c.word_rank, c.vector_rank, percent_rank() OVER (ORDER BY c.memory_number) AS newness
        FROM (SELECT f.memory_number, max(f.word_points) AS word_points, max(f.vector_points) AS vector_points,
                     max(f.word_rank) AS word_rank, max(f.vector_rank) AS vector_rank
              FROM (SELECT w.memory_number, coalesce(w.points / nullif((SELECT max(x.points) FROM by_words x), 0), 0) AS word_points,
                           0::double precision AS vector_points, w.rank AS word_rank, NULL::integer AS vector_rank
                    FROM by_words w
                    UNION ALL
                    SELECT v.memory_number, 0, coalesce(greatest(v.points, 0) / nullif((SELECT max(x.points) FROM by_vector x), 0), 0), NULL, v.rank
                    FROM by_vector v
                    UNION ALL
                    SELECT n.memory_number, 0, 0, NULL, NULL FROM newest n) AS f
              GROUP BY f.memory_number) AS c
    ), best AS (
        SELECT m.memory_id, m.version, m.store, m.kind, m.content, m.trust, m.tags, m.speaker, m.session_id, m.turn,
               m.recorded_at, m.valid_from, c.word_points, c.vector_points, c.word_rank, c.vector_rank, c.word_points + c.vector_points + 0.1::double precision * c.newness
                   - CASE WHEN m.kind = 'conversation' AND agent_private.is_question(m.content)
                          THEN 0.3::double precision ELSE 0 END AS points,
               c.memory_number
        FROM candidates c
        CROSS JOIN LATERAL (
            SELECT * FROM public.agent_memory x
            WHERE x.memory_number = c.memory_number
              AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
              AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
              AND (x.session_id IS NULL OR x.session_id <> coalesce(session_now, ''))
            LIMIT 1  -- a look-up per candidate, whatever the planner believes of tables that nobody has analyzed yet
        ) AS m
        ORDER BY points DESC, c.memory_number DESC
        LIMIT least(memory_limit, 200)
    )
    SELECT b.memory_id, b.version, b.store, b.kind, b.content, b.trust, b.tags, b.speaker, b.session_id, b.turn,
           b.recorded_at, b.valid_from, b.points,
           CASE WHEN b.word_rank IS NULL AND b.vector_rank IS NULL THEN '{}'
                ELSE array_remove(ARRAY[CASE WHEN b.word_rank IS NOT NULL THEN 'words' END,
                                        CASE WHEN b.vector_rank IS NOT NULL THEN 'vector' END], NULL) END,
           array_remove(ARRAY[b.word_rank, b.vector_rank], NULL),
           array_remove(ARRAY[CASE WHEN b.word_rank IS NOT NULL THEN b.word_points END,
                              CASE WHEN b.vector_rank IS NOT NULL THEN b.vector_points END], NULL),
           row_number() OVER (ORDER BY b.points DESC, b.memory_number DESC)
    FROM best b;
END
$$;
