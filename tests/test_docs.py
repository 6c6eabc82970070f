"""The documentation says what the code says: hooks, the plugin API, the modules, the examples."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gzip
import inspect
import io
import re
import sys
from pathlib import Path
from types import ModuleType

import pluggy
import pytest

from pgclone import api, hookspecs
from pgclone.host import validate
from pgclone.testing.storage import StorageConformance

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SFTP = ROOT / "examples" / "pgclone-sftp" / "src"
sys.path.append(str(SFTP))


@dataclasses.dataclass(frozen=True)
class Section:
    heading: str
    text: str


def sections(page: str, level: int) -> list[Section]:
    """What stands under each heading of a level that is code."""
    found = re.split(r"^(#+ .+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return [
        Section(match[1], text)
        for heading, text in zip(found[1::2], found[2::2])
        if (match := re.fullmatch(rf"#{{{level}}} `(.+)`", heading))
    ]


def blocks(page: str) -> list[str]:
    """The examples in Python."""
    return re.findall(r"^```python\n(.+?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def hooks() -> list[ast.FunctionDef]:
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def signature(hook: ast.FunctionDef) -> str:
    assert hook.returns is not None
    return f"{hook.name}({ast.unparse(hook.args)}) -> {ast.unparse(hook.returns)}".replace("'", '"')


def words(text: str | None) -> str:
    return " ".join((text or "").split())


# Hooks and the API


def test_every_hook_is_documented_under_its_signature() -> None:
    assert [section.heading for section in sections("hooks.md", 3)] == [signature(hook) for hook in hooks()]


def test_the_hooks_are_those_that_the_host_knows() -> None:
    manager = pluggy.PluginManager("pgclone")
    manager.add_hookspecs(hookspecs)
    assert sorted(hook.name for hook in hooks()) == sorted(vars(manager.hook))


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook.name)
def test_what_a_hook_promises_is_what_its_docstring_says(hook: ast.FunctionDef) -> None:
    (section,) = [section for section in sections("hooks.md", 3) if section.heading == signature(hook)]
    assert words(ast.get_docstring(hook)) in words(section.text)


def test_every_public_name_is_documented_with_its_fields() -> None:
    wanted = set()
    for name in api.__all__:
        value = getattr(api, name)
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        wanted.add(f"{name}({', '.join(fields)})" if fields else name)
    assert {section.heading for section in sections("hooks.md", 4)} == wanted


@pytest.mark.parametrize("name", [name for name in api.__all__ if name not in ("hookimpl", "log")])
def test_what_a_name_means_is_what_its_docstring_says(name: str) -> None:
    (section,) = [section for section in sections("hooks.md", 4) if section.heading.partition("(")[0] == name]
    docstring = inspect.cleandoc(getattr(api, name).__doc__)
    summary, _, arguments = docstring.partition("Args:")
    meanings = re.findall(r"^    \w+: (.+(?:\n        .+)*)", arguments, re.MULTILINE)
    assert bool(meanings) == bool(arguments)
    for text in (summary, *meanings):
        assert words(text) in words(section.text)


def test_the_api_is_all_that_the_documentation_imports() -> None:
    imported = set(re.findall(r"^from (pgclone(?:\.\w+)*) import", "\n".join(blocks("plugins.md")), re.MULTILINE))
    assert imported == {"pgclone.api", "pgclone.testing.storage"}


# Examples


def module(source: str) -> ModuleType:
    module = ModuleType("example")
    exec(compile(source, "docs/plugins.md", "exec"), vars(module))
    return module


def example(words: str) -> str:
    (source,) = [block for block in blocks("plugins.md") if words in block]
    return source


def test_every_example_of_a_plugin_is_one_that_the_host_accepts() -> None:
    plugins = [module(block) for block in blocks("plugins.md") if "@hookimpl" in block]
    manager = pluggy.PluginManager("pgclone")
    manager.add_hookspecs(hookspecs)
    for number, plugin in enumerate(plugins):
        validate(manager, plugin, str(number))
        manager.register(plugin, str(number))
        manager.check_pending()
    assert len(plugins) == 4


@pytest.mark.parametrize("name", ["__init__", "host"])
def test_the_storage_plugin_is_the_one_that_is_installed_and_tested(name: str) -> None:
    assert (SFTP / "pgclone_sftp" / f"{name}.py").read_text() in blocks("plugins.md")


def test_the_storage_plugin_has_fewer_than_60_lines() -> None:
    assert len(example("@hookimpl\ndef storage_open").splitlines()) < 60


def test_the_example_of_a_conformance_test_is_one() -> None:
    case = module(example("# tests/test_sftp.py")).TestSftp
    assert issubclass(case, StorageConformance)
    assert case.location is not StorageConformance.location


def test_the_codec() -> None:
    (codec,) = module(example("zlib")).codecs()
    sink = io.BytesIO()
    with codec.compress(sink, codec.default_level) as encoder:
        encoder.write(b"bytes")
    assert gzip.decompress(sink.getvalue()) == b"bytes"
    with codec.decompress(io.BytesIO(sink.getvalue())) as decoder:
        assert decoder.read(10) == b"bytes"
    unfinished = io.BytesIO()
    with contextlib.suppress(ZeroDivisionError), codec.compress(unfinished, 1) as encoder:
        encoder.write(b"bytes")
        raise ZeroDivisionError
    with pytest.raises(EOFError):
        gzip.decompress(unfinished.getvalue())


# The rest


def test_every_module_has_its_place_in_the_architecture() -> None:
    package = ROOT / "pgclone"
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(re.findall(r"`(pgclone\.[\w.]+)`", table("architecture.md"))) == modules


def table(page: str) -> str:
    """The first column of a page's table."""
    return "\n".join(line.split("|")[1] for line in (DOCS / page).read_text().splitlines() if line.startswith("|"))


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (DOCS / page).read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = DOCS / (path or page)
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target
