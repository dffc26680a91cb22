"""One file an op: schema, PyTorch reference, fake, backward, autograd. Importing this package loads csrc's kernels if it can."""

from __future__ import annotations

from moe_layer.ops import _ext

_ext.status()
