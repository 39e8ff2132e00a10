#!/bin/sh
# Write the migrations from the schema files. Only until the first release: a released migration never changes.
set -eu
cd "$(dirname "$0")"

build() {
    name=$1
    title=$2
    shift 2
    {
        echo "-- $title Made from supabase/schemas/ by supabase/build_migrations.sh."
        for file in "$@"; do printf '\n-- ---- %s\n\n' "$file"; cat "$file"; done
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
}

build 20250101000000_agent_learning_system.sql "The learning layer, from nothing." schemas/[0-6]*.sql
build 20250201000000_safe_execution.sql "Approvals, the execution log, and tools that agents write." schemas/[78]*.sql
build 20250301000000_discovery_and_monitor.sql "Discovery of the application, the background learner, the monitor and its alerts." schemas/9*.sql
