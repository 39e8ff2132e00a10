-- Ranking: which memories of one scope fit a question best.

-- Whether a text ends as a question: what somebody asked tells less than what was stated. Without a search_path of its
-- own, so that the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.is_question(content text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN right(rtrim(content), 1) IN ('?', '？', '؟');

-- The numbers of the ranking, learned once on two conversations of LoCoMo (benchmarks/retrieval_quality.py measures them
-- on others); the unit of all is the best score by words. What is 0 is off.
--   saturation, length_share: k1 and b of BM25, for a turn; length_share_alone: b for what is no turn;
--   session_saturation, session_length_share: the same for a session
--   beside, near: what a word counts in the turns one and two places from where it was said
--   answer: what it counts in the turn that follows a question in which it was said
--   certainty: power of the share of the question's weight that the best has, by which all scores by words are lowered
--   session: what the words of the whole session add; vector: what the vector adds, at most, for the nearest
--   vector_beside, vector_near, vector_answer: as beside, near and answer, of the vector
--   speaker: added where the question names who said it; asked: taken from what is a question
--   updated: taken from the older of those that share the same words with the question, where these are nearly all that any
--   memory shares with it, most from the oldest
--   newness: added to the newest candidate, of turns and of others
CREATE FUNCTION agent_private.ranking_weights(
    OUT saturation double precision, OUT length_share double precision, OUT length_share_alone double precision,
    OUT session_saturation double precision, OUT session_length_share double precision,
    OUT beside double precision, OUT near double precision, OUT answer double precision, OUT certainty double precision,
    OUT session double precision, OUT vector double precision,
    OUT vector_beside double precision, OUT vector_near double precision, OUT vector_answer double precision,
    OUT speaker double precision, OUT asked double precision, OUT updated double precision,
    OUT newness_of_turns double precision, OUT newness double precision)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 0.9, 0.1, 0.75, 1.2, 0.5, 0.5, 0.3, 1.0, 0.3, 0.3, 0.42, 0.4, 0.1, 0.7, 0.15, 0.2, 0.1, 0.03, 0.1;
$$;

-- The best memories for a question within one scope of one owner. Three lists find them, each divided by its best: the
-- words of a memory (BM25; for a turn of a conversation with the words of the turns around it, each word counting most
-- where it counts most), the words of the whole session, and vectors, again with those of the turns around. Their sum
-- decides, with what ranking_weights() adds and takes. What is no turn of a conversation has no neighbours and no
-- session; for that the newest fill up. At most 200, best first. Returns columns and no documents: those cost as much as
-- the ranking, and recall needs fewer fields than search. Only what fits the filters (see agent_private.wanted) and was
-- believed as_of (NULL: now). lists names the lists that found a memory, with list_ranks and list_scores in the same
-- order; it is empty for what only fills up. Where no turn is searched and no vector given, a shorter query finds the
-- same: the long one takes three times as long to set up. Leans on hits(), on nearest(), on agent_memory_by_number,
-- agent_memory_one_per_turn and agent_memory_by_scope; locks nothing.
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
SET jit = off  -- to compile takes longer than any search
AS $$
#variable_conflict use_column
DECLARE
    tenant text := current_setting('agent.tenant_id');
    stores_to_fill_up text[] := CASE the_scope WHEN 'tenant' THEN '{application}' ELSE '{user_memory,conversation}' END;
    is_alone boolean;  -- whether no turn of a conversation is among what is searched
    is_whole boolean;  -- whether all postings of the words are read
    -- Of the rules what is read once per posting or candidate: a field of a record costs several times as much.
    length_of_turns double precision;  -- saturation and length of BM25: so much, and so much for each word
    length_per_word_of_turns double precision;
    length_alone double precision;
    length_per_word double precision;
    updated double precision;
    newness double precision;
    newness_of_turns double precision;
    asked double precision;
    certainty double precision;
    everything boolean := filters = '{}' AND as_of IS NULL;
    rules record;
    words text[];
    frequencies double precision[];
    weights double precision[];
    all_weights double precision;
    memories double precision;
    mean_words double precision;
BEGIN
    SELECT * INTO rules FROM agent_private.ranking_weights();
    SELECT q.* INTO words, frequencies, memories, mean_words
    FROM agent_private.question_words(the_scope, the_owner, question, as_of) AS q;
    IF memories IS NULL THEN
        RETURN;
    END IF;
    IF filters ? 'stores' THEN
        stores_to_fill_up := ARRAY(SELECT u.store FROM unnest(stores_to_fill_up) AS u (store) WHERE filters -> 'stores' ? u.store);
    END IF;
    is_whole := agent_private.are_few(frequencies, memories) AND NOT agent_private.are_looked_up(the_scope, filters, as_of);
    is_alone := as_of IS NULL AND (filters ? 'stores' AND NOT filters -> 'stores' ? 'conversation' OR NOT EXISTS (
        SELECT FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner AND m.store >= 'conversation' AND m.store <= 'conversation'
          AND m.superseded_at IS NULL
        ORDER BY m.store, m.memory_number DESC LIMIT 1));
    weights := ARRAY(SELECT ln(1 + (greatest(memories, u.frequency) - u.frequency + 0.5::double precision) / (u.frequency + 0.5::double precision))
                     FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at) ORDER BY u.at);
    all_weights := coalesce((SELECT sum(u.weight) FROM unnest(weights) AS u (weight)), 1);
    length_of_turns := rules.saturation * (1 - rules.length_share);
    length_per_word_of_turns := rules.saturation * rules.length_share / mean_words;
    length_alone := rules.saturation * (1 - rules.length_share_alone);
    length_per_word := rules.saturation * rules.length_share_alone / mean_words;
    updated := rules.updated;
    newness := rules.newness;
    newness_of_turns := rules.newness_of_turns;
    asked := rules.asked;
    certainty := rules.certainty;
    IF is_alone AND question_embedding IS NULL THEN
        RETURN QUERY
        WITH by_words AS MATERIALIZED (
            SELECT h.memory_number, sum(weights[h.word] * h.occurrences / (h.occurrences + length_alone + length_per_word * h.word_count)) AS points,
                   bit_or(1::bigint << h.word) AS own_words, sum(weights[h.word]) AS own_weight
            FROM agent_private.hits(tenant, the_scope, the_owner, words, frequencies, memories, filters, as_of, is_whole, false) AS h
            GROUP BY h.memory_number
            ORDER BY points DESC, h.memory_number DESC LIMIT greatest(100, least(memory_limit, 200))
        ), newest AS (
            SELECT n.memory_number FROM (SELECT greatest(10, least(50, memory_limit - count(*))) AS many FROM by_words) AS f
            CROSS JOIN LATERAL (
                SELECT n.memory_number
                FROM unnest(stores_to_fill_up) AS s (store)
                CROSS JOIN LATERAL (
                    SELECT m.memory_number FROM public.agent_memory m
                    WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner
                      AND m.store >= s.store AND m.store <= s.store
                      AND m.superseded_at IS NULL AND agent_private.fits(m, filters, NULL)
                    ORDER BY m.store, m.memory_number DESC LIMIT f.many) AS n
                ORDER BY n.memory_number DESC LIMIT f.many) AS n
            WHERE n.memory_number NOT IN (SELECT w.memory_number FROM by_words w)
        ), found AS MATERIALIZED (  -- narrow, for it is sorted four times; what is returned is looked up for the best alone
            SELECT w.*, m.valid_from, m.is_asked, m.is_stated
            FROM (SELECT * FROM by_words UNION ALL SELECT n.memory_number, 0, 0, 0 FROM newest n) AS w
            CROSS JOIN LATERAL (
                SELECT x.valid_from, x.kind = 'conversation' AND agent_private.is_question(x.content) AS is_asked,
                       x.store <> 'application' AS is_stated
                FROM public.agent_memory x
                WHERE x.memory_number = w.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
                  AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
                  AND (x.session_id IS NULL OR x.session_id <> coalesce(session_now, ''))
                LIMIT 1
            ) AS m
        ), scored AS (
            SELECT f.memory_number, f.points / b.points * least(1, b.points / all_weights) ^ certainty
                   - CASE WHEN f.is_asked THEN asked ELSE 0 END
                   + percent_rank() OVER (ORDER BY f.valid_from, f.memory_number) * newness
                   - CASE WHEN f.own_words > 0 AND f.is_stated AND f.own_weight >= b.own_weight
                          THEN updated * (1 - cume_dist() OVER (PARTITION BY f.own_words ORDER BY f.valid_from, f.memory_number)) ELSE 0 END
                   AS sum_of_points,
                   f.points / b.points AS word_points, rank() OVER (ORDER BY f.points DESC)::integer AS word_rank
            FROM found f
            CROSS JOIN (SELECT (SELECT coalesce(nullif(max(x.points), 0), 1) FROM by_words x) AS points,
                               (SELECT 0.9::double precision * max(x.own_weight) FROM found x) AS own_weight) AS b
        ), best AS (
            SELECT s.*, row_number() OVER (ORDER BY s.sum_of_points DESC, s.memory_number DESC) AS place
            FROM scored s
            ORDER BY s.sum_of_points DESC, s.memory_number DESC
            LIMIT least(memory_limit, 200)
        )
        SELECT m.memory_id, m.version, m.store, m.kind, m.content, m.trust, m.tags, m.speaker, m.session_id, m.turn,
               m.recorded_at, m.valid_from, b.sum_of_points,
               CASE WHEN b.word_points > 0 THEN '{words}'::text[] ELSE '{}' END,
               CASE WHEN b.word_points > 0 THEN ARRAY[b.word_rank] ELSE '{}' END,
               CASE WHEN b.word_points > 0 THEN ARRAY[b.word_points] ELSE '{}' END, b.place
        FROM best b
        CROSS JOIN LATERAL (
            SELECT * FROM public.agent_memory x WHERE x.memory_number = b.memory_number AND x.tenant_id = tenant LIMIT 1) AS m;
        RETURN;
    END IF;
    RETURN QUERY
    WITH hits AS MATERIALIZED (  -- double precision throughout: numeric arithmetic costs ten times as much
        SELECT h.word, h.memory_number, h.place, h.occurrences,
               weights[h.word] * h.occurrences / (h.occurrences + CASE WHEN h.place IS NULL THEN length_alone + length_per_word * h.word_count
                   ELSE length_of_turns + length_per_word_of_turns * h.word_count END) AS points
        FROM agent_private.hits(tenant, the_scope, the_owner, words, frequencies, memories, filters, as_of, is_whole,
                                CASE WHEN filters -> 'stores' <@ '["conversation"]' THEN true END) AS h
    ), by_words AS MATERIALIZED (
        SELECT h.memory_number, max(h.place) AS place, sum(h.points) AS points, bit_or(1::bigint << h.word) AS own_words, sum(weights[h.word]) AS own_weight
        FROM hits h GROUP BY h.memory_number
        ORDER BY points DESC, h.memory_number DESC LIMIT (SELECT greatest(100, least(memory_limit, 200)))
    ), by_vector AS MATERIALIZED (  -- how far above the last of the list, which varies with the model
        SELECT n.memory_number, CASE WHEN n.best = n.last THEN 1
                   ELSE (n.similarity - n.last + (n.best - n.last) / n.many) / ((n.best - n.last) * (1 + 1 / n.many)) END AS points
        FROM (SELECT v.memory_number, v.similarity, max(v.similarity) OVER () AS best, min(v.similarity) OVER () AS last,
                     (count(*) OVER ())::double precision AS many
              FROM agent_private.nearest(the_scope, the_owner, question_embedding, embedding_model, 100) AS v) AS n
    ), heard AS MATERIALIZED (  -- turns of conversations that were found themselves, and what neighbours need of them
        SELECT c.memory_number, c.own_words, c.own_weight, c.vector_points, m.session_id, m.turn, m.asked,
               coalesce(c.place, agent_private.place_of(m.session_id, m.turn)) AS place
        FROM (SELECT f.memory_number, max(f.place) AS place, max(f.own_words) AS own_words, max(f.own_weight) AS own_weight,
                     max(f.vector_points) AS vector_points
              FROM (SELECT w.memory_number, w.place, w.own_words, w.own_weight, 0::double precision AS vector_points FROM by_words w WHERE w.place IS NOT NULL
                    UNION ALL
                    SELECT v.memory_number, NULL, 0, 0, v.points FROM by_vector v) AS f
              GROUP BY f.memory_number) AS c
        CROSS JOIN LATERAL (
            SELECT x.session_id, x.turn, agent_private.is_question(x.content) AS asked FROM public.agent_memory x
            WHERE x.memory_number = c.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
            LIMIT 1  -- a look-up per candidate, whatever the planner believes of tables that nobody has analyzed yet
        ) AS m
        WHERE m.turn IS NOT NULL
    ), shares AS MATERIALIZED (
        SELECT s.step, (s.words ^ 3) AS words_cubed, (s.answer ^ 3) AS answer_cubed, s.vector
        FROM (VALUES (-2, rules.near, rules.near, rules.vector_near), (-1, rules.beside, rules.beside, rules.vector_beside), (0, 1, 1, 1),
                     (1, rules.beside, rules.answer, rules.vector_beside), (2, rules.near, rules.near, rules.vector_near)) AS s (step, words, answer, vector)
    ), around AS (  -- the cubic mean of a word's points: near the largest, and more for more
        SELECT x.place, sum(x.points) AS points
        FROM (SELECT e.place + s.step AS place, h.word,
                     cbrt(sum(h.points * h.points * h.points * CASE WHEN e.asked THEN s.answer_cubed ELSE s.words_cubed END)) AS points
              FROM heard e JOIN hits h ON h.memory_number = e.memory_number CROSS JOIN shares s
              GROUP BY e.place + s.step, h.word) AS x
        GROUP BY x.place
    ), around_vector AS (
        SELECT e.place + s.step AS place,
               sum(e.vector_points * CASE WHEN s.step = 1 AND e.asked THEN rules.vector_answer ELSE s.vector END) AS points
        FROM heard e CROSS JOIN shares s
        WHERE e.vector_points > 0
        GROUP BY e.place + s.step
    ), said AS MATERIALIZED (
        SELECT h.place >> 20 AS session, h.word, sum(h.occurrences) AS occurrences, max(h.place & 1048575)::double precision AS turns
        FROM hits h WHERE h.place IS NOT NULL GROUP BY h.place >> 20, h.word
    ), sessions AS (  -- BM25 of sessions, as long as their last turn with a word of the question
        SELECT s.session, sum(w.weight * s.occurrences / (s.occurrences + rules.session_saturation
                   * (1 - rules.session_length_share + rules.session_length_share * l.turns / l.mean_turns))) AS points
        FROM said s
        JOIN (SELECT x.session, max(x.turns) AS turns, avg(max(x.turns)) OVER () AS mean_turns, count(*) OVER () AS sessions
              FROM said x GROUP BY x.session) AS l ON l.session = s.session
        JOIN (SELECT x.word, count(*) AS frequency,
                     ln(1 + (max(a.sessions) - count(*) + 0.5::double precision) / (count(*) + 0.5::double precision)) AS weight
              FROM said x CROSS JOIN (SELECT count(DISTINCT y.session) AS sessions FROM said y) AS a
              GROUP BY x.word) AS w ON w.word = s.word
        GROUP BY s.session
    ), newest AS (
        SELECT n.memory_number, n.place
        FROM (SELECT greatest(10, least(50, memory_limit - count(*))) AS many FROM by_words) AS l
        CROSS JOIN unnest(stores_to_fill_up) AS f (store)
        CROSS JOIN LATERAL (  -- the newest of each store by the index, then those of both; of turns what users stated
            SELECT m.memory_number, agent_private.place_of(m.session_id, m.turn) AS place
            FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = the_owner
              -- Both bounds and no equality: then no index but agent_memory_by_scope has this order. By number alone all
              -- memories would be read where a store has none.
              AND m.store >= f.store AND m.store <= f.store
              AND m.superseded_at IS NULL AND (everything OR agent_private.fits(m, filters, as_of))
              AND (m.store <> 'conversation' OR m.kind = 'user' AND NOT agent_private.is_question(m.content))
            ORDER BY m.store, m.memory_number DESC LIMIT l.many) AS n
        -- To fill up what words leave free; a few always, for the newest may matter more than the last of many words.
        ORDER BY n.memory_number DESC LIMIT (SELECT greatest(10, least(50, memory_limit - count(*))) FROM by_words)
    ), candidates AS (  -- what is no turn by its number, turns by their place, with the number of those found themselves
        SELECT max(c.memory_number) AS memory_number, c.place, max(c.own_words) AS own_words, max(c.own_weight) AS own_weight,
               max(c.word_points) AS word_points, max(c.vector_points) AS vector_points
        FROM (SELECT w.memory_number, NULL::bigint AS place, w.own_words, w.own_weight, w.points AS word_points, 0::double precision AS vector_points
              FROM by_words w WHERE w.place IS NULL
              UNION ALL
              SELECT v.memory_number, NULL, 0, 0, 0, v.points FROM by_vector v
              WHERE NOT EXISTS (SELECT FROM heard e WHERE e.memory_number = v.memory_number)
              UNION ALL
              SELECT n.memory_number, n.place, 0, 0, 0, 0 FROM newest n
              UNION ALL
              SELECT NULL, a.place, 0, 0, a.points, 0 FROM around a
              UNION ALL
              SELECT NULL, a.place, 0, 0, 0, a.points FROM around_vector a
              UNION ALL
              SELECT e.memory_number, e.place, e.own_words, e.own_weight, 0, 0 FROM heard e) AS c
        GROUP BY coalesce(c.place, -c.memory_number), c.place
    ), weighed AS MATERIALIZED (
        SELECT c.memory_number, c.place, c.own_words, c.own_weight, c.word_points / b.words AS word_points, coalesce(s.points / b.session, 0) AS session_points,
               c.vector_points / b.vector AS vector_points,
               c.word_points / b.words * least(1, b.words / all_weights) ^ rules.certainty
                   + coalesce(s.points / b.session, 0) * rules.session + c.vector_points * rules.vector AS points
        FROM candidates c
        CROSS JOIN (SELECT coalesce(nullif(max(x.word_points), 0), 1) AS words, coalesce(nullif(max(x.vector_points), 0), 1) AS vector,
                           (SELECT coalesce(nullif(max(y.points), 0), 1) FROM sessions y) AS session
                    FROM candidates x) AS b
        LEFT JOIN sessions s ON s.session = c.place >> 20
        ORDER BY points DESC, c.memory_number DESC LIMIT (SELECT greatest(150, least(memory_limit, 200) + 50))
    ), found AS MATERIALIZED (  -- narrow, for it is sorted six times; what is returned is looked up for the best alone
        SELECT m.*, w.own_words, w.own_weight, w.word_points, w.session_points, w.vector_points, w.points
        FROM weighed w
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.valid_from, x.speaker, x.turn IS NOT NULL AS is_turn, x.store <> 'application' AS is_stated,
                   (x.turn IS NOT NULL OR x.kind = 'conversation') AND agent_private.is_question(x.content) AS is_asked
            FROM public.agent_memory x
            WHERE x.memory_number = w.memory_number AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
              AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
              AND (x.session_id IS NULL OR x.session_id <> coalesce(session_now, ''))
            LIMIT 1
        ) AS m
        WHERE w.memory_number IS NOT NULL
        UNION ALL
        SELECT m.*, w.own_words, w.own_weight, w.word_points, w.session_points, w.vector_points, w.points
        FROM weighed w
        JOIN (SELECT e.place >> 20 AS session, min(e.session_id) AS session_id FROM heard e GROUP BY e.place >> 20) AS s
          ON w.memory_number IS NULL AND s.session = w.place >> 20 AND s.session_id <> coalesce(session_now, '')
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.valid_from, x.speaker, x.turn IS NOT NULL, x.store <> 'application', agent_private.is_question(x.content)
            FROM public.agent_memory x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner
              AND x.session_id = s.session_id AND x.turn = (w.place & 1048575)::integer AND x.superseded_at IS NULL
              AND x.trust <> 'external' AND agent_private.fits(x, filters, as_of)
            LIMIT 1
        ) AS m
    ), named AS (
        SELECT s.speaker FROM (SELECT DISTINCT f.speaker FROM found f WHERE f.speaker IS NOT NULL) AS s
        WHERE EXISTS (SELECT FROM agent_private.lexemes(s.speaker, agent_private.text_language()) l WHERE l.lexeme = ANY (words))
    ), scored AS (
        SELECT f.memory_number, f.points + CASE WHEN n.speaker IS NULL THEN 0 ELSE rules.speaker END
               - CASE WHEN f.is_asked THEN asked ELSE 0 END
               + percent_rank() OVER (ORDER BY f.valid_from, f.memory_number) * CASE WHEN f.is_turn THEN newness_of_turns ELSE newness END
               - CASE WHEN f.own_words > 0 AND f.is_stated AND f.own_weight >= (SELECT 0.9::double precision * max(x.own_weight) FROM found x)
                      THEN updated * (1 - cume_dist() OVER (PARTITION BY f.own_words ORDER BY f.valid_from, f.memory_number)) ELSE 0 END
               AS sum_of_points, f.word_points, f.session_points, f.vector_points,
               rank() OVER (ORDER BY f.word_points DESC)::integer AS word_rank,
               rank() OVER (ORDER BY f.session_points DESC)::integer AS session_rank,
               rank() OVER (ORDER BY f.vector_points DESC)::integer AS vector_rank
        FROM found f
        LEFT JOIN named n ON n.speaker = f.speaker
    ), best AS (
        SELECT s.*, row_number() OVER (ORDER BY s.sum_of_points DESC, s.memory_number DESC) AS place
        FROM scored s
        ORDER BY s.sum_of_points DESC, s.memory_number DESC
        LIMIT least(memory_limit, 200)
    )
    SELECT m.memory_id, m.version, m.store, m.kind, m.content, m.trust, m.tags, m.speaker, m.session_id, m.turn,
           m.recorded_at, m.valid_from, b.sum_of_points,
           CASE WHEN b.word_points > 0 THEN '{words}'::text[] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN '{session}'::text[] END
               || CASE WHEN b.vector_points > 0 THEN '{vector}'::text[] END,
           CASE WHEN b.word_points > 0 THEN ARRAY[b.word_rank] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN ARRAY[b.session_rank] END
               || CASE WHEN b.vector_points > 0 THEN ARRAY[b.vector_rank] END,
           CASE WHEN b.word_points > 0 THEN ARRAY[b.word_points] ELSE '{}' END || CASE WHEN b.session_points > 0 THEN ARRAY[b.session_points] END
               || CASE WHEN b.vector_points > 0 THEN ARRAY[b.vector_points] END,
           b.place
    FROM best b
    CROSS JOIN LATERAL (
        SELECT * FROM public.agent_memory x WHERE x.memory_number = b.memory_number AND x.tenant_id = tenant LIMIT 1) AS m;
END
$$;
