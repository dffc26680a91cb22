"""One MoE layer for PyTorch. The public names are in `__all__`; docs/api.md describes them."""

from __future__ import annotations

from moe_layer._version import __version__

__all__ = ["__version__"]
