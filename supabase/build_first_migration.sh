#!/bin/sh
# Write the first migration from the schema files. Only until the first release: a released migration never changes.
set -eu
cd "$(dirname "$0")"
name=20250101000000_agent_learning_system.sql
{
    echo "-- The learning layer, from nothing. Made from supabase/schemas/ by supabase/build_first_migration.sh."
    for file in schemas/*.sql; do printf '\n-- ---- %s\n\n' "$file"; cat "$file"; done
    printf '\n-- ---- registration\n\n'
    echo "INSERT INTO public.agent_migration (name, checksum) VALUES ('$name', NULL) ON CONFLICT DO NOTHING;"
    echo "DO \$\$"
    echo "DECLARE other text;"
    echo "BEGIN"
    echo "    FOR other IN SELECT rolname FROM pg_roles WHERE rolname IN ('anon', 'authenticated') LOOP"
    echo "        EXECUTE format('REVOKE ALL ON TABLE public.agent_migration FROM %I', other);"
    echo "    END LOOP;"
    echo "END"
    echo "\$\$;"
    echo "RESET search_path;"
} > "migrations/$name"
