#!/bin/sh
# What only a GPU can say, in under nine minutes: benchmarks/gpu.sh [--only PART ...] [--out FOLDER] [--cpu]
# Needs PyTorch with Triton, transformers, NumPy and PyYAML; neither Flower nor Hydra. PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
