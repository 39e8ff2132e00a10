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
