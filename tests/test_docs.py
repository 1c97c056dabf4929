"""What the documentation names exists: links, files, functions, modules, commands and flags. No jax here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from eejax.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "bench/RESULTS.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
FOLDERS = ("eejax", "pallas_kernels", "checkpoints", "bench", "tests", "docs")
SUFFIXES = "py|md|c|h|sh|json|jsonl|toml|svg|png"

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")
PATH = re.compile(rf"({'|'.join(FOLDERS)})(/[\w.-]+)*/?|[\w./-]+\.({SUFFIXES})")
MODULE = re.compile(r"(eejax|pallas_kernels|bench|checkpoints)(\.\w+)+")
COMMAND = re.compile(r"python -m bench ([a-z_]+)")
EEJAX = re.compile(r"(?:^    |`)eejax ([a-z][a-z-]*)", re.MULTILINE)
WORD = re.compile(r"[a-z]+(_[a-z]+)+|[A-Z]+(_[A-Z]+)+")
"""Options, functions and environment variables that stand alone."""
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
FOREIGN_FLAGS = {"help"}


@cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a Python file; methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.ClassDef():
                names.add(node.name)
                names |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name()):
                names.add(node.target.id)
    return frozenset(names)


@cache
def imported(path: Path) -> frozenset[str]:
    """Names that a Python file imports, wherever in it: what a package re-exports."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom))
    return frozenset(alias.asname or alias.name for node in nodes for alias in node.names)


def anchors(path: Path) -> set[str]:
    """Headings of a page as GitHub links them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module has."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return end == len(parts) or ".".join(parts[end:]) in defined(path) | imported(path)
    return False


@cache
def commands() -> frozenset[str]:
    """Names of the commands of `eejax`."""
    return frozenset(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def source() -> str:
    """All source, in which options, flags and environment variables are declared."""
    folders = ("eejax", "pallas_kernels", "bench", "checkpoints")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return "\n".join(file.read_text() for file in files if file.suffix in (".py", ".sh", ".c"))


@cache
def in_source(pattern: str) -> bool:
    return re.search(pattern, source()) is not None


def problems(text: str, page: Path) -> Iterator[str]:
    """What a page names that does not exist."""
    for shown, linked, image in LINK.findall(text):
        target = linked or image
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        shown = shown.strip("`")  # noqa: PLW2901
        if not path.exists():
            yield f"link to {target}: there is no such file"
        elif anchor and anchor not in anchors(path):
            yield f"link to {target}: there is no such heading"
        elif path.suffix == ".py" and NAME.fullmatch(shown) and not is_module(shown) and shown not in defined(path):
            yield f"link {shown}: {name} does not define it"
    for span in SPAN.findall(text):
        if PATH.fullmatch(span) and "/" in span and not (ROOT / span).exists():
            yield f"`{span}`: there is no such file or folder"
        if MODULE.fullmatch(span) and not PATH.fullmatch(span) and not is_module(span):
            yield f"`{span}`: there is no such module or name"
        if WORD.fullmatch(span) and not in_source(rf"\b{span}\b"):
            yield f"`{span}`: no source file has this word"
    for name in COMMAND.findall(text):
        if not (ROOT / "bench" / f"{name}.py").exists() and not (ROOT / "bench" / name / "__init__.py").exists():
            yield f"python -m bench {name}: there is no such benchmark"
    for name in EEJAX.findall(text):
        if name not in commands():
            yield f"eejax {name}: there is no such command"
    for flag in set(FLAG.findall(text)) - FOREIGN_FLAGS:
        if not in_source(rf"--{flag}\b|\b{flag.replace('-', '_')}\b"):
            yield f"--{flag}: nothing declares such a flag"


@pytest.mark.parametrize("page", PAGES)
def test_what_the_docs_name_exists(page: str) -> None:
    path = ROOT / page
    assert not list(problems(path.read_text(), path))


def test_readme_is_short_and_leads_to_the_decode_step() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "docs/architecture.md#one-decode-step" in text
    assert text.count("<!-- claims -->") == text.count("<!-- /claims -->") == 1
    way = (ROOT / "docs/architecture.md").read_text().partition("## One decode step")[2].partition("\n## ")[0]
    assert "[`decode_chunk`](../eejax/device/decode.py)" in way


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[`decode_chunk`](../eejax/device/decode.py)", None),
        ("[`decode_lump`](../eejax/device/decode.py)", "does not define it"),
        ("[`LLM.generate`](../eejax/serve/llm.py)", None),
        ("[`LLM.regenerate`](../eejax/serve/llm.py)", "does not define it"),
        ("[`run_if`](../eejax/device/decode.py)", "does not define it"),  # it imports it
        ("[`LLM`](../eejax/llm.py)", "no such file"),
        ("[there](cpu.md#what-is-compiled)", None),
        ("[there](cpu.md#what-is-not)", "no such heading"),
        ("`eejax/device/decode.py`", None),
        ("`eejax/decode.py`", "no such file"),
        ("`eejax.serve.Engine`", None),
        ("`eejax.serve.Motor`", "no such module or name"),
        ("`python -m bench latency --replay 0.7`", None),
        ("`python -m bench tardiness`", "no such benchmark"),
        ("    eejax tune-exits PATH", None),
        ("    eejax tune-doors PATH", "no such command"),
        ("`max_wait`, `EEJAX_AMX`", None),
        ("`max_late`", "no source file"),
        ("`EEJAX_MAX`", "no source file"),
        ("`--max-risk`", None),
        ("`--max-bliss`", "such a flag"),
    ],
)
def test_the_check_finds_what_does_not_exist(text: str, found: str | None) -> None:
    said = list(problems(text, ROOT / "docs/page.md"))
    assert bool(said) == bool(found) and (found is None or found in said[0])
