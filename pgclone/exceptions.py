"""Every error of pgclone, in one tree: what happened, to which object, and what to do about it.

The command line prints ``str(error)`` on stderr and exits with status 1. `Error`, `KeyError`, `ValueError` and
`RuntimeError` are the names that callers of django-pgclone catch; every error here is one of them.
"""

from __future__ import annotations

import builtins


class PgcloneError(Exception):
    """The root of the tree.

    Args:
        cause: One sentence that names the object and what is wrong with it.
        remedy: What the reader can do about it.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


Error = PgcloneError


class KeyError(PgcloneError, builtins.KeyError):
    """Something was looked up by a name that does not exist."""


class ValueError(PgcloneError, builtins.ValueError):
    """An option, a setting or an argument is wrong. Nothing was begun."""


class RuntimeError(PgcloneError, builtins.RuntimeError):
    """A dump, restore or copy could not be done. The primary database is as it was."""


class Forbidden(RuntimeError):
    """The settings (`PGCLONE_ALLOW_*`) or the situation do not allow this command."""


class KeyNotFound(KeyError, RuntimeError):
    """No dump has this key."""


class DatabaseNotFound(RuntimeError):
    """The server has no database of this name."""


class PluginError(RuntimeError):
    """A plugin cannot be loaded, breaks its contract or has failed."""


class HookFailed(RuntimeError):
    """A hook raised. The exception it raised is the `__cause__`."""


class StorageError(RuntimeError):
    """The storage could not read, write or list."""


class CorruptDump(RuntimeError):
    """What the storage returned is not what was dumped: truncated, changed or incomplete."""


class ToolFailed(RuntimeError):
    """pg_dump or pg_restore is missing, too old or has failed."""


class ServerError(RuntimeError):
    """The server cannot be reached, refuses the login or a statement, or lacks something.

    Args:
        sqlstate: The server's error code (PostgreSQL docs, appendix A), if it gave one.
    """

    def __init__(self, cause: str, remedy: str = "", *, sqlstate: str | None = None) -> None:
        super().__init__(cause, remedy)
        self.sqlstate = sqlstate


class NotPossible(RuntimeError):
    """Found before anything was touched: this server, role or database does not allow what was asked for."""


class Locked(RuntimeError):
    """Another run is at work on the same database."""


class SwapFailed(RuntimeError):
    """The swap was rolled back. The primary database is as it was."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived. Not a `PgcloneError`: nothing should catch it but clean up."""
