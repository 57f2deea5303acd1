#!/usr/bin/env bash
# Sets up the environment and passes the tests.
#
#   bash tests/run.sh                              # everything that can run on this machine
#   bash tests/run.sh --fast                       # unit tests and one run on two ranks, in four minutes at most
#   bash tests/run.sh tests/unit -k divergence     # what pytest is told instead
#
# Three kinds: tests/unit (one process), tests/dist (real ranks on this machine), tests/launch (real hosts, real Slurm).
# What they need from the system is installed from Debian where that is possible (as root, with apt); --no-install leaves
# the system alone. What is missing then is said before and after.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

fast=no install=yes
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) fast=yes ;;
        --no-install) install=no ;;
        *) break ;;
    esac
    shift
done

# ---- What the tests need from Debian: kind, command or header, package

needed=(
    "tests/dist (NVMe offload)|libaio.h|libaio-dev"
    "tests/dist (NVMe offload)|g++|g++"
    "tests/launch (hostfile)|pdsh|pdsh"
    "tests/launch (hostfile)|sshd|openssh-server"
    "tests/launch (hostfile)|ip|iproute2"
    "tests/launch (hostfile)|numactl|numactl"
    "tests/launch (Slurm)|slurmctld|slurm-wlm"
    "tests/launch (Slurm)|munged|munge"
    "tests/launch (scripts)|shellcheck|shellcheck"
)
is_here() { command -v "$1" > /dev/null || [ -e "/usr/sbin/$1" ] || [ -e "/usr/include/$1" ]; }
find_missing() {
    missing=() packages=()
    local kind what package
    for line in "${needed[@]}"; do
        IFS='|' read -r kind what package <<< "$line"
        is_here "$what" || { missing+=("$kind needs $what: apt-get install $package"); packages+=("$package"); }
    done
}
find_missing
if [ "$fast" = no ] && [ "$install" = yes ] && [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "Installing ${packages[*]} (--no-install leaves the system alone)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq < /dev/null
    apt-get install -y -qq --no-install-recommends "${packages[@]}" < /dev/null > /dev/null
    find_missing
fi
warn_of_missing() {
    [ "$fast" = no ] && [ ${#missing[@]} -gt 0 ] || return 0
    printf '\n!!! NOT EVERYTHING IS TESTED on this machine:\n' >&2
    printf '!!!   %s\n' "${missing[@]}" >&2
}
warn_of_missing

# ---- The environment

bash tools/setup_env.sh || exit 1
export PATH="$root/.venv/bin:$PATH"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
export TOKENIZERS_PARALLELISM=false
# Ops that DeepSpeed builds (asynchronous I/O for NVMe offload) are kept with the environment. A build that was killed
# leaves a lock for which every later run would wait for ever: no build here takes half an hour.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}
mkdir -p "$TORCH_EXTENSIONS_DIR"
find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +30 -delete

# ---- The tests

status=0 started=$SECONDS
ruff check . || status=1
ruff format --check . || status=1

aside=$(mktemp)
trap 'rm -f "$aside"' EXIT
beside() {  # this command's output comes when the other one has ended
    "$@" > "$aside" 2>&1 &
}
wait_for_the_other() {
    wait $! || status=1
    cat "$aside"
}

if [ $# -gt 0 ]; then
    python -m pytest "$@" || status=1
elif [ "$fast" = yes ]; then
    beside python -m pytest -q tests/unit/data tests/unit/checkpoint tests/unit/monitor tests/unit/tools
    python -m pytest -q tests/unit tests/dist/test_control.py --ignore tests/unit/data --ignore tests/unit/checkpoint \
        --ignore tests/unit/monitor --ignore tests/unit/tools || status=1
    wait_for_the_other
else
    # tests/launch mostly wait, for Slurm and for what must time out. Beside them, on what they leave of the cores:
    # tests/unit, which use one, and the build of DeepSpeed's NVMe reader, which takes minutes and which tests/dist need.
    # Where it cannot be built, the tests that need it say so.
    # shellcheck disable=SC2317  # it is called by name, in `beside`
    unit_tests() {
        nice python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()" \
            > "$TORCH_EXTENSIONS_DIR/async_io.log" 2>&1
        nice python -m pytest tests/unit
    }
    beside unit_tests
    python -m pytest --durations=10 tests/launch || status=1
    wait_for_the_other
    python -m pytest --durations=15 tests/dist || status=1
fi

warn_of_missing
seconds=$((SECONDS - started))
verdict=$([ "$status" = 0 ] && echo passed || echo FAILED)
printf '\nThe tests %s in %d min %d s.\n' "$verdict" $((seconds / 60)) $((seconds % 60))
exit "$status"
