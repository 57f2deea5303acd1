#!/usr/bin/env bash
# Run a recipe on this machine.
#
#   bash launch/local.sh launch/recipes/quickstart.yaml [--any_field value ...]
#
# One rank per accelerator, or two on a machine without one. Relative paths in a recipe start at the project's root.
# Settings, as environment variables:
#   RANKS             number of ranks
#   MASTER_PORT       port for the ranks to meet (default: a free one)
#   OMP_NUM_THREADS   threads per rank (default: the cores shared out evenly)
#   DS_ACCELERATOR    set it to cpu to leave the accelerators of a machine alone
# SIGTERM or Ctrl-C: the run stops with a checkpoint before its next phase, and the exit code is 75.
set -euo pipefail

fail() { echo "local.sh: $*" >&2; exit 2; }

[[ $# -ge 1 && $1 != --* ]] || fail "the first argument is a recipe, for example launch/recipes/quickstart.yaml"
[[ -f $1 ]] || fail "there is no recipe '$1'"
recipe=$(realpath "$1")
shift

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# An environment of your own (a container, conda) that has deepspeed is taken as it is.
[[ -d .venv/bin ]] || command -v deepspeed > /dev/null || bash tools/setup_env.sh
[[ -d .venv/bin ]] && export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

accelerators=0
if [[ ${DS_ACCELERATOR:-} != cpu ]]; then
    accelerators=$(python -c 'import torch; print(torch.accelerator.device_count())')
    [[ $accelerators -gt 0 ]] || export DS_ACCELERATOR=cpu
fi
ranks=${RANKS:-$((accelerators > 0 ? accelerators : 2))}
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TOKENIZERS_PARALLELISM=false
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# A signal to this script, Ctrl-C too, goes to the ranks and not to the launcher: they checkpoint before their next phase
# and exit with 75, and the launcher passes that on. It would itself kill them after 30 seconds and exit with 1. Ranks
# that are not there yet are waited for, and die of the signal.
launcher='' signals=0
# shellcheck disable=SC2317  # the trap calls it
stop() {
    signals=$((signals + 1))
    [[ -n $launcher ]] || return 0
    until pkill -TERM --session "$launcher" --full -- --local_rank || ! kill -0 "$launcher" 2> /dev/null; do
        sleep 0.2
    done
}
trap stop INT TERM

# What `deepspeed` starts on a machine; it would itself end with 0 if this launcher were killed.
world=$(python -c 'import base64, json, sys
print(base64.urlsafe_b64encode(json.dumps({"localhost": list(range(int(sys.argv[1])))}).encode()).decode())' "$ranks")
[[ $signals == 0 ]] || exit 143
setsid python -u -m deepspeed.launcher.launch --quiet --world_info="$world" --master_addr=127.0.0.1 \
    --master_port="$port" --module gkd_ds.train --config "$recipe" "$@" &
launcher=$!
[[ $signals == 0 ]] || stop # it came before the launcher had a name
while :; do # a signal ends `wait`, not the launcher
    heard=$signals status=0
    wait "$launcher" || status=$?
    [[ $signals != "$heard" ]] || break
done
exit "$status"
