-- Who may call what. Everything belongs to agent_app; nothing is for anon.

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private'
  AND p.proname NOT IN ('publish', 'guard', 'own_scope', 'enqueue_learning', 'forget_jobs', 'queue_status', 'expedite_jobs', 'queue_state',
                        'reorder_learning', 'rescue_jobs', 'retry_failed_jobs');

-- A user with a JWT may recall and search, record runs, and look after their own memories.
SELECT agent_private.publish(f, 'user') FROM unnest(ARRAY[
    'public.recall_context(jsonb, text, text[], integer, text, text)',
    'public.match_memories(jsonb, text, integer, text, text, text, jsonb, timestamptz)',
    'public.record_run(jsonb, jsonb)',
    'public.upsert_learning(jsonb, jsonb, integer)',
    'public.upsert_learnings(jsonb, jsonb, jsonb)',
    'public.get_learning(jsonb, uuid)',
    'public.get_learnings(jsonb, jsonb, integer, integer)',
    'public.delete_learning(jsonb, uuid)',
    'public.delete_learnings(jsonb, uuid[])',
    'public.clear_learnings(jsonb, text)',
    'public.add_turns(jsonb, text, jsonb, integer)']::regprocedure[]) AS f;

-- Learning, importing, listing over users and erasing are for servers.
SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.pending_learning(jsonb, integer, integer)',
    'public.apply_learning(jsonb, text[], jsonb, bigint, jsonb, boolean)',
    'public.expedite_learning(jsonb)',
    'public.queue_state(text)',
    'public.retry_learning(jsonb, text, double precision, integer)',
    'public.rescue_learning(double precision)',
    'public.retry_failed_learning(text[])',
    'public.memories_without_embedding(jsonb, text, integer, integer, text)',
    'public.store_embeddings(jsonb, text, jsonb, text)',
    'public.arrange_embeddings(jsonb, text, integer, text, integer)',
    'public.owners_without_embedding(jsonb, text, integer)',
    'public.import_runs(jsonb, jsonb)',
    'public.list_runs(jsonb, jsonb, integer, integer)',
    'public.get_run(jsonb, text)',
    'public.list_users(jsonb)',
    'public.erase_user(jsonb)',
    'public.set_text_language(jsonb, text)',
    'public.reindex_words(jsonb, integer)',
    'public.learning_status(jsonb)']::regprocedure[]) AS f;
