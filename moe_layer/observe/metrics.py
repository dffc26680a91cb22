"""Load statistics and the places metrics go: JSON lines always, TensorBoard when it is installed.

Keys are constant over a run: `loss/...`, `moe/imbalance/layer_03`, `moe/imbalance/mean`, `perf/tokens_per_s`, `opt/lr`.
L layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moe_layer.stats import imbalance, load_entropy

Counts = Sequence[Sequence[int]]
"""Tokens per expert: one row of E integers per MoE layer."""


@dataclass(frozen=True)
class LayerLoad:
    """How evenly one layer's experts are used.

    Attributes:
        imbalance: largest load / mean load (1 is balanced, E the worst; 0 without tokens).
        entropy: entropy of the loads / log E (1 is balanced). dead: experts without a token.
    """

    imbalance: float
    entropy: float
    dead: int


def layer_load(counts: Sequence[int]) -> LayerLoad:
    """Statistics of one row of counts."""
    return LayerLoad(imbalance=imbalance(counts), entropy=load_entropy(counts), dead=sum(1 for c in counts if c == 0))


def load_metrics(counts: Counts) -> dict[str, float]:
    """`moe/...` scalars of all layers."""
    loads = [layer_load(row) for row in counts]
    out: dict[str, float] = {}
    for index, load in enumerate(loads):
        out[f"moe/imbalance/layer_{index:02d}"] = load.imbalance
        out[f"moe/entropy/layer_{index:02d}"] = load.entropy
        out[f"moe/dead_experts/layer_{index:02d}"] = load.dead
    out["moe/imbalance/mean"] = sum(load.imbalance for load in loads) / max(1, len(loads))
    out["moe/imbalance/max"] = max((load.imbalance for load in loads), default=0.0)
    out["moe/imbalance/max_layer"] = max(range(len(loads)), key=lambda i: loads[i].imbalance, default=0)
    out["moe/dead_experts/sum"] = sum(load.dead for load in loads)
    return out


def format_line(step: int, steps: int, values: Mapping[str, float | None]) -> str:
    """One console line of a training step; what is None (unknown peak, no GPU) is left out."""
    parts = [
        f"step {step}/{steps}",
        f"loss {values['loss/train']:.3f}",
        f"aux {values['loss/aux']:.4f}",
        f"z {values['loss/z']:.4f}",
        f"imb {values['moe/imbalance/mean']:.2f} "
        f"(max L{int(values['moe/imbalance/max_layer'] or 0)} {values['moe/imbalance/max']:.2f})",
        f"drop {100 * (values['moe/dropped'] or 0.0):.1f}%",
        f"tok/s {short_number(values['perf/tokens_per_s'] or 0.0)}",
    ]
    if (tflops := values.get("perf/tflops")) is not None:
        parts.append(f"TFLOP/s {tflops:.1f}")
    if (mfu := values.get("perf/mfu")) is not None:
        parts.append(f"MFU {100 * mfu:.1f}%")
    if (memory := values.get("perf/memory_gib")) is not None:
        parts.append(f"mem {memory:.1f} GiB")
    if (eta := values.get("perf/eta_s")) is not None:
        parts.append(f"eta {short_time(eta)}")
    return "  ".join(parts)


def short_number(value: float) -> str:
    """41234 -> 41k."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """130 -> 2m10s."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


class MetricsWriter:
    """Writes `metrics.jsonl` and, if installed, TensorBoard events; use it as a context manager.

    Args:
        folder: the run directory.
        resume_step: keep what was logged up to this step and drop the rest; None starts the file anew.

    Attributes:
        note: None, or one sentence on a sink that is not available.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        if resume_step is None:
            self._path.write_text("")
        else:
            _truncate_after(self._path, resume_step)
        self._file: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._board, self.note = _tensorboard(folder, resume_step)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one record; floats and integers also go to TensorBoard.

        Args:
            kind: `train` or `val`.
        """
        record = {"step": step, "kind": kind, **{k: v for k, v in values.items() if v is not None}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        OSError: there is none.
    """
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _truncate_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _tensorboard(folder: Path, resume_step: int | None) -> tuple[Any, str | None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None, "TensorBoard is not installed, so only metrics.jsonl is written (pip install tensorboard)"
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge), None
