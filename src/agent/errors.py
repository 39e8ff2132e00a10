"""One error tree, branched by who must act.

`LearningError`
    `ConfigurationError`     the developer who wrote the code or the settings
    `OperatorError`          whoever runs the database, the queue or the machine
        `DatabaseUnavailable`    it could not be reached: try again, or spool
        `MigrationError`         the schema is missing, older, newer or edited
        `AccessRefused`          the database refused this role or this identity
    `CallerError`            the program that called us with this input
        `IdentityError`          nobody, or a malformed somebody
        `NotFound`               proven absence of the thing named
        `InvalidLearning`        a value that the store's schema refuses
        `InvalidRequest`         a call of a tool, a search, an import or a request for approval that cannot be
    `ConflictError`          nobody: fresh data was written meanwhile, read it and decide again
    `Refused`                nobody: a recorded decision against it, by policy, database or person
    `ModelError`             the language model or embedder answered with something unusable
"""

from __future__ import annotations


class LearningError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigurationError(LearningError):
    """A setting or an argument is wrong; the message names it, its value and what is allowed."""


class OperatorError(LearningError):
    """Something outside the program must be started, migrated or granted."""


class DatabaseUnavailable(OperatorError):
    """The database could not be reached. The same call may succeed later."""


class MigrationError(OperatorError):
    """The schema of the database does not fit this version of the package."""


class AccessRefused(OperatorError):
    """The database refused: the key, the role, or a row of somebody else."""


class CallerError(LearningError):
    """The input of this call cannot be used; nothing was changed."""


class IdentityError(CallerError):
    """No identity, or one that cannot be: an empty or over-long id, or one with a NUL."""


class NotFound(CallerError):
    """The thing named does not exist for this identity."""


class InvalidLearning(CallerError):
    """A value that does not fit the schema of its store."""


class InvalidRequest(CallerError):
    """A call of a tool, a search, an import or a request for approval that cannot be: unknown, malformed, out of
    bounds."""


class Refused(LearningError):
    """A recorded decision against what was asked. Nothing was done; asking again the same way changes nothing."""


class ConflictError(LearningError):
    """What was read has changed since; read again and decide on the fresh data."""


class ModelError(LearningError):
    """A model's or an embedder's answer that cannot be used; nothing was written from it."""
