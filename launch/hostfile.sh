#!/usr/bin/env bash
# One training run on the hosts of a hostfile, over pdsh and ssh: checks them, then starts DeepSpeed's launcher.
#
#   bash launch/hostfile.sh HOSTFILE RECIPE.yaml [--any_field value ...]
#
# To stop it early with a checkpoint: Ctrl-C or SIGTERM to this script, or touch OUTPUT_DIR/STOP on any host; the exit
# code is then 75. Settings, as environment variables:
#   MASTER_ADDR   an address of the first host that the others reach (default: the first that it reports)
#   MASTER_PORT   (default 29500)
#   SSH_PORT      where the hosts' sshd listens (default: what ssh's own configuration says)
#   TRAVEL        names of further environment variables that the hosts need, separated by spaces
#   PREFLIGHT=0   do not check the hosts first
set -euo pipefail

hostfile=$(realpath "${1:?the first argument is a hostfile, as launch/hostfile.example}")
recipe=$(realpath "${2:?the second argument is a recipe}")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -d .venv/bin ]] && export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

way=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
[[ -z ${MASTER_ADDR:-} ]] || way+=(--master_addr "$MASTER_ADDR")
[[ -z ${SSH_PORT:-} ]] || way+=(--ssh_port "$SSH_PORT")

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    python tools/preflight.py "${way[@]}" --config "$recipe" "$@"
fi
# A host whose link is cut must not be waited for as long as TCP would.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# What the hosts must know is written where DeepSpeed looks for it, readable by nobody else, and without secrets.
DS_ENV_FILE=$(mktemp -t deepspeed_env.XXXXXXXX)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
read -ra travel <<< "${TRAVEL:-}"
python tools/deepspeed_env.py "${travel[@]}"
stop_file=$(python tools/stop_file.py --config "$recipe" "$@")

# DeepSpeed's launcher has no good end: at a signal it kills the ranks after 30 seconds and exits with 1. So it lives in
# a session of its own, where Ctrl-C does not reach it, and a signal to this script becomes a stop file. The file is made
# again and again, because a trainer that is just starting takes an old one away.
# shellcheck disable=SC2317  # the trap calls it
stop() {
    if [[ -n ${asking:-} ]]; then
        kill -TERM "$launcher" 2> /dev/null || true
        return
    fi
    echo "hostfile.sh: asking the trainer to checkpoint and stop; a second signal ends it without"
    while kill -0 "$launcher" 2> /dev/null; do
        touch "$stop_file" 2> /dev/null || true # its directory may not be there yet
        sleep 1
    done &
    asking=$!
}
setsid deepspeed "${way[@]}" --module "${GKD_MODULE:-gkd_ds.train}" --config "$recipe" "$@" &
launcher=$!
trap stop INT TERM
while kill -0 "$launcher" 2> /dev/null; do # a signal ends `wait`, not the launcher
    wait "$launcher" || true
done
status=0
wait "$launcher" || status=$?
if [[ -n ${asking:-} ]]; then
    kill "$asking" 2> /dev/null || true
    rm -f "$stop_file"
fi
exit "$status"
