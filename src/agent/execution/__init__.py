"""Tools that run only as code and people allow: one mediator, a gate for SQL, a sandbox for tools agents write."""
