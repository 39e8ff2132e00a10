-- Approvals, the execution log, and tools that agents write. Made from supabase/schemas/ by supabase/build_migrations.sh.

-- ---- schemas/70_approvals.sql

-- Approvals: what waits for a person, who decided, and what is told where. Rows are the truth, messages a view of them.
--
-- Locks are taken in one order, so that nobody waits in a circle: key of a delivery, approvals by id, batch, rule or
-- budget, and last the head of a chain.

DO $$
BEGIN
    BEGIN
        CREATE ROLE agent_sql_writer NOLOGIN;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- roles belong to the cluster: another database of it made this one
    END;
END
$$;
GRANT USAGE ON SCHEMA public TO agent_sql_writer;
SET search_path = public, extensions;

-- Take on all tenants for the rest of the call, for what serves all of them. Returns what was set before, for leave().
CREATE FUNCTION agent_private.enter_everywhere()
RETURNS text[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := ARRAY[
        coalesce(current_setting('agent.tenant_id', true), ''),
        coalesce(current_setting('agent.user_id', true), ''),
        coalesce(current_setting('agent.agent_id', true), ''),
        coalesce(current_setting('agent.reach', true), '')
    ];
BEGIN
    PERFORM set_config('agent.tenant_id', '', true), set_config('agent.user_id', '', true),
            set_config('agent.agent_id', '', true), set_config('agent.reach', 'everywhere', true);
    RETURN previous;
END
$$;

-- enter_everywhere() for a caller who is a server and does not act for a user's token; all others are refused.
CREATE FUNCTION agent_private.enter_as_server()
RETURNS text[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    caller text := coalesce(nullif(current_setting('role', true), 'none'), session_user);
    claims jsonb := nullif(current_setting('request.jwt.claims', true), '')::jsonb;
BEGIN
    IF NOT pg_has_role(caller, 'agent_server', 'MEMBER')
       OR coalesce(claims ->> 'role', 'service_role') IN ('anon', 'authenticated') THEN
        RAISE EXCEPTION 'only a server may act for all tenants' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN agent_private.enter_everywhere();
END
$$;

CREATE TABLE agent_private.server_secret (
    purpose text PRIMARY KEY CHECK (purpose <> ''),
    secret text NOT NULL CHECK (secret ~ '^[0-9a-f]{64}$'),
    made_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE agent_private.server_secret IS 'Random secrets that the servers of this database share and no client knows.';
SELECT agent_private.guard('agent_private.server_secret');
REVOKE UPDATE, DELETE ON agent_private.server_secret FROM agent_app;
CREATE POLICY of_servers ON agent_private.server_secret TO agent_app
    USING ((SELECT current_setting('agent.reach', true)) = 'everywhere');

-- The secret that the servers of this database share for a purpose, made when it is first asked for; never for a
-- user's token. 'seal': graph states, paused tools, sessions of reviewers. 'monitor who': numbers for users in alerts.
CREATE FUNCTION public.server_secret(purpose text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    found text;
BEGIN
    SELECT s.secret INTO found FROM agent_private.server_secret s WHERE s.purpose = server_secret.purpose;
    IF found IS NULL THEN
        -- Whoever comes second waits for the first and then reads what is there.
        INSERT INTO agent_private.server_secret (purpose, secret)
        VALUES (server_secret.purpose, encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'hex'))
        ON CONFLICT DO NOTHING;
        SELECT s.secret INTO found FROM agent_private.server_secret s WHERE s.purpose = server_secret.purpose;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(found);
END
$$;

CREATE TABLE public.approval_batch (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    batch_id uuid NOT NULL,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    opened_at timestamptz,
    interrupt jsonb CHECK (jsonb_typeof(interrupt) = 'object'),
    resumed_at timestamptz,
    resume_after timestamptz NOT NULL DEFAULT '-infinity',
    resume_attempts integer NOT NULL DEFAULT 0,
    resume_error text,
    PRIMARY KEY (batch_id),
    UNIQUE (tenant_id, batch_id)
);
COMMENT ON TABLE public.approval_batch IS 'Approvals that are asked for together: one card in each channel, one resume of a paused run.';
COMMENT ON COLUMN public.approval_batch.opened_at IS 'Since when channels show it; NULL while the run that asks has not paused yet.';
COMMENT ON COLUMN public.approval_batch.interrupt IS 'The pause that waits for it: {thread_id, interrupt_id, assistant_id, graph_id, identity}.';
COMMENT ON COLUMN public.approval_batch.resume_after IS 'Not resumed before: a lease of who resumes right now, or the wait after a failure.';
CREATE INDEX approval_batch_to_resume ON public.approval_batch (resume_after) WHERE interrupt IS NOT NULL AND resumed_at IS NULL;

CREATE TABLE public.human_approval_queue (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    approval_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    batch_id uuid NOT NULL,
    request_key text NOT NULL CHECK (request_key <> ''),
    kind text NOT NULL CONSTRAINT human_approval_queue_kind CHECK (kind IN ('action', 'execution', 'tool_version', 'proposal')),
    tool text NOT NULL CHECK (tool <> ''),
    tool_version text NOT NULL DEFAULT '1',
    arguments jsonb NOT NULL DEFAULT '{}',
    arguments_shown jsonb,
    args_hash text NOT NULL CONSTRAINT human_approval_queue_args_hash CHECK (args_hash ~ '^[0-9a-f]{64}$'),
    risk text NOT NULL CONSTRAINT human_approval_queue_risk CHECK (risk IN ('READ', 'WRITE', 'DESTRUCTIVE')),
    summary text NOT NULL DEFAULT '',
    reason text NOT NULL DEFAULT '',
    effects jsonb,
    bounds jsonb,
    approvers text[] NOT NULL DEFAULT '{}',
    required_votes integer NOT NULL DEFAULT 1 CHECK (required_votes >= 1),
    -- pending -> approved | rejected | expired | cancelled; approved -> executing | expired
    -- executing -> executed | failed | unknown
    state text NOT NULL DEFAULT 'pending' CONSTRAINT human_approval_queue_state CHECK (state IN (
        'pending', 'approved', 'rejected', 'expired', 'cancelled', 'executing', 'executed', 'failed', 'unknown')),
    requested_by text CHECK (requested_by <> ''),
    agent_id text,
    session_id text,
    run_id text,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    escalate_at timestamptz NOT NULL,
    escalated_at timestamptz,
    decided_at timestamptz,
    decided_by text[] NOT NULL DEFAULT '{}',
    note text NOT NULL DEFAULT '',
    version integer NOT NULL DEFAULT 1,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    replaces uuid,
    replaced_by uuid,
    edited_by text,
    tainted boolean NOT NULL DEFAULT false,
    fingerprint text,
    tables text[] NOT NULL DEFAULT '{}',
    rows bigint,
    policy_version text,
    ticket_hash text,
    claimed_by text,
    claimed_at timestamptz,
    finished_at timestamptz,
    log_id bigint,
    FOREIGN KEY (tenant_id, batch_id) REFERENCES public.approval_batch (tenant_id, batch_id),
    CONSTRAINT human_approval_queue_request UNIQUE (tenant_id, request_key),
    CONSTRAINT human_approval_queue_expires CHECK (escalate_at <= expires_at),
    CONSTRAINT human_approval_queue_ticket CHECK ((ticket_hash IS NOT NULL) = (state IN ('executing', 'executed', 'failed', 'unknown')))
);
COMMENT ON TABLE public.human_approval_queue IS 'One call that waits, or waited, for the yes of a person; bound to its exact arguments by their hash.';
COMMENT ON COLUMN public.human_approval_queue.reason IS 'What the model says it is for: a claim, shown as such.';
COMMENT ON COLUMN public.human_approval_queue.approvers IS 'Who may decide; nobody where it is empty.';
COMMENT ON COLUMN public.human_approval_queue.tainted IS 'Whether the run that asks had read untrusted text: then an edit of it counts as one level more dangerous too.';
COMMENT ON COLUMN public.human_approval_queue.policy_version IS 'The policy file that the call was judged by; NULL: the approval holds under any. Only to tell people: what counts is args_hash.';
COMMENT ON COLUMN public.human_approval_queue.ticket_hash IS 'sha256 of the ticket that the one claimer holds.';
COMMENT ON COLUMN public.human_approval_queue.version IS 'Goes up with each change, so that messages know when they are old.';
CREATE INDEX human_approval_queue_batch ON public.human_approval_queue (tenant_id, batch_id);
CREATE INDEX human_approval_queue_by_time ON public.human_approval_queue (tenant_id, requested_at DESC);
CREATE INDEX human_approval_queue_open ON public.human_approval_queue (expires_at) WHERE state IN ('pending', 'approved', 'executing');
CREATE INDEX human_approval_queue_waiting ON public.human_approval_queue (tenant_id, requested_at)
    WHERE state IN ('pending', 'approved', 'executing');
CREATE INDEX human_approval_queue_changed ON public.human_approval_queue (changed_at);
CREATE INDEX human_approval_queue_requester ON public.human_approval_queue (tenant_id, requested_by);
CREATE UNIQUE INDEX human_approval_queue_ticket_hash ON public.human_approval_queue (ticket_hash) WHERE ticket_hash IS NOT NULL;

CREATE TABLE public.approval_vote (
    tenant_id text NOT NULL,
    approval_id uuid NOT NULL REFERENCES public.human_approval_queue,
    voter text NOT NULL CHECK (voter <> ''),
    verdict text NOT NULL CHECK (verdict IN ('approve', 'reject')),
    channel text NOT NULL,
    note text NOT NULL DEFAULT '',
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (approval_id, voter)
);
COMMENT ON TABLE public.approval_vote IS 'The vote of one person on one approval: one, however often they click. Who approved may still reject.';

CREATE TABLE public.approval_event (
    tenant_id text NOT NULL,
    number bigint NOT NULL,
    at timestamptz NOT NULL,
    approval_id uuid,
    what text NOT NULL,
    actor text,
    details jsonb NOT NULL,
    previous_hash text NOT NULL,
    row_hash text NOT NULL,
    PRIMARY KEY (tenant_id, number)
);
COMMENT ON TABLE public.approval_event IS 'What happened to approvals, rules and the kill switch: only added to, numbered and hash-chained per tenant. Holds no arguments.';
CREATE INDEX approval_event_by_approval ON public.approval_event (approval_id);

CREATE TABLE public.agent_chain (
    tenant_id text NOT NULL,
    chain text NOT NULL CHECK (chain IN ('approval_event', 'agent_execution_log')),
    number bigint NOT NULL,
    row_hash text NOT NULL,
    PRIMARY KEY (tenant_id, chain)
);
COMMENT ON TABLE public.agent_chain IS 'Number and hash of the last row of each chain: its lock, and what finds out that the end was cut off.';

CREATE TABLE public.approval_delivery (
    tenant_id text NOT NULL,
    batch_id uuid NOT NULL REFERENCES public.approval_batch,
    channel text NOT NULL CHECK (channel <> ''),
    ref jsonb,
    delivered_version bigint NOT NULL DEFAULT 0,
    deliver_after timestamptz NOT NULL DEFAULT '-infinity',
    attempts integer NOT NULL DEFAULT 0,
    error text,
    PRIMARY KEY (batch_id, channel)
);
COMMENT ON TABLE public.approval_delivery IS 'The one message of a batch in one channel, and which state of the batch it shows.';
COMMENT ON COLUMN public.approval_delivery.deliver_after IS 'Not delivered before: a lease of who delivers right now, or the wait after a failure.';
COMMENT ON COLUMN public.approval_delivery.delivered_version IS 'Sum of the versions of its approvals, as the message shows them.';

CREATE TABLE public.approval_seen (
    channel text NOT NULL,
    delivery_key text NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (channel, delivery_key)
);
COMMENT ON TABLE public.approval_seen IS 'Deliveries and clicks that were taken, for a day, and answers to pauses of graphs, for eight: what comes a second time is a replay.';
CREATE INDEX approval_seen_by_time ON public.approval_seen (seen_at);

CREATE TABLE public.approval_rule (
    tenant_id text NOT NULL,
    rule_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tool text NOT NULL CHECK (tool <> ''),
    fingerprint text NOT NULL CHECK (fingerprint <> ''),
    tables text[] NOT NULL,
    max_rows bigint NOT NULL CHECK (max_rows >= 0),
    max_uses integer CHECK (max_uses > 0),
    uses integer NOT NULL DEFAULT 0,
    made_by text NOT NULL CHECK (made_by <> ''),
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    revoked_by text,
    CONSTRAINT approval_rule_expires CHECK (expires_at > made_at)
);
COMMENT ON TABLE public.approval_rule IS 'A standing yes of one person to calls of one shape; never for DESTRUCTIVE, never for their own calls.';
CREATE INDEX approval_rule_by_shape ON public.approval_rule (tenant_id, tool, fingerprint);

CREATE TABLE public.approval_continuation (
    tenant_id text NOT NULL,
    approval_id uuid PRIMARY KEY REFERENCES public.human_approval_queue,
    payload text NOT NULL,
    mac text NOT NULL,
    saved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    taken_until timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    error text
);
COMMENT ON TABLE public.approval_continuation IS 'A paused program that goes on once its approval is decided. Who takes it up has it for a time, and ends it.';
COMMENT ON COLUMN public.approval_continuation.due_at IS 'When a keeper may go on with it: not while the process that began it still waits.';
COMMENT ON COLUMN public.approval_continuation.taken_until IS 'Until then it is somebody''s; after that its process counts as dead.';

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.approval_batch', 'public.human_approval_queue', 'public.approval_vote', 'public.approval_event',
    'public.agent_chain', 'public.approval_delivery', 'public.approval_seen', 'public.approval_rule',
    'public.approval_continuation']::regclass[]) AS t;
REVOKE DELETE ON public.approval_batch, public.human_approval_queue, public.approval_vote, public.approval_rule,
    public.agent_chain FROM agent_app;
REVOKE UPDATE, DELETE ON public.approval_event FROM agent_app;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY[
        'approval_batch', 'human_approval_queue', 'approval_vote', 'approval_event', 'agent_chain',
        'approval_delivery', 'approval_rule', 'approval_continuation'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_tenant ON public.%I TO agent_app
            USING (
                (SELECT current_setting('agent.reach', true)) = 'everywhere'
                OR (tenant_id = (SELECT current_setting('agent.tenant_id', true))
                    AND (SELECT current_setting('agent.reach', true)) = 'tenant')
            )
        $policy$, target);
    END LOOP;
END
$$;
CREATE POLICY of_no_tenant ON public.approval_seen TO agent_app
    USING ((SELECT current_setting('agent.reach', true)) IN ('tenant', 'everywhere'));

-- Refuse what would change a row that is only added to, whoever asks.
CREATE FUNCTION agent_private.refuse_change()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION '% is only added to', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON public.approval_event
    FOR EACH STATEMENT EXECUTE FUNCTION agent_private.refuse_change();
ALTER TABLE public.approval_event ENABLE ALWAYS TRIGGER only_added_to;

-- Refuse steps from state to state that there are none of, and another call under the same approval; tell each change.
CREATE FUNCTION agent_private.watch_approval()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.state <> OLD.state AND (OLD.state || ' ' || NEW.state) NOT IN (
               'pending approved', 'pending rejected', 'pending expired', 'pending cancelled',
               'approved executing', 'approved expired',
               'executing executed', 'executing failed', 'executing unknown') THEN
            RAISE EXCEPTION 'an approval that is % does not become %', OLD.state, NEW.state USING ERRCODE = 'check_violation';
        END IF;
        IF (NEW.tenant_id, NEW.approval_id, NEW.batch_id, NEW.request_key, NEW.kind, NEW.tool, NEW.tool_version, NEW.args_hash, NEW.risk,
            NEW.approvers, NEW.required_votes, NEW.expires_at, NEW.edited_by, NEW.tainted)
           IS DISTINCT FROM
           (OLD.tenant_id, OLD.approval_id, OLD.batch_id, OLD.request_key, OLD.kind, OLD.tool, OLD.tool_version, OLD.args_hash, OLD.risk,
            OLD.approvers, OLD.required_votes, OLD.expires_at, OLD.edited_by, OLD.tainted) THEN
            RAISE EXCEPTION 'what an approval is for does not change' USING ERRCODE = 'check_violation';
        END IF;
        NEW.version := OLD.version + 1;
        NEW.changed_at := clock_timestamp();
    END IF;
    PERFORM pg_notify('agent_approval', NEW.approval_id::text);
    RETURN NEW;
END
$$;
CREATE TRIGGER watched BEFORE INSERT OR UPDATE ON public.human_approval_queue
    FOR EACH ROW EXECUTE FUNCTION agent_private.watch_approval();

-- Move the head of a chain on by one. Returns the new number and the hash before it; locks the head until the end of the
-- transaction, so it is the last thing that a transaction takes.
CREATE FUNCTION agent_private.next_of_chain(the_tenant text, the_chain text)
RETURNS public.agent_chain
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    head public.agent_chain;
BEGIN
    INSERT INTO public.agent_chain AS c (tenant_id, chain, number, row_hash) VALUES (the_tenant, the_chain, 1, '')
    ON CONFLICT (tenant_id, chain) DO UPDATE SET number = c.number + 1
    RETURNING c.* INTO head;
    RETURN head;
END
$$;

-- The hash of a row of a chain: of the hash before it and its text.
CREATE FUNCTION agent_private.chain_hash(previous_hash text, content text)
RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT encode(sha256(convert_to(previous_hash || content, 'UTF8')), 'hex');
$$;

-- The text of an event as its hash covers it; times as numbers, because their text depends on the session.
CREATE FUNCTION agent_private.event_text(e public.approval_event)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_array(e.tenant_id, e.number, extract(epoch FROM e.at), e.approval_id, e.what, e.actor, e.details)::text;
$$;

-- Add an event to the chain of a tenant; locks its head.
CREATE FUNCTION agent_private.append_event(
    the_tenant text, the_approval_id uuid, the_what text, the_actor text, the_details jsonb DEFAULT '{}')
RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    head public.agent_chain := agent_private.next_of_chain(the_tenant, 'approval_event');
    event public.approval_event;
BEGIN
    event.tenant_id := the_tenant;
    event.number := head.number;
    event.at := clock_timestamp();
    event.approval_id := the_approval_id;
    event.what := the_what;
    event.actor := the_actor;
    event.details := the_details;
    event.previous_hash := head.row_hash;
    event.row_hash := agent_private.chain_hash(head.row_hash, agent_private.event_text(event));
    INSERT INTO public.approval_event SELECT (event).*;
    UPDATE public.agent_chain c SET row_hash = event.row_hash WHERE c.tenant_id = the_tenant AND c.chain = 'approval_event';
END
$$;

-- The state of an approval by the clock: what is past its time is expired, whether or not somebody has said so yet.
-- The yes to a version of a tool is an exception, here and in list_approvals() and tend_approvals(): it is no call that
-- must run soon, and it stays until it is taken up.
CREATE FUNCTION agent_private.approval_state(a public.human_approval_queue)
RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN (a.state = 'pending' OR (a.state = 'approved' AND a.kind <> 'tool_version'))
                     AND a.expires_at <= clock_timestamp() THEN 'expired' ELSE a.state END;
$$;

-- The hash of what an approval is for and who may decide, as the chain keeps it; what was erased has another one.
CREATE FUNCTION agent_private.approval_digest(a public.human_approval_queue)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.chain_hash('', jsonb_build_array(
        a.approval_id, a.arguments, a.arguments_shown, a.summary, a.reason, a.effects, a.bounds, a.approvers, a.tainted)::text);
$$;

-- An approval with its votes, its pause and its messages, as all functions give it.
CREATE FUNCTION agent_private.approval_document(a public.human_approval_queue)
RETURNS jsonb
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT to_jsonb(a) - 'ticket_hash' || jsonb_build_object(
        'state', agent_private.approval_state(a),
        'votes', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                      'voter', v.voter, 'verdict', v.verdict, 'channel', v.channel, 'note', v.note, 'at', v.at)
                      ORDER BY v.at, v.voter), '[]')
                  FROM public.approval_vote v WHERE v.approval_id = a.approval_id),
        'interrupt', (SELECT b.interrupt FROM public.approval_batch b WHERE b.batch_id = a.batch_id),
        'messages', (SELECT coalesce(jsonb_agg(jsonb_build_object('channel', d.channel, 'ref', d.ref) ORDER BY d.channel), '[]')
                     FROM public.approval_delivery d WHERE d.batch_id = a.batch_id AND d.ref IS NOT NULL));
$$;

-- The texts of a JSON array, without doubles; none where it is none.
CREATE FUNCTION agent_private.texts(list jsonb)
RETURNS text[]
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(DISTINCT t), '{}') FROM jsonb_array_elements_text(
        CASE WHEN jsonb_typeof(list) = 'array' THEN list ELSE '[]' END) AS t WHERE t IS NOT NULL AND t <> '';
$$;

-- Count the votes of an approval and settle it where they suffice. One reject wins. The caller holds its row.
CREATE FUNCTION agent_private.settle_approval(the_approval_id uuid)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    approved text[];
    rejected text[];
    said text;
    settled text;
BEGIN
    SELECT coalesce(array_agg(v.voter ORDER BY v.at) FILTER (WHERE v.verdict = 'approve'), '{}'),
           coalesce(array_agg(v.voter ORDER BY v.at) FILTER (WHERE v.verdict = 'reject'), '{}'),
           coalesce(string_agg(v.note, E'\n' ORDER BY v.at) FILTER (WHERE v.note <> ''), '')
    INTO approved, rejected, said
    FROM public.approval_vote v WHERE v.approval_id = the_approval_id;
    -- The update raises the version in any case: the message of a batch shows how many votes there are.
    UPDATE public.human_approval_queue a
    SET state = CASE WHEN rejected <> '{}' THEN 'rejected' WHEN cardinality(approved) >= a.required_votes THEN 'approved' ELSE a.state END,
        decided_by = CASE WHEN rejected <> '{}' THEN rejected WHEN cardinality(approved) >= a.required_votes THEN approved ELSE a.decided_by END,
        decided_at = CASE WHEN rejected <> '{}' OR cardinality(approved) >= a.required_votes THEN clock_timestamp() ELSE a.decided_at END,
        note = said
    WHERE a.approval_id = the_approval_id
    RETURNING a.state INTO settled;
    RETURN settled;
END
$$;

-- A standing rule that says yes to this approval, used up by one; NULL where there is none. Locks the rule.
CREATE FUNCTION agent_private.use_rule(a public.human_approval_queue)
RETURNS public.approval_rule
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found public.approval_rule;
BEGIN
    IF a.risk = 'DESTRUCTIVE' OR a.required_votes > 1 OR a.fingerprint IS NULL OR a.rows IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT r.* INTO found FROM public.approval_rule r
    WHERE r.tenant_id = a.tenant_id AND r.tool = a.tool AND r.fingerprint = a.fingerprint AND a.tables <@ r.tables
      AND a.rows <= r.max_rows AND r.revoked_at IS NULL AND r.expires_at > clock_timestamp()
      AND (r.max_uses IS NULL OR r.uses < r.max_uses)
      AND r.made_by = ANY (a.approvers) AND r.made_by IS DISTINCT FROM a.requested_by
    ORDER BY r.made_at, r.rule_id LIMIT 1 FOR UPDATE;
    IF found.rule_id IS NOT NULL THEN
        UPDATE public.approval_rule r SET uses = r.uses + 1 WHERE r.rule_id = found.rule_id;
        RETURN found;
    END IF;
    RETURN NULL;
END
$$;

-- Ask for an approval: see docs/reference/storage-functions.md for the keys of request. The same request_key gives back
-- the same approval; another call under it raises PT409. With replaces, the approval named is cancelled and the
-- new one is asked for by whom the old one was; edited_by must be one of its approvers, and the new one is never less
-- strict: as many votes at least, nobody else to decide, no lower risk, as tainted. Returns the approval.
CREATE FUNCTION public.request_approval(identity jsonb, request jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    key text;
    seconds double precision;
    escalate double precision;
    a public.human_approval_queue;
    known public.human_approval_queue;
    old public.human_approval_queue;
    rule public.approval_rule;
    actor text;
BEGIN
    identity := agent_private.document(identity);
    request := agent_private.document(request);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    IF request ->> 'risk' IS NULL OR request ->> 'risk' NOT IN ('READ', 'WRITE', 'DESTRUCTIVE') THEN
        PERFORM agent_private.refuse('PT422', format('risk %s cannot be approved', coalesce(quote_literal(request ->> 'risk'), 'NULL')));
    END IF;
    a.approval_id := gen_random_uuid();
    key := coalesce(nullif(request ->> 'request_key', ''), a.approval_id::text);
    a.requested_by := nullif(identity ->> 'user_id', '');
    a.agent_id := nullif(identity ->> 'agent_id', '');
    a.session_id := nullif(identity ->> 'session_id', '');
    a.run_id := nullif(identity ->> 'run_id', '');
    IF request ->> 'replaces' IS NOT NULL THEN
        SELECT q.* INTO old FROM public.human_approval_queue q
        WHERE q.tenant_id = tenant AND q.approval_id = (request ->> 'replaces')::uuid FOR UPDATE;
        IF old.approval_id IS NULL THEN
            PERFORM agent_private.refuse('PT404', 'there is no approval of this id to replace');
        END IF;
        a.requested_by := old.requested_by;
        a.agent_id := old.agent_id;
        a.session_id := old.session_id;
        a.run_id := old.run_id;
    END IF;
    SELECT q.* INTO known FROM public.human_approval_queue q WHERE q.tenant_id = tenant AND q.request_key = key;
    IF known.approval_id IS NULL THEN
        IF old.approval_id IS NOT NULL THEN
            IF agent_private.approval_state(old) <> 'pending' THEN
                PERFORM agent_private.refuse('PT409', format('this approval is %s: it can no longer be edited', agent_private.approval_state(old)));
            END IF;
            IF nullif(request ->> 'edited_by', '') IS NULL OR NOT request ->> 'edited_by' = ANY (old.approvers) THEN
                PERFORM agent_private.refuse('PT403', 'only who may decide on this approval may edit it');
            END IF;
            IF old.requested_by IS NOT NULL AND (old.requested_by = request ->> 'edited_by'
               OR old.requested_by = ANY (agent_private.texts(request -> 'edited_user_ids'))) THEN
                PERFORM agent_private.refuse('PT403', 'nobody edits and approves what they asked for themselves');
            END IF;
            IF coalesce((request ->> 'required_votes')::integer, CASE WHEN request ->> 'risk' = 'DESTRUCTIVE' THEN 2 ELSE 1 END)
                   < old.required_votes
               OR NOT agent_private.texts(request -> 'approvers') <@ old.approvers
               OR array_position(ARRAY['READ', 'WRITE', 'DESTRUCTIVE'], request ->> 'risk')
                   < array_position(ARRAY['READ', 'WRITE', 'DESTRUCTIVE'], old.risk)
               OR request ->> 'approved_by' IS NOT NULL THEN
                PERFORM agent_private.refuse('PT422', 'an edit needs as many votes, of the same people, for no lower risk');
            END IF;
        ELSIF request ->> 'edited_by' IS NOT NULL THEN
            PERFORM agent_private.refuse('PT422', 'edited_by without the approval that is replaced');
        END IF;
        IF request ->> 'approved_by' IS NOT NULL
           AND (request ->> 'risk' = 'DESTRUCTIVE' OR request ->> 'approved_by' NOT LIKE 'policy:_%') THEN
            PERFORM agent_private.refuse('PT422', 'only a rule of the policy file approves by itself, and never what is DESTRUCTIVE');
        END IF;
        seconds := coalesce((request ->> 'expires_in_seconds')::double precision,
                            CASE WHEN request ->> 'risk' = 'DESTRUCTIVE' THEN 900 ELSE 3600 END);
        escalate := coalesce((request ->> 'escalate_in_seconds')::double precision, seconds / 3);
        IF NOT (seconds > 0 AND seconds <= 604800 AND escalate >= 0) THEN
            PERFORM agent_private.refuse('PT422', 'an approval expires after more than nothing and at most seven days');
        END IF;
        a.tenant_id := tenant;
        a.batch_id := coalesce((request ->> 'batch_id')::uuid, old.batch_id, gen_random_uuid());
        a.request_key := key;
        a.kind := coalesce(request ->> 'kind', 'action');
        a.tool := request ->> 'tool';
        a.tool_version := coalesce(request ->> 'tool_version', '1');
        a.arguments := coalesce(request -> 'arguments', '{}');
        a.arguments_shown := coalesce(nullif(request -> 'arguments_shown', 'null'), a.arguments);
        a.args_hash := request ->> 'args_hash';
        a.risk := request ->> 'risk';
        a.summary := coalesce(request ->> 'summary', '');
        a.reason := coalesce(request ->> 'reason', '');
        a.effects := nullif(request -> 'effects', 'null');
        a.bounds := nullif(request -> 'bounds', 'null');
        a.approvers := agent_private.texts(request -> 'approvers');
        a.required_votes := coalesce((request ->> 'required_votes')::integer, CASE WHEN a.risk = 'DESTRUCTIVE' THEN 2 ELSE 1 END);
        a.state := 'pending';
        a.requested_at := clock_timestamp();
        a.expires_at := a.requested_at + make_interval(secs => seconds);
        a.escalate_at := least(a.requested_at + make_interval(secs => escalate), a.expires_at);
        a.decided_by := '{}';
        a.note := '';
        a.version := 1;
        a.changed_at := a.requested_at;
        a.replaces := old.approval_id;
        a.edited_by := request ->> 'edited_by';
        a.tainted := coalesce((request ->> 'tainted')::boolean, false) OR coalesce(old.tainted, false);
        a.fingerprint := nullif(request ->> 'fingerprint', '');
        a.policy_version := nullif(request ->> 'policy_version', '');
        a.tables := agent_private.texts(request -> 'tables');
        a.rows := (request ->> 'rows')::bigint;
        -- A batch opens when it is asked for, or, where it is held, when the run that asks has paused.
        INSERT INTO public.approval_batch AS b (tenant_id, batch_id, opened_at)
        VALUES (tenant, a.batch_id, CASE WHEN (request -> 'held') = 'true' THEN NULL ELSE clock_timestamp() END)
        ON CONFLICT (batch_id) DO UPDATE SET opened_at = coalesce(b.opened_at, excluded.opened_at), resumed_at = NULL
        WHERE b.tenant_id = tenant;
        IF NOT FOUND THEN
            PERFORM agent_private.refuse('PT404', 'there is no batch of this id');
        END IF;
        INSERT INTO public.human_approval_queue SELECT (a).* ON CONFLICT (tenant_id, request_key) DO NOTHING;
        IF NOT FOUND THEN
            SELECT q.* INTO known FROM public.human_approval_queue q WHERE q.tenant_id = tenant AND q.request_key = key;
        END IF;
    END IF;
    IF known.approval_id IS NOT NULL THEN
        IF (known.args_hash, known.tool, known.requested_by)
           IS DISTINCT FROM (request ->> 'args_hash', request ->> 'tool', a.requested_by) THEN
            PERFORM agent_private.refuse('PT409', 'another call was asked for under this request_key');
        END IF;
        a := known;
    ELSE
        IF old.approval_id IS NOT NULL THEN
            UPDATE public.human_approval_queue q
            SET state = 'cancelled', replaced_by = a.approval_id, decided_at = clock_timestamp(), decided_by = ARRAY[a.edited_by],
                note = coalesce(request ->> 'note', '')
            WHERE q.approval_id = old.approval_id;
        END IF;
        IF request ->> 'approved_by' IS NOT NULL THEN
            actor := request ->> 'approved_by';
        ELSIF a.replaces IS NULL THEN
            rule := agent_private.use_rule(a);
            actor := 'rule:' || rule.rule_id;
        END IF;
        IF actor IS NOT NULL THEN
            UPDATE public.human_approval_queue q SET state = 'approved', decided_at = clock_timestamp(), decided_by = ARRAY[actor]
            WHERE q.approval_id = a.approval_id;
        ELSIF a.edited_by IS NOT NULL AND a.risk <> 'DESTRUCTIVE' AND a.edited_by = ANY (a.approvers) THEN
            INSERT INTO public.approval_vote (tenant_id, approval_id, voter, verdict, channel, note)
            VALUES (tenant, a.approval_id, a.edited_by, 'approve', coalesce(nullif(request ->> 'channel', ''), 'edit'),
                    coalesce(request ->> 'note', ''));
            IF agent_private.settle_approval(a.approval_id) = 'approved' THEN
                actor := a.edited_by;
            END IF;
        END IF;
        SELECT q.* INTO a FROM public.human_approval_queue q WHERE q.approval_id = a.approval_id;
        IF old.approval_id IS NOT NULL THEN
            PERFORM agent_private.append_event(tenant, old.approval_id, 'cancelled', a.edited_by,
                                               jsonb_build_object('replaced_by', a.approval_id, 'decided_by', ARRAY[a.edited_by]));
        END IF;
        PERFORM agent_private.append_event(tenant, a.approval_id, 'requested', a.requested_by, jsonb_build_object(
            'tool', a.tool, 'tool_version', a.tool_version, 'risk', a.risk, 'args_hash', a.args_hash,
            'required_votes', a.required_votes, 'edited_by', a.edited_by, 'content_hash', agent_private.approval_digest(a)));
        PERFORM agent_private.append_event(tenant, a.approval_id, 'voted', v.voter, jsonb_build_object(
            'verdict', v.verdict, 'channel', v.channel, 'args_hash', a.args_hash))
        FROM public.approval_vote v WHERE v.approval_id = a.approval_id;
        IF actor IS NOT NULL THEN
            PERFORM agent_private.append_event(tenant, a.approval_id, 'approved', actor,
                                               jsonb_build_object('args_hash', a.args_hash, 'decided_by', a.decided_by));
        END IF;
    END IF;
    SELECT q.* INTO a FROM public.human_approval_queue q WHERE q.approval_id = a.approval_id;
    request := agent_private.approval_document(a);
    PERFORM agent_private.leave(previous);
    RETURN request;
END
$$;

-- One approval, or NULL where this tenant has none of that id.
CREATE FUNCTION public.get_approval(identity jsonb, the_approval_id uuid)
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
        RETURN NULL;
    END IF;
    SELECT agent_private.approval_document(a) INTO found FROM public.human_approval_queue a
    WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.approval_id = the_approval_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Approvals of a tenant, newest first, or from the oldest on where wanted.oldest_first is true. wanted: state, states,
-- batch_id, session_id, approval_ids, begins (of the id, hex digits), after ({requested_at, approval_id} of the last one seen), limit
-- (at most 1,000; else 100). What is open comes from human_approval_queue_waiting, all else from _by_time.
CREATE FUNCTION public.list_approvals(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
    -- By the clock, what is open may be expired, and never the other way round.
    only_open boolean;
    wanted_states text[];
    wanted_ids uuid[];
    moment timestamptz := clock_timestamp();
    digits text;
    first_id uuid;
    last_id uuid;
    after_time timestamptz;
    after_id uuid;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    IF wanted -> 'states' IS NOT NULL THEN
        wanted_states := agent_private.texts(wanted -> 'states');
    END IF;
    IF wanted ->> 'state' IS NOT NULL THEN
        wanted_states := CASE WHEN wanted_states IS NULL OR wanted ->> 'state' = ANY (wanted_states)
                              THEN ARRAY[wanted ->> 'state'] ELSE '{}' END;
    END IF;
    IF wanted -> 'approval_ids' IS NOT NULL THEN
        wanted_ids := agent_private.texts(wanted -> 'approval_ids')::uuid[];
    END IF;
    only_open := coalesce(wanted ->> 'state' IN ('pending', 'approved', 'executing'), false);
    digits := replace(wanted ->> 'begins', '-', '');
    first_id := rpad(digits, 32, '0')::uuid;
    last_id := rpad(digits, 32, 'f')::uuid;
    after_time := (wanted #>> '{after,requested_at}')::timestamptz;
    after_id := (wanted #>> '{after,approval_id}')::uuid;
    IF (wanted -> 'oldest_first') = 'true' THEN
        SELECT coalesce(jsonb_agg(agent_private.approval_document(x.a) ORDER BY x.requested_at, x.approval_id), '[]') INTO found
        FROM (SELECT a, a.requested_at, a.approval_id FROM public.human_approval_queue a
              WHERE a.tenant_id = current_setting('agent.tenant_id')
                AND (NOT only_open OR a.state IN ('pending', 'approved', 'executing'))
                -- agent_private.approval_state(a) = ANY (wanted_states), in terms that the planner has statistics of
                AND (wanted_states IS NULL
                     OR (a.state = ANY (wanted_states) AND NOT (a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= moment))
                     OR ('expired' = ANY (wanted_states) AND a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= moment))
                AND (wanted ->> 'batch_id' IS NULL OR a.batch_id = (wanted ->> 'batch_id')::uuid)
                AND (wanted ->> 'session_id' IS NULL OR a.session_id = wanted ->> 'session_id')
            AND (wanted_ids IS NULL OR a.approval_id = ANY (wanted_ids))
                AND (digits IS NULL OR a.approval_id BETWEEN first_id AND last_id)
                AND (after_time IS NULL OR (a.requested_at, a.approval_id) > (after_time, after_id))
              ORDER BY a.requested_at, a.approval_id LIMIT least(coalesce((wanted ->> 'limit')::integer, 100), 1000)) AS x;
        PERFORM agent_private.leave(previous);
        RETURN found;
    END IF;
    SELECT coalesce(jsonb_agg(agent_private.approval_document(x.a) ORDER BY x.requested_at DESC, x.approval_id), '[]') INTO found
    FROM (SELECT a, a.requested_at, a.approval_id FROM public.human_approval_queue a
          WHERE a.tenant_id = current_setting('agent.tenant_id')
            AND (NOT only_open OR a.state IN ('pending', 'approved', 'executing'))
            -- agent_private.approval_state(a) = ANY (wanted_states), in terms that the planner has statistics of
            AND (wanted_states IS NULL
                 OR (a.state = ANY (wanted_states) AND NOT (a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= moment))
                 OR ('expired' = ANY (wanted_states) AND a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= moment))
            AND (wanted ->> 'batch_id' IS NULL OR a.batch_id = (wanted ->> 'batch_id')::uuid)
            AND (wanted ->> 'session_id' IS NULL OR a.session_id = wanted ->> 'session_id')
            AND (wanted_ids IS NULL OR a.approval_id = ANY (wanted_ids))
            AND (digits IS NULL OR a.approval_id BETWEEN first_id AND last_id)
            AND (after_time IS NULL OR a.requested_at < after_time OR (a.requested_at = after_time AND a.approval_id > after_id))
          ORDER BY a.requested_at DESC, a.approval_id LIMIT least(coalesce((wanted ->> 'limit')::integer, 100), 1000)) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- How many approvals wait for a decision in these tenants, NULL: in all: {tenant_id: count}, without those that have
-- none. Leans on human_approval_queue_open.
CREATE FUNCTION public.count_waiting(tenants text[])
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    found jsonb;
BEGIN
    SELECT coalesce(jsonb_object_agg(x.tenant_id, x.waiting), '{}') INTO found
    FROM (SELECT a.tenant_id, count(*) AS waiting FROM public.human_approval_queue a
          WHERE a.state = 'pending' AND a.expires_at > clock_timestamp() AND (tenants IS NULL OR a.tenant_id = ANY (tenants))
          GROUP BY a.tenant_id) AS x;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Why this vote does not count, or NULL: 'repeated' where the same person said the same before.
CREATE FUNCTION agent_private.objection(a public.human_approval_queue, decision jsonb)
RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    person text := decision ->> 'decided_by';
    hash text := coalesce(decision ->> 'args_hash', '');
    state_now text := agent_private.approval_state(a);
BEGIN
    IF a.approval_id IS NULL THEN
        RETURN 'there is no such approval';
    ELSIF coalesce(person, '') = '' THEN
        RETURN 'the decision names nobody';
    ELSIF coalesce(decision ->> 'verdict', '') NOT IN ('approve', 'reject') THEN
        RETURN 'the verdict is neither approve nor reject';
    ELSIF hash !~ '^[0-9a-f]{16,64}$' OR left(a.args_hash, length(hash)) <> hash THEN
        RETURN 'the decision is about other arguments';
    ELSIF EXISTS (SELECT FROM public.approval_vote v
                  WHERE v.approval_id = a.approval_id AND v.voter = person AND v.verdict = decision ->> 'verdict') THEN
        RETURN 'repeated';
    ELSIF state_now <> 'pending' THEN
        RETURN format('it is %s', state_now);
    ELSIF NOT person = ANY (a.approvers) THEN
        RETURN format('%s may not decide on it', person);
    ELSIF person = a.requested_by OR a.requested_by = ANY (agent_private.texts(decision -> 'user_ids')) THEN
        RETURN 'nobody decides on what they asked for themselves';
    ELSIF a.risk = 'DESTRUCTIVE' AND person = a.edited_by AND decision ->> 'verdict' = 'approve' THEN
        RETURN 'who edited something DESTRUCTIVE does not approve it';
    END IF;
    RETURN NULL;
END
$$;

-- Vote on approvals, on all of them or on none: [{approval_id, verdict, decided_by, user_ids, channel, args_hash (16
-- hex digits of it or more), note, dedup_key}]. Returns {outcome: recorded|repeated|refused, why, approvals}.
-- Locks the approvals in the order of their ids.
CREATE FUNCTION public.decide_approvals(identity jsonb, decisions jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    ids uuid[];
    decision jsonb;
    a public.human_approval_queue;
    objected text;
    why text;
    delivered_before boolean := false;
    outcome text := 'repeated';
    state_now text;
    used record;
    told jsonb := '[]';
    decided jsonb;
BEGIN
    identity := agent_private.document(identity);
    decisions := agent_private.document(decisions);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a decision needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    IF jsonb_typeof(decisions) IS DISTINCT FROM 'array' OR jsonb_array_length(decisions) = 0 THEN
        PERFORM agent_private.refuse('PT422', 'there is nothing to decide');
    END IF;
    IF (SELECT count(*) <> count(DISTINCT d ->> 'approval_id') FROM jsonb_array_elements(decisions) AS d) THEN
        PERFORM agent_private.refuse('PT422', 'an approval is decided once at a time');
    END IF;
    FOR used IN SELECT DISTINCT coalesce(d ->> 'channel', '') AS channel, d ->> 'dedup_key' AS dedup_key
                FROM jsonb_array_elements(decisions) AS d WHERE d ->> 'dedup_key' IS NOT NULL ORDER BY 1, 2
    LOOP
        INSERT INTO public.approval_seen (channel, delivery_key) VALUES ('decision ' || used.channel, used.dedup_key)
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            delivered_before := true;
        END IF;
    END LOOP;
    SELECT array_agg((d ->> 'approval_id')::uuid) INTO ids FROM jsonb_array_elements(decisions) AS d;
    PERFORM FROM public.human_approval_queue q
    WHERE q.tenant_id = tenant AND q.approval_id = ANY (ids) ORDER BY q.approval_id FOR UPDATE;
    FOR decision IN SELECT d FROM jsonb_array_elements(decisions) AS d LOOP
        SELECT q.* INTO a FROM public.human_approval_queue q
        WHERE q.tenant_id = tenant AND q.approval_id = (decision ->> 'approval_id')::uuid;
        objected := agent_private.objection(a, decision);
        IF objected IS NULL THEN
            outcome := 'recorded';
        ELSIF objected <> 'repeated' THEN
            why := coalesce(why, objected);
        END IF;
    END LOOP;
    IF outcome = 'recorded' AND delivered_before THEN
        why := 'this very decision was delivered before';
    END IF;
    IF why IS NOT NULL THEN
        outcome := 'refused';
    END IF;
    FOR decision IN SELECT d FROM jsonb_array_elements(decisions) AS d ORDER BY (d ->> 'approval_id')::uuid LOOP
        SELECT q.* INTO a FROM public.human_approval_queue q
        WHERE q.tenant_id = tenant AND q.approval_id = (decision ->> 'approval_id')::uuid;
        IF a.approval_id IS NULL THEN
            CONTINUE;
        ELSIF outcome = 'refused' THEN
            told := told || jsonb_build_object('approval_id', a.approval_id, 'what', 'decision_refused', 'actor', left(decision ->> 'decided_by', 512),
                'details', jsonb_build_object('why', why, 'verdict', left(decision ->> 'verdict', 20), 'channel', left(decision ->> 'channel', 100)));
        ELSIF agent_private.objection(a, decision) IS NULL THEN
            INSERT INTO public.approval_vote AS v (tenant_id, approval_id, voter, verdict, channel, note)
            VALUES (tenant, a.approval_id, decision ->> 'decided_by', decision ->> 'verdict',
                    coalesce(decision ->> 'channel', ''), coalesce(decision ->> 'note', ''))
            ON CONFLICT (approval_id, voter) DO UPDATE  -- who approved may still reject, as long as it is pending
            SET verdict = excluded.verdict, channel = excluded.channel, note = excluded.note, at = clock_timestamp();
            state_now := agent_private.settle_approval(a.approval_id);
            told := told || jsonb_build_object('approval_id', a.approval_id, 'what', 'voted', 'actor', decision ->> 'decided_by',
                'details', jsonb_build_object('verdict', decision ->> 'verdict', 'channel', decision ->> 'channel', 'args_hash', a.args_hash));
            IF state_now <> 'pending' THEN
                told := told || jsonb_build_object('approval_id', a.approval_id, 'what', state_now, 'actor', decision ->> 'decided_by',
                                                   'details', jsonb_build_object('args_hash', a.args_hash, 'decided_by', (
                    SELECT q.decided_by FROM public.human_approval_queue q WHERE q.approval_id = a.approval_id)));
            END IF;
        END IF;
    END LOOP;
    PERFORM agent_private.append_event(tenant, (t ->> 'approval_id')::uuid, t ->> 'what', t ->> 'actor', t -> 'details')
    FROM jsonb_array_elements(told) WITH ORDINALITY AS e (t, position);
    SELECT coalesce(jsonb_agg(agent_private.approval_document(q) ORDER BY array_position(ids, q.approval_id)), '[]') INTO decided
    FROM public.human_approval_queue q WHERE q.tenant_id = tenant AND q.approval_id = ANY (ids);
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('outcome', outcome, 'why', why, 'approvals', decided);
END
$$;

-- End an approval that nobody waits for any more: pending becomes the_state (cancelled or expired), approved becomes
-- expired, all else stays. Returns the approval.
CREATE FUNCTION public.close_approval(identity jsonb, the_approval_id uuid, the_state text, closed_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    a public.human_approval_queue;
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    IF the_state IS NULL OR the_state NOT IN ('cancelled', 'expired') THEN
        PERFORM agent_private.refuse('PT422', 'an approval is closed as cancelled or expired');
    END IF;
    UPDATE public.human_approval_queue q
    SET state = CASE WHEN q.state = 'approved' THEN 'expired' ELSE the_state END,
        decided_at = coalesce(q.decided_at, clock_timestamp())
    WHERE q.tenant_id = tenant AND q.approval_id = the_approval_id AND q.state IN ('pending', 'approved')
    RETURNING q.* INTO a;
    IF a.approval_id IS NOT NULL THEN
        PERFORM agent_private.append_event(tenant, a.approval_id, a.state, closed_by);
    ELSE
        SELECT q.* INTO a FROM public.human_approval_queue q WHERE q.tenant_id = tenant AND q.approval_id = the_approval_id;
        IF a.approval_id IS NULL THEN
            PERFORM agent_private.refuse('PT404', 'there is no approval of this id');
        END IF;
    END IF;
    found := agent_private.approval_document(a);
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Note the pause that waits for a batch, and open the batch to the channels.
-- interrupt: {thread_id, interrupt_id, assistant_id, graph_id, identity}. Returns how many approvals it has.
CREATE FUNCTION public.attach_interrupt(identity jsonb, batch_id uuid, interrupt jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    members integer;
BEGIN
    identity := agent_private.document(identity);
    interrupt := agent_private.document(interrupt);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a batch of approvals needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    UPDATE public.approval_batch b
    SET interrupt = attach_interrupt.interrupt, opened_at = coalesce(b.opened_at, clock_timestamp()),
        -- the same pause told twice is not resumed twice
        resumed_at = CASE WHEN b.interrupt ->> 'interrupt_id' = attach_interrupt.interrupt ->> 'interrupt_id' THEN b.resumed_at END
    WHERE b.tenant_id = tenant AND b.batch_id = attach_interrupt.batch_id;
    IF NOT FOUND THEN
        PERFORM agent_private.refuse('PT404', 'there is no batch of this id');
    END IF;
    SELECT count(*) INTO members FROM public.human_approval_queue a
    WHERE a.tenant_id = tenant AND a.batch_id = attach_interrupt.batch_id;
    -- Whoever delivers is woken.
    PERFORM pg_notify('agent_approval', a.approval_id::text) FROM public.human_approval_queue a
    WHERE a.tenant_id = tenant AND a.batch_id = attach_interrupt.batch_id;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(members);
END
$$;

-- What the channels do not show yet: [{batch_id, tenant_id, channel, ref (NULL: not posted), version, approvals,
-- escalated}], each leased to the caller. What was decided before it was ever posted is not posted any more, and what
-- could not be delivered within a day is given up.
CREATE FUNCTION public.take_deliveries(channels text[], lease_seconds double precision DEFAULT 60)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    taken jsonb := '[]';
    due record;
    lately timestamptz := clock_timestamp() - interval '1 day';  -- in a variable the index is used
BEGIN
    INSERT INTO public.approval_delivery (tenant_id, batch_id, channel)
    SELECT DISTINCT a.tenant_id, a.batch_id, c.channel
    FROM public.human_approval_queue a
    JOIN public.approval_batch b ON b.batch_id = a.batch_id AND b.opened_at IS NOT NULL
    CROSS JOIN unnest(channels) AS c (channel)
    WHERE a.state = 'pending' AND a.expires_at > clock_timestamp()
      AND NOT EXISTS (SELECT FROM public.approval_delivery d WHERE d.batch_id = a.batch_id AND d.channel = c.channel)
    ORDER BY a.batch_id, c.channel
    ON CONFLICT DO NOTHING;
    FOR due IN
        SELECT d.*, v.version AS version_now, v.escalated
        FROM (SELECT DISTINCT a.tenant_id, a.batch_id FROM public.human_approval_queue a
              WHERE a.changed_at > lately) AS recent
        JOIN public.approval_delivery d ON d.tenant_id = recent.tenant_id AND d.batch_id = recent.batch_id
        CROSS JOIN LATERAL (SELECT sum(a.version) AS version, bool_or(a.escalated_at IS NOT NULL) AS escalated,
                                   max(a.changed_at) AS changed_at, bool_or(a.state = 'pending') AS waits
                            FROM public.human_approval_queue a WHERE a.batch_id = d.batch_id AND a.tenant_id = d.tenant_id) AS v
        WHERE d.channel = ANY (channels) AND d.deliver_after <= clock_timestamp() AND d.delivered_version < v.version
          AND (d.ref IS NOT NULL OR v.waits)
        ORDER BY d.batch_id, d.channel LIMIT 50
        FOR UPDATE OF d SKIP LOCKED
    LOOP
        UPDATE public.approval_delivery d SET deliver_after = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE d.batch_id = due.batch_id AND d.channel = due.channel;
        taken := taken || jsonb_build_object(
            'batch_id', due.batch_id, 'tenant_id', due.tenant_id, 'channel', due.channel, 'ref', due.ref,
            'escalated', due.escalated,
            'version', (SELECT sum(a.version) FROM public.human_approval_queue a
                        WHERE a.tenant_id = due.tenant_id AND a.batch_id = due.batch_id),
            'approvals', (SELECT jsonb_agg(agent_private.approval_document(a) ORDER BY a.requested_at, a.approval_id)
                          FROM public.human_approval_queue a
                          WHERE a.tenant_id = due.tenant_id AND a.batch_id = due.batch_id));
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN taken;
END
$$;

-- A message shows this version of its batch now. Returns whether there is such a delivery.
CREATE FUNCTION public.delivery_done(the_batch_id uuid, channel text, delivered_version bigint, ref jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    there boolean;
BEGIN
    ref := agent_private.document(ref);
    UPDATE public.approval_delivery d
    SET delivered_version = greatest(d.delivered_version, delivery_done.delivered_version), ref = coalesce(delivery_done.ref, d.ref),
        deliver_after = '-infinity', attempts = 0, error = NULL
    WHERE d.batch_id = the_batch_id AND d.channel = delivery_done.channel;
    there := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(there);
END
$$;

-- A message could not be delivered: it is due again after 2, 4, 8, … at most 300 seconds. Returns how often it failed.
CREATE FUNCTION public.delivery_failed(the_batch_id uuid, channel text, error text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    failed integer;
BEGIN
    UPDATE public.approval_delivery d
    SET attempts = d.attempts + 1, error = left(delivery_failed.error, 1000),
        deliver_after = clock_timestamp() + make_interval(secs => least(300, 2 ^ least(d.attempts + 1, 9)))
    WHERE d.batch_id = the_batch_id AND d.channel = delivery_failed.channel
    RETURNING d.attempts INTO failed;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(failed);
END
$$;

-- Paused runs whose approvals are all decided: [{batch_id, tenant_id, interrupt, approvals}], leased to the caller.
-- One that could not be resumed within a day is given up.
CREATE FUNCTION public.take_resumes(lease_seconds double precision DEFAULT 60)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    taken jsonb := '[]';
    due public.approval_batch;
BEGIN
    FOR due IN
        SELECT b.* FROM public.approval_batch b
        WHERE b.interrupt IS NOT NULL AND b.resumed_at IS NULL AND b.resume_after <= clock_timestamp()
          AND EXISTS (SELECT FROM public.human_approval_queue a
                      WHERE a.tenant_id = b.tenant_id AND a.batch_id = b.batch_id AND a.changed_at > clock_timestamp() - interval '1 day')
          AND NOT EXISTS (SELECT FROM public.human_approval_queue a
                          WHERE a.tenant_id = b.tenant_id AND a.batch_id = b.batch_id AND a.state = 'pending')
        ORDER BY b.batch_id LIMIT 50
        FOR UPDATE OF b SKIP LOCKED
    LOOP
        UPDATE public.approval_batch b SET resume_after = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE b.batch_id = due.batch_id;
        taken := taken || jsonb_build_object(
            'batch_id', due.batch_id, 'tenant_id', due.tenant_id, 'interrupt', due.interrupt,
            'approvals', (SELECT jsonb_agg(agent_private.approval_document(a) ORDER BY a.requested_at, a.approval_id)
                          FROM public.human_approval_queue a
                          WHERE a.tenant_id = due.tenant_id AND a.batch_id = due.batch_id));
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN taken;
END
$$;

-- The run that waited for a batch goes on. Returns whether there is such a batch.
CREATE FUNCTION public.resume_done(batch_id uuid)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    there boolean;
BEGIN
    UPDATE public.approval_batch b SET resumed_at = clock_timestamp(), resume_error = NULL WHERE b.batch_id = resume_done.batch_id;
    there := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(there);
END
$$;

-- A run could not be resumed: it is tried again after 2, 4, 8, … at most 300 seconds. Returns how often it failed.
CREATE FUNCTION public.resume_failed(batch_id uuid, error text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    failed integer;
BEGIN
    UPDATE public.approval_batch b
    SET resume_attempts = b.resume_attempts + 1, resume_error = left(error, 1000),
        resume_after = clock_timestamp() + make_interval(secs => least(300, 2 ^ least(b.resume_attempts + 1, 9)))
    WHERE b.batch_id = resume_failed.batch_id
    RETURNING b.resume_attempts INTO failed;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(failed);
END
$$;

-- Whether a delivery of a channel comes for the first time; forgotten after a day, in LangGraph's own channel after eight.
CREATE FUNCTION public.remember_delivery(channel text, delivery_key text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    first_time boolean;
BEGIN
    INSERT INTO public.approval_seen (channel, delivery_key) VALUES (remember_delivery.channel, remember_delivery.delivery_key)
    ON CONFLICT DO NOTHING;
    first_time := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(first_time);
END
$$;

-- Make a standing rule: {tool, fingerprint, tables, max_rows, expires_at, made_by, max_uses}. Returns the rule.
CREATE FUNCTION public.save_standing_rule(identity jsonb, rule jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    made public.approval_rule;
BEGIN
    identity := agent_private.document(identity);
    rule := agent_private.document(rule);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a rule needs a tenant');
    END IF;
    INSERT INTO public.approval_rule (tenant_id, tool, fingerprint, tables, max_rows, expires_at, made_by, max_uses)
    VALUES (current_setting('agent.tenant_id'), rule ->> 'tool', rule ->> 'fingerprint', agent_private.texts(rule -> 'tables'),
            (rule ->> 'max_rows')::bigint, (rule ->> 'expires_at')::timestamptz, rule ->> 'made_by', (rule ->> 'max_uses')::integer)
    RETURNING * INTO made;
    PERFORM agent_private.append_event(made.tenant_id, NULL, 'rule_made', made.made_by, jsonb_build_object(
        'rule_id', made.rule_id, 'tool', made.tool, 'fingerprint', made.fingerprint, 'tables', made.tables, 'max_rows', made.max_rows));
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(made);
END
$$;

-- The standing rules of a tenant, newest first, revoked and expired ones too.
CREATE FUNCTION public.list_standing_rules(identity jsonb)
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
    SELECT coalesce(jsonb_agg(to_jsonb(r) || jsonb_build_object('holds',
               r.revoked_at IS NULL AND r.expires_at > clock_timestamp() AND (r.max_uses IS NULL OR r.uses < r.max_uses))
               ORDER BY r.made_at DESC, r.rule_id), '[]') INTO found
    FROM public.approval_rule r WHERE r.tenant_id = current_setting('agent.tenant_id');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- End a standing rule. Returns whether it held until now; one of that id that does not exist raises PT404.
CREATE FUNCTION public.revoke_standing_rule(identity jsonb, the_rule_id uuid, revoked_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    ended boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a rule needs a tenant');
    END IF;
    IF NOT EXISTS (SELECT FROM public.approval_rule r
                   WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.rule_id = the_rule_id) THEN
        PERFORM agent_private.refuse('PT404', 'there is no rule of this id');
    END IF;
    UPDATE public.approval_rule r SET revoked_at = clock_timestamp(), revoked_by = revoke_standing_rule.revoked_by
    WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.rule_id = the_rule_id AND r.revoked_at IS NULL;
    ended := FOUND;
    IF ended THEN
        PERFORM agent_private.append_event(current_setting('agent.tenant_id'), NULL, 'rule_revoked', revoke_standing_rule.revoked_by,
                                           jsonb_build_object('rule_id', the_rule_id));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(ended);
END
$$;

-- ---- schemas/75_executions.sql

-- Executions: the claim of an approval, the log that is only added to, budgets and the kill switch.

CREATE TABLE public.agent_execution_log (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    log_id bigint NOT NULL,
    at timestamptz NOT NULL,
    user_id text,
    agent_id text,
    session_id text,
    run_id text,
    tool text NOT NULL CHECK (tool <> ''),
    tool_version text NOT NULL,
    risk text NOT NULL CHECK (risk IN ('READ', 'WRITE', 'DESTRUCTIVE', 'FORBIDDEN')),
    decision text NOT NULL CHECK (decision IN ('allowed', 'approved', 'denied', 'refused', 'undone')),
    state text NOT NULL CHECK (state IN ('executed', 'failed', 'unknown', 'refused', 'denied', 'rejected', 'expired', 'cancelled')),
    approval_id uuid,
    decided_by text[] NOT NULL,
    rows jsonb NOT NULL CHECK (jsonb_typeof(rows) = 'object'),
    row_count bigint,
    result_bytes bigint,
    duration_ms numeric,
    undoes bigint,
    details_hash text NOT NULL,
    previous_hash text NOT NULL,
    row_hash text NOT NULL,
    PRIMARY KEY (tenant_id, log_id),
    UNIQUE (tenant_id, previous_hash)
);
COMMENT ON TABLE public.agent_execution_log IS 'What agents did, tried and were refused: only added to, numbered and hash-chained per tenant.';
COMMENT ON COLUMN public.agent_execution_log.rows IS 'Rows touched, by table: {table: {inserted, updated, deleted}}.';
COMMENT ON COLUMN public.agent_execution_log.details_hash IS 'sha256 of the row of agent_execution_details, which can be erased without breaking the chain.';
CREATE INDEX agent_execution_log_by_time ON public.agent_execution_log (tenant_id, at DESC);
CREATE INDEX agent_execution_log_by_user ON public.agent_execution_log (tenant_id, user_id, at DESC);
CREATE INDEX agent_execution_log_by_approval ON public.agent_execution_log (approval_id);
CREATE UNIQUE INDEX agent_execution_log_undone ON public.agent_execution_log (tenant_id, undoes) WHERE undoes IS NOT NULL AND state = 'executed';

CREATE TABLE public.agent_execution_details (
    tenant_id text NOT NULL,
    log_id bigint NOT NULL,
    user_id text,
    salt text NOT NULL,
    arguments_shown jsonb,
    arguments_run jsonb,
    error text,
    pre_image jsonb,
    PRIMARY KEY (tenant_id, log_id),
    FOREIGN KEY (tenant_id, log_id) REFERENCES public.agent_execution_log
);
COMMENT ON TABLE public.agent_execution_details IS 'The part of the log that may hold personal data: arguments, error, and rows as they were before. Erased with its user.';
COMMENT ON COLUMN public.agent_execution_details.salt IS 'Keeps the hash that stays behind from telling what was erased.';
CREATE INDEX agent_execution_details_by_user ON public.agent_execution_details (tenant_id, user_id);

CREATE TABLE public.agent_execution_budget (
    tenant_id text NOT NULL,
    limit_key text NOT NULL CHECK (limit_key <> ''),
    minute timestamptz NOT NULL,
    used integer NOT NULL,
    PRIMARY KEY (tenant_id, limit_key, minute)
);
COMMENT ON TABLE public.agent_execution_budget IS 'How often something that is limited was begun, by minute, for the last hour.';

CREATE TABLE public.agent_execution_halt (
    tenant_id text NOT NULL,
    halt_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    agent_id text,
    tool text,
    reason text NOT NULL,
    halted_by text NOT NULL CHECK (halted_by <> ''),
    halted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    resumed_at timestamptz,
    resumed_by text
);
COMMENT ON TABLE public.agent_execution_halt IS 'The kill switch: while a row has no resumed_at, what it names does not run. No agent or no tool means every one.';
CREATE INDEX agent_execution_halt_in_force ON public.agent_execution_halt (tenant_id) WHERE resumed_at IS NULL;

CREATE TABLE public.agent_execution_result (
    tenant_id text NOT NULL,
    result_key text NOT NULL,
    user_id text,
    log_id bigint NOT NULL,
    result text NOT NULL CONSTRAINT agent_execution_result_size CHECK (octet_length(result) <= 65536),
    saved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, result_key)
);
COMMENT ON TABLE public.agent_execution_result IS 'What an approved call gave, as JSON, for whoever comes back with the very same call, or a run that went on after a pause: kept for 7 days, and erased with its user.';
COMMENT ON COLUMN public.agent_execution_result.result_key IS 'Id of the approval of a call, or key of a run.';
CREATE INDEX agent_execution_result_by_time ON public.agent_execution_result (saved_at);
CREATE INDEX agent_execution_result_by_user ON public.agent_execution_result (tenant_id, user_id);

SELECT agent_private.guard(t) FROM unnest(ARRAY[
    'public.agent_execution_log', 'public.agent_execution_details', 'public.agent_execution_budget',
    'public.agent_execution_halt', 'public.agent_execution_result']::regclass[]) AS t;
REVOKE UPDATE, DELETE ON public.agent_execution_log FROM agent_app;
REVOKE UPDATE ON public.agent_execution_details FROM agent_app;
REVOKE DELETE ON public.agent_execution_halt FROM agent_app;

DO $$
DECLARE
    target text;
BEGIN
    FOREACH target IN ARRAY ARRAY[
        'agent_execution_log', 'agent_execution_details', 'agent_execution_budget', 'agent_execution_halt',
        'agent_execution_result'] LOOP
        EXECUTE format($policy$
            CREATE POLICY of_the_tenant ON public.%I TO agent_app
            USING (
                (SELECT current_setting('agent.reach', true)) = 'everywhere'
                OR (tenant_id = (SELECT current_setting('agent.tenant_id', true))
                    AND (SELECT current_setting('agent.reach', true)) = 'tenant')
            )
        $policy$, target);
    END LOOP;
END
$$;

CREATE TRIGGER only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON public.agent_execution_log
    FOR EACH STATEMENT EXECUTE FUNCTION agent_private.refuse_change();
ALTER TABLE public.agent_execution_log ENABLE ALWAYS TRIGGER only_added_to;
CREATE TRIGGER never_changed BEFORE UPDATE OR TRUNCATE ON public.agent_execution_details
    FOR EACH STATEMENT EXECUTE FUNCTION agent_private.refuse_change();
ALTER TABLE public.agent_execution_details ENABLE ALWAYS TRIGGER never_changed;

-- The hash of the part of a log row that can be erased.
CREATE FUNCTION agent_private.details_hash(d public.agent_execution_details)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.chain_hash(d.salt, jsonb_build_array(
        d.tenant_id, d.log_id, d.user_id, d.arguments_shown, d.arguments_run, d.error, d.pre_image)::text);
$$;

-- The text of a log row as its hash covers it; times as numbers, because their text depends on the session.
CREATE FUNCTION agent_private.execution_text(l public.agent_execution_log)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_array(
        l.tenant_id, l.log_id, extract(epoch FROM l.at), l.user_id, l.agent_id, l.session_id, l.run_id, l.tool, l.tool_version, l.risk,
        l.decision, l.state, l.approval_id, l.decided_by, l.rows, l.row_count, l.result_bytes, l.duration_ms, l.undoes, l.details_hash)::text;
$$;

-- Add a row to the log of a tenant; locks the head of its chain. who: {user_id, agent_id, session_id, run_id}.
CREATE FUNCTION agent_private.append_execution(the_tenant text, who jsonb, entry jsonb, the_deciders text[] DEFAULT '{}')
RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    head public.agent_chain;
    l public.agent_execution_log;
    d public.agent_execution_details;
BEGIN
    head := agent_private.next_of_chain(the_tenant, 'agent_execution_log');
    d.tenant_id := the_tenant;
    d.log_id := head.number;
    d.user_id := nullif(who ->> 'user_id', '');
    d.salt := encode(uuid_send(gen_random_uuid()), 'hex');
    d.arguments_shown := nullif(entry -> 'arguments_shown', 'null');
    d.arguments_run := nullif(entry -> 'arguments_run', 'null');
    d.error := entry ->> 'error';
    d.pre_image := nullif(entry -> 'pre_image', 'null');
    l.tenant_id := the_tenant;
    l.log_id := head.number;
    l.at := clock_timestamp();
    l.user_id := d.user_id;
    l.agent_id := nullif(who ->> 'agent_id', '');
    l.session_id := nullif(who ->> 'session_id', '');
    l.run_id := nullif(who ->> 'run_id', '');
    l.tool := entry ->> 'tool';
    l.tool_version := coalesce(entry ->> 'tool_version', '1');
    l.risk := entry ->> 'risk';
    l.decision := entry ->> 'decision';
    l.state := entry ->> 'state';
    l.approval_id := (entry ->> 'approval_id')::uuid;
    l.decided_by := the_deciders;
    l.rows := coalesce(nullif(entry -> 'rows', 'null'), '{}');
    l.row_count := (entry ->> 'row_count')::bigint;
    l.result_bytes := (entry ->> 'result_bytes')::bigint;
    l.duration_ms := (entry ->> 'duration_ms')::numeric;
    l.undoes := (entry ->> 'undoes')::bigint;
    l.details_hash := agent_private.details_hash(d);
    l.previous_hash := head.row_hash;
    l.row_hash := agent_private.chain_hash(head.row_hash, agent_private.execution_text(l));
    INSERT INTO public.agent_execution_log SELECT (l).*;
    INSERT INTO public.agent_execution_details SELECT (d).*;
    UPDATE public.agent_chain c SET row_hash = l.row_hash WHERE c.tenant_id = the_tenant AND c.chain = 'agent_execution_log';
    RETURN l.log_id;
END
$$;

-- Keep what an execution gave, if it is not too long, for get_execution_result; the first one under a key stays.
CREATE FUNCTION agent_private.keep_result(the_tenant text, the_key text, the_user text, the_log_id bigint, the_result text)
RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO public.agent_execution_result (tenant_id, result_key, user_id, log_id, result)
    SELECT the_tenant, the_key, the_user, the_log_id, the_result WHERE octet_length(the_result) <= 65536
    ON CONFLICT DO NOTHING;
$$;

-- What stops a tool of an agent in a tenant: {halt_id, reason, by}, or NULL.
CREATE FUNCTION agent_private.halted(the_tenant text, the_agent text, the_tool text)
RETURNS jsonb
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT jsonb_build_object('halt_id', h.halt_id, 'reason', h.reason, 'by', h.halted_by)
    FROM public.agent_execution_halt h
    WHERE h.tenant_id = the_tenant AND h.resumed_at IS NULL
      AND (h.agent_id IS NULL OR h.agent_id = the_agent) AND (h.tool IS NULL OR h.tool = the_tool)
    ORDER BY h.halted_at LIMIT 1;
$$;

-- Take an approved call to execute it: the first of any number of callers wins. Returns {claimed, ticket, state, why};
-- the ticket is needed to finish it and is kept by nobody else. What the kill switch stops is not claimed.
CREATE FUNCTION public.claim_approval(identity jsonb, the_approval_id uuid, args_hash text, claimed_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    the_ticket text := encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'hex');
    a public.human_approval_queue;
    why text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT q.* INTO a FROM public.human_approval_queue q
    WHERE q.tenant_id = tenant AND q.approval_id = the_approval_id FOR UPDATE;
    why := CASE
        WHEN a.approval_id IS NULL THEN 'there is no such approval'
        WHEN a.args_hash IS DISTINCT FROM claim_approval.args_hash THEN 'it was given for other arguments'
        WHEN agent_private.approval_state(a) <> 'approved' THEN format('it is %s', agent_private.approval_state(a))
        WHEN agent_private.approval_digest(a) IS DISTINCT FROM (
            SELECT e.details ->> 'content_hash' FROM public.approval_event e
            WHERE e.tenant_id = tenant AND e.approval_id = a.approval_id AND e.what = 'requested' ORDER BY e.number LIMIT 1)
            THEN 'its row was changed after it was asked for'
        WHEN agent_private.halted(tenant, a.agent_id, a.tool) IS NOT NULL THEN 'execution is halted'
    END;
    IF why IS NULL THEN
        UPDATE public.human_approval_queue q
        SET state = 'executing', ticket_hash = agent_private.chain_hash('', the_ticket), claimed_by = claim_approval.claimed_by,
            claimed_at = clock_timestamp()
        WHERE q.approval_id = the_approval_id
        RETURNING q.* INTO a;
    END IF;
    IF a.approval_id IS NOT NULL THEN
        PERFORM agent_private.append_event(tenant, a.approval_id, CASE WHEN why IS NULL THEN 'claimed' ELSE 'claim_refused' END,
                                           claim_approval.claimed_by, jsonb_strip_nulls(jsonb_build_object('args_hash', a.args_hash, 'why', why)));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('claimed', why IS NULL, 'ticket', CASE WHEN why IS NULL THEN the_ticket END,
                              'state', agent_private.approval_state(a), 'why', why);
END
$$;

-- End the execution of the approval of this ticket in the tenant (NULL: of any) and log it. Returns {log_id, state}.
-- An execution that was given up as unknown stays so, but what became of it is logged. entry.result, the JSON of what it
-- gave, is kept for get_execution_result.
CREATE FUNCTION agent_private.finish(the_tenant text, ticket text, entry jsonb, only_executing boolean)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    a public.human_approval_queue;
    the_log_id bigint;
    final text := entry ->> 'state';
BEGIN
    IF final IS NULL OR final NOT IN ('executed', 'failed', 'unknown') THEN
        PERFORM agent_private.refuse('PT422', 'an execution ends as executed, failed or unknown');
    END IF;
    SELECT q.* INTO a FROM public.human_approval_queue q
    WHERE q.ticket_hash = agent_private.chain_hash('', ticket) AND (the_tenant IS NULL OR q.tenant_id = the_tenant) FOR UPDATE;
    IF a.approval_id IS NULL THEN
        PERFORM agent_private.refuse('PT404', 'there is no execution of this ticket');
    END IF;
    IF a.state <> 'executing' THEN
        IF only_executing THEN
            PERFORM agent_private.refuse('PT409', format('this execution is over: it is %s', a.state));
        ELSIF a.state = final THEN  -- told twice
            RETURN jsonb_build_object('log_id', a.log_id, 'state', a.state);
        ELSIF a.state <> 'unknown' THEN
            PERFORM agent_private.refuse('PT409', format('this execution is over: it is %s', a.state));
        END IF;
    END IF;
    entry := jsonb_build_object('arguments_shown', a.arguments_shown) || entry || jsonb_build_object(
        'approval_id', a.approval_id, 'tool', a.tool, 'tool_version', a.tool_version, 'risk', a.risk,
        'decision', CASE WHEN entry ->> 'undoes' IS NULL THEN 'approved' ELSE 'undone' END);
    IF a.state = 'executing' THEN
        UPDATE public.human_approval_queue q SET state = final, finished_at = clock_timestamp() WHERE q.approval_id = a.approval_id;
    END IF;
    the_log_id := agent_private.append_execution(a.tenant_id, jsonb_build_object(
        'user_id', a.requested_by, 'agent_id', a.agent_id, 'session_id', a.session_id, 'run_id', a.run_id), entry, a.decided_by);
    -- The row is this transaction's already; nobody can wait for it and hold the head of the chain.
    UPDATE public.human_approval_queue q SET log_id = the_log_id WHERE q.approval_id = a.approval_id;
    IF a.arguments_shown IS NULL THEN  -- its user was erased while it ran: that it was done stays, nothing else
        DELETE FROM public.agent_execution_details d WHERE d.tenant_id = a.tenant_id AND d.log_id = the_log_id;
        PERFORM agent_private.append_event(a.tenant_id, NULL, 'erased', NULL,
                                           jsonb_build_object('log_ids', jsonb_build_array(the_log_id)));
    ELSIF a.state = 'executing' AND final = 'executed' THEN
        PERFORM agent_private.keep_result(a.tenant_id, a.approval_id::text, a.requested_by, the_log_id, entry ->> 'result');
    END IF;
    PERFORM agent_private.append_event(a.tenant_id, a.approval_id, final, a.claimed_by, jsonb_build_object('log_id', the_log_id));
    RETURN jsonb_build_object('log_id', the_log_id, 'state', CASE WHEN a.state = 'executing' THEN final ELSE a.state END);
END
$$;

-- Tell how the execution of a claimed approval ended, in entry.state: executed, failed or unknown; the log row is
-- written in the same transaction. Told twice it answers the same. Returns {log_id, state}.
CREATE FUNCTION public.finish_execution(identity jsonb, ticket text, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    receipt jsonb;
BEGIN
    identity := agent_private.document(identity);
    entry := agent_private.document(entry);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    receipt := agent_private.finish(current_setting('agent.tenant_id'), ticket, entry, false);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- finish_execution for the login that writes, inside the transaction of its write: both are committed or neither. The
-- tenant is that of the login, and of the ticket for an owner who takes the role; an execution that was given up meanwhile raises PT409, which undoes the write.
CREATE FUNCTION public.finish_write(ticket text, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_everywhere();
    receipt jsonb;
BEGIN
    receipt := agent_private.finish(agent_private.sql_tenant(), ticket, agent_private.document(entry), true);
    PERFORM agent_private.leave(previous);
    RETURN receipt;
END
$$;

-- What the call of an approval gave, or a run that went on after a pause, for the user who asked for it: {log_id, result},
-- result as JSON text. the_key: id of the approval, or key of the run. NULL where nothing was kept, it was too long ago, or
-- it is another's.
CREATE FUNCTION public.get_execution_result(identity jsonb, the_key text)
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
        RETURN NULL;
    END IF;
    SELECT jsonb_build_object('log_id', r.log_id, 'result', r.result) INTO found FROM public.agent_execution_result r
    WHERE r.tenant_id = current_setting('agent.tenant_id') AND r.result_key = the_key
      AND r.user_id IS NOT DISTINCT FROM nullif(identity ->> 'user_id', '');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Log what needed no approval: reads, what a policy allowed, refusals. Returns {log_id}.
CREATE FUNCTION public.record_execution(identity jsonb, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    the_log_id bigint;
BEGIN
    identity := agent_private.document(identity);
    entry := agent_private.document(entry);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    IF entry ->> 'decision' = 'approved' AND entry ->> 'state' = 'executed' THEN
        PERFORM agent_private.refuse('PT422', 'what was approved and executed is logged with its ticket');
    END IF;
    the_log_id := agent_private.append_execution(current_setting('agent.tenant_id'), identity, entry);
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('log_id', the_log_id);
END
$$;

-- Take one from the budget of the last hour. per_hour NULL: no limit. Returns {allowed, halted: {reason, by} or NULL, used}.
-- Locks the budget until the end of the transaction.
CREATE FUNCTION public.reserve_execution(identity jsonb, the_tool text, limit_key text, per_hour integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    stopped jsonb;
    already integer := 0;
    fits boolean := true;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    stopped := agent_private.halted(tenant, nullif(identity ->> 'agent_id', ''), the_tool);
    IF per_hour IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('agent budget ' || jsonb_build_array(tenant, reserve_execution.limit_key)::text, 0));
        DELETE FROM public.agent_execution_budget b
        WHERE b.tenant_id = tenant AND b.limit_key = reserve_execution.limit_key AND b.minute <= clock_timestamp() - interval '1 hour';
        SELECT coalesce(sum(b.used), 0) INTO already FROM public.agent_execution_budget b
        WHERE b.tenant_id = tenant AND b.limit_key = reserve_execution.limit_key;
        fits := already < per_hour;
        IF fits AND stopped IS NULL THEN
            INSERT INTO public.agent_execution_budget AS b (tenant_id, limit_key, minute, used)
            VALUES (tenant, reserve_execution.limit_key, date_trunc('minute', clock_timestamp()), 1)
            ON CONFLICT ON CONSTRAINT agent_execution_budget_pkey DO UPDATE SET used = b.used + 1;
            already := already + 1;
        END IF;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('allowed', fits AND stopped IS NULL, 'halted', stopped, 'used', already);
END
$$;

-- Stop executions: {agent_id, tool, reason, halted_by}; no agent_id or no tool means every one. Returns the halt.
CREATE FUNCTION public.halt_executions(identity jsonb, halt jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    made public.agent_execution_halt;
BEGIN
    identity := agent_private.document(identity);
    halt := agent_private.document(halt);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a halt needs a tenant');
    END IF;
    INSERT INTO public.agent_execution_halt (tenant_id, agent_id, tool, reason, halted_by)
    VALUES (current_setting('agent.tenant_id'), nullif(halt ->> 'agent_id', ''), nullif(halt ->> 'tool', ''),
            coalesce(halt ->> 'reason', ''), halt ->> 'halted_by')
    RETURNING * INTO made;
    PERFORM agent_private.append_event(made.tenant_id, NULL, 'halted', made.halted_by, jsonb_build_object(
        'halt_id', made.halt_id, 'agent_id', made.agent_id, 'tool', made.tool, 'reason', made.reason));
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(made);
END
$$;

-- End a halt. Returns whether it was in force until now.
CREATE FUNCTION public.resume_executions(identity jsonb, halt_id uuid, resumed_by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    ended boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a halt needs a tenant');
    END IF;
    UPDATE public.agent_execution_halt h SET resumed_at = clock_timestamp(), resumed_by = resume_executions.resumed_by
    WHERE h.tenant_id = current_setting('agent.tenant_id') AND h.halt_id = resume_executions.halt_id AND h.resumed_at IS NULL;
    ended := FOUND;
    IF ended THEN
        PERFORM agent_private.append_event(current_setting('agent.tenant_id'), NULL, 'halt_ended', resume_executions.resumed_by,
                                           jsonb_build_object('halt_id', resume_executions.halt_id));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(ended);
END
$$;

-- The halts of a tenant, newest first; those in force have no resumed_at.
CREATE FUNCTION public.list_halts(identity jsonb)
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
    SELECT coalesce(jsonb_agg(to_jsonb(h) ORDER BY h.halted_at DESC, h.halt_id), '[]') INTO found
    FROM public.agent_execution_halt h WHERE h.tenant_id = current_setting('agent.tenant_id');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- The log of a tenant, newest first, without pre-images. wanted: limit (at most 1,000; else 100), tool, state, since, user_id.
CREATE FUNCTION public.list_executions(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(x.l) - ARRAY['details_hash', 'previous_hash', 'row_hash'] || jsonb_build_object(
               'arguments_shown', d.arguments_shown, 'error', d.error, 'erased', d.log_id IS NULL) ORDER BY x.log_id DESC), '[]')
    INTO found
    FROM (SELECT l, l.tenant_id, l.log_id FROM public.agent_execution_log l
          WHERE l.tenant_id = current_setting('agent.tenant_id')
            AND (wanted ->> 'tool' IS NULL OR l.tool = wanted ->> 'tool')
            AND (wanted ->> 'state' IS NULL OR l.state = wanted ->> 'state')
            AND (wanted ->> 'since' IS NULL OR l.at >= (wanted ->> 'since')::timestamptz)
            AND (wanted ->> 'user_id' IS NULL OR l.user_id = wanted ->> 'user_id')
          ORDER BY l.log_id DESC LIMIT least(coalesce((wanted ->> 'limit')::integer, 100), 1000)) AS x
    LEFT JOIN public.agent_execution_details d ON d.tenant_id = x.tenant_id AND d.log_id = x.log_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- One row of the log with arguments, pre-image and hashes; undone_by is the row that undid it. NULL where there is none.
CREATE FUNCTION public.get_execution(identity jsonb, the_log_id bigint)
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
        RETURN NULL;
    END IF;
    SELECT to_jsonb(l) || jsonb_build_object(
               'arguments_shown', d.arguments_shown, 'arguments_run', d.arguments_run, 'error', d.error, 'pre_image', d.pre_image,
               'erased', d.log_id IS NULL,
               'undone_by', (SELECT min(u.log_id) FROM public.agent_execution_log u
                             WHERE u.tenant_id = l.tenant_id AND u.undoes = l.log_id AND u.state = 'executed'))
    INTO found
    FROM public.agent_execution_log l
    LEFT JOIN public.agent_execution_details d ON d.tenant_id = l.tenant_id AND d.log_id = l.log_id
    WHERE l.tenant_id = current_setting('agent.tenant_id') AND l.log_id = the_log_id;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Compute both chains of a tenant anew: {rows, intact, first_broken, approvals: {rows, first_broken}}. first_broken is
-- the number of the first row that is not what was written or is missing; one past the last where the end was cut off.
-- The events also say what an approval was for, who asked and who decided: of one whose row or votes say otherwise, the
-- event that asked for it counts as broken, and one past the last where nothing asked for it.
-- Arguments may be missing where a user was erased.
CREATE FUNCTION public.verify_executions(identity jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    log_rows bigint;
    log_broken bigint;
    log_hash text;
    event_rows bigint;
    event_broken bigint;
    event_hash text;
    changed bigint;
    head_number bigint;
    head_hash text;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a log belongs to a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT count(*), min(x.should) FILTER (WHERE NOT x.fine), (array_agg(x.row_hash ORDER BY x.should DESC))[1]
    INTO event_rows, event_broken, event_hash
    FROM (SELECT row_number() OVER w AS should, e.row_hash,
                 e.number = row_number() OVER w AND e.previous_hash = coalesce(lag(e.row_hash) OVER w, '')
                 AND e.row_hash = agent_private.chain_hash(e.previous_hash, agent_private.event_text(e)) AS fine
          FROM public.approval_event e WHERE e.tenant_id = tenant
          WINDOW w AS (ORDER BY e.number)) AS x;
    SELECT max(c.number), max(c.row_hash) INTO head_number, head_hash FROM public.agent_chain c
    WHERE c.tenant_id = tenant AND c.chain = 'approval_event';
    IF event_broken IS NULL AND (coalesce(head_number, 0), coalesce(head_hash, '')) <> (event_rows, coalesce(event_hash, '')) THEN
        event_broken := event_rows + 1;
    END IF;
    WITH events AS (SELECT e.* FROM public.approval_event e WHERE e.tenant_id = tenant),
    asked AS (SELECT e.* FROM events e WHERE e.what = 'requested'),
    ended AS (SELECT DISTINCT ON (e.approval_id) e.approval_id, e.what, e.details -> 'decided_by' AS decided_by
              FROM events e WHERE e.details ? 'decided_by' ORDER BY e.approval_id, e.number DESC),
    said AS (SELECT DISTINCT ON (e.approval_id, e.actor) e.approval_id, e.actor, e.details ->> 'verdict' AS verdict
             FROM events e WHERE e.what = 'voted' ORDER BY e.approval_id, e.actor, e.number DESC),
    miscounted AS (SELECT coalesce(s.approval_id, v.approval_id) AS approval_id
                   FROM said s
                   FULL JOIN (SELECT o.* FROM public.approval_vote o WHERE o.tenant_id = tenant) v
                       ON v.approval_id = s.approval_id AND v.voter = s.actor
                   WHERE v.verdict IS DISTINCT FROM s.verdict),
    erased AS (SELECT t::uuid AS approval_id FROM events e, jsonb_array_elements_text(e.details -> 'approval_ids') AS t
               WHERE e.what = 'erased')
    SELECT min(coalesce(k.number, event_rows + 1)) INTO changed
    FROM asked k
    FULL JOIN (SELECT q.* FROM public.human_approval_queue q WHERE q.tenant_id = tenant) a ON a.approval_id = k.approval_id
    LEFT JOIN ended d ON d.approval_id = a.approval_id
    WHERE k.number IS NULL OR a.approval_id IS NULL
       OR (a.requested_by, a.tool, a.tool_version, a.risk, a.args_hash, a.required_votes::text, a.edited_by) IS DISTINCT FROM
          (k.actor, k.details ->> 'tool', k.details ->> 'tool_version', k.details ->> 'risk', k.details ->> 'args_hash',
           k.details ->> 'required_votes', k.details ->> 'edited_by')
       OR to_jsonb(a.decided_by) <> coalesce(d.decided_by, '[]')
       OR (a.state IN ('approved', 'executing', 'executed', 'failed', 'unknown') AND d.what IS DISTINCT FROM 'approved')
       OR (a.state = 'rejected' AND d.what IS DISTINCT FROM 'rejected')
       OR a.approval_id IN (SELECT m.approval_id FROM miscounted m)
       OR (k.details ->> 'content_hash' IS DISTINCT FROM agent_private.approval_digest((
               SELECT q FROM public.human_approval_queue q WHERE q.approval_id = a.approval_id))
           AND NOT (a.arguments = '{}' AND a.arguments_shown IS NULL
                    AND a.approval_id IN (SELECT x.approval_id FROM erased x)));
    event_broken := least(event_broken, changed);
    SELECT count(*), min(x.should) FILTER (WHERE NOT x.fine), (array_agg(x.row_hash ORDER BY x.should DESC))[1]
    INTO log_rows, log_broken, log_hash
    FROM (SELECT row_number() OVER w AS should, l.row_hash,
                 l.log_id = row_number() OVER w AND l.previous_hash = coalesce(lag(l.row_hash) OVER w, '')
                 AND l.row_hash = agent_private.chain_hash(l.previous_hash, agent_private.execution_text(l))
                 AND CASE WHEN d.log_id IS NOT NULL THEN agent_private.details_hash(d) = l.details_hash
                          ELSE gone.log_id IS NOT NULL
                     END AS fine
          FROM public.agent_execution_log l
          LEFT JOIN public.agent_execution_details d ON d.tenant_id = l.tenant_id AND d.log_id = l.log_id
          LEFT JOIN (SELECT DISTINCT g.id::bigint AS log_id
                     FROM public.approval_event e CROSS JOIN LATERAL jsonb_array_elements_text(e.details -> 'log_ids') AS g (id)
                     WHERE e.tenant_id = tenant AND e.what = 'erased') AS gone ON gone.log_id = l.log_id
          WHERE l.tenant_id = tenant
          WINDOW w AS (ORDER BY l.log_id)) AS x;
    SELECT max(c.number), max(c.row_hash) INTO head_number, head_hash FROM public.agent_chain c
    WHERE c.tenant_id = tenant AND c.chain = 'agent_execution_log';
    IF log_broken IS NULL AND (coalesce(head_number, 0), coalesce(head_hash, '')) <> (log_rows, coalesce(log_hash, '')) THEN
        log_broken := log_rows + 1;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object(
        'rows', log_rows, 'intact', log_broken IS NULL AND event_broken IS NULL, 'first_broken', log_broken,
        'approvals', jsonb_build_object('rows', event_rows, 'first_broken', event_broken));
END
$$;

-- What the clock does: expire what is due, remind, and give up as unknown what has been executing for longer than
-- executing_seconds. For all tenants; what somebody works on right now is passed over. Returns how many changed.
CREATE FUNCTION public.tend_approvals(executing_seconds double precision DEFAULT 900)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    due public.human_approval_queue;
    told jsonb := '[]';
    changed integer := 0;
    next_one record;
    the_log_id bigint;
BEGIN
    DELETE FROM public.approval_seen s WHERE (s.channel, s.delivery_key) IN (
        SELECT o.channel, o.delivery_key FROM public.approval_seen o
        WHERE o.seen_at < clock_timestamp() - interval '1 day'
          -- LangGraph gives a node its earlier answers again as long as an approval lives, which is 7 days at most.
          AND (o.channel NOT IN ('interrupt', 'decision interrupt') OR o.seen_at < clock_timestamp() - interval '8 days')
        ORDER BY o.seen_at LIMIT 1000 FOR UPDATE SKIP LOCKED);
    DELETE FROM public.agent_execution_result r WHERE (r.tenant_id, r.result_key) IN (
        SELECT o.tenant_id, o.result_key FROM public.agent_execution_result o
        WHERE o.saved_at < clock_timestamp() - interval '7 days' ORDER BY o.saved_at LIMIT 1000 FOR UPDATE SKIP LOCKED);
    FOR due IN
        SELECT a.* FROM public.human_approval_queue a
        WHERE (a.state IN ('pending', 'approved') AND (a.state = 'pending' OR a.kind <> 'tool_version') AND a.expires_at <= clock_timestamp())
           OR (a.state = 'pending' AND a.escalated_at IS NULL AND a.escalate_at <= clock_timestamp())
           OR (a.state = 'executing' AND a.claimed_at <= clock_timestamp() - make_interval(secs => executing_seconds))
        ORDER BY a.approval_id LIMIT 500
        FOR UPDATE SKIP LOCKED
    LOOP
        changed := changed + 1;
        IF due.state = 'executing' THEN
            UPDATE public.human_approval_queue a SET state = 'unknown', finished_at = clock_timestamp()
            WHERE a.approval_id = due.approval_id;
        ELSIF due.expires_at <= clock_timestamp() THEN
            UPDATE public.human_approval_queue a SET state = 'expired', decided_at = coalesce(a.decided_at, clock_timestamp())
            WHERE a.approval_id = due.approval_id;
        ELSE
            UPDATE public.human_approval_queue a SET escalated_at = clock_timestamp() WHERE a.approval_id = due.approval_id;
        END IF;
        told := told || jsonb_build_object('tenant_id', due.tenant_id, 'approval_id', due.approval_id, 'what', CASE
            WHEN due.state = 'executing' THEN 'unknown' WHEN due.expires_at <= clock_timestamp() THEN 'expired' ELSE 'escalated' END);
    END LOOP;
    -- Heads of chains last, tenant by tenant in one order.
    FOR next_one IN
        SELECT t.tenant_id, t.approval_id, t.what FROM jsonb_to_recordset(told) AS t (tenant_id text, approval_id uuid, what text)
        ORDER BY t.tenant_id, t.what <> 'unknown', t.approval_id
    LOOP
        the_log_id := NULL;
        IF next_one.what = 'unknown' THEN
            SELECT a.* INTO due FROM public.human_approval_queue a WHERE a.approval_id = next_one.approval_id;
            the_log_id := agent_private.append_execution(due.tenant_id, jsonb_build_object(
                'user_id', due.requested_by, 'agent_id', due.agent_id, 'session_id', due.session_id, 'run_id', due.run_id),
                jsonb_build_object(
                    'state', 'unknown', 'decision', 'approved', 'tool', due.tool, 'tool_version', due.tool_version, 'risk', due.risk,
                    'approval_id', due.approval_id, 'arguments_shown', due.arguments_shown,
                    'error', 'nobody told how it ended'), due.decided_by);
            UPDATE public.human_approval_queue a SET log_id = the_log_id WHERE a.approval_id = due.approval_id;
        END IF;
    END LOOP;
    FOR next_one IN
        SELECT t.tenant_id, t.approval_id, t.what FROM jsonb_to_recordset(told) AS t (tenant_id text, approval_id uuid, what text)
        ORDER BY t.tenant_id, t.approval_id
    LOOP
        PERFORM agent_private.append_event(next_one.tenant_id, next_one.approval_id, next_one.what, NULL);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(changed);
END
$$;

-- Erase what approvals and the log hold of a user: arguments, errors, results, rows as they were before, paused programs; what
-- still waited is cancelled. That something was done, by which tool and with which risk, stays. The caller has entered.
-- Returns the number of rows changed per table.
CREATE FUNCTION agent_private.erase_executions(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    asked bigint;
    details bigint;
    paused bigint;
    results bigint;
    gone bigint[];
    emptied uuid[];
    closed uuid[];
    closed_id uuid;
BEGIN
    PERFORM FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user ORDER BY a.approval_id FOR UPDATE;
    SELECT coalesce(array_agg(a.approval_id ORDER BY a.approval_id), '{}') INTO closed FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user AND a.state IN ('pending', 'approved');
    SELECT coalesce(array_agg(a.approval_id ORDER BY a.approval_id), '{}') INTO emptied FROM public.human_approval_queue a
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user AND a.arguments_shown IS NOT NULL;
    UPDATE public.human_approval_queue a
    SET arguments = '{}', arguments_shown = NULL, summary = '', reason = '', effects = NULL, bounds = NULL,
        state = CASE a.state WHEN 'pending' THEN 'cancelled' WHEN 'approved' THEN 'expired' ELSE a.state END
    WHERE a.tenant_id = the_tenant AND a.requested_by = the_user;
    GET DIAGNOSTICS asked = ROW_COUNT;
    DELETE FROM public.approval_continuation c USING public.human_approval_queue a
    WHERE a.approval_id = c.approval_id AND a.tenant_id = the_tenant AND a.requested_by = the_user;
    GET DIAGNOSTICS paused = ROW_COUNT;
    DELETE FROM public.agent_execution_result r WHERE r.tenant_id = the_tenant AND r.user_id = the_user;
    GET DIAGNOSTICS results = ROW_COUNT;
    WITH deleted AS (
        DELETE FROM public.agent_execution_details d WHERE d.tenant_id = the_tenant AND d.user_id = the_user
        RETURNING d.log_id)
    SELECT count(*), coalesce(array_agg(x.log_id ORDER BY x.log_id), '{}') INTO details, gone FROM deleted x;
    FOREACH closed_id IN ARRAY closed LOOP
        PERFORM agent_private.append_event(the_tenant, closed_id, a.state, NULL, '{"why": "its user was erased"}')
        FROM public.human_approval_queue a WHERE a.approval_id = closed_id;
    END LOOP;
    IF gone <> '{}' OR emptied <> '{}' THEN
        PERFORM agent_private.append_event(the_tenant, NULL, 'erased', NULL,
                                           jsonb_build_object('log_ids', gone, 'approval_ids', emptied));
    END IF;
    RETURN jsonb_build_object('human_approval_queue', asked, 'approval_continuation', paused, 'agent_execution_details', details,
                              'agent_execution_result', results);
END
$$;

-- What erase_user() erases beside memories and runs. Returns the number of rows changed per table.
CREATE OR REPLACE FUNCTION agent_private.erase_elsewhere(the_tenant text, the_user text)
RETURNS jsonb
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT agent_private.erase_executions(the_tenant, the_user);
$$;

-- ---- schemas/77_paused_tools.sql

-- Runs of agent-written tools that wait for an approval in the middle of their work: put away, taken up, ended.

-- Keep a paused program with its approval until that is decided; the first one saved stays. Nobody but who waits for it
-- goes on with it for wait_seconds. replaces: the approval that the same program waited for before, whose pause ends in
-- the same transaction. Returns whether it was kept.
CREATE FUNCTION public.save_continuation(
    identity jsonb, the_approval_id uuid, payload text, mac text, wait_seconds double precision DEFAULT 0, replaces uuid DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    kept boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    IF NOT EXISTS (SELECT FROM public.human_approval_queue a
                   WHERE a.tenant_id = current_setting('agent.tenant_id') AND a.approval_id = the_approval_id) THEN
        PERFORM agent_private.refuse('PT404', 'there is no approval of this id');
    END IF;
    INSERT INTO public.approval_continuation (tenant_id, approval_id, payload, mac, due_at)
    VALUES (current_setting('agent.tenant_id'), the_approval_id, save_continuation.payload, save_continuation.mac,
            clock_timestamp() + make_interval(secs => wait_seconds))
    ON CONFLICT DO NOTHING;
    kept := FOUND;
    DELETE FROM public.approval_continuation c
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = replaces;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(kept);
END
$$;

-- Take up a paused program for lease_seconds: {payload, mac}, or NULL where there is none or somebody else has it.
CREATE FUNCTION public.take_continuation(identity jsonb, the_approval_id uuid, lease_seconds double precision DEFAULT 900)
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
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    UPDATE public.approval_continuation c SET taken_until = clock_timestamp() + make_interval(secs => lease_seconds)
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id
      AND (c.taken_until IS NULL OR c.taken_until <= clock_timestamp())
    RETURNING jsonb_build_object('payload', c.payload, 'mac', c.mac) INTO found;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- Give back a paused program that could not go on now. Keepers try again after 2, 4, 8, … at most 300 seconds. Returns
-- whether it was there.
CREATE FUNCTION public.release_continuation(identity jsonb, the_approval_id uuid, error text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    there boolean;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an approval needs a tenant');
    END IF;
    UPDATE public.approval_continuation c
    SET taken_until = NULL, attempts = c.attempts + 1, error = left(release_continuation.error, 1000),
        due_at = clock_timestamp() + make_interval(secs => least(300, 2 ^ least(c.attempts + 1, 9)))
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id;
    there := FOUND;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(there);
END
$$;

-- End a paused program that went on, and log how: entry as for record_execution. entry.result, JSON text, is kept under
-- the_key for get_execution_result. In one transaction, so that of any number of callers one ends it; the others raise
-- PT409. Returns {log_id}.
CREATE FUNCTION public.finish_continuation(identity jsonb, the_approval_id uuid, the_key text, entry jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    the_log_id bigint;
BEGIN
    identity := agent_private.document(identity);
    entry := agent_private.document(entry);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'an execution needs a tenant');
    END IF;
    IF entry ->> 'decision' = 'approved' THEN
        PERFORM agent_private.refuse('PT422', 'what was approved and executed is logged with its ticket');
    END IF;
    DELETE FROM public.approval_continuation c
    WHERE c.tenant_id = current_setting('agent.tenant_id') AND c.approval_id = the_approval_id;
    IF NOT FOUND THEN
        PERFORM agent_private.refuse('PT409', 'this paused program has ended already');
    END IF;
    the_log_id := agent_private.append_execution(current_setting('agent.tenant_id'), identity, entry);
    PERFORM agent_private.keep_result(current_setting('agent.tenant_id'), the_key, nullif(identity ->> 'user_id', ''), the_log_id,
                                      entry ->> 'result');
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('log_id', the_log_id);
END
$$;

-- Paused programs whose approvals are decided and that nobody works on or waits for: [{approval_id, tenant_id, user_id,
-- agent_id, session_id}], leased to the caller. One that could not go on within a day is given up.
CREATE FUNCTION public.take_tool_resumes(lease_seconds double precision DEFAULT 60)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[] := agent_private.enter_as_server();
    taken jsonb := '[]';
    due record;
BEGIN
    FOR due IN
        SELECT c.approval_id, a.tenant_id, a.requested_by, a.agent_id, a.session_id
        FROM public.approval_continuation c
        JOIN public.human_approval_queue a ON a.approval_id = c.approval_id
        CROSS JOIN LATERAL (
            WITH RECURSIVE edits AS (
                SELECT e.state, e.replaced_by, e.changed_at FROM public.human_approval_queue e WHERE e.approval_id = c.approval_id
                UNION ALL
                SELECT e.state, e.replaced_by, e.changed_at FROM edits x
                JOIN public.human_approval_queue e ON e.approval_id = x.replaced_by)
            SELECT x.state, x.changed_at FROM edits x WHERE x.replaced_by IS NULL) AS last
        WHERE c.due_at <= clock_timestamp() AND (c.taken_until IS NULL OR c.taken_until <= clock_timestamp())
          AND last.state NOT IN ('pending', 'executing') AND last.changed_at > clock_timestamp() - interval '1 day'
        ORDER BY c.approval_id LIMIT 50
        FOR UPDATE OF c SKIP LOCKED
    LOOP
        UPDATE public.approval_continuation c SET due_at = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE c.approval_id = due.approval_id;
        taken := taken || jsonb_build_object(
            'approval_id', due.approval_id, 'tenant_id', due.tenant_id, 'user_id', due.requested_by, 'agent_id', due.agent_id,
            'session_id', due.session_id);
    END LOOP;
    PERFORM agent_private.leave(previous);
    RETURN taken;
END
$$;

-- ---- schemas/78_sql_logins.sql

-- The logins through which agents run SQL of their own: two per tenant, made by `agent migrate --roles`.
--
-- agent_sql_reader  its members only read.
-- agent_sql_writer  its members run a write that somebody approved, and finish its approval in the same transaction.
-- Both are names to recognise members by: the logins do not inherit, and get each right by themselves.

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['agent_sql_reader', 'agent_sql_writer'] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', wanted);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;  -- roles belong to the cluster: another database of it made this one
        END;
    END LOOP;
END
$$;

CREATE TABLE agent_private.sql_login (
    login_name name PRIMARY KEY,
    tenant_id text NOT NULL,
    kind text NOT NULL,
    made_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sql_login_kind_is_known CHECK (kind IN ('reader', 'writer'))
);
COMMENT ON TABLE agent_private.sql_login IS 'Which tenant a login of agents'' SQL belongs to. Row policies go by it, because a setting can be set by whoever is held by it.';
REVOKE ALL ON TABLE agent_private.sql_login FROM PUBLIC;
GRANT SELECT ON TABLE agent_private.sql_login TO agent_app;

-- The tenant of the login of this session, whatever role it has taken on; NULL for every other login. Reads one row by
-- primary key. A definer because the logins themselves can read no table of ours.
CREATE FUNCTION agent_private.sql_tenant()
RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT l.tenant_id FROM agent_private.sql_login l WHERE l.login_name = session_user;
$$;
SELECT agent_private.publish('agent_private.sql_tenant()', 'private');

-- ---- schemas/80_agent_tools.sql

-- Tools that agents write: versions that never change, and which of them may run.

CREATE TABLE public.agent_tool (
    tenant_id text NOT NULL CHECK (tenant_id <> ''),
    name text NOT NULL CONSTRAINT agent_tool_name CHECK (name ~ '^[a-z_][a-z0-9_]{0,62}$'),
    version integer NOT NULL CHECK (version >= 1),
    description text NOT NULL,
    code text NOT NULL,
    parameters jsonb NOT NULL,
    examples jsonb NOT NULL,
    example_results jsonb NOT NULL,
    capabilities jsonb NOT NULL,
    code_hash text NOT NULL CONSTRAINT agent_tool_code_hash CHECK (code_hash ~ '^[0-9a-f]{64}$'),
    author text NOT NULL CHECK (author <> ''),
    -- draft -> approved | retired; approved -> retired
    state text NOT NULL DEFAULT 'draft' CONSTRAINT agent_tool_state CHECK (state IN ('draft', 'approved', 'retired')),
    saved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    approval_id uuid,
    approved_by text[] NOT NULL DEFAULT '{}',
    approved_at timestamptz,
    retired_by text,
    retired_at timestamptz,
    PRIMARY KEY (tenant_id, name, version),
    UNIQUE (tenant_id, name, code_hash),
    CONSTRAINT agent_tool_approved CHECK (state <> 'approved' OR approval_id IS NOT NULL)
);
COMMENT ON TABLE public.agent_tool IS 'One version of a tool that an agent wrote. At most one version of a name is approved, and only that one runs.';
COMMENT ON COLUMN public.agent_tool.capabilities IS 'The tools of the executor that its code calls.';
COMMENT ON COLUMN public.agent_tool.example_results IS 'What its examples gave in the sandbox when it was saved.';
CREATE UNIQUE INDEX agent_tool_one_approved ON public.agent_tool (tenant_id, name) WHERE state = 'approved';

SELECT agent_private.guard('public.agent_tool'::regclass);
REVOKE DELETE ON public.agent_tool FROM agent_app;
CREATE POLICY of_the_tenant ON public.agent_tool TO agent_app
    USING (tenant_id = (SELECT current_setting('agent.tenant_id', true))
           AND (SELECT current_setting('agent.reach', true)) = 'tenant');

-- Refuse to change what a version of a tool is, and steps between states that there are none of.
CREATE FUNCTION agent_private.watch_tool()
RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_jsonb(NEW) - ARRAY['state', 'approval_id', 'approved_by', 'approved_at', 'retired_by', 'retired_at']
       <> to_jsonb(OLD) - ARRAY['state', 'approval_id', 'approved_by', 'approved_at', 'retired_by', 'retired_at'] THEN
        RAISE EXCEPTION 'a version of a tool does not change; save another' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state <> OLD.state AND (OLD.state || ' ' || NEW.state) NOT IN ('draft approved', 'draft retired', 'approved retired') THEN
        RAISE EXCEPTION 'a tool that is % does not become %', OLD.state, NEW.state USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER watched BEFORE UPDATE ON public.agent_tool FOR EACH ROW EXECUTE FUNCTION agent_private.watch_tool();

-- Save a version of a tool as a draft: {name, description, code, parameters, examples, example_results, capabilities,
-- code_hash, author}. The same code_hash of the same name is the same version. Returns {name, version, state, code_hash}.
CREATE FUNCTION public.save_tool_version(identity jsonb, tool jsonb)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    saved public.agent_tool;
BEGIN
    identity := agent_private.document(identity);
    tool := agent_private.document(tool);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a tool needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM pg_advisory_xact_lock(hashtextextended('agent tool ' || jsonb_build_array(tenant, tool ->> 'name')::text, 0));
    SELECT t.* INTO saved FROM public.agent_tool t
    WHERE t.tenant_id = tenant AND t.name = tool ->> 'name' AND t.code_hash = tool ->> 'code_hash';
    IF saved.name IS NULL THEN
        INSERT INTO public.agent_tool (tenant_id, name, version, description, code, parameters, examples, example_results,
                                       capabilities, code_hash, author)
        SELECT tenant, tool ->> 'name', coalesce(max(t.version), 0) + 1, coalesce(tool ->> 'description', ''), tool ->> 'code',
               coalesce(tool -> 'parameters', '{}'), coalesce(tool -> 'examples', '[]'), coalesce(tool -> 'example_results', '[]'),
               coalesce(tool -> 'capabilities', '[]'), tool ->> 'code_hash', tool ->> 'author'
        FROM public.agent_tool t WHERE t.tenant_id = tenant AND t.name = tool ->> 'name'
        RETURNING * INTO saved;
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('name', saved.name, 'version', saved.version, 'state', saved.state, 'code_hash', saved.code_hash);
END
$$;

-- Let a draft run, by the ticket of a claimed approval of kind tool_version whose arguments name it: {name, version,
-- code_hash}. The version that ran before is retired. Told twice it answers the same. Returns {name, version, state}.
CREATE FUNCTION public.approve_tool_version(identity jsonb, ticket text, tool_name text, version integer, code_hash text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    a public.human_approval_queue;
    t public.agent_tool;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a tool needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    SELECT q.* INTO a FROM public.human_approval_queue q
    WHERE q.tenant_id = tenant AND q.ticket_hash = agent_private.chain_hash('', ticket) FOR UPDATE;
    IF a.approval_id IS NULL OR a.kind <> 'tool_version' OR a.state NOT IN ('executing', 'executed') THEN
        PERFORM agent_private.refuse('PT403', 'this ticket is of no approval of a tool that is being carried out');
    END IF;
    IF (a.arguments ->> 'name', a.arguments ->> 'version', a.arguments ->> 'code_hash')
       IS DISTINCT FROM (tool_name, approve_tool_version.version::text, approve_tool_version.code_hash) THEN
        PERFORM agent_private.refuse('PT403', 'this approval was given for another tool, version or code');
    END IF;
    PERFORM FROM public.agent_tool o WHERE o.tenant_id = tenant AND o.name = tool_name ORDER BY o.version FOR UPDATE;
    SELECT o.* INTO t FROM public.agent_tool o
    WHERE o.tenant_id = tenant AND o.name = tool_name AND o.version = approve_tool_version.version
      AND o.code_hash = approve_tool_version.code_hash;
    IF t.name IS NULL THEN
        PERFORM agent_private.refuse('PT404', 'there is no such version of this tool with this code');
    END IF;
    IF NOT (t.state = 'approved' AND t.approval_id = a.approval_id) THEN
        IF t.state <> 'draft' OR a.state <> 'executing' THEN
            PERFORM agent_private.refuse('PT409', format('this version is %s: only a draft is approved, once', t.state));
        END IF;
        UPDATE public.agent_tool o SET state = 'retired', retired_at = clock_timestamp(), retired_by = 'version ' || t.version
        WHERE o.tenant_id = tenant AND o.name = tool_name AND o.state = 'approved';
        UPDATE public.agent_tool o
        SET state = 'approved', approval_id = a.approval_id, approved_by = a.decided_by, approved_at = clock_timestamp()
        WHERE o.tenant_id = tenant AND o.name = tool_name AND o.version = t.version;
        PERFORM agent_private.append_event(tenant, a.approval_id, 'tool_approved', a.claimed_by, jsonb_build_object(
            'name', t.name, 'version', t.version, 'code_hash', t.code_hash));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN jsonb_build_object('name', t.name, 'version', t.version, 'state', 'approved');
END
$$;

-- Take a version of a tool, or with version NULL all of them, out of use. Returns how many were.
CREATE FUNCTION public.retire_tool(identity jsonb, tool_name text, version integer, by text)
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    tenant text;
    retired integer;
BEGIN
    identity := agent_private.document(identity);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        PERFORM agent_private.refuse('PT403', 'a tool needs a tenant');
    END IF;
    tenant := current_setting('agent.tenant_id');
    PERFORM FROM public.agent_tool o WHERE o.tenant_id = tenant AND o.name = tool_name ORDER BY o.version FOR UPDATE;
    UPDATE public.agent_tool o SET state = 'retired', retired_at = clock_timestamp(), retired_by = retire_tool.by
    WHERE o.tenant_id = tenant AND o.name = tool_name AND o.state <> 'retired'
      AND (retire_tool.version IS NULL OR o.version = retire_tool.version);
    GET DIAGNOSTICS retired = ROW_COUNT;
    IF retired > 0 THEN
        PERFORM agent_private.append_event(tenant, NULL, 'tool_retired', retire_tool.by,
                                           jsonb_build_object('name', tool_name, 'version', retire_tool.version));
    END IF;
    PERFORM agent_private.leave(previous);
    RETURN to_jsonb(retired);
END
$$;

-- The tools of a tenant by name, newest version first, with their code. wanted: state.
CREATE FUNCTION public.list_tools(identity jsonb, wanted jsonb DEFAULT '{}')
RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous text[];
    found jsonb;
BEGIN
    identity := agent_private.document(identity);
    wanted := agent_private.document(wanted);
    previous := agent_private.enter(identity, 'tenant');
    IF previous IS NULL THEN
        RETURN '[]';
    END IF;
    SELECT coalesce(jsonb_agg(to_jsonb(t) ORDER BY t.name, t.version DESC), '[]') INTO found FROM public.agent_tool t
    WHERE t.tenant_id = current_setting('agent.tenant_id') AND (wanted ->> 'state' IS NULL OR t.state = wanted ->> 'state');
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- One version of a tool; with version NULL the approved one, else the newest. NULL where there is none.
CREATE FUNCTION public.get_tool(identity jsonb, tool_name text, version integer DEFAULT NULL)
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
        RETURN NULL;
    END IF;
    SELECT to_jsonb(t) INTO found FROM public.agent_tool t
    WHERE t.tenant_id = current_setting('agent.tenant_id') AND t.name = tool_name
      AND (get_tool.version IS NULL OR t.version = get_tool.version)
    ORDER BY t.state = 'approved' DESC, t.version DESC LIMIT 1;
    PERFORM agent_private.leave(previous);
    RETURN found;
END
$$;

-- ---- schemas/85_execution_grants.sql

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

-- ---- registration

INSERT INTO public.agent_migration (name, checksum) VALUES ('20250201000000_safe_execution.sql', NULL) ON CONFLICT DO NOTHING;
DO $$
DECLARE other text;
BEGIN
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
        EXECUTE format('REVOKE ALL ON TABLE public.agent_migration FROM %I', other);
    END LOOP;
END
$$;
RESET search_path;
