#!/usr/bin/env bash
# One training run on the hosts of a hostfile, over pdsh and ssh: checks them, then starts DeepSpeed's launcher.
#
#   bash launch/hostfile.sh HOSTFILE RECIPE.yaml [--any_field value ...]
#
# To stop it early with a checkpoint: touch OUTPUT_DIR/STOP. Settings, as environment variables:
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
mkdir -p runs
export DS_ENV_FILE=$PWD/runs/.deepspeed_env
read -ra travel <<< "${TRAVEL:-}"
python tools/deepspeed_env.py "${travel[@]}"
exec deepspeed "${way[@]}" --module "${GKD_MODULE:-gkd_ds.train}" --config "$recipe" "$@"
