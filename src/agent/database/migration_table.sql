-- Which migrations this database has. The first migration file makes the same table, for those who apply the files
-- with `psql` or the Supabase command line; whichever comes first wins.
-- Run only when the table is missing, in the transaction that holds the migration lock.

CREATE TABLE IF NOT EXISTS public.agent_migration (
    name text PRIMARY KEY,
    checksum text,
    applied_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE public.agent_migration IS 'Migrations of the learning system that this database has.';
COMMENT ON COLUMN public.agent_migration.name IS 'File name of the migration.';
COMMENT ON COLUMN public.agent_migration.checksum IS
    'SHA-256 of the file; NULL where it was applied by hand, until the next `agent migrate`.';

-- Whoever owns the table reads and writes it; no policy lets anybody else in.
ALTER TABLE public.agent_migration ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON public.agent_migration FROM PUBLIC;

DO $$
DECLARE
    role_name text;
BEGIN
    FOR role_name IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
        EXECUTE format('REVOKE ALL ON public.agent_migration FROM %I', role_name);
    END LOOP;
END
$$;
