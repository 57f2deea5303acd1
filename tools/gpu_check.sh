#!/usr/bin/env bash
# Checks on one device what no CPU can: its numbers beside the CPU's, NCCL, streaming from pinned memory, fp16, ...
#
#   bash tools/gpu_check.sh                                  # nine minutes at most
#   bash tools/gpu_check.sh --wheels DIR --output OUT        # where DeepSpeed is not installed, and no network is
#   DS_ACCELERATOR=cpu bash tools/gpu_check.sh               # does it run? (a minute; what needs a device is skipped)
#
# --wheels DIR   put what is missing beside the packages that PYTHON has, from the wheels in DIR (tools/README.md says how to
#                fill it); into an environment of its own under TMPDIR, which goes when this script ends
# --output OUT   where gpu_check.json and gpu_check.md go (default runs/gpu_check)
# --minutes N    the most that all of it takes (default 9)
# --only NAMES   some of the checks
# PYTHON, in the environment, is the interpreter (default: .venv's where there is one, else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "gpu_check.sh: $*" >&2; exit 2; }

PYTHON=${PYTHON:-}
[[ -n $PYTHON ]] || { [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python || PYTHON=python3; }
arguments=() wheels=''
while [[ $# -gt 0 ]]; do
    case $1 in
        --wheels) wheels=${2:-}; shift 2 || fail "--wheels needs a folder" ;;
        *) arguments+=("$1"); shift ;;
    esac
done

if [[ -n $wheels ]]; then
    [[ -d $wheels ]] || fail "there is no folder '$wheels'"
    wanted=(deepspeed datasets transformers sentencepiece protobuf pyyaml) # not wandb: nothing is reported to it
    for wheel in "$wheels"/*.whl; do # what the folder has of these is wanted, too
        case ${wheel##*/} in
            trl-*) wanted+=(trl) ;;
            flash_attn-*) wanted+=(flash_attn) ;;
        esac
    done
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    # PYTHON may itself be an environment's, whose packages another environment would not see: they are put on its path.
    "$PYTHON" -m venv --without-pip --system-site-packages "$environment"
    "$PYTHON" -c 'import sys; print("\n".join(path for path in sys.path if path.endswith("-packages")))' \
        > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    PYTHON=$environment/bin/python
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" "${wanted[@]}" ||
        fail "the wheels in '$wheels' do not make up for what is missing (above); add what pip names"
fi

"$PYTHON" -c 'import deepspeed' 2> /dev/null ||
    fail "$PYTHON has no DeepSpeed; make .venv (bash tools/setup_env.sh), set PYTHON, or give --wheels"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline
"$PYTHON" -m tools.gpu_check.run --already "$SECONDS" "${arguments[@]}"
