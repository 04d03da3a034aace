#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of some 15 minutes: build, tests, compute-sanitizer, benchmarks.
#
#   bench/gpu.sh [--device cpu] [--quick] [PART...]
#
# Parts: build doctor tests sanitizer large micro host variants training fashion (all of them by default, in this order).
# micro is micro-ema, micro-mix and micro-copy. Only when asked for: dense (segmentation and detection), mix-variants, and
# counters (what the hardware counts, by ncu).
# Nothing is downloaded. Wanted: Python with torch, triton, pybind11, pytest, pytest-benchmark, hypothesis, expecttest, timm,
# matplotlib; nvcc, cmake, ninja.
# Results go to $OUT (./out by default): a JSON file for each benchmark, and the logs of all parts in logs.tar.gz.
#   PYTHON       the interpreter (python3)
#   MANPP_DATA   the folder of Fashion-MNIST's files, where they are not installed
#   MANPP_COMMIT what the results say they measured, where the tree comes without its history
#   BUDGET       seconds for the whole (1200): what is left then is left away
# --device cpu --quick tries the script out where there is no GPU: what needs one is left away.
set -u -o pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-out}")
BUDGET=${BUDGET:-1200}
DEVICE=cuda
PARTS=()
RUN=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --quick) export MANPP_BENCH_QUICK=1; shift ;;
    --run) shift; RUN=("$@"); break ;; # a part on its own, which is how timeout comes to run a function
    -*) echo "gpu.sh: there is no option $1" >&2; exit 2 ;;
    *) PARTS+=("$1"); shift ;;
  esac
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(build doctor tests sanitizer large micro host variants training fashion)

export PYTHON OUT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MANPP_BENCH_DEVICE=$DEVICE

build() {
  [ "$DEVICE" = cuda ] || return 0
  export MANPP_CUDA=on
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
    export TORCH_CUDA_ARCH_LIST
  fi
  # CMake puts the modules into this tree, which is on the PYTHONPATH; pip does the same with more requirements.
  local python
  python=$("$PYTHON" -c 'import sys; print(sys.executable)')
  { cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$python" -DMANPP_CUDA=on && cmake --build build/gpu; } ||
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .
}

doctor() { "$PYTHON" -m manpp_kernels.cli doctor; }

tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  # On a GPU what needs one, alone: the rest runs everywhere. A backend that is missing there is a failure. One thread
  # for each worker on the CPU: more of them than there are cores would wait for one another.
  local needed=()
  if [ "$DEVICE" = cuda ]; then
    export MANPP_TEST_BACKENDS=cuda,triton,cpu,eager OMP_NUM_THREADS=1
    needed=(-m cuda)
  fi
  "$PYTHON" -m pytest python_tests -p no:cacheprovider --no-header -v -ra "${needed[@]}" "${workers[@]}"
}

# Tensors of more than 2^31 elements, one test at a time.
large() {
  MANPP_TEST_BACKENDS=cuda,triton MANPP_TEST_LARGE=1 "$PYTHON" -m pytest python_tests -p no:cacheprovider --no-header \
    -v -ra -m cuda -k 2_to_31
}

# Without PyTorch's caching allocator, so that each tensor is an allocation of its own with an end that is watched.
sanitizer() {
  # memcheck also reports calls of the CUDA API that fail, of which PyTorch makes some on purpose.
  local options=()
  [ "$1" = memcheck ] && options=(--report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "${options[@]}" \
    "$PYTHON" bench/sanitizer_workload.py cuda
}

# What the micro parts compare with takes a minute to compile.
prewarm() { "$PYTHON" bench/prewarm.py "$@"; }
prewarm_training() {
  "$PYTHON" bench/training.py --network resnet32 --rounds 1 --variant "e2e, compiled, CUDA graph" \
    --variant "dgl, narrow head, 4 blocks, compiled, CUDA graph" --variant "dgl, narrow head, compiled, CUDA graph" \
    --variant "MAN++ parameter form, unlocked, compiled, CUDA graph"
}

micro() { "$PYTHON" -m manpp_kernels.cli bench "$1" --json "$OUT/$1.json" ${MANPP_BENCH_QUICK:+--quick}; }
host() { "$PYTHON" bench/host_cost.py --json "$OUT/host_cost.json"; }
variants() { "$PYTHON" bench/ema_variants.py --json "$OUT/ema_variants.json"; }
mix_variants() { "$PYTHON" bench/mix_variants.py --json "$OUT/mix_variants.json"; }
counters() { "$PYTHON" bench/counters.py --json "$OUT/counters.json"; }
# Traced anew in every process, compiled variants take a minute or two to make ready though their code is in Inductor's
# cache: what does not come up in time is left out, so that the others are timed within the part's limit.
training() { "$PYTHON" bench/training.py --prepare 120 --json "$OUT/training.json"; }
dense() { "$PYTHON" bench/dense.py --json "$OUT/dense.json"; }
fashion() { "$PYTHON" bench/fashion_mnist.py --json "$OUT/fashion_mnist.json" ${MANPP_DATA:+--data-root "$MANPP_DATA"}; }

if [ ${#RUN[@]} -gt 0 ]; then
  "${RUN[@]}"
  exit
fi

mkdir -p "$OUT"
LOGS=$(mktemp -d)
: >"$LOGS/parts.txt"

# part LIMIT NAME FUNCTION...: with a log of its own, stopped after LIMIT seconds or when the budget is spent.
part() {
  local limit=$1 name=$2 begin=$SECONDS rest=$((BUDGET - SECONDS)) code result
  shift 2
  if [ "$rest" -lt 5 ]; then
    echo "$name: left away, no time" | tee -a "$LOGS/parts.txt"
    return
  fi
  # Interrupted, not ended: pytest then tells of what has failed so far.
  timeout -s INT -k 10 "$((limit < rest ? limit : rest))" bash bench/gpu.sh --device "$DEVICE" --run "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  case $code in
    0) result=ok ;;
    124 | 137) result=STOPPED ;;
    *) result="FAILED ($code)" ;;
  esac
  echo "$name: $result, $((SECONDS - begin)) s" | tee -a "$LOGS/parts.txt"
  [ "$code" -eq 0 ] || tail -n 15 "$LOGS/$name.log" | cut -c1-200
}

wants() { [[ " ${PARTS[*]} " == *" $1 "* ]]; }

wants build && part 200 build build
wants doctor && part 60 doctor doctor
# What is only right or wrong runs side by side; what is timed runs alone.
if wants sanitizer && [ "$DEVICE" = cuda ]; then
  for tool in memcheck racecheck initcheck; do
    part 120 "sanitizer-$tool" sanitizer "$tool" &
  done
fi
if wants tests || wants sanitizer; then # while nothing is timed
  { wants micro || wants micro-copy; } && part 120 prewarm-copy prewarm bench_detach_copy &
  { wants micro || wants micro-mix; } && part 120 prewarm-mix prewarm bench_scale_bias_mix &
  if wants micro || wants micro-ema; then
    part 120 prewarm-ema-large prewarm bench_ema_scale_update "4 x 25 M" &
    part 120 prewarm-ema-small prewarm bench_ema_scale_update "96 x 4,800" &
  fi
  wants training && [ "$DEVICE" = cuda ] && part 200 prewarm-training prewarm_training &
fi
wants tests && part 240 tests tests # in the foreground, as a shell's background jobs do not hear an interrupt
wait
wants large && [ "$DEVICE" = cuda ] && part 90 large large
tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .
{ wants micro || wants micro-ema; } && part 180 micro-ema micro ema_scale_update
{ wants micro || wants micro-mix; } && part 60 micro-mix micro scale_bias_mix
{ wants micro || wants micro-copy; } && part 70 micro-copy micro detach_copy
wants host && part 40 host host
wants variants && [ "$DEVICE" = cuda ] && part 60 variants variants
wants mix-variants && [ "$DEVICE" = cuda ] && part 120 mix-variants mix_variants
wants counters && [ "$DEVICE" = cuda ] && part 120 counters counters
tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .
wants training && part 240 training training
wants dense && part 90 dense dense
wants fashion && part 180 fashion fashion
tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .

echo
wants tests && tail -n 3 "$LOGS/tests.log"
"$PYTHON" bench/report.py --summary "$OUT"
echo
paste -sd';' "$LOGS/parts.txt" | sed 's/;/; /g'
# Prewarming matters for the time alone. A benchmark that was stopped has its rows so far; what is only right or wrong has
# to have come to its end.
! grep -v ^prewarm "$LOGS/parts.txt" | grep -qE 'FAILED|^(build|doctor|tests|sanitizer.*|large): (STOPPED|left away)'
