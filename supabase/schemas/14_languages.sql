-- The language of a tenant's texts: setting it, and changing the words that were indexed before.

-- Say in which language a tenant's texts are searched: the name of a text search configuration of Postgres, such as
-- 'german'; 'simple' (words as they are) for what Postgres has none of. For operators. What was indexed before is found by
-- its old words until reindex_words has changed them. Returns {language, scopes_waiting}.
CREATE FUNCTION public.set_text_language(identity jsonb, the_language text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    waiting bigint;
    known text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a language is set for a tenant');
    END IF;
    SELECT c.cfgname INTO known FROM pg_ts_config c
    WHERE c.cfgnamespace = 'pg_catalog'::regnamespace AND c.cfgname::text = lower(btrim(the_language));
    known := coalesce(known, 'simple');
    INSERT INTO public.agent_text_language AS l (tenant_id, language) VALUES (current_setting('agent.tenant_id'), known)
    ON CONFLICT (tenant_id) DO UPDATE SET language = excluded.language, changed_at = clock_timestamp()
    WHERE l.language <> excluded.language;
    SELECT count(*) INTO waiting FROM public.agent_scope s
    WHERE s.tenant_id = current_setting('agent.tenant_id') AND s.languages <> ARRAY[known] AND s.languages <> '{}';
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('language', known, 'scopes_waiting', waiting);
END
$$;

-- Change the words of at most row_limit versions to the tenant's language, scope by scope; nothing where all are. For
-- operators; the learner does it. Locks the scopes one after the other. Returns {reindexed, scopes_waiting}.
CREATE FUNCTION public.reindex_words(identity jsonb, row_limit integer DEFAULT 1000)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    the_language text;
    due public.agent_scope;
    target public.agent_memory;
    done integer := 0;
    done_here integer;
    waiting bigint;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'words are changed for a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    the_language := agent_private.text_language();
    FOR due IN
        SELECT * FROM public.agent_scope s
        WHERE s.tenant_id = tenant AND s.languages <> ARRAY[the_language] AND s.languages <> '{}'
        ORDER BY s.scope, s.owner_id LIMIT row_limit
    LOOP
        EXIT WHEN done >= row_limit;
        -- Its version stays as it is: what is known does not change.
        SELECT * INTO due FROM public.agent_scope s
        WHERE s.tenant_id = tenant AND s.scope = due.scope AND s.owner_id = due.owner_id FOR UPDATE;
        CONTINUE WHEN NOT FOUND;  -- erased meanwhile
        IF due.reindexing IS DISTINCT FROM the_language THEN
            due.reindexed_to := 0;
        END IF;
        done_here := 0;
        FOR target IN
            SELECT x.* FROM unnest(ARRAY['user_memory', 'application', 'conversation']) AS o (store)
            CROSS JOIN LATERAL (
                SELECT * FROM public.agent_memory m
                WHERE m.tenant_id = tenant AND m.scope = due.scope AND m.owner_id = due.owner_id AND m.store = o.store
                  AND m.superseded_at IS NULL AND m.memory_number > due.reindexed_to
                ORDER BY m.memory_number LIMIT row_limit - done
            ) AS x
            UNION ALL
            (SELECT * FROM public.agent_memory m
             WHERE m.tenant_id = tenant AND m.scope = due.scope AND m.owner_id = due.owner_id AND m.superseded_at IS NOT NULL
               AND agent_private.is_searched(m.store) AND m.memory_number > due.reindexed_to
             ORDER BY m.memory_number LIMIT row_limit - done)
            ORDER BY memory_number LIMIT row_limit - done
        LOOP
            done_here := done_here + 1;
            due.reindexed_to := target.memory_number;
            IF target.superseded_at IS NULL THEN
                PERFORM agent_private.unindex_memory(target, true);
                PERFORM agent_private.index_memories(due.scope, due.owner_id, ARRAY[target.memory_number]);
            ELSE
                DELETE FROM public.agent_memory_past_term t WHERE t.memory_number = target.memory_number AND t.tenant_id = tenant;
                INSERT INTO public.agent_memory_past_term (tenant_id, scope, owner_id, lexeme, memory_number, occurrences, impact, word_count, place)
                SELECT tenant, due.scope, due.owner_id, l.lexeme, target.memory_number, l.occurrences,
                       agent_private.impact(l.occurrences, l.word_count), l.word_count, agent_private.place_of(target.session_id, target.turn)
                FROM (SELECT w.lexeme, w.occurrences, (sum(w.occurrences) OVER ())::integer AS word_count
                      FROM agent_private.lexemes(agent_private.searched_text(target), the_language) AS w) AS l;
            END IF;
        END LOOP;
        UPDATE public.agent_scope s
        SET reindexing = the_language, reindexed_to = due.reindexed_to,
            languages = CASE WHEN done_here < row_limit - done THEN ARRAY[the_language] ELSE s.languages END
        WHERE s.tenant_id = tenant AND s.scope = due.scope AND s.owner_id = due.owner_id;
        done := done + done_here;
    END LOOP;
    SELECT count(*) INTO waiting FROM public.agent_scope s
    WHERE s.tenant_id = tenant AND s.languages <> ARRAY[the_language] AND s.languages <> '{}';
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('reindexed', done, 'scopes_waiting', waiting);
END
$$;
