"""The plugin host: what is loaded, in which order, what is refused, and whose errors count."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core import checks

from pgclone import conf, exceptions
from pgclone import host as hosts
from pgclone.host import Failure, Host
from pgclone.locations import parse_location
from pgclone.streams import store

NOTE = """
@hookimpl
def post_dump(run, key):
    run.append(f"{__name__} {key}")
"""
"""A plugin that tells the test, which passes a list for the run, that it was called."""

OURS = ("s3", "gcs")
"""The plugins of this repository that are distributions of their own, and installed for its tests."""


class Shop:
    """Where plugins are installed: a folder on sys.path with modules, and distributions that have entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, source: str = NOTE) -> str:
        text = "from pgclone.api import *\n" + textwrap.dedent(source)
        (self.folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    def distribution(self, project: str, entry: str, source: str = NOTE, *, version: str = "1.0") -> None:
        """A distribution with one plugin, in a module of the distribution's name."""
        self.module(project.replace("-", "_"), source)
        info = self.folder / f"{project.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[pgclone]\n{entry} = {project.replace('-', '_')}\n")
        importlib.invalidate_caches()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield Shop(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def build(*plugins: str, disabled: tuple[str, ...] = ()) -> Host:
    return hosts.build(conf.resolve(plugins=plugins, disabled_plugins=disabled))


def names(host: Host) -> list[str]:
    return [plugin.name for plugin in host.plugins]


def failure(host: Host) -> Failure:
    (failure,) = host.failures
    return failure


# Order


def test_the_projects_modules_are_called_as_listed_then_installed_plugins_then_the_built_ins(shop: Shop) -> None:
    shop.distribution("dist-y", "alpha")
    shop.distribution("dist-x", "beta")
    called: list[str] = []
    host = build(shop.module("second"), shop.module("first"))
    host.tell("post_dump", run=called, key="K", size=1)
    assert called == ["second K", "first K", "dist_x K", "dist_y K"]
    assert names(host) == ["second", "first", *OURS, "beta", "alpha", "commands", "zstd", "files"]


def test_management_commands_are_called_before_everything_else(shop: Shop) -> None:
    called: list[str] = []
    note = """
    @hookimpl(tryfirst={first})
    def pre_dump(run): run.called.append(__name__)
    @hookimpl
    def pre_swap(run): run.called.append(__name__)
    """
    shop.distribution("installed", "installed", note.format(first=False))
    host = build(shop.module("own", note.format(first=False)))
    options = {"pre_dump_hooks": ("clearsessions",), "pre_swap_hooks": ("migrate", "check")}
    run = SimpleNamespace(called=called, options=options)
    database = SimpleNamespace(call_command=called.append)
    host.call("pre_dump", run=run, source=database)
    host.call("pre_swap", run=run, target=database)
    assert called == ["clearsessions", "own", "installed", "migrate", "check", "own", "installed"]


def test_what_is_loaded_says_where_it_came_from_and_what_it_implements(shop: Shop) -> None:
    shop.distribution("pgclone-note", "note", version="3.1")
    host = build(shop.module("own"))
    found = [plugin for plugin in host.plugins if plugin.name not in OURS]
    assert [(plugin.name, plugin.origin, plugin.version, list(plugin.hooks)) for plugin in found] == [
        ("own", "PGCLONE_PLUGINS", "", ["post_dump"]),
        ("note", "distribution pgclone-note", "3.1", ["post_dump"]),
        ("commands", "built in", "", ["pre_dump", "pre_swap"]),
        ("zstd", "built in", "", ["codecs"]),
        ("files", "built in", "", ["delete_key", "list_keys", "storage_open"]),
    ]


def test_a_plugin_may_be_an_object_in_a_module(shop: Shop) -> None:
    shop.module(
        "hooks",
        """
        class Note:
            @hookimpl
            def post_dump(self, run): run.append("object")
        note = Note()
        class nested:
            note = Note()
        """,
    )
    called: list[str] = []
    build("hooks:note", "hooks:nested.note").tell("post_dump", run=called, key="K", size=1)
    assert called == ["object", "object"]


# Storage: the first answer, and all of it from one plugin

STORAGE = """
@hookimpl
def storage_open(location, key): return {open}
@hookimpl
def list_keys(location): return iter([Entry("from " + __name__)]) if location.scheme == "shelf" else None
@hookimpl
def delete_key(location, key): return True if location.scheme == "shelf" else None
"""


def test_the_first_plugin_that_answers_serves_a_location(shop: Shop) -> None:
    other = STORAGE.replace("shelf", "drawer")
    host = build(shop.module("drawer", other), shop.module("one", STORAGE), shop.module("two", STORAGE))
    storage = host.storage(parse_location("shelf://any"))
    assert [entry.key for entry in storage.list(location=storage.location, prefix="")] == ["from one"]


def test_a_location_is_never_served_by_two_plugins(shop: Shop) -> None:
    host = build(shop.module("one", STORAGE.format(open="None")), shop.module("two", STORAGE.format(open="open(key)")))
    storage = host.storage(parse_location("shelf://any"))
    with pytest.raises(exceptions.PluginError, match="lists shelf://any does not open keys"):
        with store(storage, "key"):
            pass


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket", r"pip install 'pgclone\[s3\]'"),
        ("gs://bucket", r"pip install 'pgclone\[gcs\]'"),
        ("sftp://host", "Check its spelling"),
    ],
)
def test_a_location_that_nobody_serves(url: str, remedy: str) -> None:
    with pytest.raises(exceptions.ValueError, match=f'No plugin serves the storage location "{url}"(.|\n)*{remedy}'):
        build(disabled=OURS).storage(parse_location(url))


def test_a_storage_that_raises_when_it_is_asked(shop: Shop) -> None:
    source = STORAGE.replace("return iter", "raise OSError('no route'); return iter")
    with pytest.raises(exceptions.StorageError, match="shelf://any cannot be listed: no route"):
        build(shop.module("one", source)).storage(parse_location("shelf://any"))


# Disabling


def test_disabled_plugins_are_not_even_imported(shop: Shop) -> None:
    shop.distribution("pgclone-evil", "evil", "raise RuntimeError('imported')")
    shop.module("own", "raise RuntimeError('imported')")
    host = build("own", disabled=("evil", "own", "zstd", *OURS))
    assert names(host) == ["commands", "files"]
    assert host.failures == ()
    assert {"own", "pgclone_evil"} & set(sys.modules) == set()
    assert host.codecs == {}


# What is refused

REFUSED = {
    "an unknown hook": (
        "@hookimpl\ndef pre_swop(run): pass",
        'it implements "pre_swop", which is no hook. Did you mean "pre_swap"?',
    ),
    "a hook that is like no other": (
        "@hookimpl\ndef xyz(): pass",
        'it implements "xyz", which is no hook.',
    ),
    "an unknown argument": (
        "@hookimpl\ndef pre_swap(run, databse): pass",
        "{'databse'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "a generator function that opens": (
        STORAGE.replace("return {open}", "yield None"),
        "storage_open is a generator function: it never returns None",
    ),
    "a generator function that lists": (
        STORAGE.format(open="None").replace("return iter", "yield 1; return iter"),
        "list_keys is a generator function: it never returns None",
    ),
    "half a storage": (
        "@hookimpl\ndef list_keys(): pass\n@hookimpl\ndef storage_open(): pass",
        "it implements storage_open, list_keys, but a storage needs all of storage_open, list_keys, delete_key.",
    ),
    "a hook wrapper": (
        "@hookimpl(wrapper=True)\ndef pre_swap(run):\n    yield",
        "pre_swap is a hook wrapper",
    ),
    "a hook wrapper of the old kind": (
        "@hookimpl(hookwrapper=True)\ndef pre_swap(run):\n    yield",
        "pre_swap is a hook wrapper",
    ),
    "an error at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "an import that is missing": ("import pgclone_nothing", "No module named 'pgclone_nothing'"),
    "an exit at import": ("raise SystemExit(0)", "SystemExit: 0"),
    "a codec that is none": ("@hookimpl\ndef codecs(): return ['lz4']", "has no attribute 'name'"),
    "codecs that raise": ("@hookimpl\ndef codecs(): raise LookupError('no lz4')", "LookupError: no lz4"),
    "the name of another's codec": (
        "@hookimpl\ndef codecs(): return [Codec('zstd', b'', None, None)]",
        'another plugin has a codec "zstd" already.',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(shop: Shop, case: str) -> None:
    source, reason = REFUSED[case]
    shop.distribution("pgclone-other", "other")
    shop.distribution("pgclone-bad", "bad", source, version="6.6")
    shop.module("own")
    host = build("own")
    assert (failure(host).name, failure(host).origin) == ("bad", "distribution pgclone-bad")
    with pytest.raises(exceptions.PluginError) as caught:
        host.require_all()
    assert str(caught.value).startswith('The plugin "bad" (distribution pgclone-bad) cannot be loaded: ')
    assert reason in caught.value.cause
    assert 'add "bad" to PGCLONE_DISABLED_PLUGINS' in caught.value.remedy
    called: list[str] = []
    host.tell("post_dump", run=called, key="K", size=1)
    assert called == ["own K", "pgclone_other K"]  # the others work


def test_a_plugin_that_failed_half_way_is_not_called_at_all(shop: Shop) -> None:
    host = build(shop.module("own", NOTE + "@hookimpl\ndef pre_swop(): pass"))
    called: list[str] = []
    host.tell("post_dump", run=called, key="K", size=1)
    assert (called, failure(host).name) == ([], "own")


def test_a_class_instead_of_an_instance(shop: Shop) -> None:
    shop.module("hooks", "class Note:\n    @hookimpl\n    def post_dump(self): pass")
    assert '"hooks:Note" is a class: name an instance of it.' in str(failure(build("hooks:Note")).as_error())


@pytest.mark.parametrize("path", ["hooks:nothing", "hooks.nothing", "nothing", "not a name", ""])
def test_a_module_or_object_that_does_not_exist(shop: Shop, path: str) -> None:
    shop.module("hooks")
    error = failure(build(path)).as_error()
    assert error.cause.startswith(f'The plugin "{path}" (PGCLONE_PLUGINS) cannot be loaded: ')


def test_two_distributions_with_a_plugin_of_one_name(shop: Shop) -> None:
    shop.distribution("pgclone-one", "note")
    shop.distribution("pgclone-two", "note")
    host = build()
    assert 'There are two plugins of the name "note".' in str(failure(host).as_error())
    assert names(host).count("note") == 1


def test_a_module_that_is_listed_twice(shop: Shop) -> None:
    host = build(shop.module("own"), "own")
    assert 'There are two plugins of the name "own".' in str(failure(host).as_error())


def test_hooks_of_a_newer_core_are_accepted_when_they_say_so(shop: Shop) -> None:
    host = build(shop.module("own", NOTE + "@hookimpl(optionalhook=True)\ndef post_mortem(run): pass"))
    assert (host.failures, names(host)[0]) == ((), "own")


# Codecs


def test_codecs_are_collected_and_found_by_name(shop: Shop) -> None:
    own = "@hookimpl\ndef codecs():\n    yield Codec('mine', b'M', None, None)"
    host = build(shop.module("own", own))
    assert sorted(host.codecs) == ["mine", "zstd"]
    assert host.codec("mine").magic == b"M"
    with pytest.raises(exceptions.ValueError, match=r'There is no codec "lz4"(.|\n)*There are: mine, none, zstd'):
        host.codec("lz4")


# Whose errors count

RAISE = """
@hookimpl
def {hook}(run):
    run.append(__name__)
    raise {error}
"""


@pytest.mark.parametrize("error", ["ValueError('too late')", "SystemExit(3)", "PgcloneError('too late')"])
@pytest.mark.parametrize("hook", ["post_dump", "post_swap", "on_event"])
def test_after_the_fact_each_implementation_is_on_its_own(
    shop: Shop, caplog: pytest.LogCaptureFixture, hook: str, error: str
) -> None:
    source = RAISE.format(hook=hook, error=error)
    host = build(shop.module("one", source), shop.module("two", source))
    called: list[str] = []
    arguments = {"post_dump": {"key": "K", "size": 1}, "post_swap": {"old_database": None}, "on_event": {"event": 1}}
    host.tell(hook, run=called, **arguments[hook])
    assert called == ["one", "two"]
    logged = [(record.levelno, record.fields) for record in caplog.records if record.event == "hook_failed"]  # type: ignore[attr-defined]
    assert [level for level, _ in logged] == [logging.ERROR, logging.ERROR]
    assert [(fields["hook"], fields["plugin"]) for _, fields in logged] == [(hook, "one"), (hook, "two")]
    assert error.partition("'")[0] in logged[0][1]["error"]


def test_a_signal_ends_what_runs_after_the_fact(shop: Shop) -> None:
    source = "from pgclone.exceptions import Terminated\n" + RAISE.format(hook="post_dump", error="Terminated(143)")
    with pytest.raises(exceptions.Terminated):
        build(shop.module("one", source)).tell("post_dump", run=[], key="K", size=1)


@pytest.mark.parametrize("hook", ["pre_dump", "post_restore", "pre_swap"])
def test_before_the_fact_the_first_error_aborts(shop: Shop, hook: str) -> None:
    source = RAISE.format(hook=hook, error="ValueError('not like this')")
    host = build(shop.module("one", source), shop.module("two", source), disabled=("commands",))
    called: list[str] = []
    database = {"source" if hook == "pre_dump" else "target": None}
    with pytest.raises(exceptions.HookFailed) as caught:
        host.call(hook, run=called, **database)
    assert called == ["one"]
    assert caught.value.cause == f'The {hook} hook of the plugin "one" failed: ValueError: not like this'
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        ("PgcloneError('A veto.')", exceptions.PgcloneError),
        ("SystemExit(0)", exceptions.HookFailed),
        ("KeyboardInterrupt", KeyboardInterrupt),
    ],
)
def test_what_a_hook_may_raise(shop: Shop, error: str, raised: type[BaseException]) -> None:
    host = build(shop.module("one", RAISE.format(hook="post_restore", error=error)))
    with pytest.raises(raised) as caught:
        host.call("post_restore", run=[], target=None)
    assert type(caught.value) is raised


def test_the_connection_is_proven_before_each_implementation(shop: Shop) -> None:
    note = "@hookimpl\ndef post_restore(run): run.append(__name__)"
    host = build(shop.module("one", note), shop.module("two", note))
    called: list[str] = []
    host.call("post_restore", before=lambda: called.append("proof"), run=called, target=None)
    assert called == ["proof", "one", "proof", "two"]


# manage.py check


@pytest.fixture
def findings(shop: Shop, settings: Any) -> Callable[..., list[tuple[str | None, str]]]:
    def run(*plugins: str) -> list[tuple[str | None, str]]:
        settings.PGCLONE_PLUGINS = plugins
        return [(message.id, message.msg) for message in checks.run_checks(tags=["pgclone"])]

    return run


def test_check_reports_plugins_that_cannot_be_loaded(
    shop: Shop, findings: Callable[..., list[tuple[str | None, str]]]
) -> None:
    shop.distribution("pgclone-bad", "bad", "1 / 0")
    ((number, text),) = findings()
    assert number == "pgclone.E002"
    assert text.startswith('The plugin "bad" (distribution pgclone-bad) cannot be loaded: ZeroDivisionError')


def test_check_collects_what_plugins_find_and_says_which_of_them_fail(
    shop: Shop, findings: Callable[..., list[tuple[str | None, str]]]
) -> None:
    find = """
    from django.core.checks import Warning
    @hookimpl
    def check_settings(settings):
        yield Warning(f"{__name__} saw {settings.SECRET_KEY}", id=f"{__name__}.W001")
    """
    fail = "@hookimpl\ndef check_settings(): raise KeyError('SOME_SETTING')"
    assert findings(shop.module("one", find), shop.module("broken", fail), shop.module("two", find)) == [
        ("one.W001", "one saw not a secret"),
        ("pgclone.E003", "The check_settings hook of the plugin \"broken\" failed: KeyError('SOME_SETTING')"),
        ("two.W001", "two saw not a secret"),
    ]


def test_check_reports_disabled_names_that_no_plugin_has(
    findings: Callable[..., list[tuple[str | None, str]]], settings: Any
) -> None:
    settings.PGCLONE_DISABLED_PLUGINS = ["zstd", "zstdd"]
    assert findings() == [("pgclone.W001", 'PGCLONE_DISABLED_PLUGINS names "zstdd", which is no plugin.')]


def test_all_failures_are_named(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    host = build(shop.module("one", "1 / 0"), shop.module("two", "1 / 0"))
    with pytest.raises(exceptions.PluginError, match='"two"'):
        host.require_all()
    assert 'The plugin "one"' in caplog.text
