#!/usr/bin/env bash
# Everything from a fresh clone to a distilled model, on two CPU cores in about ten minutes:
#
#   bash launch/quickstart.sh
#
# environment -> teacher (SmolLM2-135M-Instruct) -> student (the same with 24 of its 30 layers) -> data -> training on
# two ranks -> result. Everything is in runs/quickstart. A second call reuses what is there; a finished run is shown
# again, not repeated (remove runs/quickstart/run to train anew). It uses the CPU on every machine, so that the
# result is the same everywhere. W&B records offline unless WANDB_MODE says otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

home=runs/quickstart
run=$home/run
system="Answer in one short sentence."  # shorter than the chat template's own
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "1/5 environment"
bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=true

step "2/5 teacher, student, data"
python tools/prepare_smollm2.py --teacher $home/models/teacher --student $home/models/student --keep-layers 24
python tools/prepare_chatterbot.py --output $home/data --system "$system"

step "3/5 training"
if [ -f $run/FINISHED ]; then
    echo "$run has finished already; remove it to train again."
else
    # An unfinished run starts over: it is shorter than its checkpoints would be worth.
    RANKS=2 bash launch/local.sh launch/recipes/quickstart.yaml --overwrite_output_dir true
fi

step "4/5 answers and report"
if [ ! -f $run/answers.json ] || [ $run/FINISHED -nt $run/answers.json ]; then
    python tools/answers.py --system "$system" --before $home/models/student --after $run --teacher $home/models/teacher \
        --output $run/answers.json
fi
python tools/report.py $run

step "5/5 result"
status=0
python tools/show_result.py $run || status=$?
wandb_run=$(find $run/wandb -maxdepth 1 -name '*run-*' -type d 2> /dev/null | sort | tail -n 1)
cat <<END

Student:  $run (load it with transformers' from_pretrained)
Report:   $run/report.html and $run/report.png
W&B run:  ${wandb_run:-none} (upload it with: wandb sync ${wandb_run:-DIRECTORY})
Took:     $SECONDS s
END
exit $status
