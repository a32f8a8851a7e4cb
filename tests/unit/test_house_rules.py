"""The house rules a linter does not know: sizes, names, docstrings, prints and words that must not be in the tree.

Each rule is a function from a file to findings, `path:line: reason`, so that the rules are tested as well as the tree.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("gateway", "picker", "scorers", "protos", "sim")
PYTHON = (*SHIPPED, "bench", "tests")

FUNCTION_LINES = 70
FILE_LINES = 450
VAGUE_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "manager"})

# Whose job is to talk to a terminal. Everything else logs or returns values.
MAY_PRINT = ("gateway/cli", "gateway/demo", "sim/__main__", "sim/cluster", "bench/", "tests/")

# Put together here, so that this file does not find itself.
BANNED_WORDS = tuple(
    "".join(parts) for parts in (("/wo", "rk/"), ("/tmp/bash", "_jobs"), ("pypi", ".org"), ("python", "hosted"))
)
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "build", "data", "dist", "node_modules", "out"})
TEXT = frozenset(
    {"", ".cfg", ".in", ".ini", ".json", ".md", ".proto", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml", ".yml"}
)

Rule = Callable[[PurePosixPath, str], Iterator[str]]


def function_length(path: PurePosixPath, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: function {node.name} has {lines} lines, at most {FUNCTION_LINES} allowed"


def file_length(path: PurePosixPath, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{path}:{FILE_LINES + 1}: file has {lines} lines, at most {FILE_LINES} are allowed"


def no_global(path: PurePosixPath, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: `global {', '.join(node.names)}`; pass the state in"


def telling_name(path: PurePosixPath, text: str) -> Iterator[str]:
    vague = sorted(VAGUE_NAMES.intersection(path.with_suffix("").parts))
    if vague:
        yield f"{path}:1: a module named {vague[0]!r} says nothing about what it owns"


def module_docstring(path: PurePosixPath, text: str) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(text)):
        yield f"{path}:1: module has no docstring"


def no_print(path: PurePosixPath, text: str) -> Iterator[str]:
    if str(path).startswith(MAY_PRINT):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{path}:{node.lineno}: print() outside a command"


def no_banned_words(path: PurePosixPath, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        for word in BANNED_WORDS:
            if word in line:
                yield f"{path}:{number}: {word!r} must not be in the tree"


PYTHON_RULES: tuple[Rule, ...] = (function_length, file_length, no_global, telling_name, module_docstring, no_print)


def tree(*tops: str) -> Iterator[Path]:
    """Every file under the given directories of the repository, without what is generated or hidden."""
    for top in tops:
        for directory, names, files in os.walk(ROOT / top):
            names[:] = sorted(
                n for n in names if n not in SKIPPED_DIRECTORIES and (not n.startswith(".") or n == ".ci")
            )
            yield from (Path(directory) / name for name in sorted(files))


def python_files() -> list[Path]:
    return [path for path in tree(*PYTHON) if path.suffix == ".py" and not path.stem.endswith("_pb2")]


def relative(path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(ROOT).as_posix())


def check(rule: Rule, path: PurePosixPath, text: str) -> list[str]:
    try:
        return list(rule(path, text))
    except SyntaxError as error:
        return [f"{path}:{error.lineno}: not Python: {error.msg}"]


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_python_file_keeps_the_rule(rule: Rule) -> None:
    files = python_files()
    assert len(files) > 20, f"only {len(files)} Python files found under {ROOT}"

    findings = [finding for path in files for finding in check(rule, relative(path), path.read_text(encoding="utf-8"))]

    assert not findings, "\n" + "\n".join(findings)


def test_tree_has_no_banned_words() -> None:
    files = [path for path in tree("") if path.suffix in TEXT and not path.is_symlink()]

    findings = [
        finding
        for path in files
        for finding in no_banned_words(relative(path), path.read_text("utf-8", errors="replace"))
    ]

    assert not findings, "\n" + "\n".join(findings)


def test_test_directories_are_packages() -> None:
    """Two test files may have the same name only in packages."""
    directories = {path.parent for path in tree("tests") if path.suffix == ".py"}

    missing = [
        f"{relative(directory)}/__init__.py:1: missing"
        for directory in sorted(directories)
        if not (directory / "__init__.py").exists()
    ]

    assert not missing, "\n" + "\n".join(missing)


def long_function(lines: int) -> str:
    return "def f():\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("rule", "path", "text", "expected"),
    [
        (function_length, "a.py", long_function(FUNCTION_LINES), []),
        (function_length, "a.py", "\nasync " + long_function(FUNCTION_LINES + 1), ["a.py:2: function f has 71 lines"]),
        (file_length, "a.py", "x\n" * FILE_LINES, []),
        (file_length, "a.py", "x\n" * (FILE_LINES + 1), ["a.py:451: file has 451 lines"]),
        (no_global, "a.py", "x = 1\ndef f(:\n", ["a.py:2: not Python"]),
        (no_global, "a.py", "def f():\n    global x, y\n", ["a.py:2: `global x, y`"]),
        (telling_name, "picker/core/utils.py", "", ["picker/core/utils.py:1: a module named 'utils'"]),
        (telling_name, "picker/common/a.py", "", ["picker/common/a.py:1: a module named 'common'"]),
        (telling_name, "picker/commonly.py", "", []),
        (module_docstring, "a.py", "x = 1\n", ["a.py:1: module has no docstring"]),
        (module_docstring, "a.py", '"""Doc."""\n', []),
        (no_print, "picker/a.py", "\n\nprint(1)\n", ["picker/a.py:3: print()"]),
        (no_print, "gateway/cli.py", "print(1)\n", []),
        (no_print, "picker/a.py", "blueprint(1)\nx.print(2)\n", []),
        (no_banned_words, "a.md", f"fine\nsee {BANNED_WORDS[0]}x\n", [f"a.md:2: '{BANNED_WORDS[0]}'"]),
    ],
)
def test_rule_finds(rule: Rule, path: str, text: str, expected: list[str]) -> None:
    found = check(rule, PurePosixPath(path), text)

    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
