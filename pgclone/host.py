"""Builds the plugin host: loads the plugins, in order, and calls their hooks.

Order of calls: the project's own modules (`PGCLONE_PLUGINS`) as listed, then installed plugins by the reverse of their
names, then the built-ins. The built-in `commands` asks to go first.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

import pluggy

from pgclone import exceptions, hookspecs
from pgclone.conf import Options
from pgclone.events import log
from pgclone.types import Codec, Location

GROUP = "pgclone"
"""The entry-point group, and the marker's name."""

BUILT_IN = ("files", "zstd", "commands")

STORAGE_HOOKS = ("storage_open", "list_keys", "delete_key")


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin: where it came from, and which hooks it implements."""

    name: str
    origin: str
    version: str
    hooks: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be loaded."""

    name: str
    origin: str
    error: Exception | SystemExit

    def as_error(self) -> exceptions.PluginError:
        return exceptions.PluginError(
            f'The plugin "{self.name}" ({self.origin}) cannot be loaded: {type(self.error).__name__}: {self.error}',
            f'Mend or uninstall it, or add "{self.name}" to PGCLONE_DISABLED_PLUGINS if nothing depends on it.',
        )


@dataclass(frozen=True)
class Host:
    """The plugins of one command."""

    manager: pluggy.PluginManager
    plugins: tuple[Plugin, ...]
    failures: tuple[Failure, ...] = ()
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    """Names in `PGCLONE_DISABLED_PLUGINS` that no plugin has."""

    def require_all(self) -> None:
        """Refuse to work when a plugin is missing: it may be the one that masks personal data.

        Raises:
            PluginError: The first plugin that could not be loaded. The log names the others.
        """
        for other in self.failures[1:]:
            log.error("plugin_failed", error=str(other.as_error()))
        for failure in self.failures:
            raise failure.as_error() from failure.error

    def call(self, hook: str, *, before: Callable[[], None] = lambda: None, **arguments: Any) -> None:
        """Call all implementations of a lifecycle hook, one after the other.

        Args:
            before: Called before each implementation.

        Raises:
            PgcloneError: What an implementation raised, as it is.
            HookFailed: Any other exception that an implementation raised, `SystemExit` included.
        """
        for name, caller in self.callers(hook):
            before()
            try:
                caller(**arguments)
            except (exceptions.PgcloneError, exceptions.Terminated):
                raise
            except (Exception, SystemExit) as error:
                raise exceptions.HookFailed(
                    f'The {hook} hook of the plugin "{name}" failed: {type(error).__name__}: {error}',
                    "Mend the hook, or what it objects to, and try again.",
                ) from error

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call all implementations of a hook that runs after the fact, each on its own: errors are logged."""
        for name, caller in self.callers(hook):
            try:
                caller(**arguments)
            except exceptions.Terminated:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a plugin raises is too late to count
                log.error("hook_failed", hook=hook, plugin=name, error=repr(error))

    def storage(self, location: Location) -> Storage:
        """The plugin that serves a location.

        Raises:
            ValueError: None does.
            StorageError: One raised when it was asked.
        """
        for plugin in self._implementers("list_keys"):
            try:
                answer = self._caller("list_keys", plugin)(location=location, prefix="")
            except exceptions.PgcloneError:
                raise
            except Exception as error:
                raise exceptions.StorageError(f"{location} cannot be listed: {error}") from error
            if answer is not None:
                return Storage(location, *(self._caller(hook, plugin) for hook in STORAGE_HOOKS))
        extra = {"s3": "s3", "gs": "gcs"}.get(location.scheme)
        raise exceptions.ValueError(
            f'No plugin serves the storage location "{location}".',
            f"Install it: pip install 'pgclone[{extra}]'"
            if extra
            else "Check its spelling, or install the plugin for it.",
        )

    def codec(self, name: str) -> Codec:
        """The codec of that name.

        Raises:
            ValueError: No plugin brings it.
        """
        if name not in self.codecs:
            raise exceptions.ValueError(
                f'There is no codec "{name}".',
                f"There are: {', '.join(sorted([*self.codecs, 'none']))}. Others come with plugins.",
            )
        return self.codecs[name]

    def callers(self, hook: str) -> Iterator[tuple[str, pluggy.HookCaller]]:
        """The plugins that implement a hook, in the order of calls: each one's name, and what calls it alone."""
        for plugin in self._implementers(hook):
            yield self.manager.get_name(plugin) or "", self._caller(hook, plugin)

    def _implementers(self, hook: str) -> list[Any]:
        """The plugins that implement a hook, in the order of calls."""
        return [impl.plugin for impl in reversed(getattr(self.manager.hook, hook).get_hookimpls())]

    def _caller(self, hook: str, plugin: object) -> pluggy.HookCaller:
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        return self.manager.subset_hook_caller(hook, remove_plugins=others)


@dataclass(frozen=True)
class Storage:
    """The storage hooks of the plugin that serves a location."""

    location: Location
    open: pluggy.HookCaller
    list: pluggy.HookCaller
    delete: pluggy.HookCaller


def build(options: Options) -> Host:
    """Load the built-ins, the installed plugins and the project's own modules.

    Plugins that cannot be loaded end up in `Host.failures`: `ls` and `manage.py check` work without them, and
    everything else refuses to (`Host.require_all`).
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.add_hookcall_monitoring(_observe, lambda *_: None)
    plugins: list[Plugin] = []
    failures: list[Failure] = []

    seen: set[str] = set()

    def load(name: str, origin: str, version: str, find: Any) -> None:
        seen.add(name)
        if name in options.disabled_plugins:
            return
        plugin: object = None
        try:
            plugin = find()
            validate(manager, plugin, name)
            manager.register(plugin, name)
            manager.check_pending()
        except (Exception, SystemExit) as error:  # noqa: BLE001  importing a plugin runs a stranger's code
            if manager.has_plugin(name) and manager.get_plugin(name) is plugin:
                manager.unregister(name=name)
            failures.append(Failure(name, origin, _explained(error)))
        else:
            hooks = tuple(caller.name for caller in manager.get_hookcallers(plugin) or ())
            plugins.append(Plugin(name, origin, version, hooks))

    for name in BUILT_IN:
        load(name, "built in", "", lambda name=name: importlib.import_module(f"pgclone.plugins.{name}"))
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        load(entry.name, f"distribution {_name(entry.dist)}", _version(entry.dist), entry.load)
    for path in reversed(options.plugins):
        load(path, "PGCLONE_PLUGINS", "", lambda path=path: EntryPoint(path, path, GROUP).load())

    codecs: dict[str, Codec] = {}
    for plugin in plugins:
        try:
            _collect(codecs, manager, plugin)
        except Exception as error:  # noqa: BLE001
            failures.append(Failure(plugin.name, plugin.origin, error))
    unknown = tuple(sorted({*options.disabled_plugins} - seen))
    return Host(manager, tuple(reversed(plugins)), tuple(failures), codecs, unknown)


def validate(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Refuse what pluggy would let pass, and would go wrong at three in the morning.

    Raises:
        PluginError: Which rule the plugin breaks.
    """
    if manager.has_plugin(name):
        raise exceptions.PluginError(f'There are two plugins of the name "{name}".')
    if inspect.isclass(plugin):
        raise exceptions.PluginError(f'"{name}" is a class: name an instance of it.')
    if plugin.__hash__ is None:
        raise exceptions.PluginError(f'"{name}" cannot be hashed, which pluggy needs: a dataclass would be frozen.')
    found = [hook for hook in dir(plugin) if manager.parse_hookimpl_opts(plugin, hook) is not None]
    for hook in found:
        options: Mapping[str, Any] = manager.parse_hookimpl_opts(plugin, hook) or {}
        if options.get("wrapper") or options.get("hookwrapper"):
            raise exceptions.PluginError(
                f"{hook} is a hook wrapper: plugins are called one by one, and there is nothing to wrap."
            )
        if hook in STORAGE_HOOKS and inspect.isgeneratorfunction(getattr(plugin, hook)):
            raise exceptions.PluginError(
                f"{hook} is a generator function: it never returns None, and would answer for every storage location."
            )
    stored = [hook for hook in STORAGE_HOOKS if hook in found]
    if stored and len(stored) < len(STORAGE_HOOKS):
        raise exceptions.PluginError(
            f"it implements {', '.join(stored)}, but a storage needs all of {', '.join(STORAGE_HOOKS)}."
        )


def _explained(error: Exception | SystemExit) -> Exception | SystemExit:
    """pluggy's word on an unknown hook, with the name that was probably meant."""
    text = str(error)
    if isinstance(error, pluggy.PluginValidationError) and "unknown hook" in text:
        unknown = text.split("'")[1]
        known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{GROUP}_spec")]
        close = difflib.get_close_matches(unknown, known, n=1)
        return exceptions.PluginError(
            f'it implements "{unknown}", which is no hook.' + (f' Did you mean "{close[0]}"?' if close else "")
        )
    return error


def _collect(codecs: dict[str, Codec], manager: pluggy.PluginManager, plugin: Plugin) -> None:
    if "codecs" not in plugin.hooks:
        return
    implementation = manager.get_plugin(plugin.name)
    others = [other for other in manager.get_plugins() if other is not implementation]
    answers: Iterable[Iterable[Codec]] = manager.subset_hook_caller("codecs", remove_plugins=others)()
    for codec in (codec for answer in answers for codec in answer):
        if codec.name in codecs:
            raise exceptions.PluginError(f'another plugin has a codec "{codec.name}" already.')
        codecs[codec.name] = codec


def _observe(hook: str, implementations: Any, _arguments: Mapping[str, Any]) -> None:
    log.debug("hook_called", hook=hook, plugins=[impl.plugin_name for impl in reversed(implementations)])


def _name(distribution: Distribution | None) -> str:
    return distribution.metadata["Name"] if distribution else "unknown"


def _version(distribution: Distribution | None) -> str:
    return distribution.version if distribution else ""
