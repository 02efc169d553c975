"""The layout of the repository: what is where, who imports whom, which exceptions are raised, how it is written."""

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPO

FOLDERS = ("checks", "formats", "plumbing")
# Imports run downwards: a module may import the layers below its own, and modules of its own folder.
LAYERS = [
    {"train", "sample", "eval", "bench", "parity"},  # the commands
    {"checkpoint"},
    {"configurator"},
    {"checks", "data"},
    {"fp8", "optim", "formats"},
    {"model"},
    {"attention"},
    {"plumbing"},
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
MODULES = {str(p.relative_to(REPO).with_suffix("")).replace("/", "."): p
           for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS)) for p in sorted(REPO.glob(pattern))
           if p.stem != "__init__"}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree):
    """The modules of this repository that a module imports, inside of functions too.

    Without its main(), which is a command: it runs only where the file is the script, and may use everything.
    """
    names, parts = set(), [node for node in tree.body if getattr(node, "name", "") != "main"]
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & set(MODULES)


def place(name):
    """The folder of a module, or its own name in the root."""
    return name.partition(".")[0]


def test_the_root_has_at_most_12_python_files():
    assert len(list(REPO.glob("*.py"))) <= 12


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards_only(name):
    mine = place(name)
    upwards = [other for other in imported(TREES[name])
               if place(other) != mine and DEPTH[place(other)] <= DEPTH[mine] and mine not in LAYERS[0]]
    assert not upwards


def test_no_module_imports_itself_over_others():
    imports = {name: imported(tree) for name, tree in TREES.items()}
    while leaves := [name for name, others in imports.items() if not others]:
        imports = {name: others - set(leaves) for name, others in imports.items() if name not in leaves}
    assert not imports, f"a circle among {sorted(imports)}"


def test_no_name_shadows_the_standard_library_or_a_package():
    popular = {"datasets", "tokenizers", "transformers", "accelerate", "evaluate", "peft", "trl", "utils", "tests"}
    names = {place(name) for name in MODULES} | {name.rpartition(".")[2] for name in MODULES}
    assert not names & (sys.stdlib_module_names | (popular - {"tests"}))
    inside = str(REPO)
    path, sys.path[:] = sys.path[:], [p for p in sys.path if p and Path(p).resolve() not in (REPO, REPO / "tests")]
    try:
        shadowed = []
        for name in {place(name) for name in MODULES}:
            module = sys.modules.pop(name, None)
            spec = find_spec(name)
            if module is not None:
                sys.modules[name] = module
            if spec and spec.origin and not spec.origin.startswith(inside):
                shadowed.append(name)
    finally:
        sys.path[:] = path
    assert not shadowed


@pytest.mark.parametrize("path", [p for p in sorted(REPO.rglob("*.py")) if not p.relative_to(REPO).parts[0].startswith(
    (".", "out", "data_cache"))], ids=lambda p: str(p.relative_to(REPO)))
def test_no_line_is_longer_than_120(path):
    assert max(map(len, path.read_text().splitlines()), default=0) <= 120


# ----------------------------------------------------------------------------------------------------------------
# errors

# what else may be raised, and why
OTHER_EXCEPTIONS = {
    "plumbing/entry.py": {"KeyboardInterrupt"},  # what Python itself raises at Ctrl-C
    "plumbing/disk.py": {"OSError"},  # a full disk, which a library reported as something else
    "formats/files.py": {  # what the interfaces of os.walk, io and json ask for
        "error", "EOFError", "json.JSONDecodeError"},
}


def raised(tree):
    """The names of the exceptions that a module raises; a bare `raise` has none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_raised_is_a_user_error_or_a_stopped_run(name):
    path = str(MODULES[name].relative_to(REPO))
    assert set(raised(TREES[name])) <= {"UserError", "RunStopped"} | OTHER_EXCEPTIONS.get(path, set())


# ----------------------------------------------------------------------------------------------------------------
# voice

# `told` and its kind: sentences whose subject is a message that somebody gets, in place of the thing itself
TRANSLATED = re.compile(r"\btold\b|\bwhat cannot work\b|\bmistakes? of (yours|ours)\b", re.IGNORECASE)
PROSE = [*MODULES.values(), *REPO.glob("bench/**/*.py"), *REPO.glob("config/*.py"), *REPO.glob("*.md"),
         *REPO.glob("docs/*.md")]


@pytest.mark.parametrize("path", sorted(PROSE), ids=lambda p: str(p.relative_to(REPO)))
def test_prose_is_plain(path):
    found = [f"line {i}: {line.strip()}" for i, line in enumerate(path.read_text().splitlines(), 1)
             if TRANSLATED.search(line)]
    assert not found
