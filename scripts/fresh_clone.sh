#!/usr/bin/env bash
# What a newcomer sees: clone this commit into an empty folder with an empty home and run the README's two commands there.
#
#   bash scripts/fresh_clone.sh            both; takes about ten minutes on two cores
#   bash scripts/fresh_clone.sh train      the first only
#
# Checks what the README promises of them: tiny.yaml under 180 s after installation, validation loss under 2.0 nats a byte, every expert
# of every layer used in the final validation pass, every test passed. Only PATH and pip's and the network's own variables are handed on.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
git clone -q "$root" "$folder/clone" && mkdir "$folder/home" && cd "$folder/clone" || exit 1
mapfile -t kept < <(env | grep -iE '^(PIP_[A-Z_]+|https?_proxy|no_proxy|SSL_CERT_[A-Z]+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)=')
fresh() { env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$folder/home" "${kept[@]}" "$@"; }

failed=()
expect() { local name="$1"; shift; if "$@"; then echo "fresh: ok: $name"; else echo "fresh: FAILED: $name"; failed+=("$name"); fi; }
echo "fresh: $(git log -1 --format='%h %s'), load average $(cut -d' ' -f1-3 /proc/loadavg 2>/dev/null || echo unknown)"

fresh bash scripts/setup.sh || exit 1
start=$SECONDS
fresh bash scripts/train.sh configs/train/tiny.yaml >"$folder/train.log" 2>&1
status=$?
seconds=$((SECONDS - start))
tail -n 16 "$folder/train.log"
loss="$(sed -n 's/^val_loss //p' "$folder/train.log")"
expect "training ends with exit code 0" test "$status" -eq 0
expect "validation loss $loss < 2.0" awk -v loss="${loss:-9}" 'BEGIN { exit !(loss < 2.0) }'
expect "no dead expert in the last validation pass" test "$(grep -c 'dead 0$' "$folder/train.log")" -eq 4
expect "training took $seconds s < 180 s" test "$seconds" -lt 180

if [ "${1:-}" != train ]; then
    expect "bash scripts/test.sh" fresh bash scripts/test.sh
fi
if [ ${#failed[@]} -gt 0 ]; then exit 1; fi
echo "fresh: all passed"
