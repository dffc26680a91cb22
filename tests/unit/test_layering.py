"""Imports point one way, and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moe_layer"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A part may import its own level and those below it; docs/design.md section 8.
LEVELS = [
    {"_version", "errors", "types"},
    {"config", "ops"},
    {"dispatch", "experts", "replay", "losses", "balance", "counters", "stats", "parallel", "routing_options"},
    {"router"},
    {"layer"},
    {"checkpoint", "compat", "hooks", "observe", "train"},
    {"cli", "__main__"},
]
LEVEL = {part: index for index, parts in enumerate(LEVELS) for part in parts}
# `parallelize` looks for MoELayers, so it sits above the layer; the rest of parallel (groups, version shims) sits
# below.
ABOVE_THE_LAYER = {"parallel/shard.py"}
# Not even their own level: ops know no configuration, and reading a configuration loads no torch.
FORBIDDEN = {("ops", "config"), ("config", "ops"), ("config", "types")}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.stem if len(relative.parts) == 1 else relative.parts[0]


def imported_parts(path: Path) -> set[str]:
    """Parts of moe_layer that a file imports, inside functions too; relative imports are an error of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            names = [node.module or ""]
            if node.module == "moe_layer":
                names = [f"moe_layer.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("moe_layer.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{path} is in no level: add {part!r} to LEVELS and to docs/design.md section 8"
    level = LEVEL["layer"] + 1 if str(path.relative_to(PACKAGE)) in ABOVE_THE_LAYER else LEVEL[part]
    for other in imported_parts(path):
        assert LEVEL[other] <= level, f"{path.relative_to(ROOT)} ({part}) imports moe_layer.{other}, which is above it"
        assert (part, other) not in FORBIDDEN, f"{path.relative_to(ROOT)} ({part}) must not import moe_layer.{other}"


def test_every_folder_is_a_package() -> None:
    """setuptools packs only folders with __init__.py: others work from a checkout and are missing from a wheel."""
    folders = {path.parent for path in FILES}
    missing = [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing, f"add __init__.py to {', '.join(missing)}"


def test_files_fit_in_a_head() -> None:
    sources = [*FILES, *(ROOT / "csrc").glob("*.c*"), *(ROOT / "scripts").rglob("*.py")]
    lengths = sorted(((len(path.read_text().splitlines()), path.relative_to(ROOT)) for path in sources), reverse=True)
    print("longest files:", *(f"{count:4d} {path}" for count, path in lengths[:5]), sep="\n  ")
    print(f"median of {len(lengths)} files: {lengths[len(lengths) // 2][0]} lines")
    too_long = [f"{path} ({count} lines)" for count, path in lengths if count > MAX_LINES]
    assert not too_long, f"over {MAX_LINES} lines, split them: {', '.join(too_long)}"
