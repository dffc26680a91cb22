"""Collect every error message of the package into the second half of docs/troubleshooting.md.

`python scripts/error_index.py` rewrites the part below the marker; tests/unit/test_docs.py fails until it is current.
Messages are read from the syntax tree, with … for what is filled in, so that a message can be searched for on the page.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
MARKER = "<!-- below: written by scripts/error_index.py -->\n"
OURS = (
    "ConfigError",
    "RoutingError",
    "TraceError",
    "CheckpointError",
    "TrainingError",
    "CapacityError",
    "DispatchTimeout",
    "RankMismatch",
)
BUILTIN = ("ValueError", "TypeError", "RuntimeError", "ImportError", "OSError")


def template(node: ast.expr) -> str:
    """Text of a string expression, … for every part that is computed; empty when all of it is."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "…") + (template(node.right) or "…")
    if isinstance(node, ast.List) and len(node.elts) == 1:
        return template(node.elts[0])
    return ""


def messages(path: Path) -> list[tuple[str, str]]:
    """(error type, message) of every call of an error type with a literal message."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            name, text = node.func.id, " ".join(template(node.args[0]).split())
            if name in OURS + BUILTIN and re.search("[A-Za-z]{3}", text):
                found.append((name, text))
    return found


def index() -> str:
    """The generated half of the page."""
    by_type: dict[str, set[tuple[str, str]]] = {name: set() for name in OURS + BUILTIN}
    for path in sorted((ROOT / "moe_layer").rglob("*.py")):
        for name, text in messages(path):
            by_type[name].add((str(path.relative_to(ROOT / "moe_layer")), text))
    parts = []
    for name, rows in by_type.items():
        if not rows:
            continue
        table = [f"| {text.replace('|', chr(92) + '|')} | {where} |" for where, text in sorted(rows)]
        parts.append("\n".join([f"### {name}", "", "| message | raised in moe_layer/ |", "|---|---|", *table, ""]))
    return "\n".join(parts)


def page() -> str:
    """The whole page as it should be."""
    return PAGE.read_text().split(MARKER)[0] + MARKER + "\n" + index()


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")
