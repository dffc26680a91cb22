"""No op is registered without torch's own checks of it (schema, fake, autograd registration, AOT dispatch)."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import torch

from moe_layer import ops

TESTS = Path(__file__).parents[1]


def test_every_op_is_opchecked() -> None:
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"moe_layer.ops.{module.name}")
    found = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in found if name.startswith("moe_layer::")}
    assert len(names) >= 15
    text = "\n".join(path.read_text() for folder in ("ops", "unit") for path in sorted((TESTS / folder).glob("*.py")))
    missing = [
        name for name in sorted(names) if not re.search(rf"check\(\s*torch\.ops\.moe_layer\.{name}\.default", text)
    ]
    assert not missing, f"no torch.library.opcheck of {missing}"
