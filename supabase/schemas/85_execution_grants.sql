-- Who may call what of approvals, executions and tools: servers alone, and the login that writes its one function.

SELECT agent_private.publish(p.oid::regprocedure, 'private')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'agent_private' AND p.proname IN (
    'enter_everywhere', 'enter_as_server', 'refuse_change', 'watch_approval', 'next_of_chain', 'chain_hash', 'event_text', 'append_event',
    'approval_state', 'approval_document', 'approval_digest', 'texts', 'settle_approval', 'use_rule', 'objection', 'details_hash', 'execution_text',
    'append_execution', 'keep_result', 'erase_executions', 'halted', 'finish', 'watch_tool');

SELECT agent_private.publish(f, 'server') FROM unnest(ARRAY[
    'public.server_secret(text)',
    'public.request_approval(jsonb, jsonb)',
    'public.get_approval(jsonb, uuid)',
    'public.list_approvals(jsonb, jsonb)',
    'public.count_waiting(text[])',
    'public.decide_approvals(jsonb, jsonb)',
    'public.close_approval(jsonb, uuid, text, text)',
    'public.attach_interrupt(jsonb, uuid, jsonb)',
    'public.take_deliveries(text[], double precision)',
    'public.delivery_done(uuid, text, bigint, jsonb)',
    'public.delivery_failed(uuid, text, text)',
    'public.take_resumes(double precision)',
    'public.resume_done(uuid)',
    'public.resume_failed(uuid, text)',
    'public.remember_delivery(text, text)',
    'public.save_standing_rule(jsonb, jsonb)',
    'public.list_standing_rules(jsonb)',
    'public.revoke_standing_rule(jsonb, uuid, text)',
    'public.save_continuation(jsonb, uuid, text, text, double precision, uuid)',
    'public.take_continuation(jsonb, uuid, double precision)',
    'public.release_continuation(jsonb, uuid, text)',
    'public.finish_continuation(jsonb, uuid, text, jsonb)',
    'public.take_tool_resumes(double precision)',
    'public.claim_approval(jsonb, uuid, text, text)',
    'public.finish_execution(jsonb, text, jsonb)',
    'public.record_execution(jsonb, jsonb)',
    'public.reserve_execution(jsonb, text, text, integer)',
    'public.halt_executions(jsonb, jsonb)',
    'public.resume_executions(jsonb, uuid, text)',
    'public.list_halts(jsonb)',
    'public.list_executions(jsonb, jsonb)',
    'public.get_execution(jsonb, bigint)',
    'public.get_execution_result(jsonb, text)',
    'public.verify_executions(jsonb)',
    'public.tend_approvals(double precision)',
    'public.save_tool_version(jsonb, jsonb)',
    'public.approve_tool_version(jsonb, text, text, integer, text)',
    'public.retire_tool(jsonb, text, integer, text)',
    'public.list_tools(jsonb, jsonb)',
    'public.get_tool(jsonb, text, integer)']::regprocedure[]) AS f;

SELECT agent_private.publish('public.finish_write(text, jsonb)'::regprocedure, 'private');
GRANT EXECUTE ON FUNCTION public.finish_write(text, jsonb) TO agent_sql_writer;
