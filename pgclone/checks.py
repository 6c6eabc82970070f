"""Django system checks: the settings, and the plugins."""

from __future__ import annotations

from typing import Any

from django.core import checks

from pgclone import conf, exceptions


@checks.register("pgclone")
def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Settings that the core reads (E001), plugins that cannot be loaded (E002), and what plugins say of theirs."""
    errors = [_message(error, "pgclone.E001") for error in conf.check()]
    return errors or _check_plugins()


def _check_plugins() -> list[checks.CheckMessage]:
    from pgclone import host

    built = host.build(conf.resolve())
    messages = [_message(failure.as_error(), "pgclone.E002") for failure in built.failures]
    messages += [
        checks.Warning(f'PGCLONE_DISABLED_PLUGINS names "{name}", which is no plugin.', id="pgclone.W001")
        for name in built.unknown
    ]
    for name, call in built.callers("check_settings"):
        try:
            messages += [message for answer in call(settings=conf.settings()) for message in answer]
        except Exception as error:  # noqa: BLE001  a plugin's check that fails is a finding, too
            text = f'The check_settings hook of the plugin "{name}" failed: {error!r}'
            messages.append(checks.Error(text, id="pgclone.E003"))
    return messages


def _message(error: exceptions.PgcloneError, id: str) -> checks.CheckMessage:
    return checks.Error(error.cause, hint=error.remedy or None, id=id)
