#!/usr/bin/env bash
# TransformerEngine for a GPU machine without network, made on a machine without a GPU: about 27 MB for one architecture.
#
#   bash scripts/te_offline.sh WORK te.tar.xz      make it (needs PyPI, python3.12 with headers, g++, a CUDA toolkit's headers)
#   eval "$(bash scripts/te_offline.sh --install te.tar.xz FOLDER)"      there: unpack and set PYTHONPATH, LD_LIBRARY_PATH
#
# Environment: PYTHON (python3.12; there python3), TE (2.20.2), TORCH (2.11.0, as on the GPU machine), ARCH (90), MAX_JOBS (1), CUDA_HOME.
# The torch half is 33 C++ files: 30 minutes on two busy cores. The GPU machine must have einops, onnxscript and pyyaml.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}

if [ "$1" = --install ]; then
    mkdir -p "$3"
    tar -C "$3" -xJf "$2"
    packages=$("${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
    libraries=$(printf '%s:' "$packages"/nvidia/{cu13,cudnn,nccl}/lib)
    echo "export PYTHONPATH='$3':\"\${PYTHONPATH:-}\" LD_LIBRARY_PATH='$libraries'\"\${LD_LIBRARY_PATH:-}\" NVTE_FRAMEWORK=pytorch"
    exit
fi

work=$1 out=$(realpath -m "$2") te=${TE:-2.20.2}
mkdir -p "$work" && cd "$work"
"${PYTHON:-python3.12}" -m venv venv
pip() { venv/bin/python -m pip "$@"; }
pip install -q "torch==${TORCH:-2.11.0}" ninja setuptools wheel packaging pybind11
rm -rf site sdist wheels && mkdir site sdist wheels
pip download -q --no-deps -d wheels "transformer-engine==$te" "transformer-engine-cu13==$te" importlib-metadata nvdlfw-inspect
pip download -q -d wheels pydantic
# --no-build-isolation: the sdist's metadata needs torch.version.cuda, so a CUDA build of torch
pip download -q --no-deps --no-build-isolation -d wheels "transformer-engine-torch==$te"
for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d site; done
tar -C sdist --strip-components=1 -xzf "wheels/transformer_engine_torch-$te.tar.gz"
(
    # without FORCE_BUILD the sdist looks for a prebuilt wheel elsewhere; NCCL_EP needs a newer NCCL than torch brings
    export PATH="$PWD/venv/bin:$PATH" CPLUS_INCLUDE_PATH=$CUDA_HOME/include MAX_JOBS=${MAX_JOBS:-1}
    export NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 NVTE_PROJECT_BUILDING=1 NVTE_CUDA_ARCHS=${ARCH:-90}
    cd sdist && python setup.py build_ext
)
library=site/transformer_engine/wheel_lib
rm -rf site/transformer_engine/jax "$library"/*nccl_ep*
cp sdist/build/lib*/transformer_engine/wheel_lib/transformer_engine_torch*.so "$library/"
python3 "$here/te_one_arch.py" "$library/libtransformer_engine.so" "${ARCH:-90}"
strip --strip-unneeded "$library"/*.so
tar --owner=0 --group=0 -C site -cJf "$out" .
sha256sum "$out"
