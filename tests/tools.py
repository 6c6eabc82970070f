"""Folders with a pg_dump, a pg_restore and a psql that go wrong: the real ones, behind scripts."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = '''#!{python} -IS
import os, signal, subprocess, sys

tool = {tool!r}


def exact():
    os.execv(tool, [tool, *sys.argv[1:]])


def die(after=None, status=None, by=None, section=None):
    """Pass that many bytes on (None: all), then stop the real tool and end with a status, or by a signal."""
    if section and f"--section={{section}}" not in sys.argv:
        exact()
    feeding = tool.endswith("pg_restore")
    pipe = {{"stdin": subprocess.PIPE}} if feeding else {{"stdout": subprocess.PIPE}}
    process = subprocess.Popen([tool, *sys.argv[1:]], **pipe)
    source, sink = (sys.stdin.buffer, process.stdin) if feeding else (process.stdout, sys.stdout.buffer)
    left = sys.maxsize if after is None else after
    while left and (block := source.read(min(left, 65536))):
        sink.write(block)
        sink.flush()
        left -= len(block)
    if after is None:
        process.communicate() if feeding else process.wait()
    process.kill()
    process.wait()
    if by:
        os.kill(os.getpid(), by)
    sys.exit(status)


if "--version" in sys.argv or "--list" in sys.argv:
    exact()
{action}
'''


def make_tools(
    folder: Path, bin: Path, *, pg_dump: str = "exact()", pg_restore: str = "exact()", psql: str = "exact()"
) -> Path:
    """A folder for PGCLONE_BIN_DIR. The actions are Python: `exact()`, `die(after=…, status=… or by=…, section=…)`."""
    tools = folder / "tools"
    tools.mkdir()
    for name, action in (("pg_dump", pg_dump), ("pg_restore", pg_restore), ("psql", psql)):
        script = tools / name
        script.write_text(_SCRIPT.format(python=sys.executable, tool=str(bin / name), action=action))
        script.chmod(0o755)
    return tools
