"""The tree tests itself: who may use whom, and what is written about what is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pagekit
from pagekit import cli, errors

ROOT = Path(__file__).parent.parent
CRATES = ROOT / "crates"
ENGINE = CRATES / "pagekit" / "src"
PYTHON = ROOT / "python" / "pagekit"

# Rooms of the engine, and the rooms they may use (ARCHITECTURE.md says why).
MAY_USE = {
    "page": set(),
    "page_set": {"page"},
    "door": {"error"},
    "working_set": {"page", "page_set", "error", "source"},
    "error": set(),
    "thread": set(),
    "process": {"error"},
    "wire": {"page"},
    # A helper process ends with the thread that started it, and answers one process.
    "source": {"page", "error", "thread", "process"},
    "layer": {"page", "error", "source"},
    "stack": {"page", "error", "source", "layer"},
    "delivery": {"error"},
    "template": {
        *("page", "page_set", "error", "thread", "process"),
        *("source", "stack", "delivery", "working_set"),
    },
    "backend": {"page", "template"},
    "engine": {"page", "error", "thread", "template", "backend"},
    "client": {
        *("page", "page_set", "error", "thread", "wire", "delivery", "door"),
        *("template", "backend", "engine"),
    },
    "map": {
        *("page", "error", "thread", "process", "delivery", "template", "backend", "engine"),
    },
    "relay": {"page", "error", "thread", "wire", "door", "engine"},
    "server": {"page", "error", "delivery", "door", "template", "engine", "client", "relay"},
}
FAMILIES = ["source", "layer", "backend", "client"]


def code_of(path: Path) -> str:
    """Rust without comments and without its unit tests."""
    text = path.read_text().split("#[cfg(test)]\nmod tests")[0]
    return re.sub(r"//.*", "", text)


def rust_files(room: str) -> list[Path]:
    directory = ENGINE / room
    found = sorted(directory.rglob("*.rs")) if directory.is_dir() else [ENGINE / f"{room}.rs"]
    return [path for path in found if path.stem != "conformance"]


def members(family: str) -> list[str]:
    """The pieces of a family, one file or directory each."""
    first = {path.relative_to(ENGINE / family).parts[0] for path in rust_files(family)}
    return sorted(name.removesuffix(".rs") for name in first - {"mod.rs"})


# Rust


def test_every_room_is_known_and_in_the_table() -> None:
    library = (ENGINE / "lib.rs").read_text()
    rooms = set(re.findall(r"^pub mod (\w+);", library, re.MULTILINE))
    assert rooms == set(MAY_USE)
    table = set(re.findall(r"\[`(\w+)`\]", "".join(re.findall(r"^//! \|.*", library, re.M))))
    assert rooms <= table, rooms - table


@pytest.mark.parametrize("room", MAY_USE)
def test_rooms_use_what_they_may(room: str) -> None:
    for path in rust_files(room):
        code = code_of(path)
        assert "crate::{" not in code, f"{path}: one `use` a room, so that this test can read it"
        used = set(re.findall(r"\bcrate::(\w+)", code)) & set(MAY_USE)
        assert used <= MAY_USE[room] | {room}, f"{path} uses {used - MAY_USE[room]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_do_not_know_each_other(family: str) -> None:
    for path in rust_files(family):
        if path == ENGINE / family / "mod.rs":
            continue
        known = set(re.findall(rf"(?:super|crate::{family})::(\w+)", code_of(path)))
        assert not known & set(members(family)), path


def test_only_the_stack_names_sources_and_layers() -> None:
    named = {
        path.relative_to(ENGINE).as_posix()
        for path in sorted(ENGINE.rglob("*.rs"))
        for family in ("source", "layer")
        for member in members(family)
        if re.search(rf"\b{family}::(\{{[^}}]*\b)?{member}\b", code_of(path))
    }
    assert named == {"stack.rs"}


def test_the_engine_knows_backends_by_their_trait_only() -> None:
    for path in rust_files("engine"):
        for member in members("backend"):
            assert not re.search(rf"\bbackend::{member}\b", code_of(path)), path


def test_the_wire_has_no_sockets_and_no_threads() -> None:
    for path in rust_files("wire"):
        code = code_of(path)
        assert not re.search(r"\b(rustix|libc|uffd|std::(net|os|thread|sync|io|fs))\b", code), path


def test_crates_depend_on_what_they_may() -> None:
    ours = {"uffd": set(), "pagekit": {"uffd"}, "pagekit-shim": {"uffd", "pagekit"}}
    ours |= {"pagekitd": {"pagekit"}, "pagekit-py": {"pagekit", "uffd"}}
    assert {path.name for path in CRATES.iterdir()} == set(ours)
    for crate, may in ours.items():
        manifest = tomllib.loads((CRATES / crate / "Cargo.toml").read_text())
        assert set(manifest["dependencies"]) & set(ours) == may, crate


def used_of_the_engine(crate: str) -> set[str]:
    found: set[str] = set()
    for path in (CRATES / crate / "src").rglob("*.rs"):
        code = code_of(path)
        found |= set(re.findall(r"\bpagekit::(\w+)", code))
        for group in re.findall(r"\bpagekit::\{([^}]*)\}", code):
            found |= {name.strip().split("::")[0] for name in group.split(",")}
    return found


def test_what_other_crates_use_of_the_engine() -> None:
    assert used_of_the_engine("uffd") == set()
    assert used_of_the_engine("pagekit-shim") <= {"page", "wire", "thread"}
    # Registration and conversion: nothing that could decide anything.
    known = {"delivery", "error", "server", "template", "working_set"}
    shown = {"page", "map", "process", "relay", "stack", "wire"}
    assert used_of_the_engine("pagekit-py") <= known | shown
    assert used_of_the_engine("pagekitd") <= known | {"stack"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_piece_is_in_its_familys_table(family: str) -> None:
    table = "".join(re.findall(r"^//! \|.*", (ENGINE / family / "mod.rs").read_text(), re.M))
    assert set(re.findall(r"\[`(\w+)`\]", table)) == set(members(family))


@pytest.mark.parametrize("family", ["source", "layer"])
def test_every_piece_of_a_stack_is_explained_where_it_is_written(family: str) -> None:
    stack = (ENGINE / "stack.rs").read_text()
    helps = {
        "pagekitd --help": (CRATES / "pagekitd" / "src" / "options.rs").read_text(),
        "pagekit serve --help": cli.group.get_command(None, "serve").help,  # type: ignore
        "pagekit.Template": inspect.getdoc(pagekit.Template),
    }
    for member in members(family):
        assert f"[`crate::{family}::{member}`]" in stack, f"stack.rs does not mention {member}"
        for name, text in helps.items():
            assert re.search(rf"\b{member}\b", text or ""), f"{name} does not mention {member}"


def test_every_piece_runs_the_conformance_suite() -> None:
    for family in ("source", "layer"):
        for path in rust_files(family):
            if path.stem != "mod":
                assert "conformance::check(" in path.read_text(), path


def test_every_feature_has_its_tests_and_their_page_is_true() -> None:
    tests = {path.stem: path.read_text() for path in (CRATES / "uffd" / "tests").glob("*.rs")}
    table = (CRATES / "uffd" / "src" / "features.rs").read_text().split("\nfeatures! {")[1]
    features = re.findall(r'^ {8}([A-Z_]+)(?: = \d+)?: "', table, re.MULTILINE)
    assert len(features) >= 24
    for name in features:
        assert tests.get(name.lower(), "").startswith(f"//! {name}: "), name
        assert f'need("{name}")' in tests[name.lower()], f"{name} is not asked for"
    page = (CRATES / "uffd" / "tests" / "README.md").read_text()
    others = set(tests) - {name.lower() for name in features}
    assert others <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)), others
    for file, test in re.findall(r"`(\w+)::(\w+)`", page):
        if file != "uffd":
            assert re.search(rf"#\[test\]\n(?:#.*\n)*fn {test}\(", tests[file]), f"{file}::{test}"


# Python


def imports(path: Path) -> Iterator[str]:
    """Modules that a file of the package imports, absolute."""
    package = ["pagekit", *path.relative_to(PYTHON).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_who_may_import_the_core() -> None:
    for path in sorted(PYTHON.rglob("*.py")):
        name = path.relative_to(PYTHON).as_posix()
        used = set(imports(path))
        if name != "_native.py":
            allowed = name in (
                "template.py",
                "server.py",
                "working_set.py",
                "relay.py",
                "mapping.py",
            )
            allowed = allowed or name.startswith("uffd/")
            direct = {module for module in used if re.match(r"pagekit\._core\b", module)}
            assert not direct, f"{name} imports {direct}"
            if not allowed and name != "doctor.py":
                assert not any(module.startswith("pagekit._native") for module in used), name


def test_directions_of_imports() -> None:
    """The engine's face knows neither drivers nor presentation; drivers know no presentation; the
    command line uses public names only."""
    for path in sorted(PYTHON.rglob("*.py")):
        name = path.relative_to(PYTHON).as_posix()
        used = set(imports(path))
        room = name.split("/")[0] if "/" in name else ""
        forbidden = {
            "": "sandbox|cli|report",
            "sandbox": "cli|report",
            "report": "cli",
            "uffd": "sandbox|cli|report|template|server",
            "cli": r"_[a-z]\w*",
        }
        if name in ("__init__.py", "doctor.py"):
            continue  # hand out the rooms, and look into each of them
        for module in used:
            assert not re.match(rf"pagekit\.({forbidden[room]})(?![a-z])", module), (
                f"{name}: {module}"
            )
    assert not any(m.startswith("pagekit") for m in imports(PYTHON / "errors.py"))


def test_the_drawing_of_errors_is_true() -> None:
    drawn: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ((?:[│ ]  )*)(?:[├└]─ )?(\w+)(?:\((\w+)\))?  +\S", line)
        if found:
            depth = 0 if "─" not in line else len(found[1]) // 3 + 1
            path[depth:] = [found[2]]
            drawn[found[2]] = path[depth - 1] if depth else None
            if found[3]:
                builtin = getattr(__import__("builtins"), found[3])
                assert issubclass(getattr(errors, found[2]), builtin), found[2]
    classes = {
        name: item
        for name, item in vars(errors).items()
        if inspect.isclass(item) and issubclass(item, errors.PagekitError)
    }
    assert set(drawn) == set(classes)
    for name, parent in drawn.items():
        assert classes[name].__doc__
        if parent:
            assert classes[name].__bases__[0] is classes[parent], name


def test_every_error_is_raised_somewhere() -> None:
    text = "".join(
        path.read_text() for path in sorted(PYTHON.rglob("*.py")) if path.name != "errors.py"
    )
    text += (CRATES / "pagekit-py" / "src" / "lib.rs").read_text()
    for name, item in vars(errors).items():
        if inspect.isclass(item) and issubclass(item, errors.PagekitError):
            base = item.__subclasses__()
            assert base or re.search(rf"\b{name}\(|\"{name}\"", text), f"{name} is never raised"


def test_exit_statuses_agree_between_rust_and_python() -> None:
    python = {"Usage": "UsageError", "Permission": "PermissionDenied", "Kernel": "KernelError"}
    python |= {"Integrity": "IntegrityError"}
    python |= {"Callback": "CallbackError", "Timeout": "SourceTimeout"}
    body = code_of(ENGINE / "error.rs").split("fn exit_code")[1].split("\n    }\n")[0]
    seen = set()
    for arm, status in re.findall(r"((?:Error::\w+ \{ \.\. \}(?:\s*\|\s*)?)+) => (\d+)", body):
        for variant in re.findall(r"Error::(\w+)", arm):
            item = getattr(errors, python.get(variant, variant))
            assert item.exit_code == int(status), variant
            seen.add(variant)
    assert len(seen) == 10


def public_things() -> Iterator[tuple[str, object]]:
    for module in (pagekit, importlib.import_module("pagekit.sandbox")):
        for name in module.__all__:
            thing = getattr(module, name)
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and callable(getattr(value, "fget", value)):
                        yield f"{module.__name__}.{name}.{member}", getattr(thing, member)


def test_public_names_are_explained() -> None:
    """A member that keeps another public class's promise (a protocol's) may leave it there."""
    things = dict(public_things())
    told = {name.rsplit(".", 1)[-1] for name, thing in things.items() if inspect.getdoc(thing)}
    assert not {name for name in things if name.rsplit(".", 1)[-1] not in told}


def test_every_verb_has_its_file_and_an_example() -> None:
    context = click.Context(cli.group)
    verbs = cli.group.list_commands(context)
    assert verbs == sorted(verbs)
    for verb in verbs:
        assert (PYTHON / "cli" / f"{verb}.py").exists()
        command = cli.group.get_command(context, verb)
        assert command is not None and command.name == verb
        assert "Example" in (command.help or ""), f"pagekit {verb} --help has no example"
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{verb} {option.name}"
        assert any("--json" in parameter.opts for parameter in command.params), verb
    assert cli.group.get_command(context, "nonsense") is None


# All of it


def tracked() -> list[Path]:
    """Files that are part of the project, or will be."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        return [path for path in ROOT.rglob("*.rs") if "target" not in path.parts]
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_the_project_speaks_of_itself_only() -> None:
    """No places of somebody's machine, no package registries (but lock files), no trackers."""
    words = r"/work/(main|shared)|\b(pypi|crates|npmjs)\.(org|io|com)\b|\bissue #?\d|\bTODO\b"
    for path in tracked():
        if path.suffix in (".lock", ".so") or path == Path(__file__):
            continue
        found = re.search(words, path.read_text(errors="replace"))
        assert not found, f"{path}: {found[0]}"


def test_skips_have_a_name_and_a_reason() -> None:
    """Best by `support.need`, so that a run can insist on what must not be skipped."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for skip in re.findall(r"\bskip(?:if|Test|test)?\((.*)", path.read_text()):
            assert path == Path(__file__) or re.match(r'f?"[^"]+: ', skip), f"{path}: {skip}"


def test_every_program_is_used_by_a_test() -> None:
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    for path in (Path(__file__).parent / "programs").glob("*.c"):
        assert f'program("{path.stem}")' in texts, path
