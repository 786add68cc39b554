#!/usr/bin/env bash
# Submits a chain of jobs, each of which extends the run to its own step, one after the other. From the repository:
#
#   launch/slurm/chain.sh 10000,20000,30000 [SBATCH OPTIONS…] -- --run RUN --config C --data D --save-every 500
#
# The arguments after -- are those of launch/pretrain.py without --until-step.
#
# Call chain.sh again, with other sbatch options (more nodes, say) or further steps, to queue new jobs behind the old
# ones. Where jobs may not requeue, repeat a step as often as jobs are needed to reach it: 30000,30000,30000. Jobs that
# are not needed end at once.
#
# All jobs of a run have the same name. Slurm starts one job of a name at a time (--dependency=singleton), in the order
# of submission. So the next job starts when the one before it has ended, failed, lost its nodes or was cancelled, and
# never at the same time. With --dependency=afterany two could run at once after a job between them is cancelled.
set -euo pipefail

usage() {
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -gt 0 ] || usage
IFS=, read -ra steps <<< "$1"
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -gt 1 ] || usage
shift

WSM_REPO=${WSM_REPO:-$PWD}
# shellcheck source=launch/attempt.sh
source "$WSM_REPO/launch/attempt.sh"
for step in "${steps[@]}"; do
  read_arguments "$@" --until-step "$step" # fails here, not in the queue, if they are wrong
done
name=pretrain-$(basename -- "$RUN" | tr -c 'A-Za-z0-9\n' _)-$(realpath -- "$RUN" | cksum | cut -d ' ' -f 1)
dependency=singleton
first_line "$JOB/slurm_job" # the running job may have another name, if it was submitted by hand
[ -z "$REPLY" ] || [ -z "$(squeue --noheader --jobs="$REPLY" 2> /dev/null)" ] || dependency=afterany:$REPLY,singleton
for step in "${steps[@]}"; do
  sbatch --parsable "${options[@]}" --job-name="$name" --dependency="$dependency" \
    "$WSM_REPO/launch/slurm/pretrain.sbatch" "$@" --until-step "$step"
done
