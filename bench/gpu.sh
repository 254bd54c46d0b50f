#!/usr/bin/env bash
# What the GPU of this machine makes of every bundle of the repository: parity with float32 of ONNX Runtime and
# latency, for each flavour of TensorRT that is installed and each precision. Prints JSON, a line a plan.
#
#   bench/gpu.sh [BUNDLE...] > gpu.jsonl
#
# PYTHON says which interpreter (.venv/bin/python by default). Exit status: 0 all plans run within the tolerance
# of their bundle; 1 some do not, and it says why; 3 there is no GPU, or no TensorRT.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-.venv/bin/python}
if [ "$#" -eq 0 ]; then
  set -- bundles/*/manifest.sha256
  set -- "${@%/manifest.sha256}"
fi

lack=$("$python" -c 'from pipelines.engines.cuda import probe; print(probe().problem)') || exit 1
if [ -n "$lack" ]; then
  echo "gpu.sh: no GPU: $lack" >&2
  exit 3
fi
flavours=$("$python" -c '
from pipelines.engines.flavours import FLAVOURS
print(*(flavour.name for flavour in FLAVOURS if flavour.version))') || exit 1
if [ -z "$flavours" ]; then
  echo "gpu.sh: no TensorRT: pip install 'grainwatch[tensorrt]' or 'grainwatch[tensorrt-rtx]'" >&2
  exit 3
fi

"$python" -m grainwatch engine backends "$@" >&2 || exit 1
status=0
for flavour in $flavours; do
  for precision in fp32 fp16 int8; do
    for bundle in "$@"; do
      # Codes of micrographs are whole numbers: in 8 bits they are others.
      if [ "$precision" = int8 ] && grep -q '"kind": "micrograph-' "$bundle/bundle.json" 2>/dev/null; then continue; fi
      "$python" -m grainwatch engine build "$bundle" --flavour "$flavour" --precision "$precision" --again --json ||
        status=1
    done
  done
done
exit "$status"
