"""`python -m moe_layer` is `moe-layer`; torchrun starts it as `torchrun ... -m moe_layer train FILE`."""

from __future__ import annotations

import sys

from moe_layer.cli import main

if __name__ == "__main__":
    sys.exit(main())
