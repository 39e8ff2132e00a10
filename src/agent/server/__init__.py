"""What runs beside the graphs in a LangGraph server."""
