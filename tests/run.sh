#!/usr/bin/env bash
# Sets up the environment and passes the tests.
#
#   bash tests/run.sh                              # everything
#   bash tests/run.sh --fast                       # tests/unit and one run on two ranks, in four minutes
#   bash tests/run.sh tests/unit -k divergence     # what pytest is told instead
#   bash tests/run.sh --no-install ...             # any of these, and nothing is installed from Debian
#
# Three kinds: tests/unit (one process), tests/dist (real ranks on this machine), tests/launch (real hosts, real
# Slurm). What they need from the system is listed below. It is installed where it is missing and this may be done
# (root, apt-get); where it may not, that is said before and after the tests.
set -uo pipefail
started=$SECONDS

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

install=yes fast=no
while [ $# -gt 0 ]; do
    case $1 in
        --no-install) install=no ;;
        --fast) fast=yes ;;
        *) break ;;
    esac
    shift
done
if [ $fast = yes ] && [ $# -gt 0 ]; then
    echo "run.sh: --fast chooses the tests; leave out '$*'." >&2
    exit 2
fi

# Debian's package, a file or command of it, what needs it.
NEEDS="
python3-venv    ensurepip                  the environment
g++             g++                        tests/dist (NVMe offload)
libaio-dev      /usr/include/libaio.h      tests/dist (NVMe offload)
procps          pgrep                      tests/dist (launch/local.sh)
pdsh            pdsh                       tests/launch (hostfile)
openssh-server  /usr/sbin/sshd             tests/launch (hostfile)
iproute2        ip                         tests/launch (hostfile)
slurm-wlm       /usr/sbin/slurmctld        tests/launch (Slurm)
munge           /usr/sbin/munged           tests/launch (Slurm)
shellcheck      shellcheck                 tests/launch (scripts)
"

is_there() {
    case $1 in
        ensurepip) [ -x .venv/bin/python ] || "${PYTHON:-python3}" -c "import ensurepip" 2> /dev/null ;;
        *) [ -e "$1" ] || command -v "$1" > /dev/null ;;
    esac
}

look() {  # sets `packages` and `missing`
    packages=() missing=()
    local package what kind
    while read -r package what kind; do
        if [ -n "$package" ] && ! is_there "$what"; then
            packages+=("$package")
            missing+=("$kind: apt-get install $package")
        fi
    done <<< "$NEEDS"
}

look
if [ ${#packages[@]} -gt 0 ] && [ $install = yes ] && [ $fast = no ] && [ $# -eq 0 ] && [ "$EUID" = 0 ] && command -v apt-get > /dev/null; then
    echo "Installing from Debian: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null; } < /dev/null ||
        echo "run.sh: apt-get could not install all of it." >&2
    look
fi
say_what_is_missing() {
    [ ${#missing[@]} -gt 0 ] && [ $fast = no ] || return 0
    printf '\n!!! NOT EVERYTHING IS TESTED on this machine:\n' >&2
    printf '!!!   %s\n' "${missing[@]}" >&2
    printf '!!! (as root, bash tests/run.sh installs them)\n\n' >&2
}
say_what_is_missing

bash tools/setup_env.sh || exit 1

export PATH="$root/.venv/bin:$PATH"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
export TOKENIZERS_PARALLELISM=false
# Ops that DeepSpeed builds (asynchronous I/O for NVMe offload) are kept with the environment.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}
mkdir -p "$TORCH_EXTENSIONS_DIR"

status=0
ruff check . || status=1
ruff format --check . || status=1

# What runs beside something else says what it has to say when that has ended.
aside=$(mktemp)
trap 'rm -f "$aside"' EXIT

if [ $# -gt 0 ]; then
    python -m pytest "$@" || status=1
elif [ $fast = yes ]; then
    # Two processes of about the same length, for two cores.
    half=(tests/unit/checkpoint tests/unit/data tests/unit/learn tests/unit/plan tests/unit/rollout tests/unit/tools)
    python -m pytest -q "${half[@]}" > "$aside" 2>&1 &
    other=$!
    python -m pytest -q tests/unit "${half[@]/#/--ignore=}" || status=1
    wait $other || status=1
    cat "$aside"
    python -m pytest -q tests/dist/test_control.py || status=1
else
    # tests/launch mostly wait, for Slurm and for what must time out. Beside them, on what they leave of the cores:
    # tests/unit, which use one, and the build of DeepSpeed's NVMe reader, which takes minutes and which tests/dist
    # need. Where it cannot be built, the tests that need it say so.
    (
        nice python -c "
from deepspeed.ops.op_builder import AsyncIOBuilder
from gkd_ds.engine import builds
builds.load(AsyncIOBuilder())" > "$TORCH_EXTENSIONS_DIR/async_io.log" 2>&1
        nice python -m pytest tests/unit
    ) > "$aside" 2>&1 &
    unit=$!
    python -m pytest --durations=10 tests/launch || status=1
    wait $unit || status=1
    cat "$aside"
    python -m pytest --durations=15 tests/dist || status=1
fi
say_what_is_missing
took=$((SECONDS - started))
printf 'All of it took %d min %02d s; exit code %d.\n' $((took / 60)) $((took % 60)) "$status"
exit "$status"
