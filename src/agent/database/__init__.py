"""The way to the data: transports to the storage functions, the embedded server, the migrations."""

from __future__ import annotations

from agent.database.opening import open_database
from agent.database.protocol import Database

__all__ = ["Database", "open_database"]
