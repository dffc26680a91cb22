"""The training text: deterministic, complete, split per file, and clear about what it cannot read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_layer.config.train import DataConfig
from moe_layer.errors import ConfigError
from moe_layer.train.data import Sampler, load_text, stdlib_sources, validation_batch


def test_standard_library_is_real_text_in_a_fixed_order_without_tests() -> None:
    paths = stdlib_sources()
    assert paths == stdlib_sources() and len(paths) > 300
    names = [path.as_posix() for path in paths]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name or "/tests/" in name for name in names)
    text = load_text(DataConfig(max_bytes=300_000))
    assert len(text.train) + len(text.val) == 300_000
    assert text.fingerprint == load_text(DataConfig(max_bytes=300_000)).fingerprint
    assert b"import" in bytes(text.train)


def test_each_file_gives_its_last_part_to_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 90 + b"A" * 10)
    (tmp_path / "b.txt").write_bytes(b"b" * 45 + b"B" * 5)
    text = load_text(DataConfig(files=(str(tmp_path / "*.txt"),), sequence_length=8, val_fraction=0.1, max_bytes=1000))
    assert bytes(text.train) == b"a" * 90 + b"b" * 45
    assert bytes(text.val) == b"A" * 10 + b"B" * 5
    assert text.files == 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_batch_of_one_rank(ranks: int) -> None:
    text = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    sampler = Sampler(text, sequence_length=16, global_batch=8, seed=3)
    whole = Sampler(text, sequence_length=16, global_batch=8, seed=3)
    for step in (0, 7, 500, 3):  # epochs forward and back
        parts = torch.cat([sampler.batch(step, rank=r, ranks=ranks) for r in range(ranks)])
        assert torch.equal(parts, whole.batch(step))


def test_an_epoch_shows_every_window_once_and_epochs_differ() -> None:
    text = np.arange(4 * 20 + 11, dtype=np.uint8)
    sampler = Sampler(text, sequence_length=4, global_batch=1, seed=0)
    firsts = [int(sampler.batch(step)[0, 0]) for step in range(2 * sampler.windows)]
    one, two = firsts[: sampler.windows], firsts[sampler.windows :]
    assert len(set(one)) == len(one) == sampler.windows
    assert {b - a for a, b in zip(sorted(one), sorted(one)[1:], strict=False)} == {4}
    assert one != two


def test_validation_windows_are_even_and_independent_of_the_split() -> None:
    text = np.arange(200, dtype=np.uint8)
    whole = validation_batch(text, sequence_length=8, sequences=6, indices=range(6))
    parts = [validation_batch(text, sequence_length=8, sequences=6, indices=range(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole[0, 0] == 0 and whole[-1, -1] == 199


def test_unreadable_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as error:
        load_text(DataConfig(files=(str(tmp_path / "folder"), str(tmp_path / "none*.txt"), str(tmp_path / "dangling"))))
    problems = error.value.problems
    assert len(problems) == 3
    assert "folder' is not a regular file; for a folder write" in problems[0]
    assert "none*.txt' matches no file" in problems[1]
    assert all(str(tmp_path) in problem for problem in problems)


def test_a_file_that_does_not_open_is_an_error_for_users_and_a_note_for_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_bytes(b"x = 1\n" * 100)
    bad.write_bytes(b"y = 2\n" * 100)
    real_open = open

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        if str(path) == str(bad):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"data\.files: cannot read '.*bad\.py': Permission denied; make it readable"):
        load_text(DataConfig(files=(str(tmp_path / "*.py"),), sequence_length=8))
    monkeypatch.setattr("moe_layer.train.data.stdlib_sources", lambda: [bad, good])
    text = load_text(DataConfig(sequence_length=8))
    assert text.files == 1 and len(text.skipped) == 1 and "bad.py" in text.skipped[0]


def test_too_little_text_names_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"0123456789")
    with pytest.raises(ConfigError, match=r"9 training bytes are fewer than data\.sequence_length \+ 1 \(33\)"):
        load_text(DataConfig(files=(str(tmp_path / "short.txt"),), sequence_length=32, val_fraction=0.1))
