"""The driver's side of a peer that lives in another process (`peer_sonic.py`): one JSON request and answer a line."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_layer.layer import MoELayer

SERVER = Path(__file__).with_name("peer_sonic.py")


class PeerError(RuntimeError):
    """The peer answered with an error, too late, or not at all; the text says which."""


class Peer:
    """A `peer_sonic.py --serve` process on the same GPU.

    Args:
        site: its PYTHONPATH. cache: folder of its autotuner. log: file for what it prints.
    """

    def __init__(self, *, site: str, cache: Path, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": site}
        self.log = log.open("w")
        command = [sys.executable, str(SERVER), "--serve", "--cache", str(cache)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def ask(self, request: str, *, seconds: float, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            PeerError: an error there, its end, or no answer within `seconds` (the process is then killed).
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"the peer ended before {request}; see {self.log.name}") from None
        deadline = time.monotonic() + seconds
        while not select.select([self.process.stdout], [], [], 1.0)[0]:
            if time.monotonic() > deadline:
                self.close()
                raise PeerError(f"the peer did not answer {request} within {seconds:.0f} s; see {self.log.name}")
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"the peer ended during {request}; see {self.log.name}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"the peer failed in {request}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def agreement(peer: Peer, layer: MoELayer, x: Tensor, upstream: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Load the peer with our inputs and weights, and compare what both compute.

    Its router rounds logits to bf16 where ours keeps fp32, so a few tokens choose other experts: the median and the
    95th percentile of a token's relative error tell a wrong call from that.

    Returns:
        what `load` answered, and `agrees`: relative errors of y and dx by token, of the weight gradients as a whole.
    """
    experts = layer.experts
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        given, back = f"{folder}/in.pt", f"{folder}/out.pt"
        tensors = {
            "x": x,
            "upstream": upstream,
            "router": layer.router.weight,
            "gate_up": experts.gate_up_proj,
            "down": experts.down_proj,
        }
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, given)
        answer = peer.ask("load", seconds=560, shape=list(shape), tensors=given)
        peer.ask("results", seconds=60, path=back)
        theirs = torch.load(back, weights_only=True)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    y = layer(x)
    y.backward(upstream)
    found: dict[str, Any] = {}
    for name, mine in (("y", y.detach()), ("dx", x.grad)):
        other = theirs[name].cuda().float()
        error_T = (mine.float() - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-9)
        found[name] = [round(float(error_T.quantile(q)), 4) for q in (0.5, 0.95)]
    ours = {"drouter": layer.router.weight.grad, "dgate_up": experts.gate_up_proj.grad, "ddown": experts.down_proj.grad}
    for name, gradient in ours.items():
        other = theirs[name].cuda().float()
        found[name] = round(float((gradient.float() - other).norm() / other.norm()), 4)
    return {**answer, "agrees": found}


def peer_columns(times: dict[str, list[float]], name: str, goal: float) -> dict[str, Any]:
    """Ratios ours / peer, graph against graph and eager against eager, from interleaved medians."""
    median = {variant: statistics.median(values) for variant, values in times.items() if values}
    row: dict[str, Any] = {"goal": goal}
    for kind in ("graph", "eager"):
        theirs = median.get(f"{name}_{kind}")
        if theirs is not None:
            row[f"ratio_{kind}"] = round(median[kind] / theirs, 4)
    if f"{name}_eager" in median:
        row["ratio_graph_to_eager"] = round(median["graph"] / median[f"{name}_eager"], 4)
    return row
