#!/usr/bin/env bash
# The whole benchmark: results.json, results.md and results.png beside this file. About 40 minutes on two quiet cores.
# Arguments go to run.py, for example: bash tools/bench/run.sh --groups fixed zero3
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=python
[ -x .venv/bin/python ] && PYTHON=.venv/bin/python
export PYTHONPATH=. DS_ACCELERATOR=cpu
exec "$PYTHON" -m tools.bench.run "$@"
