"""Byte-level text: Python's own standard library by default, or the user's files.

Bytes are tokens (vocabulary 256), so there is no tokenizer to install and a loss is in nats per byte everywhere. The
order is a function of (seed, step) alone: no state to save, the same on every rank and at every number of ranks.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_layer.config.train import DataConfig
from moe_layer.errors import ConfigError

VOCAB = 256
_SKIPPED_DIRS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class TextData:
    """Training and validation bytes.

    Attributes:
        train, val: uint8 [n] (read-only).
        files: how many files they come from. skipped: one sentence per file that was left out.
        fingerprint: 16 hexadecimal digits that identify the bytes and their split.
    """

    train: np.ndarray
    val: np.ndarray
    files: int
    skipped: tuple[str, ...]
    fingerprint: str


def stdlib_sources() -> list[Path]:
    """Every .py file of the running Python's standard library, tests left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in _SKIPPED_DIRS)
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def user_files(patterns: tuple[str, ...]) -> list[Path]:
    """Expand paths and glob patterns (sorted, each file once).

    Raises:
        ConfigError: a pattern that matches nothing, or a path that is no file; lists all of them.
    """
    found: dict[Path, None] = {}
    problems = []
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if glob.has_magic(pattern):
            matches = [m for m in matches if os.path.isfile(m)]
        if not matches:
            problems.append(
                f"data.files: '{pattern}' matches no file in {os.getcwd()}; give an existing path or pattern"
            )
        for match in matches:
            if not os.path.isfile(match):
                problems.append(f"data.files: '{match}' is not a regular file; for a folder write '{match}/**/*.txt'")
            found[Path(match)] = None
    if problems:
        raise ConfigError(problems)
    return list(found)


def load_text(config: DataConfig) -> TextData:
    """Read the text into two uint8 arrays, each file's last `val_fraction` into the second.

    At most `config.max_bytes` bytes are held, never twice.

    Raises:
        ConfigError: a user's file cannot be read, or too little text for one sequence of each part.
    """
    builtin = not config.files
    paths = stdlib_sources() if builtin else user_files(config.files)
    sizes, skipped = _readable_sizes(paths, builtin=builtin)
    parts: list[tuple[Path, int, int]] = []
    left = config.max_bytes
    for path, size in sizes:
        size = min(size, left)
        left -= size
        val = int(size * config.val_fraction)
        if size:
            parts.append((path, size - val, val))
    train = np.empty(sum(n for _, n, _ in parts), dtype=np.uint8)
    val = np.empty(sum(n for _, _, n in parts), dtype=np.uint8)
    at_train = at_val = 0
    for path, n_train, n_val in parts:
        _read_into(path, train[at_train : at_train + n_train], val[at_val : at_val + n_val])
        at_train, at_val = at_train + n_train, at_val + n_val
    _check_length(train, "training", config)
    _check_length(val, "validation", config)
    digest = hashlib.sha256(train)
    digest.update(val)
    train.flags.writeable = val.flags.writeable = False
    return TextData(train, val, len(parts), tuple(skipped), digest.hexdigest()[:16])


def _readable_sizes(paths: list[Path], *, builtin: bool) -> tuple[list[tuple[Path, int]], list[str]]:
    """Sizes of the files that open; the others are named (standard library) or an error (the user's)."""
    sizes: list[tuple[Path, int]] = []
    problems: list[str] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                sizes.append((path, os.fstat(file.fileno()).st_size))
        except OSError as error:
            problems.append(f"data.files: cannot read '{path}': {error.strerror or error}")
    if problems and not builtin:
        raise ConfigError([f"{p}; make it readable or take it out of the list" for p in problems])
    return sizes, problems


def _read_into(path: Path, *targets: np.ndarray) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            for target in targets:
                view = memoryview(target)
                while len(view):
                    got = file.readinto(view)
                    if not got:
                        raise ConfigError(
                            f"data.files: '{path}' became {len(view)} bytes shorter while it was read; retry"
                        )
                    view = view[got:]
    except OSError as error:
        raise ConfigError(
            f"data.files: cannot read '{path}': {error.strerror or error}; make it readable or take it out of the list"
        ) from error


def _check_length(text: np.ndarray, what: str, config: DataConfig) -> None:
    need = config.sequence_length + 1
    if len(text) < need:
        raise ConfigError(
            f"data: {len(text)} {what} bytes are fewer than data.sequence_length + 1 ({need}); add files, raise "
            f"data.max_bytes ({config.max_bytes}) or data.val_fraction ({config.val_fraction}), or shorten the "
            "sequences"
        )


class Sampler:
    """Windows of S+1 bytes, shuffled anew every epoch.

    `batch(step)` depends on nothing but its arguments; the permutation kept here is a cache.
    """

    def __init__(self, text: np.ndarray, *, sequence_length: int, global_batch: int, seed: int) -> None:
        self._text, self._length, self._batch, self._seed = text, sequence_length, global_batch, seed
        # One window less than fits, so that each epoch can shift all windows by its own offset.
        self.windows = max(1, (len(text) - 1) // sequence_length - 1)
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.uint32)
        self._shift = 0

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1) -> Tensor:
        """Rank's part of the global batch of `step`: uint8 [global_batch/ranks, S+1]."""
        share = self._batch // ranks
        first = step * self._batch + rank * share
        starts = [self._start(first + i) for i in range(share)]
        return _gather(self._text, starts, self._length + 1)

    def _start(self, index: int) -> int:
        epoch, at = divmod(index, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            spare = len(self._text) - 1 - self.windows * self._length
            self._shift = int(rng.integers(0, spare + 1))
            self._order = rng.permutation(np.arange(self.windows, dtype=np.uint32))
            self._epoch = epoch
        return int(self._order[at]) * self._length + self._shift


def validation_batch(text: np.ndarray, *, sequence_length: int, sequences: int, indices: range) -> Tensor:
    """Sequences `indices` out of `sequences` evenly spaced windows: uint8 [len(indices), S+1]."""
    room = len(text) - sequence_length - 1
    starts = [room * i // max(1, sequences - 1) for i in indices]
    return _gather(text, starts, sequence_length + 1)


def _gather(text: np.ndarray, starts: list[int], length: int) -> Tensor:
    out = np.empty((len(starts), length), dtype=np.uint8)
    for row, start in enumerate(starts):
        out[row] = text[start : start + length]
    return torch.from_numpy(out)
