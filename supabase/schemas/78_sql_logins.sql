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
