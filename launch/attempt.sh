# shellcheck shell=bash
# What the job scripts share. Sourced, with WSM_REPO set, by every script of launch/.
#
# The scripts start processes, wait for them and pass signals on: that is what a shell is for, and what must answer a
# signal at once. What follows from an event, python -m wsm_ds.training.decide decides. It also writes the files in
# RUN/job that last from one attempt to the next; wsm_ds/training/job.py lists them all. Two are for people:
#   RUN/job/stop    make it, and the ranks see it, save and leave; no job of this run goes on before it is removed
#   RUN/job/failed  why the scripts gave up; no job of this run goes on before it is removed

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

# decide COMMAND ARGUMENTS…: asks wsm_ds.training.decide. Logs its messages, and ends this script with exit code 1 if it
# answers "fail". Sets ACTION and ARGUMENT to any other answer, which the caller acts upon.
decide() {
  local answer verb words
  # A signal to all processes of the job must not end Python before it has answered: on a node failure Slurm sends TERM
  # to this shell's children at the moment at which srun returns.
  answer=$(trap '' TERM INT USR1 && exec "$WSM_PYTHON" -m wsm_ds.training.decide "$@") || die "no decision: $1 $2"
  ACTION='' ARGUMENT=''
  while read -r verb words; do
    case $verb in
      log) log "$words" ;;
      fail) die "$words" ;;
      *) ACTION=$verb ARGUMENT=$words ;;
    esac
  done <<< "$answer"
}

# leave_if_settled: ends the job if there is nothing to do, or if people must act first
leave_if_settled() {
  decide start "$RUN" --until-step="$UNTIL_STEP"
  [ "$ACTION" != "done" ] || exit 0
}

# is_done: the rule of wsm_ds.training.job.is_done, in builtins, because `attend` asks every 2 s for as long as a run takes
is_done() {
  first_line "$JOB/done"
  [[ $REPLY =~ \"step\":\ *([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge "$UNTIL_STEP" ]
}

# begin_attempt: sets WSM_ATTEMPT (exported), LATEST_BEFORE and LOGS. From here on, ranks of older attempts can publish
# nothing.
begin_attempt() {
  decide begin "$RUN"
  read -r WSM_ATTEMPT LATEST_BEFORE <<< "$ARGUMENT"
  export WSM_ATTEMPT
  LOGS=$JOB/logs/attempt-$WSM_ATTEMPT
}

# decide_for_attempt COMMAND ARGUMENTS…: `decide`, told what it must know of the attempt
decide_for_attempt() {
  decide "$1" "$RUN" --until-step="$UNTIL_STEP" --attempt="$WSM_ATTEMPT" --latest-before="$LATEST_BEFORE" \
    --max-crashes="$WSM_MAX_CRASHES" "${@:2}"
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

# requeue_job [UNFIT NODES]: this Slurm job starts again, if it may. Sets ARGUMENT to all nodes that it must not get then;
# empty if no unfit ones are given.
requeue_job() {
  local job code
  job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
  decide requeue --unfit-nodes="${1:-}" <<< "$job"
  scontrol requeue "$SLURM_JOB_ID"
  code=$? # above 128: the TERM of this very requeue was faster than the answer
  [ $code = 0 ] || [ $code -gt 128 ] || die "Slurm does not requeue this job"
}
