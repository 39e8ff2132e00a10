-- Discovery of the application, the background learner, the monitor and its alerts. Made from supabase/schemas/ by supabase/build_migrations.sh.

-- ---- schemas/90_app_structure.sql

-- What discovery found of the application's database.

-- ---- registration

INSERT INTO public.agent_migration (name, checksum) VALUES ('20250301000000_discovery_and_monitor.sql', NULL) ON CONFLICT DO NOTHING;
DO $$
DECLARE other text;
BEGIN
    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP
        EXECUTE format('REVOKE ALL ON TABLE public.agent_migration FROM %I', other);
    END LOOP;
END
$$;
RESET search_path;
