#!/usr/bin/env python3
"""Run tests under torch's profiler and say which of the library's kernels they launched.

    python scripts/kernels_run.py tests/gpu/test_glue_cuda.py [more pytest arguments]

The last line is "N launches of M of the library's K kernels" and names those that were not launched; the exit code is
pytest's.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def compiled_kernels(library: Path) -> set[str]:
    """Names of the `__global__` functions in the library: in its mangled symbols each follows its length."""
    return {name.decode() for name in re.findall(rb"\d([a-z][a-z_]*_kernel)[EI]", library.read_bytes())}


def main(arguments: list[str]) -> int:
    import pytest
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        print("kernels_run: no CUDA GPU is visible, so no kernel can be counted; run it on a GPU machine")
        return 1
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        code = int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments]))
        torch.cuda.synchronize()
    launched: Counter[str] = Counter()
    for event in profiler.events() or ():
        found = re.search(r"moe_layer::.*?(\w+_kernel)\b", event.name)
        if found:
            launched[found.group(1)] += 1
    known = compiled_kernels(ROOT / "moe_layer" / "_C.abi3.so")
    for name, count in sorted(launched.items()):
        print(f"{count:6d} {name}")
    missing = ", ".join(sorted(known - set(launched))) or "none"
    counts = f"{sum(launched.values())} launches of {len(launched)} of the library's {len(known)} kernels"
    print(f"{counts}, without: {missing}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
