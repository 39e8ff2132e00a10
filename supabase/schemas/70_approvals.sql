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
