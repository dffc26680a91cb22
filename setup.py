"""Only the decision whether to build csrc; everything else is in pyproject.toml.

MOE_LAYER_CUDA=auto (default): build when torch is importable, is a CUDA build and a matching toolkit is found, else say
the one reason and make a pure package. 0: never. 1: fail when it cannot be built. See csrc/build.py for the other
variables.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

spec = importlib.util.spec_from_file_location("moe_layer_csrc_build", Path(__file__).parent / "csrc/build.py")
assert spec is not None and spec.loader is not None
csrc = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = csrc
spec.loader.exec_module(csrc)

# scripts/build_wheel.sh cuda: the wheel is for other machines, this one's torch may be a CPU build.
CROSS = os.environ.get("MOE_LAYER_CUDA_CROSS") == "1"


class BuildCsrc(build_ext):
    """Hands the one extension to csrc/build.py, which needs neither torch's BuildExtension nor its guesses."""

    def build_extension(self, ext: Extension) -> None:
        try:
            print(csrc.build(Path(self.get_ext_fullpath(ext.name)).resolve(), cross=CROSS))
        except csrc.BuildError as error:
            raise CompileError(str(error)) from None


class BuildWithConfigs(build_py):
    """Puts configs/ into the package as moe_layer/_configs, where an installed package looks for its presets."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "moe_layer/_configs"
            shutil.copytree(Path(__file__).parent / "configs", target, dirs_exist_ok=True)


def want_extension() -> bool:
    mode = os.environ.get("MOE_LAYER_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"MOE_LAYER_CUDA is {mode!r}; write auto, 0 or 1")
    if mode == "0":
        return False
    try:
        csrc.check_torch_and_toolkit(cross=CROSS)
    except csrc.BuildError as error:
        if mode == "1":
            raise SystemExit(f"MOE_LAYER_CUDA=1 but the CUDA extension cannot be built: {error}") from None
        print(f"moe_layer: pure Python package, without the CUDA extension: {error}")
        return False
    return True


commands = {"build_py": BuildWithConfigs}
if want_extension():
    # The library calls nothing of CPython, so one wheel serves every Python from 3.10 on.
    setup(
        ext_modules=[Extension("moe_layer._C", sources=[], py_limited_api=True)],
        cmdclass={**commands, "build_ext": BuildCsrc},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup(cmdclass=commands)
