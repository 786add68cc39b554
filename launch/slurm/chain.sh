#!/usr/bin/env bash
# Submits a chain of jobs, each of which extends the run to its own step, one after the other. From the repository:
#
#   launch/slurm/chain.sh 10000,20000,30000 [SBATCH OPTIONS…] -- --run RUN --config C --data D --save-every 500
#
# After the -- stand the arguments of launch/pretrain.py but --until-step. Call it again, with other sbatch options (more
# nodes, say) or further steps, and the new jobs queue behind the old ones. Where jobs may not requeue, give a step as
# often as it takes jobs to reach it: 30000,30000,30000; those that come too late end at once.
#
# Jobs of one run have one name of their own, and Slurm starts one of a name at a time (--dependency=singleton), in the
# order of submission: so the next starts whether the one before it ended well, failed, lost its nodes or was cancelled,
# and never beside it, as it would with --dependency=afterany when a link between them is cancelled.
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
  read_arguments "$@" --until-step "$step" # refuses what no job could use
done
name=pretrain-$(basename -- "$RUN" | tr -c 'A-Za-z0-9\n' _)-$(realpath -- "$RUN" | cksum | cut -d ' ' -f 1)
dependency=singleton
first_line "$JOB/slurm_job" # one that was submitted by hand, and has another name
[ -z "$REPLY" ] || [ -z "$(squeue --noheader --jobs="$REPLY" 2> /dev/null)" ] || dependency=afterany:$REPLY,singleton
for step in "${steps[@]}"; do
  sbatch --parsable "${options[@]}" --job-name="$name" --dependency="$dependency" \
    "$WSM_REPO/launch/slurm/pretrain.sbatch" "$@" --until-step "$step"
done
