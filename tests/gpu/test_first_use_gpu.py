"""An op called on its own, in a process that has built no layer, runs its kernel and not the reference."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = """
import torch
from moe_layer.ops import kernels
from moe_layer.ops.route_topk import route_topk
call = lambda x: route_topk(x, top_k=2).weights
x = torch.randn(64, 16, device="cuda")
assert not kernels.kernels_loaded()
y = {call}(x)
assert kernels.kernels_loaded()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
    {call}(x)
    torch.cuda.synchronize()
names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
assert any("moe_layer" in name for name in names), names
"""


@pytest.mark.parametrize("call", ["call", "torch.compile(call, fullgraph=True)"])
def test_first_call_takes_the_kernel(call: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(call=call)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
