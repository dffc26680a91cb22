#!/usr/bin/env bash
# Train from a YAML file: bash scripts/train.sh configs/train/tiny.yaml [--out DIR] [key=value ...]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -eq 0 ]; then
    echo "usage: bash scripts/train.sh CONFIG.yaml [--out DIR] [--dry-run] [key=value ...]" >&2
    exit 2
fi
bash "$ROOT/scripts/setup.sh"
PYTHON="$(sed -n 2p "$ROOT/.stamp")"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m moe_layer train "$@"
