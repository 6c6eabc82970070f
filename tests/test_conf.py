"""Options: one table gives them their names, types, defaults, settings, configuration keys, flags and arguments."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from django.core.management import load_command_class
from django.test import override_settings

import pgclone
from pgclone import checks, conf, exceptions
from pgclone.conf import Option

TAKEN = [option for option in conf.TABLE if option.commands]
SET = [option for option in conf.TABLE if option.setting]
CONFIGURED = [option for option in conf.TABLE if option.in_config]

VALUES: dict[type, list[Any]] = {
    str: ["flag", "config", "setting"],
    int: [1, 2, 3],
    tuple: [("flag",), ("config",), ("setting",)],
}


def by_name(option: Option) -> str:
    return option.name


def values(option: Option) -> list[Any]:
    """Three values: for the flag, the configuration and the setting. Of a bool, each differs from the next one."""
    default = option.default
    return VALUES.get(option.type, [not default, default, not default])


@pytest.mark.parametrize("option", conf.TABLE, ids=by_name)
def test_a_flag_beats_the_configuration_which_beats_the_setting_which_beats_the_default(option: Option) -> None:
    flag, config, setting = values(option)
    expected = option.default() if callable(option.default) else option.default
    with override_settings():
        assert getattr(conf.resolve(), option.name) == expected
    with override_settings(**{option.setting: setting} if option.setting else {}):
        if option.setting:
            expected = setting
        assert getattr(conf.resolve(), option.name) == expected
        with override_settings(PGCLONE_CONFIGS={"mine": {option.name: config} if option.in_config else {}}):
            if option.in_config:
                expected = config
            assert getattr(conf.resolve("mine"), option.name) == expected
            if option.commands:
                expected = flag
                assert getattr(conf.resolve("mine", **{option.name: flag}), option.name) == expected


@pytest.mark.parametrize("option", SET, ids=by_name)
def test_a_setting_of_none_is_a_setting_that_is_left_out(option: Option) -> None:
    left_out = conf.resolve()
    with override_settings(**{str(option.setting): None}):
        assert conf.resolve() == left_out
        assert conf.check() == []


def test_the_instance_is_the_host_name_at_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "web-7")
    assert conf.resolve().instance == "web-7"


@pytest.mark.parametrize(
    ("names", "database"),
    [(["app"], "postgres"), (["postgres"], "template1"), (["template1"], "postgres")],
)
def test_the_maintenance_database_is_none_of_the_projects(names: list[str], database: str) -> None:
    with project_databases(*names):
        assert conf.resolve().conn_db == database


def test_without_a_free_maintenance_database_one_must_be_named() -> None:
    with project_databases("postgres", "template1"):
        with pytest.raises(exceptions.ValueError, match="could not automatically determine a connection database"):
            conf.resolve()
        with override_settings(PGCLONE_CONN_DB="maintenance"):
            assert conf.resolve().conn_db == "maintenance"


WRONG: dict[type, tuple[list[Any], str]] = {
    str: ([True, ["a"], 1.5, object], "a string"),
    int: ([True, "1", 1.5], "a whole number"),
    bool: ([1, 0, "yes"], "True or False"),
    tuple: (["migrate", 5, [1], {"a": 1}], "a list of strings"),
}


@pytest.mark.parametrize("option", SET, ids=by_name)
def test_settings_of_the_wrong_type_are_refused_by_name(option: Option) -> None:
    wrong, wanted = WRONG[option.type]
    for value in wrong:
        with override_settings(**{str(option.setting): value}):
            with pytest.raises(exceptions.ValueError) as refused:
                conf.resolve()
            assert refused.value.cause == f"settings.{option.setting} is {value!r}, but must be {wanted}."
            assert [str(error) for error in conf.check()] == [str(refused.value)]


@pytest.mark.parametrize("option", CONFIGURED, ids=by_name)
def test_configurations_of_the_wrong_type_are_refused_by_name(option: Option) -> None:
    wrong, wanted = WRONG[option.type]
    with override_settings(PGCLONE_CONFIGS={"mine": {option.name: wrong[0]}}):
        with pytest.raises(exceptions.ValueError) as refused:
            conf.resolve("mine")
    assert str(refused.value) == (
        f'settings.PGCLONE_CONFIGS["mine"]["{option.name}"] is {wrong[0]!r}, but must be {wanted}.'
    )


@pytest.mark.parametrize("option", TAKEN, ids=by_name)
def test_arguments_of_the_wrong_type_are_refused_by_name(option: Option) -> None:
    wrong, wanted = WRONG[option.type]
    with pytest.raises(exceptions.ValueError) as refused:
        conf.resolve(**{option.name: wrong[0]})
    assert str(refused.value) == f"{option.name} is {wrong[0]!r}, but must be {wanted}."


def test_paths_numbers_and_sets_are_taken_for_what_they_mean() -> None:
    with override_settings(
        PGCLONE_STORAGE_LOCATION=Path("dumps"), PGCLONE_LOCK_TIMEOUT=5000, PGCLONE_EXCLUDE={"app.Book"}
    ):
        options = conf.resolve()
    assert (options.storage_location, options.lock_timeout, options.exclude) == ("dumps", "5000", ("app.Book",))


def test_an_unknown_configuration_is_refused_with_those_there_are() -> None:
    with override_settings(PGCLONE_CONFIGS={"weekly": {}, "nightly": {}}):
        with pytest.raises(exceptions.ValueError) as refused:
            conf.resolve("nigthly")
    assert str(refused.value) == (
        '"nigthly" is not a valid configuration in settings.PGCLONE_CONFIGS.\nThere are: nightly, weekly.'
    )


@pytest.mark.parametrize("key", ["exlude", "allow_dump", "as_name", "replace", "config", "EXCLUDE"])
def test_an_unknown_key_of_a_configuration_is_refused(key: str) -> None:
    with override_settings(PGCLONE_CONFIGS={"nightly": {key: []}}):
        with pytest.raises(exceptions.ValueError, match=f'"nightly".* has the key "{key}", which is no option'):
            conf.resolve("nightly")


@pytest.mark.parametrize("configs", [["nightly"], {"nightly": None}, {"nightly": ["exclude"]}, "nightly"])
def test_configurations_that_are_none_are_refused(configs: Any) -> None:
    with override_settings(PGCLONE_CONFIGS=configs):
        with pytest.raises(exceptions.ValueError, match="PGCLONE_CONFIGS must be a dict of dicts"):
            conf.resolve("nightly")
        (message,) = checks.check_settings()
        assert message.id == "pgclone.E001"


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({}, "nightly"),
        ({"instance": "web", "storage_location": "x", "codec": "none"}, "nightly"),
        ({"exclude": []}, "none"),
        ({"exclude_tables": ["app_*"]}, "none"),
        ({"pre_dump_hooks": ["check"]}, "none"),
        ({"pre_swap_hooks": []}, "none"),
    ],
)
def test_what_changes_a_dump_beside_its_configuration_makes_it_a_dump_of_none(
    given: dict[str, Any], label: str
) -> None:
    with override_settings(PGCLONE_CONFIGS={"nightly": {"exclude": ["app.Book"]}}):
        assert conf.resolve("nightly", **given).config == label
        assert conf.resolve(**given).config == "none"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("PGCLONE_STORAGE_LOCATON", "PGCLONE_STORAGE_LOCATION"),
        ("PGCLONE_ALLOW_RESTORES", "PGCLONE_ALLOW_RESTORE"),
        ("PGCLONE_PRE_SWAP_HOOK", "PGCLONE_PRE_SWAP_HOOKS"),
        ("PGCLONE_CONFIG", "PGCLONE_CONFIGS"),
        ("PGCLONE_PLUGIN", "PGCLONE_PLUGINS"),
    ],
)
def test_a_check_finds_mistyped_settings(typo: str, meant: str) -> None:
    with override_settings(**{typo: []}):
        (message,) = checks.check_settings()
    assert (message.id, message.msg, message.hint) == (
        "pgclone.E001",
        f"settings.{typo} is not a setting of pgclone.",
        f"Did you mean {meant}?",
    )


def test_a_check_finds_every_wrong_setting_and_names_each_once() -> None:
    with override_settings(
        PGCLONE_REVERSIBLE="yes", PGCLONE_EXCLUDE="app.Book", PGCLONE_CONFIGS={"a": {}, "b": {"exlude": []}}
    ):
        assert [message.msg for message in checks.check_settings()] == [
            "settings.PGCLONE_EXCLUDE is 'app.Book', but must be a list of strings.",
            "settings.PGCLONE_REVERSIBLE is 'yes', but must be True or False.",
            'settings.PGCLONE_CONFIGS["b"] has the key "exlude", which is no option.',
        ]


def test_a_check_leaves_the_settings_of_plugins_and_of_django_pgclone_alone() -> None:
    with override_settings(
        PGCLONE_S3_CONFIG={"AWS_ACCESS_KEY_ID": "x"},
        PGCLONE_S3_ENDPOINT_URL="http://localhost",
        PGCLONE_OF_A_PLUGIN=1,
        PGCLONE_CONFIGS={"nightly": {"exclude": ["app.Book"], "dump_key": "prod"}},
    ):
        assert checks.check_settings() == []


FUNCTIONS = {conf.DUMP: pgclone.dump, conf.LS: pgclone.ls, conf.RESTORE: pgclone.restore, conf.COPY: pgclone.copy}
BESIDE_THE_TABLE = {
    conf.DUMP: {"config"},
    conf.LS: {"config", "instances", "databases", "configs", "local"},
    conf.RESTORE: {"config"},
    conf.COPY: {"config", "dump_key"},
    conf.DOCTOR: {"config"},
}


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_functions_take_the_options_of_the_table(command: str) -> None:
    parameters = inspect.signature(FUNCTIONS[command]).parameters
    assert set(parameters) == options_of(command) | BESIDE_THE_TABLE[command]
    positional = [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]
    assert positional == (["dump_key"] if "dump_key" in parameters else [])


@pytest.mark.parametrize("command", BESIDE_THE_TABLE)
def test_the_command_line_takes_the_options_of_the_table(command: str) -> None:
    actions = {action.dest: action for action in subparser(command)._actions}
    general = {"help", "settings", "pythonpath", "traceback", "no_color", "force_color", "skip_checks", "verbosity"}
    of_the_command_line = {"plan"} if command == conf.DUMP else set()
    assert set(actions) - general == options_of(command) | BESIDE_THE_TABLE[command] | of_the_command_line
    for option in TAKEN:
        if command in option.commands:
            flags = [flag for flag in actions[option.name].option_strings if not flag.startswith("--no-")]
            assert flags == list(option.flags)
            assert actions[option.name].default is None


@pytest.mark.parametrize("command", BESIDE_THE_TABLE)
def test_the_help_explains_every_option(command: str) -> None:
    text = " ".join(subparser(command).format_help().split())
    for option in TAKEN:
        if command in option.commands:
            assert option.help in text
    assert "==SUPPRESS==" not in text


def options_of(command: str) -> set[str]:
    return {option.name for option in TAKEN if command in option.commands}


def subparser(command: str) -> argparse.ArgumentParser:
    parser = load_command_class("pgclone", "pgclone").create_parser("manage.py", "pgclone")
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[command]
    return found


@pytest.fixture(autouse=True)
def nothing_is_set() -> Iterator[None]:
    """No PGCLONE_ settings of the tests' own."""
    from django.conf import settings

    assert not [name for name in dir(settings) if name.startswith("PGCLONE_")]
    yield


class project_databases(override_settings):
    """DATABASES with these names. Django's own handler of connections, which was made before, keeps its entries."""

    def __init__(self, *names: str) -> None:
        super().__init__(DATABASES={f"alias{number}": {"NAME": name} for number, name in enumerate(names)})

    def enable(self) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Django warns of exactly this
            super().enable()


# For plugins


@dataclasses.dataclass(frozen=True)
class Colours:
    """What a plugin's dict may hold."""

    wall: str = "white"
    door: str | None = dataclasses.field(default=None, metadata={"choices": ("red", "green")})
    layers: int = 1
    shine: float = 0.5
    wet: bool = False
    labels: Mapping[str, str] | None = None


def test_a_dict_of_a_plugin_is_a_dataclass_with_its_defaults() -> None:
    assert conf.read_settings("PGCLONE_COLOURS", Colours) == Colours()
    given = {"wall": Path("/grey"), "door": "red", "layers": 2, "shine": 1, "wet": True, "labels": {"a": "b"}}
    with override_settings(PGCLONE_COLOURS=given):
        assert conf.read_settings("PGCLONE_COLOURS", Colours) == Colours("/grey", "red", 2, 1, True, {"a": "b"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("white", "settings.PGCLONE_COLOURS must be a dict."),
        ({"wal": "x"}, 'settings.PGCLONE_COLOURS has the key "wal", which is no option.\nDid you mean "wall"?'),
        ({"sky": "x"}, "There are: wall, door, layers, shine, wet, labels."),
        ({"wall": 7}, 'settings.PGCLONE_COLOURS["wall"] must be str, and is int.'),
        ({"layers": True}, 'settings.PGCLONE_COLOURS["layers"] must be int, and is bool.'),
        ({"layers": None}, 'settings.PGCLONE_COLOURS["layers"] must be int, and is NoneType.'),
        ({"wet": 1}, 'settings.PGCLONE_COLOURS["wet"] must be bool, and is int.'),
        ({"labels": {"a": 1}}, 'settings.PGCLONE_COLOURS["labels"] must be '),
        ({"door": "blue"}, 'settings.PGCLONE_COLOURS["door"] is none of those that there are.\nThere are: red, green.'),
    ],
)
def test_a_dict_of_a_plugin_that_makes_no_sense(given: Any, words: str) -> None:
    with override_settings(PGCLONE_COLOURS=given), pytest.raises(exceptions.ValueError) as caught:
        conf.read_settings("PGCLONE_COLOURS", Colours)
    assert words in str(caught.value)


def test_a_wrong_value_is_not_shown_since_it_may_be_a_secret() -> None:
    with override_settings(PGCLONE_COLOURS={"layers": "s3cr3t", "door": "s3cr3t"}):
        with pytest.raises(exceptions.ValueError) as caught:
            conf.read_settings("PGCLONE_COLOURS", Colours)
    assert "s3cr3t" not in str(caught.value)


def test_a_plugin_asks_for_an_option_of_the_project() -> None:
    assert conf.option("sweep_after") == 24 * 3600
    with override_settings(PGCLONE_SWEEP_AFTER=60):
        assert conf.option("sweep_after") == 60
