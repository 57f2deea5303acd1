#!/usr/bin/env bash
# Sets up the environment and passes the tests.
#
#   bash tests/run.sh                              # everything
#   bash tests/run.sh tests/unit -k divergence     # what pytest is told instead
#
# Three kinds: tests/unit (one process), tests/dist (real ranks on this machine), tests/launch (real hosts, real
# Slurm). What a kind needs from the system is listed below; where it is missing, that is said before and after.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
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

missing=()
needs() {  # kind, command or header, Debian package
    command -v "$2" > /dev/null || [ -e "/usr/sbin/$2" ] || [ -e "/usr/include/$2" ] || missing+=("$1 needs $2: apt-get install $3")
}
needs "tests/dist (NVMe offload)" libaio.h libaio-dev
needs "tests/dist (NVMe offload)" g++ g++
needs "tests/launch (hostfile)" pdsh pdsh
needs "tests/launch (hostfile)" sshd openssh-server
needs "tests/launch (hostfile)" ip iproute2
needs "tests/launch (Slurm)" slurmctld slurm-wlm
needs "tests/launch (Slurm)" munged munge
if [ ${#missing[@]} -gt 0 ]; then
    printf '\n!!! NOT EVERYTHING WILL BE TESTED on this machine:\n' >&2
    printf '!!!   %s\n' "${missing[@]}" >&2
    printf '!!! (bash .ci/run installs all of it on Debian)\n\n' >&2
fi

ruff check . || lint_failed=yes

if [ $# -gt 0 ]; then
    python -m pytest "$@"
    status=$?
else
    # tests/launch mostly wait, for Slurm and for what must time out. Beside them, on what they leave of the cores:
    # tests/unit, which use one, and the build of DeepSpeed's NVMe reader, which takes minutes and which tests/dist need. Where it
    # cannot be built, the tests that need it say so.
    aside=$(mktemp)
    (
        nice python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()" > "$TORCH_EXTENSIONS_DIR/async_io.log" 2>&1
        nice python -m pytest tests/unit
    ) > "$aside" 2>&1 &
    unit=$!
    python -m pytest --durations=10 tests/launch
    status=$?
    wait $unit || status=1
    cat "$aside"
    rm "$aside"
    python -m pytest --durations=15 tests/dist || status=1
fi
[ -z "${lint_failed:-}" ] || status=1
exit "$status"
