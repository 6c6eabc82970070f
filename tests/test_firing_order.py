"""All hooks, over the life of a dump: who is called, in which order, and on which database."""

from __future__ import annotations

import json
from pathlib import Path

from tests import settings
from tests.project import Project

P = "shop"
T = "shop__temp"


def test_the_firing_order_of_all_hooks(project: Project, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    orphan = tmp_path / "calls.stored" / "prod/default/none/2020-01-31-10-20-30-123456.dump.json"
    orphan.parent.mkdir(parents=True)
    orphan.write_text("the manifest of a dump that was never committed")
    project.environ["PGCLONE_RECORD"] = str(log)
    project.settings = {
        "INSTALLED_APPS": [*settings.INSTALLED_APPS, "tests.recorder"],
        "PGCLONE_PLUGINS": ["tests.recorder.hooks:first", "tests.recorder.hooks:second"],
        "PGCLONE_STORAGE_LOCATION": "recorded://here",
        "PGCLONE_SWEEP_AFTER": 0,
        "PGCLONE_PRE_DUMP_HOOKS": ["record"],
        "PGCLONE_PRE_SWAP_HOOKS": ["migrate", "record"],
    }

    def calls(*argv: str) -> list[list[str]]:
        log.write_text("")
        done = project.manage(*argv)
        assert done.status == 0, done.err
        return [json.loads(line) for line in log.read_text().splitlines()]

    loading = [["second", "codecs", P], ["first", "codecs", P]]

    assert calls("check") == [
        *loading,
        ["first", "check_settings", "prod", P],
        ["second", "check_settings", "prod", P],
    ]
    assert calls("pgclone", "dump") == [
        *loading,
        ["first", "list_keys", "prod/", P],  # what dead runs left
        ["first", "delete_key", "K.json", P],
        ["first", "list_keys", "prod/default/none/", P],  # is the key free?
        ["command", "record", P],
        ["first", "pre_dump", P, P],
        ["second", "pre_dump", P, P],
        ["first", "storage_open", "wb", "K", "True", P],
        ["first", "storage_open", "wb", "K.json", "False", P],
        ["first", "post_dump", "dump", "True", P],
        ["second", "post_dump", "dump", "True", P],
        ["first", "on_event", "Finished", "dump", P],
        ["second", "on_event", "Finished", "dump", P],
    ]
    assert calls("pgclone", "restore", "prod", "--reversible") == [
        *loading,
        ["first", "list_keys", "/", P],
        ["first", "list_keys", "K.json", P],
        ["first", "storage_open", "rb", "K.json", "False", P],
        ["first", "storage_open", "rb", "K", "False", P],
        ["first", "post_restore", T, T],
        ["second", "post_restore", T, T],
        ["command", "record", T],
        ["first", "pre_swap", T, T],
        ["second", "pre_swap", T, T],
        ["first", "post_swap", "shop__pre", P],
        ["second", "post_swap", "shop__pre", P],
        ["first", "on_event", "Finished", "restore", P],
        ["second", "on_event", "Finished", "restore", P],
    ]
    assert calls("pgclone", "restore", ":pre") == [
        *loading,
        ["command", "record", T],
        ["first", "pre_swap", T, T],
        ["second", "pre_swap", T, T],
        ["first", "post_swap", "None", P],
        ["second", "post_swap", "None", P],
        ["first", "on_event", "Finished", "restore", P],
        ["second", "on_event", "Finished", "restore", P],
    ]
