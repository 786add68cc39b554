# shellcheck shell=bash
# What the job scripts know about a run and its attempts. Sourced, with WSM_REPO set, by pretrain.sbatch and pretrain.sh.
#
# RUN/job: attempt (number of the newest), done (the only proof of success), latest beside it (the only proof of
# progress), crashes, bad_nodes, logs/attempt-K/, and two files that people may care about:
#   RUN/job/stop    make it, and the ranks see it, save and leave; no job of this run goes on before it is removed
#   RUN/job/failed  why the scripts gave up; no job of this run goes on before it is removed
#
# After srun only builtins are used where it matters: on a node failure Slurm kills the shell's children, too.

log() { printf '[%(%F %T)T attempt %s] %s\n' -1 "${WSM_ATTEMPT:-?}" "$*"; }

die() {
  log "$*" >&2
  exit 1
}

# first_line FILE: into REPLY; empty if there is none
first_line() {
  REPLY=
  [ ! -r "$1" ] || read -r REPLY < "$1" || true
}

# read_arguments ARGUMENTS OF PRETRAIN.PY: sets RUN and UNTIL_STEP
read_arguments() {
  RUN='' UNTIL_STEP=''
  while [ $# -gt 0 ]; do
    case $1 in
      --run | --run-folder) RUN=${2:-} ;;
      --run=* | --run-folder=*) RUN=${1#*=} ;;
      --until-step) UNTIL_STEP=${2:-} ;;
      --until-step=*) UNTIL_STEP=${1#*=} ;;
    esac
    shift
  done
  [ -n "$RUN" ] || die "--run is missing: give the arguments of launch/pretrain.py"
  [[ $UNTIL_STEP =~ ^[0-9]+$ ]] || die "--until-step is missing, or no number: '$UNTIL_STEP'"
  [[ $RUN = /* ]] || RUN=$PWD/$RUN
  JOB=$RUN/job
  mkdir -p "$JOB/logs" || die "$RUN cannot be written"
}

# absolute_arguments ARGUMENTS…: into ARGUMENTS, with the paths among them absolute, for launchers that go elsewhere
absolute_arguments() {
  local previous=''
  ARGUMENTS=()
  while [ $# -gt 0 ]; do
    case $previous in
      --run | --run-folder | --config | --data) ARGUMENTS+=("$(realpath -m -- "$1")") ;;
      *) ARGUMENTS+=("$1") ;;
    esac
    previous=$1
    shift
  done
}

# load_site: the site's file; all that it sets reaches the ranks
load_site() {
  WSM_SITE=${WSM_SITE:-$WSM_REPO/configs/cluster.env}
  [ -r "$WSM_SITE" ] || die "the site's file $WSM_SITE cannot be read; name yours with WSM_SITE"
  set -a
  # shellcheck source=configs/cluster.env
  source "$WSM_SITE" || die "$WSM_SITE failed"
  set +a
  [ -x "$WSM_PYTHON" ] || die "WSM_PYTHON=$WSM_PYTHON is no program; set it in $WSM_SITE"
}

# leave_if_settled: ends the job if there is nothing to do, or if people must act first
leave_if_settled() {
  if is_done; then
    log "done: step $UNTIL_STEP was reached"
    exit 0
  fi
  first_line "$JOB/failed"
  [ ! -e "$JOB/failed" ] || die "gave up before: $REPLY. Mend it, remove $JOB/failed, and submit again"
  leave_if_stopped
}

leave_if_stopped() { [ ! -e "$JOB/stop" ] || die "stopped by $JOB/stop; remove it to go on"; }

is_done() {
  first_line "$JOB/done"
  [[ $REPLY =~ \"step\":\ *([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge "$UNTIL_STEP" ]
}

# begin_attempt: sets and exports WSM_ATTEMPT, and LOGS. From here on, ranks of older attempts can publish nothing.
begin_attempt() {
  first_line "$JOB/attempt"
  WSM_ATTEMPT=$((${REPLY:-0} + 1))
  until mkdir "$JOB/attempt-$WSM_ATTEMPT" 2> /dev/null; do # of two jobs that start at once, one gets this number
    [ -e "$JOB/attempt-$WSM_ATTEMPT" ] || die "$JOB cannot be written"
    WSM_ATTEMPT=$((WSM_ATTEMPT + 1))
  done
  export WSM_ATTEMPT
  LOGS=$JOB/logs/attempt-$WSM_ATTEMPT
  if ! { mkdir -p "$LOGS" && echo "$WSM_ATTEMPT" > "$LOGS/attempt" && mv "$LOGS/attempt" "$JOB/attempt"; }; then
    die "$JOB cannot be written"
  fi
  first_line "$RUN/latest"
  LATEST_BEFORE=$REPLY
}

# leave_if_superseded: a node that was cut off and came back has no say in what becomes of the run
leave_if_superseded() {
  first_line "$JOB/attempt"
  [ "$REPLY" = "$WSM_ATTEMPT" ] || die "superseded by attempt $REPLY"
}

# note_provenance ARGUMENTS…: what this attempt is made of, in LOGS/provenance
note_provenance() {
  {
    printf 'started %(%F %T %z)T\nrun %s\ncheckpoint %s\narguments' -1 "$RUN" "${LATEST_BEFORE:-none}"
    printf ' %q' "$@"
    printf '\njob %s restart %s\nnodes %s\n' "${SLURM_JOB_ID:-none}" "${SLURM_RESTART_COUNT:-0}" "$NODES"
    echo "commit $(git -C "$WSM_REPO" rev-parse HEAD 2>&1) $(git -C "$WSM_REPO" status --porcelain 2>&1 | wc -l) files changed"
    "$WSM_PYTHON" -c 'import importlib.metadata as m, sys; print("python", sys.version.split()[0])
for name in ("torch", "deepspeed", "wsm_ds"): print(name, m.version(name))' 2>&1
    echo "environment"
    env | grep -E '^(WSM|NCCL|GLOO|TORCH|OMP|CUDA|DS|HF|PYTHON|TRITON|UCX|FI)_?[A-Z0-9_]*=' | sort
    echo "site $WSM_SITE"
    cat "$WSM_SITE"
  } > "$LOGS/provenance"
}

# judge_crash WHY: the ranks have ended by themselves; gives up (exit 1) when that leads nowhere
judge_crash() {
  first_line "$RUN/latest"
  local latest=${REPLY:-none} line crashes=0
  [ "$latest" = "${LATEST_BEFORE:-none}" ] || return 0
  echo "$latest attempt $WSM_ATTEMPT: $1" >> "$JOB/crashes"
  while read -r line; do
    if [ "${line%% *}" = "$latest" ]; then crashes=$((crashes + 1)); else crashes=0; fi
  done < "$JOB/crashes"
  [ "$crashes" -lt "$WSM_MAX_CRASHES" ] || give_up "$crashes attempts in a row ended without a new checkpoint, the last: $1"
  log "no new checkpoint since $latest ($crashes of $WSM_MAX_CRASHES attempts)"
}

# give_up REASON: says so where people look, and stops all jobs of this run
give_up() {
  echo "- gave up" >> "$JOB/crashes" # a new count begins after it
  echo "$1 (logs: $LOGS)" > "$JOB/failed"
  die "GIVING UP: $1. See $LOGS; remove $JOB/failed to try again"
}

# start_watchdog: sets WATCHDOG, the pid of what ends with 3 when the ranks have stood still for too long
start_watchdog() {
  "$WSM_PYTHON" -m wsm_ds.training.watchdog "$RUN" --timeout-s "$WSM_HANG_S" --start-timeout-s "$WSM_START_S" \
    > "$LOGS/watchdog" 2>&1 &
  WATCHDOG=$!
}

is_alive() { kill -0 "$1" 2> /dev/null; }

# attend PID: returns when the ranks that PID started have ended. Meanwhile it ends what hangs with end_ranks, which the
# caller defines. Sets HUNG to the watchdog's words.
attend() {
  local ranks=$1 pause done_s='' code=''
  HUNG=''
  while is_alive "$ranks"; do
    sleep 2 &
    pause=$!
    wait -n "$ranks" "$pause" # a trapped signal ends it, too
    kill "$pause" 2> /dev/null
    if is_done; then # the watchdog has left; ranks that cannot leave would keep the nodes
      : "${done_s:=$SECONDS}"
      [ $((SECONDS - done_s)) -le "$WSM_SAVE_S" ] || end_ranks
    elif [ -z "$code" ] && ! is_alive "$WATCHDOG" && is_alive "$ranks"; then
      wait "$WATCHDOG"
      code=$?
      if [ $code != 0 ] && [ $code != 143 ]; then # those are of SIGTERM, which this script and the ranks get, too
        HUNG=$(tail -n 1 "$LOGS/watchdog")
        log "ending the ranks: ${HUNG:=the watchdog has died}"
        end_ranks
      fi
    fi
  done
  kill "$WATCHDOG" 2> /dev/null
}

# requeue_job: this Slurm job starts again. A job that was cancelled must stay so, although scontrol would start it again,
# and one that Slurm has requeued already is left to it: both are no longer running.
requeue_job() {
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -qE ' JobState=RUNNING | Reason=TimeLimit ' ||
    die "Slurm is ending this job; not requeued by this script"
  scontrol requeue "$SLURM_JOB_ID"
  local code=$? # above 128: the TERM of this very requeue was faster than the answer
  [ $code = 0 ] || [ $code -gt 128 ] || die "Slurm does not requeue this job"
}
