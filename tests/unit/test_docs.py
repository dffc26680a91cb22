"""The pages in docs/ say what the code does: generated parts are current, named things exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import moe_layer
from moe_layer import errors
from moe_layer.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))

# Build and log switches, what torchrun sets, and where the CUDA toolkit is (for `moe-layer env` only).
ENVIRONMENT = {"MOE_LAYER_CUDA", "MOE_LAYER_LOG", "CUDA_HOME"}
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def test_the_error_index_is_current() -> None:
    spec = importlib.util.spec_from_file_location("error_index", ROOT / "scripts/error_index.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    same = module.PAGE.read_text() == module.page()
    assert same, "docs/troubleshooting.md is not current; run: python scripts/error_index.py"


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def test_every_error_type_is_explained() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text().split("## Symptoms")[0]
    missing = [name for name, _ in inspect.getmembers(errors, _is_error) if f"| `{name}` |" not in page]
    assert not missing


def test_error_bases() -> None:
    """Users catch ValueError for what they gave and RuntimeError for what happened."""
    for name in ("ConfigError", "RoutingError", "TraceError", "CheckpointError"):
        assert issubclass(getattr(errors, name), ValueError)
    for name in ("CapacityError", "DispatchTimeout", "RankMismatch"):
        assert issubclass(getattr(errors, name), RuntimeError)


def test_every_policy_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/policies.md").read_text().splitlines() if line.startswith("| ")][1:]
    for row in rows:
        named = re.findall(r"`(tests/\S+)::(\w+)`", row)
        assert named, f"a policy without a test: {row}"
        for path, name in named:
            assert re.search(rf"^def {name}\b", (ROOT / path).read_text(), re.M), f"{path} has no {name}"


def test_every_requirement_names_tests_that_exist() -> None:
    """The table of docs/dispatch.md."""
    page = (ROOT / "docs" / "dispatch.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .*$", page, re.MULTILINE)
    assert rows == [str(n) for n in range(1, 19)]
    named = re.findall(r"`(tests/\S+?)::(\w+)`", page)
    assert len(named) > 40
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_the_api_page_names_everything_public() -> None:
    page = (ROOT / "docs/api.md").read_text()
    missing = [name for name in moe_layer.__all__ if name != "__version__" and f"`{name}" not in page]
    methods = [
        name for name, value in vars(moe_layer.MoELayer).items() if callable(value) or isinstance(value, classmethod)
    ]
    missing += [name for name in methods if not name.startswith("_") and name != "forward" and f"{name}(" not in page]
    arguments = inspect.signature(moe_layer.MoELayer.forward).parameters
    missing += [name for name in arguments if name != "self" and f"| `{name}` |" not in page]
    assert not missing, f"docs/api.md does not mention {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def test_environment_variables() -> None:
    """Only build flags, the log level and torchrun's variables are read."""
    found: dict[str, str] = {}
    for path in (ROOT / "moe_layer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
            for name in re.findall(r"""os\.(?:environ(?:\.get\(|\[)|getenv\()['"](\w+)""", text):
                found[name] = str(path.relative_to(ROOT))
            for name in re.findall(r"""['"](\w+)['"] (?:not )?in os\.environ""", text):
                found[name] = str(path.relative_to(ROOT))
    unknown = {name: path for name, path in found.items() if name not in ENVIRONMENT | TORCHRUN}
    assert not unknown, f"behaviour must come from the configuration, not from {unknown}"


def test_every_command_is_in_the_api_page() -> None:
    page = (ROOT / "docs/api.md").read_text()
    missing = [name for name in COMMANDS if f"`moe-layer {name}" not in page]
    assert not missing, f"docs/api.md does not mention the commands {missing}"
