#!/bin/bash
# prothpc train on generic-slurm; nodes: 2, ranks: 2.
# Written by prothpc 1.2.3; yours to keep and edit. It can be submitted again as it is.
#
#SBATCH --job-name=prothpc-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --output=/project/abc123/work/runs/a/batch/0001-train/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@300

# shellcheck disable=SC2317 # functions that traps call
set -euo pipefail

# ---- What runs, and where.
cd /project/abc123/work
job_dir=/project/abc123/work/runs/a/batch/0001-train # this script, its logs and its notes
job_id=$SLURM_JOB_ID
hosts=$SLURM_JOB_NODELIST
command=(prothpc train protbert.toml train.run_dir=runs/a)

say() { printf '== %(%F %T)T  %s\n' -1 "$*"; }
finish() { # STATUS SENTENCE: note how this attempt ended, and leave
  say "$2"
  printf '%s\t%s\t%s\n' "$job_id" "$1" "$2" >> "$job_dir/ends.tsv"
  exit "$1"
}

# ---- Attempts: a line for every start of this job, by whomever.
attempts=$job_dir/attempts.tsv
touch "$attempts"
attempt=$(($(wc -l < "$attempts") + 1))
say "prothpc train, attempt $attempt, job $job_id on $hosts"
progress() { # changes whenever an attempt has achieved something
  { find /project/abc123/work/runs/a/checkpoints -name 'step-*' -printf '%f\n' 2> /dev/null || true; } |
    LC_ALL=C sort | cksum | tr ' ' '-'
}
stalled() { # whether the last two restarts have left everything as they found it
  [[ $(wc -l < "$attempts") -ge 3 && $(tail -n 2 "$attempts" | cut -f 3 | sort -u) == "$(progress)" ]]
}
no_use="two restarts in a row have achieved nothing: see above, give the job more time, and submit it again"
if stalled; then
  finish 1 "$no_use"
fi
printf '%s\t%(%s)T\t%s\n' "$job_id" -1 "$(progress)" >> "$attempts"

# ---- Signals are handed on to what runs; its exit code is then in $status.
launcher='' warned='' told_to_end='' status=0
hand_on() {
  caught=yes
  [[ -z $launcher ]] || kill -s USR2 "$launcher" || true # it saves and ends
}
on_warning() {
  warned=yes
  say "the warning signal: the job's time is nearly up"
  hand_on
}
on_end() {
  told_to_end=yes
  say "told to end"
  hand_on
}
trap on_warning USR2
trap on_end TERM INT
run() { # COMMAND...
  "$@" &
  launcher=$!
  while
    caught='' status=0
    wait "$launcher" || status=$? # a signal interrupts it
    [[ -n $caught ]]
  do :; done
  launcher=''
}

# ---- Software.
export PATH=/project/abc123/env/bin:$PATH

# ---- The clock: training saves and ends in time, whether or not a signal comes.
end=$(squeue --noheader --jobs "$job_id" --format %e 2> /dev/null || true) # it may have been changed
end=$(date -d "${end:-unknown}" +%s 2> /dev/null || echo $(($(date +%s) + 7200)))
export PROTHPC_END_AT=$end PROTHPC_LEAD=300

# ---- Preflight: is everything there, and do the ranks see one another?
PROTHPC_RANKS=2 run srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --mpi=pmix prothpc doctor --dir "$job_dir" --timeout 60
if [[ $status != 0 && -z $warned$told_to_end ]]; then
  finish "$status" "the preflight failed: see above"
fi

# ---- The run.
if [[ -n $warned$told_to_end ]]; then
  status=85
else
  PROTHPC_RANKS=2 run srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --mpi=pmix "${command[@]}"
fi

# ---- The end: 0 is finished, 85 wants to go on, anything else has failed.
if [[ $status != 85 ]]; then
  finish "$status" "$([[ $status == 0 ]] && echo finished || echo "failed with exit code $status")"
elif [[ -n $told_to_end && -z $warned ]]; then
  finish 1 "ended because it was told to; submit it again to go on"
elif stalled; then
  finish 1 "$no_use"
fi
say "requeued"
scontrol requeue "$job_id" # ends this script
finish 85 "goes on when it starts again"
