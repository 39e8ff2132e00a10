-- Conversations: what was said, message by message, as memories of store 'conversation'.

-- A text without blocks of recalled knowledge and without lines of one, so that what was recalled is not remembered
-- again; the same as without_recalled() in agent.learning.rendering.
CREATE FUNCTION agent_private.without_recalled(said text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- {1,1}? makes the whole take as little as it can; Postgres goes by the first part that has a preference.
    block CONSTANT text := '(?:(<|&lt;)\s{0,8}?learned_knowledge\s{0,8}?(>|&gt;).*?((<|&lt;)\s{0,8}?/\s{0,8}?learned_knowledge\s{0,8}?(>|&gt;)|\Z)){1,1}?';
    shown CONSTANT text := '^[ \t]*- .*\m\d{4}-\d\d-\d\d, (user|tool|model|external), id [0-9a-f]{8}\][ \t]*$';
    remaining text := said;
BEGIN
    IF strpos(lower(said), 'learned_knowledge') > 0 THEN
        remaining := regexp_replace(remaining, block, '', 'gi');
        -- Taking out a block may have made another of what was around it.
        remaining := left(remaining, coalesce(nullif(regexp_instr(remaining, block, 1, 1, 0, 'i'), 0) - 1, length(remaining)));
    END IF;
    IF strpos(remaining, ', id ') > 0 THEN
        remaining := regexp_replace(remaining, shown, '', 'gn');
    END IF;
    RETURN CASE WHEN remaining = said THEN said ELSE btrim(remaining, E' \t\n\r\f\v') END;
END
$$;

-- What is kept of a message: at most 20,000 characters, cut between words where there are any. NULL where it says
-- nothing: white space, punctuation and pictographs alone.
CREATE FUNCTION agent_private.turn_content(said text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN said !~ '[^\s[:punct:][:cntrl:]\u0080-\u00bf\u2000-\u2bff\u3000-\u3004\ufe00-\ufe0f\ufeff\U0001f000-\U0001faff\U000e0000-\U000e0fff]' THEN NULL
        WHEN length(said) <= 20000 THEN said
        ELSE left(said, 19700) || regexp_replace(substr(said, 19701, 300), '\s+\S*$', '') END;
$$;

-- Insert turns that are new, with evidence and words. turns: an array of {memory_id, session_id, turn, kind, speaker,
-- content, tags, trust, valid_from, source, run_id, message_id} in their order; version is 1 unless they say otherwise.
-- The caller holds the scope and has made sure that none of them is there. Returns how many.
CREATE FUNCTION agent_private.insert_turns(turns jsonb)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    person text := current_setting('agent.user_id');
    numbers bigint[];
BEGIN
    WITH inserted AS (
        INSERT INTO public.agent_memory (
            tenant_id, memory_id, version, store, kind, scope, owner_id, session_id, content, content_hash, tags, turn,
            speaker, trust, valid_from, source, run_id)
        SELECT tenant, t.memory_id, coalesce(t.version, 1), 'conversation', t.kind, 'user', person, t.session_id,
               t.content, agent_private.content_hash(t.content, t.session_id, t.turn), coalesce(t.tags, '{}'), t.turn,
               t.speaker, t.trust, coalesce(t.valid_from, now()), t.source, t.run_id
        FROM jsonb_array_elements(turns) WITH ORDINALITY AS e (item, position)
        CROSS JOIN LATERAL jsonb_populate_record(NULL::public.agent_memory, e.item) AS t
        ORDER BY e.position
        RETURNING memory_number)
    SELECT array_agg(i.memory_number) INTO numbers FROM inserted i;
    INSERT INTO public.agent_memory_evidence (tenant_id, memory_id, version, scope, owner_id, run_id, message_id)
    SELECT tenant, (e.item ->> 'memory_id')::uuid, coalesce((e.item ->> 'version')::integer, 1), 'user', person,
           e.item ->> 'run_id', agent_private.short_id(coalesce(e.item ->> 'message_id', ''))
    FROM jsonb_array_elements(turns) AS e (item)
    WHERE e.item ->> 'run_id' IS NOT NULL
    ON CONFLICT DO NOTHING;
    PERFORM agent_private.index_memories('user', person, numbers);
    RETURN coalesce(cardinality(numbers), 0);
END
$$;

-- Remember what was said in these runs, by the user and by the assistant, after what is remembered of their sessions.
-- What an earlier run of the session has told already, under the same message id and in the same words, is passed over.
-- Turns are numbered in the order in which runs are learned: where an older run comes late, its turns stand at the end,
-- with their date. Leans on the primary keys of agent_run and agent_memory and on agent_memory_one_per_turn. The caller
-- holds the scope; its version does not rise, because nothing that is learned rests on turns. Returns how many.
CREATE FUNCTION agent_private.remember_turns(run_ids text[])
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    person text := current_setting('agent.user_id');
    turns jsonb;
BEGIN
    WITH said AS MATERIALIZED (
        SELECT r.run_id, r.session_id, r.started_at, r.finished_at, e.position, e.message ->> 'role' AS kind,
               e.message ->> 'message_id' AS message_id, e.message ->> 'name' AS name,
               CASE WHEN jsonb_typeof(r.facts -> 'line') = 'number' THEN (r.facts ->> 'line')::numeric END AS line,
               agent_private.turn_content(agent_private.without_recalled(e.message ->> 'content')) AS content
        FROM public.agent_run r
        CROSS JOIN LATERAL jsonb_array_elements(r.messages) WITH ORDINALITY AS e (message, position)
        WHERE r.tenant_id = tenant AND r.user_id = person AND r.run_id = ANY (run_ids)
          AND e.message ->> 'role' IN ('user', 'assistant')
    ), identified AS MATERIALIZED (
        -- The id comes from the message. One without an id of its own is named after its words, which may be said again.
        SELECT s.*, encode(substr(sha256(convert_to(jsonb_build_array(
                   tenant, person, s.session_id, CASE WHEN s.message_id LIKE 'said-%' THEN s.run_id ELSE '' END, s.message_id,
                   s.content)::text, 'UTF8')), 1, 16), 'hex')::uuid AS memory_id
        FROM said s WHERE s.content IS NOT NULL
    ), fresh AS (
        SELECT DISTINCT ON (i.memory_id) i.* FROM identified i
        WHERE NOT EXISTS (SELECT FROM public.agent_memory m WHERE m.tenant_id = tenant AND m.memory_id = i.memory_id)
        ORDER BY i.memory_id, i.finished_at, i.line, i.run_id, i.position
    ), placed AS (
        SELECT f.*, coalesce(last.turn, 0)
                    + row_number() OVER (PARTITION BY f.session_id ORDER BY f.finished_at, f.line, f.run_id, f.position) AS turn
        FROM fresh f
        LEFT JOIN LATERAL (
            SELECT m.turn FROM public.agent_memory m
            WHERE m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.session_id = f.session_id
              AND m.superseded_at IS NULL AND m.turn IS NOT NULL
            ORDER BY m.turn DESC LIMIT 1) AS last ON true
    )
    SELECT jsonb_agg(jsonb_build_object(
        'memory_id', p.memory_id, 'session_id', p.session_id, 'turn', p.turn, 'kind', p.kind,
        'speaker', nullif(btrim(left(p.name, 200)), ''), 'content', p.content,
        'trust', CASE p.kind WHEN 'user' THEN 'user' ELSE 'model' END,
        'valid_from', CASE p.kind WHEN 'user' THEN least(p.started_at, p.finished_at) ELSE p.finished_at END,
        'source', 'verbatim', 'run_id', p.run_id, 'message_id', p.message_id) ORDER BY p.session_id, p.turn)
    INTO turns
    FROM placed p
    WHERE p.turn <= 1048575;  -- the number of a turn has 20 bits
    RETURN CASE WHEN turns IS NULL THEN 0 ELSE agent_private.insert_turns(turns) END;
END
$$;

-- What is wrong with the turns of a conversation that are handed in, in words; NULL where they can be kept.
CREATE FUNCTION agent_private.fault_of_turns(the_session text, turns jsonb)
RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF coalesce(the_session, '') !~ '\S' OR length(the_session) > 512 OR octet_length(the_session) > 800 THEN
        RETURN 'a conversation needs a session of at most 512 characters and 800 bytes';
    END IF;
    IF coalesce(jsonb_typeof(turns), 'null') <> 'array' OR jsonb_array_length(turns) > 5000 THEN
        RETURN 'turns are a list of at most 5,000 objects';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(turns) AS t
               WHERE coalesce(jsonb_typeof(t), 'null') <> 'object' OR coalesce(t ->> 'kind', '') NOT IN ('user', 'assistant')
                  OR jsonb_typeof(t -> 'content') IS DISTINCT FROM 'string'
                  OR jsonb_typeof(t -> 'turn') IS DISTINCT FROM 'number'
                  OR coalesce(jsonb_typeof(t -> 'speaker'), 'null') NOT IN ('string', 'null')
                  OR coalesce(jsonb_typeof(t -> 'valid_from'), 'null') NOT IN ('string', 'null')) THEN
        RETURN 'every turn needs its number, a kind (user or assistant) and a content; speaker and valid_from are texts';
    END IF;
    IF EXISTS (SELECT FROM jsonb_array_elements(turns) AS t
               WHERE (t ->> 'turn')::numeric NOT BETWEEN 1 AND 1048575 OR (t ->> 'turn')::numeric % 1 <> 0)
       OR EXISTS (SELECT FROM jsonb_array_elements(turns) AS t GROUP BY (t ->> 'turn')::numeric HAVING count(*) > 1) THEN
        RETURN 'the turns of a session are numbers from 1 to 1048575, each once';
    END IF;
    RETURN NULL;
END
$$;

-- Remember a conversation that happened elsewhere, or a part of it: turns: [{turn, kind: user|assistant, content,
-- speaker?, tags?, valid_from?}], at most 5,000 in a call. A turn of the session that is there already stays as it is,
-- or gets a new version where it differs; what says nothing (see agent_private.turn_content) is left out. memory_limit:
-- greatest number of turns of the user; the oldest above it are retired. Leans on agent_memory_one_per_turn; locks the
-- scope. Returns {added, changed, unchanged, empty, retired_over_limit}.
CREATE FUNCTION public.add_turns(identity jsonb, the_session text, turns jsonb, memory_limit integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    person text;
    fault text;
    compared record;
    changed public.agent_memory;
    retired integer;
BEGIN
    identity := agent_private.document(identity);
    turns := agent_private.document(turns);
    previous := agent_private.enter(identity);
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'nothing can be remembered for nobody: the identity has no tenant or no user');
    END IF;
    fault := agent_private.fault_of_turns(the_session, turns);
    IF fault IS NOT NULL THEN
        PERFORM agent_private.refuse('PT422', fault);
    END IF;
    tenant := current_setting('agent.tenant_id');
    person := agent_private.touch_scope('user');
    WITH given AS MATERIALIZED (
        SELECT (e.item ->> 'turn')::integer AS turn, e.item ->> 'kind' AS kind,
               agent_private.turn_content(agent_private.without_recalled(e.item ->> 'content')) AS content,
               nullif(btrim(left(e.item ->> 'speaker', 200)), '') AS speaker, agent_private.tags_of(e.item) AS tags,
               (e.item ->> 'valid_from')::timestamptz AS valid_from
        FROM jsonb_array_elements(turns) AS e (item)
    ), placed AS MATERIALIZED (
        SELECT g.*, m.memory_id, m.version, m.memory_number,
               CASE WHEN m.memory_id IS NOT NULL THEN  -- NULL for what is new
                   m.content_hash = agent_private.content_hash(g.content, the_session, g.turn) AND m.kind = g.kind
                   AND m.speaker IS NOT DISTINCT FROM g.speaker AND m.tags = g.tags
                   AND m.valid_from = coalesce(g.valid_from, m.valid_from) END AS is_same
        FROM given g
        LEFT JOIN public.agent_memory m
            ON m.tenant_id = tenant AND m.scope = 'user' AND m.owner_id = person AND m.session_id = the_session
            AND m.turn = g.turn AND m.superseded_at IS NULL
        WHERE g.content IS NOT NULL
    )
    SELECT count(*) FILTER (WHERE p.is_same) AS unchanged,
           array_agg(p.memory_number) FILTER (WHERE NOT p.is_same) AS changed,
           count(*) FILTER (WHERE p.is_same IS NULL) AS added,
           jsonb_agg(jsonb_build_object(
               'memory_id', coalesce(p.memory_id, gen_random_uuid()), 'version', coalesce(p.version, 0) + 1,
               'session_id', the_session, 'turn', p.turn, 'kind', p.kind, 'speaker', p.speaker, 'content', p.content,
               'tags', to_jsonb(p.tags), 'trust', CASE p.kind WHEN 'user' THEN 'user' ELSE 'model' END,
               'valid_from', p.valid_from, 'source', 'import') ORDER BY p.turn) FILTER (WHERE p.is_same IS NOT TRUE) AS to_write
    INTO compared
    FROM placed p;
    FOR changed IN SELECT m.* FROM unnest(compared.changed) AS n JOIN public.agent_memory m ON m.memory_number = n LOOP
        PERFORM agent_private.close_memory(changed, 'updated');
    END LOOP;
    IF compared.to_write IS NOT NULL THEN
        PERFORM agent_private.insert_turns(compared.to_write);
    END IF;
    retired := agent_private.hold_to_limit('conversation', memory_limit);
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object(
        'added', compared.added, 'changed', coalesce(cardinality(compared.changed), 0), 'unchanged', compared.unchanged,
        'empty', jsonb_array_length(turns) - compared.added - compared.unchanged - coalesce(cardinality(compared.changed), 0),
        'retired_over_limit', retired);
END
$$;
