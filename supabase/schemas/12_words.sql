-- Words: what a text is searched by, in its language; postings and statistics of each scope; reading them.

CREATE TABLE public.agent_memory_term (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    occurrences smallint NOT NULL,
    impact smallint NOT NULL,
    word_count integer NOT NULL,
    place bigint,
    PRIMARY KEY (memory_number, lexeme)
);
COMMENT ON TABLE public.agent_memory_term IS 'Words of the current memories that are searched. A table and not a GIN index, because row level security keeps the planner from using an index on an operator that is not leakproof, as @@ is not.';
COMMENT ON COLUMN public.agent_memory_term.impact IS 'How much the word says of this memory: see agent_private.impact. What a long list is read by, best first.';
COMMENT ON COLUMN public.agent_memory_term.word_count IS 'How many words the memory has, repeated ones too.';
COMMENT ON COLUMN public.agent_memory_term.place IS 'Where a turn stands: see agent_private.place_of; NULL for what is no turn.';
-- All that reading a list needs, so that the table itself is not read.
CREATE INDEX agent_memory_term_best ON public.agent_memory_term
    (tenant_id, scope, owner_id, lexeme, impact DESC, memory_number DESC) INCLUDE (occurrences, word_count, place);

CREATE TABLE public.agent_memory_past_term (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_number bigint NOT NULL REFERENCES public.agent_memory (memory_number) ON DELETE CASCADE,
    occurrences smallint NOT NULL,
    impact smallint NOT NULL,
    word_count integer NOT NULL,
    place bigint,
    PRIMARY KEY (memory_number, lexeme)
);
COMMENT ON TABLE public.agent_memory_past_term IS 'Words of the versions that are history, for questions about what was believed at a time.';
CREATE INDEX agent_memory_past_term_best ON public.agent_memory_past_term
    (tenant_id, scope, owner_id, lexeme, impact DESC, memory_number DESC);

CREATE TABLE public.agent_term_count (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    lexeme text NOT NULL,
    memory_count integer NOT NULL,
    PRIMARY KEY (tenant_id, scope, owner_id, lexeme),
    CONSTRAINT agent_term_count_positive CHECK (memory_count > 0)
) WITH (fillfactor = 80);  -- so that a count changes where it stands
COMMENT ON TABLE public.agent_term_count IS 'How many current memories of a scope have a word. Changed under the lock that writers of one owner share anyway, so that no row waits for writers of another.';

CREATE TABLE public.agent_text_language (
    tenant_id text PRIMARY KEY,
    language text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE public.agent_text_language IS 'In which language a tenant''s texts are searched: the name of a text search configuration of Postgres. A tenant without a row: english.';

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_memory_term', 'public.agent_memory_past_term', 'public.agent_term_count',
    'public.agent_text_language']::regclass[]) AS t;
SELECT agent_private.own_scope(t) FROM unnest(ARRAY[
    'public.agent_memory_term', 'public.agent_memory_past_term', 'public.agent_term_count']::regclass[]) AS t;
CREATE POLICY own_tenant ON public.agent_text_language TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true)))
    WITH CHECK (tenant_id = (SELECT current_setting('agent.tenant_id', true))
                AND (SELECT current_setting('agent.reach', true)) = 'tenant');

-- Which of these scripts a text has, and the language whose stemmer knows its words: a word of Greek letters is Greek,
-- one of Cyrillic letters is taken for Russian. Hebrew has no stemmer. The letters are as inside [] of a regular expression.
CREATE FUNCTION agent_private.scripts()
RETURNS TABLE (letters text, language text)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    VALUES ('\u0400-\u052F', 'russian'), ('\u05D0-\u05EA', 'hebrew'), ('\u0620-\u063F\u0641-\u064A\u066E-\u06D3\u06D5\u06FA-\u06FC', 'arabic'),
           ('\u0370-\u037D\u037F-\u03FF\u1F00-\u1FFF', 'greek'), ('\u0900-\u0963\u0966-\u097F', 'hindi'),
           ('\u0B80-\u0BFF', 'tamil'), ('\u0531-\u0556\u0561-\u0587', 'armenian');
$$;

-- A lexeme without its accents, of at most 100 characters: an index takes no long ones.
CREATE FUNCTION agent_private.folded(lexeme text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(lexeme) = length(lexeme) THEN left(lexeme, 100)
                ELSE left(normalize(regexp_replace(normalize(lexeme, NFD), '[\u0300-\u036F]', '', 'g'), NFC), 100) END;
$$;

-- A text with a space after each 255 characters without one: Postgres's parser of words takes as long as the square of some.
CREATE FUNCTION agent_private.spaced(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN length(content) > 255 THEN regexp_replace(content, '(\S{255})', '\1 ', 'g') ELSE content END;
$$;

-- The words of a text, at most 20,000 characters of it, in one of Postgres's languages ('simple': words as they are).
-- Of a longer word the first 100 characters count. A text of other than ASCII characters is taken apart by script, which
-- does not depend on the locale of the database: words of the scripts of agent_private.scripts by that language, unless
-- all is 'simple'; Hebrew words as they are and without a prefix of one letter, or of two where the first is "and" or
-- "that"; runs of Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese characters, which have no spaces between words,
-- as pairs of neighbours, and Chinese characters singly too; emoji as words. Accents do not count, nor do vowel signs of
-- Hebrew and Arabic, nor whether a character is composed or of full width.
CREATE FUNCTION agent_private.lexemes(content text, language text DEFAULT 'english')
RETURNS TABLE (lexeme text, occurrences integer)
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    plain text := left(content, 20000);
    unspaced constant text := '\u0E01-\u0E3A\u0E40-\u0E4E\u0E81-\u0EDF\u1000-\u103F\u1050-\u109F\u1780-\u17D3\u3005-\u3007\u3041-\u3096'
        '\u309D-\u309F\u30A1-\u30FA\u30FC-\u30FF\u3400-\u4DBF\u4E00-\u9FFF\uAC00-\uD7A3\uF900-\uFAFF\U00020000-\U0003FFFF';
    emoji constant text := '\u2600-\u27BF\u2B00-\u2BFF\U0001F000-\U0001F3FA\U0001F400-\U0001FAFF';
    other_scripts text;
BEGIN
    IF octet_length(plain) = length(plain) THEN
        RETURN QUERY
        SELECT left(t.lexeme, 100), sum(coalesce(array_length(t.positions, 1), 1))::integer
        FROM unnest(to_tsvector(language::regconfig, agent_private.spaced(plain))) AS t
        GROUP BY 1;
        RETURN;
    END IF;
    plain := left(lower(agent_private.composed(plain)), 20000);
    plain := replace(replace(plain, '’', ''''), 'ʼ', '''');
    -- What stands inside words and is no letter; then what stands between them.
    plain := regexp_replace(plain, '[\u00AD\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u05F3\u05F4\u0640\u064B-\u065F\u0670'
        '\u200B-\u200F\u2060\uFE00-\uFE0F\uFEFF\U0001F3FB-\U0001F3FF]', '', 'g');
    plain := regexp_replace(plain, '[\u0080-\u00A9\u00AB-\u00B4\u00B6-\u00B9\u00BB-\u00BF\u00D7\u00F7\u05BE\u05C0\u05C3\u060C\u061B\u061F'
        '\u066A-\u066D\u06D4\u0964\u0965\u2000-\u206F\u20A0-\u20CF\u2190-\u25FF\u27C0-\u2AFF\u3000-\u3004\u3008-\u3040\u30A0\u30FB\uFF00-\uFFFF]', ' ', 'g');
    SELECT string_agg(s.letters, '') INTO other_scripts FROM agent_private.scripts() AS s;
    RETURN QUERY
    SELECT agent_private.folded(x.word), sum(x.times)::integer
    FROM (
        SELECT t.lexeme, coalesce(array_length(t.positions, 1), 1)
        FROM unnest(to_tsvector(language::regconfig, agent_private.spaced(
            regexp_replace(plain, '[' || other_scripts || unspaced || emoji || ']+', ' ', 'g')))) AS t
        UNION ALL
        SELECT h.form, coalesce(array_length(t.positions, 1), 1)
        FROM agent_private.scripts() AS s
        CROSS JOIN LATERAL unnest(to_tsvector(
            (CASE WHEN lexemes.language = 'simple' OR s.language = 'hebrew' THEN 'simple'
                  WHEN s.language = 'russian' AND lexemes.language = 'serbian' THEN 'serbian' ELSE s.language END)::regconfig,
            regexp_replace(plain, '[^' || s.letters || ']+', ' ', 'g'))) AS t
        CROSS JOIN LATERAL (
            SELECT t.lexeme AS form
            UNION ALL
            SELECT substr(t.lexeme, 2) WHERE s.language = 'hebrew' AND t.lexeme ~ '^[והבכלמש].{2}'
            UNION ALL
            SELECT substr(t.lexeme, 3) WHERE s.language = 'hebrew' AND t.lexeme ~ '^[וש][הבכלמש].{2}'
        ) AS h
        WHERE plain ~ ('[' || s.letters || ']')
        UNION ALL
        SELECT f.form, 1
        FROM regexp_matches(plain, '[' || unspaced || ']+', 'g') AS r (run)
        CROSS JOIN LATERAL (
            SELECT c.letter, lead(c.letter) OVER (ORDER BY c.at) AS following, count(*) OVER () AS length
            FROM unnest(string_to_array(r.run[1], NULL)) WITH ORDINALITY AS c (letter, at)
        ) AS p
        CROSS JOIN LATERAL (
            SELECT p.letter || p.following AS form WHERE p.following IS NOT NULL
            UNION ALL
            SELECT p.letter WHERE p.length = 1 OR p.letter ~ '[\u3005-\u3007\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U0003FFFF]'
        ) AS f
        UNION ALL
        SELECT e.letter[1], 1 FROM regexp_matches(plain, '[' || emoji || ']', 'g') AS e (letter)
    ) AS x (word, times)
    GROUP BY 1
    HAVING agent_private.folded(x.word) <> '';
END
$$;

-- How much a word says of a memory, in thousandths: the part of BM25 that does not depend on the scope, for memories of
-- 20 words in the mean. Lists are read in this order; scores are computed anew. Without a search_path of its own, so that
-- the planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.impact(occurrences integer, word_count integer)
RETURNS smallint
LANGUAGE sql IMMUTABLE
RETURN (2200 * occurrences / (occurrences + 0.3::double precision + 0.045::double precision * word_count))::smallint;

-- The language of the tenant's texts.
CREATE FUNCTION agent_private.text_language()
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce((SELECT l.language FROM public.agent_text_language l WHERE l.tenant_id = current_setting('agent.tenant_id')), 'english');
$$;

-- Take the words of a current version out of postings and counts; what was believed is still found by them, unless it
-- is forgotten. The caller holds the scope.
CREATE FUNCTION agent_private.unindex_memory(target public.agent_memory, is_forgotten boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    lexemes text[];
    words integer;
BEGIN
    IF NOT agent_private.is_searched(target.store) THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM public.agent_memory_term t
        WHERE t.memory_number = target.memory_number AND t.tenant_id = target.tenant_id
        RETURNING t.*
    ), kept AS (
        INSERT INTO public.agent_memory_past_term SELECT g.* FROM gone g WHERE NOT is_forgotten
    )
    SELECT coalesce(sum(g.occurrences), 0), array_agg(g.lexeme) INTO words, lexemes FROM gone g;
    DELETE FROM public.agent_term_count c
    WHERE c.tenant_id = target.tenant_id AND c.scope = target.scope AND c.owner_id = target.owner_id AND c.lexeme = ANY (lexemes)
      AND c.memory_count = 1;
    UPDATE public.agent_term_count c SET memory_count = c.memory_count - 1
    WHERE c.tenant_id = target.tenant_id AND c.scope = target.scope AND c.owner_id = target.owner_id AND c.lexeme = ANY (lexemes);
    UPDATE public.agent_scope s
    SET memory_count = s.memory_count - 1, word_count = s.word_count - words
    WHERE (s.tenant_id, s.scope, s.owner_id) = (target.tenant_id, target.scope, target.owner_id);
END
$$;

-- Index the words of current versions of one scope that have none yet, and count them. The caller holds the scope.
CREATE FUNCTION agent_private.index_memories(the_scope text, the_owner text, the_numbers bigint[])
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    the_language text := agent_private.text_language();
    words bigint;
BEGIN
    WITH words AS MATERIALIZED (
        SELECT m.memory_number, l.lexeme, l.occurrences, m.place,
               (sum(l.occurrences) OVER (PARTITION BY m.memory_number))::integer AS word_count
        FROM unnest(the_numbers) AS n (memory_number)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, agent_private.searched_text(x) AS words_of, agent_private.place_of(x.session_id, x.turn) AS place
            FROM public.agent_memory x WHERE x.memory_number = n.memory_number AND x.tenant_id = tenant
            LIMIT 1  -- a look-up per memory, whatever the planner believes of tables that nobody has analyzed yet
        ) AS m
        CROSS JOIN LATERAL agent_private.lexemes(m.words_of, the_language) AS l
    ), posted AS (
        INSERT INTO public.agent_memory_term (tenant_id, scope, owner_id, lexeme, memory_number, occurrences, impact, word_count, place)
        SELECT tenant, the_scope, the_owner, w.lexeme, w.memory_number, w.occurrences,
               agent_private.impact(w.occurrences, w.word_count), w.word_count, w.place
        FROM words w
    ), counted AS (
        INSERT INTO public.agent_term_count AS c (tenant_id, scope, owner_id, lexeme, memory_count)
        SELECT tenant, the_scope, the_owner, w.lexeme, count(*) FROM words w GROUP BY w.lexeme
        ON CONFLICT (tenant_id, scope, owner_id, lexeme) DO UPDATE SET memory_count = c.memory_count + excluded.memory_count
    )
    SELECT coalesce(sum(w.occurrences), 0) INTO words FROM words w;
    UPDATE public.agent_scope s
    SET memory_count = s.memory_count + cardinality(the_numbers), word_count = s.word_count + words,
        languages = CASE WHEN the_language = ANY (s.languages) THEN s.languages ELSE s.languages || the_language END
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
END
$$;

-- What a question is searched by in one scope: its rarest 32 words that the scope has, the rarest first, in how many of its
-- memories each is, how many memories it has and of how many words they are in the mean. as_of: words of history alone
-- count too. NULL for words where there is no such scope.
CREATE FUNCTION agent_private.question_words(
    the_scope text, the_owner text, question text, as_of timestamptz DEFAULT NULL,
    OUT words text[], OUT frequencies double precision[], OUT memories double precision, OUT mean_words double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    languages text[];
    asked text[];
BEGIN
    SELECT greatest(s.memory_count, 1), greatest(s.word_count::double precision / greatest(s.memory_count, 1), 1), s.languages
    INTO memories, mean_words, languages
    FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.scope = the_scope AND s.owner_id = the_owner;
    IF memories IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(languages) < 2 THEN
        asked := ARRAY(SELECT l.lexeme FROM agent_private.lexemes(left(question, 4000), coalesce(languages[1], 'english')) AS l);
    ELSE  -- while a change of language is under way
        asked := ARRAY(SELECT DISTINCT l.lexeme FROM unnest(languages) AS g (language)
                       CROSS JOIN LATERAL agent_private.lexemes(left(question, 4000), g.language) AS l);
    END IF;
    SELECT coalesce(array_agg(x.lexeme ORDER BY x.frequency, x.lexeme), '{}'), coalesce(array_agg(x.frequency ORDER BY x.frequency, x.lexeme), '{}')
    INTO words, frequencies
    FROM (SELECT a.lexeme, coalesce(c.memory_count, 0)::double precision AS frequency
          FROM unnest(asked) AS a (lexeme)
          LEFT JOIN LATERAL (SELECT t.memory_count FROM public.agent_term_count t
                             WHERE t.tenant_id = tenant AND t.scope = the_scope AND t.owner_id = the_owner AND t.lexeme = a.lexeme
                             LIMIT 1) AS c ON true
          WHERE c.memory_count IS NOT NULL OR as_of IS NOT NULL
          ORDER BY 2, 1 LIMIT 32) AS x;
END
$$;

-- Whether all postings of a question's words are read, because they are few.
CREATE FUNCTION agent_private.are_few(frequencies double precision[], memories double precision)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT memories <= 10000 OR coalesce((SELECT sum(u.frequency) FROM unnest(frequencies) AS u (frequency)), 0) <= 8000;
$$;

-- Whether the memories themselves tell which postings are wanted. Which store it is of, a posting tells by its place, but
-- for stores that no turn is of. Without a search_path of its own, so that its expression stands in the place of the call.
CREATE FUNCTION agent_private.are_looked_up(the_scope text, filters jsonb, as_of timestamptz)
RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN as_of IS NOT NULL OR filters - 'stores' <> '{}'
    OR coalesce(the_scope = 'tenant' OR ((filters -> 'stores') - 'user_memory' - 'conversation') <> '[]', false) AND filters ? 'stores';

-- All postings of these words in one scope, words by their place in the list; only those of turns, or only others, or
-- all (NULL). Without a search_path of its own, so that the planner puts its query in the place of the call: a row
-- costs half as much as one that a function returns.
CREATE FUNCTION agent_private.postings(tenant text, the_scope text, the_owner text, words text[], turns_wanted boolean)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE sql STABLE ROWS 1000
BEGIN ATOMIC
    SELECT t.memory_number, t.place, w.at::integer, t.occurrences, t.word_count
    FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
    CROSS JOIN LATERAL (
        SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
        WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
          AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
        ORDER BY x.impact DESC OFFSET 0
    ) AS t;
END;

-- The postings of a question's words in one scope, words by their place in the list: rarest first, with their frequencies, as
-- question_words gives them. Complete where the scope has at most 10,000 memories, or the words at most 8,000 postings.
-- Above that the rarest words of up to 4,000 postings (the rarest of all: its best 20,000) and the best 500 of each other
-- word say which memories are looked at; of other words, up to 60,000 postings in all, the lists are read for these. The
-- 1,000 that the words speak for most then remain, and for them the postings of the commonest words are looked up.
-- Only what fits the filters and was believed as_of; then the best 500 of a common word are sought among its best 50,000.
-- Leans on agent_memory_term_best and on the primary key; locks nothing.
CREATE FUNCTION agent_private.word_hits(
    the_scope text, the_owner text, words text[], frequencies double precision[], memories double precision,
    filters jsonb DEFAULT '{}', as_of timestamptz DEFAULT NULL)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE plpgsql STABLE ROWS 1000
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    stores jsonb := filters -> 'stores';
    turns_wanted boolean := CASE WHEN stores IS NULL THEN NULL WHEN stores <@ '["conversation"]' THEN true
                                 WHEN NOT stores ? 'conversation' THEN false END;
    is_looked_up boolean := agent_private.are_looked_up(the_scope, filters, as_of);
    never constant boolean := false;  -- makes of an IN a look into a hash table, whatever the planner expects to be in it
    word_limit integer := cardinality(words);
    whole integer := word_limit;  -- so many of the rarest words are read in full,
    listed integer := word_limit;  -- and so many for the memories that these speak for
    is_complete boolean := agent_private.are_few(frequencies, memories);
    weights double precision[];
BEGIN
    IF NOT is_complete THEN
        SELECT count(*) FILTER (WHERE f.postings <= 4000 OR f.at = 1), count(*) FILTER (WHERE f.postings <= 60000 OR f.at = 1)
        INTO whole, listed
        FROM (SELECT u.at, sum(u.frequency) OVER (ORDER BY u.at) AS postings FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at)) AS f;
    END IF;
    IF is_complete AND NOT is_looked_up THEN
        RETURN QUERY SELECT p.* FROM agent_private.postings(tenant, the_scope, the_owner, words, turns_wanted) AS p;
        RETURN;
    END IF;
    weights := ARRAY(SELECT ln(1 + memories / (u.frequency + 1)) FROM unnest(frequencies) WITH ORDINALITY AS u (frequency, at) ORDER BY u.at);
    RETURN QUERY
    WITH rare AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words[:whole]) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
              AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
            ORDER BY x.impact DESC, x.memory_number DESC LIMIT CASE WHEN is_looked_up THEN 50000 ELSE 20000 END
        ) AS t
        WHERE NOT is_looked_up OR EXISTS (
            SELECT FROM public.agent_memory m WHERE m.memory_number = t.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
    ), past AS (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.* FROM public.agent_memory_past_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
            ORDER BY x.impact DESC, x.memory_number DESC LIMIT 50000
        ) AS t
        WHERE as_of IS NOT NULL AND EXISTS (
            SELECT FROM public.agent_memory m WHERE m.memory_number = t.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
    ), best AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT y.* FROM (
                SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
                WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
                  AND (turns_wanted IS NULL OR turns_wanted = (x.place IS NOT NULL))
                ORDER BY x.impact DESC, x.memory_number DESC LIMIT CASE WHEN is_looked_up THEN 50000 ELSE 500 END
            ) AS y
            WHERE NOT is_looked_up OR EXISTS (
                SELECT FROM public.agent_memory m WHERE m.memory_number = y.memory_number AND agent_private.fits(m, filters, as_of) OFFSET 0)
            LIMIT 500
        ) AS t
        WHERE w.at > whole
    ), looked_at AS MATERIALIZED (
        SELECT r.memory_number FROM rare r WHERE whole < word_limit
        UNION
        SELECT b.memory_number FROM best b
    ), lists AS MATERIALIZED (
        SELECT t.memory_number, t.place, w.at::integer AS word, t.occurrences, t.word_count
        FROM unnest(words[:listed]) WITH ORDINALITY AS w (lexeme, at)
        CROSS JOIN LATERAL (
            SELECT x.memory_number, x.place, x.occurrences, x.word_count FROM public.agent_memory_term x
            WHERE x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner AND x.lexeme = w.lexeme
              AND (never OR x.memory_number IN (SELECT l.memory_number FROM looked_at l))
            ORDER BY x.impact DESC OFFSET 0
        ) AS t
        WHERE w.at > whole
    ), spoken_for AS MATERIALIZED (
        SELECT x.memory_number
        FROM (SELECT * FROM rare UNION ALL SELECT * FROM lists UNION ALL SELECT * FROM best b WHERE b.word > listed) AS x
        WHERE NOT is_complete
        GROUP BY x.memory_number
        ORDER BY sum(weights[x.word] * x.occurrences / (x.occurrences + 0.3::double precision + 0.045::double precision * x.word_count)) DESC
        LIMIT 1000
    )
    SELECT x.* FROM (SELECT * FROM rare UNION ALL SELECT * FROM lists) AS x
    WHERE is_complete OR x.memory_number IN (SELECT s.memory_number FROM spoken_for s)
    UNION ALL
    SELECT p.* FROM past p
    UNION ALL
    SELECT t.memory_number, t.place, array_position(words, t.lexeme), t.occurrences, t.word_count
    FROM spoken_for s
    CROSS JOIN LATERAL (
        SELECT x.* FROM public.agent_memory_term x
        WHERE x.memory_number = s.memory_number AND x.lexeme = ANY (words[listed + 1:])
          AND x.tenant_id = tenant AND x.scope = the_scope AND x.owner_id = the_owner OFFSET 0
    ) AS t
    WHERE listed < word_limit;
END
$$;

-- What word_hits returns, read in place where all postings are read: is_whole says so, which is are_few and not
-- are_looked_up. Without a search_path of its own, as postings.
CREATE FUNCTION agent_private.hits(
    tenant text, the_scope text, the_owner text, words text[], frequencies double precision[], memories double precision,
    filters jsonb, as_of timestamptz, is_whole boolean, turns_wanted boolean)
RETURNS TABLE (memory_number bigint, place bigint, word integer, occurrences smallint, word_count integer)
LANGUAGE sql STABLE ROWS 1000
BEGIN ATOMIC
    SELECT p.memory_number, p.place, p.word, p.occurrences, p.word_count
    FROM agent_private.postings(tenant, the_scope, the_owner, words, turns_wanted) AS p WHERE is_whole
    UNION ALL
    SELECT h.memory_number, h.place, h.word, h.occurrences, h.word_count
    FROM agent_private.word_hits(the_scope, the_owner, words, frequencies, memories, filters, as_of) AS h WHERE NOT is_whole;
END;
