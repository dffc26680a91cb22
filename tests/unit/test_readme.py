"""Every snippet of the README runs as it is printed, in order, in an empty folder."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds the README's YAML files, each named by its own first line."""
    for name, body in re.findall(r"^```yaml\n# (\S+\.yaml)[^\n]*\n(.*?)^```", README, re.M | re.S):
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet(index: int, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(SNIPPETS[index], f"README.md snippet {index + 1}", "exec"), {"__name__": "readme"})


def test_there_are_snippets_of_about_ten_lines() -> None:
    assert len(SNIPPETS) >= 3
    assert all(len(snippet.splitlines()) <= 15 for snippet in SNIPPETS)


def test_links_and_paths_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing, f"the README links to files that do not exist: {missing}"
    for script in re.findall(r"(?:bash|train) ((?:scripts|configs)/\S+)", README):
        assert (ROOT / script).exists(), script
