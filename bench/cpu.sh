#!/usr/bin/env bash
# Every benchmark on this machine's CPU, one after the other, into bench/results/<machine>/; then the pages made of them.
#
#   bench/cpu.sh [--quick]
#
# For figures worth keeping the machine has to have nothing else to do. About half an hour on two cores. --quick tries
# everything out in a minute or two and writes to ./out.
#   PYTHON       the interpreter (python3)
#   MANPP_DATA   the folder of Fashion-MNIST's files, where they are not installed
set -eu -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export MANPP_BENCH_DEVICE=cpu PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
QUICK=()
if [ "${1:-}" = --quick ]; then
  export MANPP_BENCH_QUICK=1
  QUICK=(--quick)
fi
OUT=${OUT:-}
if [ -z "$OUT" ]; then
  OUT=out
  [ ${#QUICK[@]} -gt 0 ] || OUT=bench/results/$("$PYTHON" -c 'import sys; sys.path.insert(0, "bench"); import common; print(common.device_name())')
fi
mkdir -p "$OUT"
# First what needs files, so that a lack of them shows at once.
"$PYTHON" bench/fashion_mnist.py --json "$OUT/fashion_mnist.json" ${MANPP_DATA:+--data-root "$MANPP_DATA"}
for name in ema_scale_update scale_bias_mix detach_copy; do
  "$PYTHON" -m manpp_kernels.cli bench "$name" --json "$OUT/$name.json" "${QUICK[@]}"
done
for name in host_cost training processes dense; do
  "$PYTHON" "bench/$name.py" --json "$OUT/$name.json"
done
"$PYTHON" bench/report.py --summary "$OUT"
[ ${#QUICK[@]} -gt 0 ] || "$PYTHON" bench/report.py
