"""The graphs of `langgraph.json` and what they run on: a sample shop and, without a model key, a rule-based model."""
