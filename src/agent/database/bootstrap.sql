-- What Supabase has and a bare Postgres lacks: its roles and the functions that tell who is asking.
-- Run on every database of the embedded server that exists, `template1` included, so that new ones have it too.
-- Running it again changes nothing. Names, attributes and answers follow Supabase's own `auth` schema.

DO $$
BEGIN
    -- The public key: may do almost nothing.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'anon') THEN
        CREATE ROLE anon NOLOGIN NOINHERIT;
    END IF;
    -- A user with an access token.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'authenticated') THEN
        CREATE ROLE authenticated NOLOGIN NOINHERIT;
    END IF;
    -- A server with the secret key: row level security does not hold it.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
        CREATE ROLE service_role NOLOGIN NOINHERIT BYPASSRLS;
    END IF;
    -- The login of the REST server, which becomes one of the three. Without a password nobody can log in as it.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'authenticator') THEN
        CREATE ROLE authenticator LOGIN NOINHERIT;
    END IF;
END
$$;

GRANT anon, authenticated, service_role TO authenticator;

CREATE SCHEMA IF NOT EXISTS auth;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role;

-- The claims of the access token that this transaction runs for; NULL where there is none.
CREATE OR REPLACE FUNCTION auth.jwt() RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(
        nullif(current_setting('request.jwt.claim', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')
    )::jsonb
$$;

-- The user that the token was made for; NULL where there is none.
CREATE OR REPLACE FUNCTION auth.uid() RETURNS uuid
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    )::uuid
$$;

-- The role that the token names: `anon`, `authenticated` or `service_role`; NULL where there is no token.
CREATE OR REPLACE FUNCTION auth.role() RETURNS text
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(
        nullif(current_setting('request.jwt.claim.role', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
    )
$$;

-- By this mark discovery leaves them out: they are no functions of the application.
COMMENT ON FUNCTION auth.jwt() IS 'stand-in of the learning layer';
COMMENT ON FUNCTION auth.uid() IS 'stand-in of the learning layer';
COMMENT ON FUNCTION auth.role() IS 'stand-in of the learning layer';
GRANT EXECUTE ON FUNCTION auth.jwt(), auth.uid(), auth.role() TO anon, authenticated, service_role;
