-- Memories: one row per version, its evidence, its words, its vectors.

CREATE TABLE public.agent_memory (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    memory_id uuid NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    memory_number bigint GENERATED ALWAYS AS IDENTITY,
    store text NOT NULL CHECK (store <> ''),
    kind text NOT NULL DEFAULT '',
    scope text NOT NULL DEFAULT 'user' CHECK (scope IN ('user', 'agent', 'tenant')),
    owner_id text NOT NULL,
    session_id text,
    field text,
    content text NOT NULL CHECK (length(content) BETWEEN 1 AND 20000),
    content_hash bytea NOT NULL,
    tags text[] NOT NULL DEFAULT '{}',
    turn integer,
    speaker text,
    value jsonb,
    trust text NOT NULL CHECK (trust IN ('user', 'tool', 'model', 'external')),
    valid_from timestamptz NOT NULL DEFAULT now(),
    valid_to timestamptz,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    superseded_at timestamptz,
    superseded_reason text,
    source text NOT NULL DEFAULT 'extraction',
    run_id text,
    PRIMARY KEY (tenant_id, memory_id, version),
    CONSTRAINT agent_memory_tags CHECK (cardinality(tags) <= 32 AND array_position(tags, NULL) IS NULL),
    CONSTRAINT agent_memory_turn CHECK ((turn IS NOT NULL) = (store = 'conversation')
                                        AND (turn IS NULL OR (turn BETWEEN 1 AND 1048575 AND session_id IS NOT NULL AND field IS NULL))),
    CONSTRAINT agent_memory_speaker CHECK (length(speaker) BETWEEN 1 AND 200),
    CONSTRAINT agent_memory_owner CHECK ((scope = 'tenant') = (owner_id = '')),
    CONSTRAINT agent_memory_valid_period CHECK (valid_to IS NULL OR valid_to >= valid_from),
    CONSTRAINT agent_memory_superseded_after_recorded CHECK (superseded_at IS NULL OR superseded_at >= recorded_at),
    CONSTRAINT agent_memory_superseded_has_reason CHECK ((superseded_at IS NULL) = (superseded_reason IS NULL))
);
COMMENT ON TABLE public.agent_memory IS 'What the agents know. A change is a new version; the old one keeps its row with superseded_at set.';
COMMENT ON COLUMN public.agent_memory.memory_id IS 'Stays the same over all versions of one memory.';
COMMENT ON COLUMN public.agent_memory.memory_number IS 'Order of recording, unique over all tenants; joins words and vectors to a version.';
COMMENT ON COLUMN public.agent_memory.owner_id IS 'User id for scope user, agent id for scope agent, empty for scope tenant.';
COMMENT ON COLUMN public.agent_memory.field IS 'Profile or session field; NULL for memories that are no fields.';
COMMENT ON COLUMN public.agent_memory.content IS 'The text that is searched and rendered.';
COMMENT ON COLUMN public.agent_memory.tags IS 'At most 32 words of the user''s own to filter by, of at most 100 characters.';
COMMENT ON COLUMN public.agent_memory.turn IS 'Place of a message in its session, from 1; NULL for what is no turn of a conversation.';
COMMENT ON COLUMN public.agent_memory.speaker IS 'Name of who said it; NULL where it was not said by somebody named.';
COMMENT ON COLUMN public.agent_memory.value IS 'The typed value of a field.';
COMMENT ON COLUMN public.agent_memory.valid_from IS 'Since when it is true in the world; recorded_at is since when we believe it.';

-- One current version of a memory, one current answer per field, one current memory per text and per turn.
CREATE UNIQUE INDEX agent_memory_one_current ON public.agent_memory (tenant_id, memory_id)
    WHERE superseded_at IS NULL;
CREATE UNIQUE INDEX agent_memory_one_answer_per_field
    ON public.agent_memory (tenant_id, scope, owner_id, store, coalesce(session_id, ''), field)
    WHERE superseded_at IS NULL AND field IS NOT NULL;
CREATE UNIQUE INDEX agent_memory_no_duplicate_text
    ON public.agent_memory (tenant_id, scope, owner_id, store, content_hash)
    WHERE superseded_at IS NULL AND field IS NULL;
CREATE UNIQUE INDEX agent_memory_one_per_turn ON public.agent_memory (tenant_id, scope, owner_id, session_id, turn)
    WHERE superseded_at IS NULL AND turn IS NOT NULL;
-- Newest first within a scope.
CREATE INDEX agent_memory_by_scope ON public.agent_memory (tenant_id, scope, owner_id, store, memory_number DESC)
    WHERE superseded_at IS NULL;
-- History of an owner, in the order of recording.
CREATE INDEX agent_memory_past ON public.agent_memory (tenant_id, scope, owner_id, memory_number)
    WHERE superseded_at IS NOT NULL;
CREATE UNIQUE INDEX agent_memory_by_number ON public.agent_memory (memory_number);

CREATE TABLE public.agent_memory_evidence (
    tenant_id text NOT NULL,
    memory_id uuid NOT NULL,
    version integer NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    run_id text NOT NULL,
    message_id text NOT NULL DEFAULT '',
    tool_call_id text NOT NULL DEFAULT '',
    quote text NOT NULL DEFAULT '' CHECK (length(quote) <= 1000),
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, memory_id, version, run_id, message_id, tool_call_id),
    FOREIGN KEY (tenant_id, memory_id, version) REFERENCES public.agent_memory ON DELETE CASCADE
);
COMMENT ON TABLE public.agent_memory_evidence IS 'Which messages or tool calls of which runs a memory was learned from.';
CREATE INDEX agent_memory_evidence_by_run ON public.agent_memory_evidence (tenant_id, run_id);

CREATE TABLE public.agent_scope (
    tenant_id text NOT NULL,
    scope text NOT NULL,
    owner_id text NOT NULL,
    version bigint NOT NULL DEFAULT 0,
    memory_count integer NOT NULL DEFAULT 0,
    word_count bigint NOT NULL DEFAULT 0,
    languages text[] NOT NULL DEFAULT '{}',
    reindexing text,
    reindexed_to bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, scope, owner_id)
);
COMMENT ON TABLE public.agent_scope IS 'One row per owner: its version rises with every write, so that learning can tell whether what it read is still so; its counts are those of the searchable memories.';
COMMENT ON COLUMN public.agent_scope.languages IS 'The languages that its words are in: more than one while a change is under way.';
COMMENT ON COLUMN public.agent_scope.reindexing IS 'To which language its words are being changed, up to the memory of number reindexed_to.';

-- Let storage functions see of a table with tenant_id, scope and owner_id what the identity may see. The settings are read
-- once per query, not once per row.
CREATE FUNCTION agent_private.own_scope(target regclass)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format($policy$
        CREATE POLICY own_scope ON %s TO agent_app
        USING (
            tenant_id = (SELECT current_setting('agent.tenant_id', true))
            AND (
                (scope = 'user' AND owner_id = (SELECT current_setting('agent.user_id', true)))
                OR (scope = 'agent' AND owner_id = (SELECT current_setting('agent.agent_id', true)))
                OR scope = 'tenant'
                OR (SELECT current_setting('agent.reach', true)) = 'tenant'
            )
        )
    $policy$, target);
END
$$;
REVOKE ALL ON FUNCTION agent_private.own_scope(regclass) FROM PUBLIC;

SELECT agent_private.guard(t), agent_private.own_scope(t) FROM unnest(ARRAY[
    'public.agent_memory', 'public.agent_memory_evidence', 'public.agent_scope']::regclass[]) AS t;

-- A text in Unicode's form NFKC, a thousand characters at a time: Postgres takes as long as the square of a run of accents.
CREATE FUNCTION agent_private.composed(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(content) = length(content) THEN content
                WHEN length(content) <= 1000 THEN normalize(content, NFKC)
                ELSE (SELECT string_agg(normalize(substr(content, s.at, 1000), NFKC), '' ORDER BY s.at)
                      FROM generate_series(1, length(content), 1000) AS s (at)) END;
$$;

-- A text as it is compared: upper and lower case and white space do not count. Empty for white space alone.
CREATE FUNCTION agent_private.plain_text(content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT btrim(regexp_replace(lower(agent_private.composed(content)), '\s+', ' ', 'g'));
$$;

-- Equal texts have equal hashes; final stops do not count either, unless there is nothing else. Equal messages of a
-- conversation stay apart: there the session and the turn count too.
CREATE FUNCTION agent_private.content_hash(content text, session_id text DEFAULT NULL, turn integer DEFAULT NULL)
RETURNS bytea
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sha256(convert_to(coalesce(nullif(rtrim(p.plain, ' .!'), ''), p.plain)
                             || CASE WHEN turn IS NULL THEN '' ELSE format(E'\n%s\n%s', turn, session_id) END, 'UTF8'))
    FROM (SELECT agent_private.plain_text(content)) AS p (plain);
$$;

-- Where a turn stands among all turns: neighbours of one conversation differ by 1, and a session is place >> 20. NULL
-- for what is no turn. 42 bits of the session's hash and 20 of the turn. Without a search_path of its own, so that the
-- planner puts its expression in the place of the call.
CREATE FUNCTION agent_private.place_of(session_id text, turn integer)
RETURNS bigint
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN turn IS NOT NULL THEN
    (('x' || left(encode(sha256(convert_to(session_id, 'UTF8')), 'hex'), 16))::bit(64) >> 22)::bigint << 20 | turn END;

-- The stores whose memories are searched by their words.
CREATE FUNCTION agent_private.is_searched(store text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT store IN ('user_memory', 'application', 'conversation');
$$;

-- The text of a memory as it is searched: a turn is found by its speaker's name too.
CREATE FUNCTION agent_private.searched_text(memory public.agent_memory)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(memory.speaker || ': ', '') || memory.content;
$$;

-- The tags of a learning, sorted, each once; PT422 where they are none.
CREATE FUNCTION agent_private.tags_of(learning jsonb)
RETURNS text[]
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    told jsonb := coalesce(nullif(learning -> 'tags', 'null'), '[]');
BEGIN
    IF jsonb_typeof(told) <> 'array' OR jsonb_array_length(told) > 32 OR EXISTS (
        SELECT FROM jsonb_array_elements(told) AS t
        WHERE jsonb_typeof(t) <> 'string' OR length(t #>> '{}') NOT BETWEEN 1 AND 100) THEN
        PERFORM agent_private.refuse('PT422', 'tags are a list of at most 32 texts of 1 to 100 characters');
    END IF;
    RETURN ARRAY(SELECT DISTINCT t FROM jsonb_array_elements_text(told) AS t ORDER BY t);
END
$$;

-- An id of somebody else's making, short enough for an index: the end of a long one is its hash.
CREATE FUNCTION agent_private.short_id(id text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN octet_length(id) <= 400 THEN id
                ELSE left(id, 60) || ' ' || encode(sha256(convert_to(id, 'UTF8')), 'hex') END;
$$;

-- Lock the scope of a write, raise its version and return its owner; the lock keeps writers of one owner in line.
CREATE FUNCTION agent_private.touch_scope(wanted_scope text)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tenant text := current_setting('agent.tenant_id');
    owner text := CASE wanted_scope WHEN 'user' THEN current_setting('agent.user_id')
                                    WHEN 'agent' THEN current_setting('agent.agent_id')
                                    WHEN 'tenant' THEN '' END;
BEGIN
    IF owner IS NULL OR (owner = '' AND wanted_scope <> 'tenant') THEN
        PERFORM agent_private.refuse('PT403', format('no %s in the identity', wanted_scope));
    END IF;
    IF wanted_scope <> 'user' AND current_setting('agent.reach') = 'claims' THEN
        RAISE EXCEPTION 'only a server may write for more than one user' USING ERRCODE = 'insufficient_privilege';
    END IF;
    INSERT INTO public.agent_scope AS s (tenant_id, scope, owner_id, version)
    VALUES (tenant, wanted_scope, owner, 1)
    ON CONFLICT (tenant_id, scope, owner_id) DO UPDATE SET version = s.version + 1;
    RETURN owner;
END
$$;

-- Lock the scopes that operations are of, but for the user's, which is locked last: in one order, so that writers of
-- several do not wait for each other in a circle. curate_memories and reindex_words lock in this order too.
CREATE FUNCTION agent_private.lock_shared_scopes(operations jsonb)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shared text;
BEGIN
    FOR shared IN SELECT DISTINCT o ->> 'scope' FROM jsonb_array_elements(operations) AS o WHERE o ->> 'scope' <> 'user' ORDER BY 1 LOOP
        PERFORM agent_private.touch_scope(shared);
    END LOOP;
END
$$;

-- Close a current version: it stays as history but is no longer found. The caller holds the scope.
CREATE FUNCTION agent_private.close_memory(target public.agent_memory, reason text)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE public.agent_memory m
    SET superseded_at = greatest(clock_timestamp(), m.recorded_at), superseded_reason = reason  -- clocks are set back
    WHERE m.memory_number = target.memory_number AND m.tenant_id = target.tenant_id;
    DELETE FROM public.agent_memory_embedding e WHERE e.memory_number = target.memory_number;
    PERFORM agent_private.unindex_memory(target);
END
$$;

-- Those of some runs that are recorded for another user of the tenant. It looks past the caller's reach and gives it back.
CREATE FUNCTION agent_private.runs_of_others(run_ids text[])
RETURNS text[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    reach text := current_setting('agent.reach');
    found text[];
BEGIN
    PERFORM set_config('agent.reach', 'tenant', true);
    SELECT coalesce(array_agg(r.run_id), '{}') INTO found
    FROM public.agent_run r
    WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.run_id = ANY (run_ids)
      AND r.user_id IS DISTINCT FROM current_setting('agent.user_id');
    PERFORM set_config('agent.reach', reach, true);
    RETURN found;
END
$$;

-- Attach evidence; an item that is there already is kept as it is. A run may not be recorded yet, because tools write
-- during it; what names a run of somebody else is dropped.
CREATE FUNCTION agent_private.attach_evidence(target public.agent_memory, evidence jsonb)
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    of_others text[];
BEGIN
    IF coalesce(evidence, '[]') = '[]' THEN
        RETURN;
    END IF;
    of_others := agent_private.runs_of_others(ARRAY(SELECT DISTINCT e ->> 'run_id' FROM jsonb_array_elements(evidence) AS e));
    INSERT INTO public.agent_memory_evidence
        (tenant_id, memory_id, version, scope, owner_id, run_id, message_id, tool_call_id, quote)
    SELECT target.tenant_id, target.memory_id, target.version, target.scope, target.owner_id,
           e ->> 'run_id', agent_private.short_id(coalesce(e ->> 'message_id', '')),
           agent_private.short_id(coalesce(e ->> 'tool_call_id', '')), left(coalesce(e ->> 'quote', ''), 1000)
    FROM jsonb_array_elements(evidence) AS e
    WHERE e ->> 'run_id' IS NOT NULL AND NOT e ->> 'run_id' = ANY (of_others)
    ON CONFLICT DO NOTHING;
END
$$;

-- Write one memory as a new row: a new memory, a new version, or nothing where the text is known already.
-- Returns the receipt {status: created|updated|unchanged, memory_id, version, store, field, content}.
-- learning: store, content, and optionally memory_id, expected_version, kind, scope, session_id, field, value, tags,
-- turn (place in the session, which it needs then; the same turn with another text is a new version), speaker, trust,
-- evidence, valid_from, source, run_id.
CREATE FUNCTION agent_private.write_memory(learning jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_scope text := coalesce(learning ->> 'scope', 'user');
    owner text := agent_private.touch_scope(the_scope);
    tenant text := current_setting('agent.tenant_id');
    the_turn integer := (learning ->> 'turn')::integer;
    tags text[] := agent_private.tags_of(learning);
    the_session text := learning ->> 'session_id';
    the_speaker text := nullif(btrim(left(learning ->> 'speaker', 200)), '');
    hash bytea;
    current_row public.agent_memory;
    written public.agent_memory;
    outcome text := 'created';
BEGIN
    IF coalesce(agent_private.plain_text(learning ->> 'content'), '') = '' OR coalesce(learning ->> 'store', '') = '' THEN
        PERFORM agent_private.refuse('PT422', 'a memory needs a store and a content');
    END IF;
    IF the_turn IS NOT NULL AND (the_turn NOT BETWEEN 1 AND 1048575 OR learning ->> 'store' <> 'conversation'
                                 OR the_session IS NULL OR octet_length(the_session) > 1000 OR learning ->> 'field' IS NOT NULL) THEN
        PERFORM agent_private.refuse('PT422', 'a turn is a number from 1 to 1048575, in store conversation, with a session_id of at most '
                                              '1000 bytes and without a field');
    END IF;
    IF learning ->> 'memory_id' IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.memory_id = (learning ->> 'memory_id')::uuid AND m.superseded_at IS NULL
          AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store';
        IF NOT FOUND THEN
            PERFORM agent_private.refuse('PT404', format('no current memory %s in store %s', learning ->> 'memory_id', learning ->> 'store'));
        END IF;
    ELSIF learning ->> 'field' IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store'
          AND coalesce(m.session_id, '') = coalesce(learning ->> 'session_id', '')
          AND m.field = learning ->> 'field' AND m.superseded_at IS NULL;
    ELSIF the_turn IS NOT NULL THEN
        SELECT * INTO current_row FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner
          AND m.session_id = the_session AND m.turn = the_turn AND m.superseded_at IS NULL;
    END IF;
    IF current_row.turn IS NOT NULL THEN  -- a turn stays where it was said
        the_turn := current_row.turn;
        the_session := current_row.session_id;
    END IF;
    IF the_turn IS NULL AND learning ->> 'store' = 'conversation' THEN
        PERFORM agent_private.refuse('PT422', 'a memory of store conversation is a turn: it needs its number');
    END IF;
    hash := agent_private.content_hash(learning ->> 'content', the_session, the_turn);
    IF learning -> 'tags' IS NULL THEN
        tags := coalesce(current_row.tags, '{}');
    END IF;
    IF learning ->> 'expected_version' IS NOT NULL
       AND (learning ->> 'expected_version')::integer IS DISTINCT FROM current_row.version THEN
        PERFORM agent_private.refuse('PT409', format('memory %s is at version %s, not %s', learning ->> 'memory_id',
                                                     coalesce(current_row.version::text, 'none'), learning ->> 'expected_version'));
    END IF;
    IF current_row.memory_id IS NOT NULL AND current_row.content_hash = hash
       AND current_row.value IS NOT DISTINCT FROM nullif(learning -> 'value', 'null')
       AND current_row.kind = coalesce(learning ->> 'kind', current_row.kind) AND current_row.tags = tags
       AND current_row.speaker IS NOT DISTINCT FROM coalesce(the_speaker, current_row.speaker) THEN
        outcome := 'unchanged';
        written := current_row;
    ELSIF coalesce(current_row.field, learning ->> 'field') IS NULL THEN
        SELECT * INTO written FROM public.agent_memory m
        WHERE m.tenant_id = tenant AND m.scope = the_scope AND m.owner_id = owner AND m.store = learning ->> 'store'
          AND m.content_hash = hash AND m.field IS NULL AND m.superseded_at IS NULL
          AND m.memory_id IS DISTINCT FROM current_row.memory_id;
        IF FOUND THEN
            outcome := 'unchanged';
            IF current_row.memory_id IS NOT NULL THEN
                PERFORM agent_private.close_memory(current_row, 'merged into ' || written.memory_id);
            END IF;
        END IF;
    END IF;
    IF outcome <> 'unchanged' THEN
        IF current_row.memory_id IS NOT NULL THEN
            outcome := 'updated';
            PERFORM agent_private.close_memory(current_row, 'updated');
        END IF;
        INSERT INTO public.agent_memory (
            tenant_id, memory_id, version, store, kind, scope, owner_id, session_id, field, content, content_hash,
            tags, turn, speaker, value, trust, valid_from, source, run_id)
        VALUES (
            tenant,
            coalesce(current_row.memory_id, gen_random_uuid()),
            coalesce(current_row.version, 0) + 1,
            learning ->> 'store',
            coalesce(learning ->> 'kind', current_row.kind, ''),
            the_scope,
            owner,
            coalesce(the_session, current_row.session_id),
            coalesce(learning ->> 'field', current_row.field),
            left(learning ->> 'content', 20000),
            hash,
            tags,
            the_turn,
            coalesce(the_speaker, current_row.speaker),
            nullif(learning -> 'value', 'null'),
            coalesce(learning ->> 'trust', 'user'),
            coalesce((learning ->> 'valid_from')::timestamptz, now()),
            coalesce(learning ->> 'source', 'extraction'),
            learning ->> 'run_id')
        RETURNING * INTO written;
        IF agent_private.is_searched(written.store) THEN
            PERFORM agent_private.index_memories(the_scope, owner, ARRAY[written.memory_number]);
        END IF;
    END IF;
    PERFORM agent_private.attach_evidence(written, learning -> 'evidence');
    RETURN jsonb_build_object('status', outcome, 'memory_id', written.memory_id, 'version', written.version,
                              'memory_number', written.memory_number, 'store', written.store, 'kind', written.kind,
                              'field', written.field, 'content', written.content, 'value', written.value);
END
$$;

-- Retire the current version of a memory, named by id or by field. Returns the receipt, status retired or absent.
CREATE FUNCTION agent_private.retire_memory(learning jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    the_scope text := coalesce(learning ->> 'scope', 'user');
    owner text := agent_private.touch_scope(the_scope);
    target public.agent_memory;
BEGIN
    SELECT * INTO target FROM public.agent_memory m
    WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = the_scope AND m.owner_id = owner
      AND m.store = learning ->> 'store' AND m.superseded_at IS NULL
      AND CASE WHEN learning ->> 'memory_id' IS NOT NULL THEN m.memory_id = (learning ->> 'memory_id')::uuid
               ELSE m.field = learning ->> 'field'
                    AND coalesce(m.session_id, '') = coalesce(learning ->> 'session_id', '') END;
    IF NOT FOUND THEN
        IF learning ->> 'memory_id' IS NOT NULL THEN
            PERFORM agent_private.refuse('PT404', format('no current memory %s in store %s', learning ->> 'memory_id', learning ->> 'store'));
        END IF;
        RETURN jsonb_build_object('status', 'absent', 'store', learning ->> 'store', 'field', learning ->> 'field');
    END IF;
    IF learning ->> 'expected_version' IS NOT NULL AND (learning ->> 'expected_version')::integer <> target.version THEN
        PERFORM agent_private.refuse('PT409', format('memory %s is at version %s, not %s', target.memory_id, target.version, learning ->> 'expected_version'));
    END IF;
    PERFORM agent_private.attach_evidence(target, learning -> 'evidence');
    PERFORM agent_private.close_memory(target, coalesce(learning ->> 'reason', 'retired'));
    RETURN jsonb_build_object('status', 'retired', 'memory_id', target.memory_id, 'version', target.version,
                              'store', target.store, 'field', target.field, 'content', target.content);
END
$$;

-- Write or retire, as the operation's action says; without one it writes. Returns the receipt.
CREATE FUNCTION agent_private.apply_operation(operation jsonb)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    CASE coalesce(operation ->> 'action', 'write')
        WHEN 'write' THEN RETURN agent_private.write_memory(operation);
        WHEN 'retire' THEN RETURN agent_private.retire_memory(operation);
        ELSE PERFORM agent_private.refuse('PT422', format('action %s is neither write nor retire', operation ->> 'action'));
    END CASE;
END
$$;

-- Retire the oldest memories of a store above a limit; NULL is no limit. Returns how many.
CREATE FUNCTION agent_private.hold_to_limit(the_store text, memory_limit integer)
RETURNS integer
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    surplus public.agent_memory;
    retired integer := 0;
BEGIN
    IF memory_limit IS NULL OR (agent_private.is_searched(the_store) AND NOT EXISTS (
        SELECT FROM public.agent_scope s
        WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.scope = 'user'
          AND s.owner_id = current_setting('agent.user_id') AND s.memory_count > memory_limit)) THEN
        RETURN 0;
    END IF;
    FOR surplus IN
        SELECT * FROM public.agent_memory m
        WHERE m.tenant_id = current_setting('agent.tenant_id') AND m.scope = 'user'
          AND m.owner_id = current_setting('agent.user_id') AND m.store = the_store AND m.superseded_at IS NULL
        ORDER BY m.memory_number DESC OFFSET memory_limit
    LOOP
        PERFORM agent_private.close_memory(surplus, 'over max_memories');
        retired := retired + 1;
    END LOOP;
    RETURN retired;
END
$$;
