# shellcheck shell=bash
# Functions that the scripts of launch/ share. They source this file after they have set WSM_REPO.
#
# The scripts start processes, wait for them and pass signals on. They ask `python -m wsm_ds.training.decide` what to do
# next; it also writes the files in RUN/job that last from one attempt to the next. wsm_ds/training/job.py lists all
# files in RUN/job. Two of them are for people:
#   RUN/job/stop    make it to let the ranks save and leave; no job of this run goes on before you remove it
#   RUN/job/failed  says why the scripts gave up; no job of this run goes on before you remove it

log() { printf '[%(%F %T)T attempt %s] %s\n' -1 "${WSM_ATTEMPT:-?}" "$*"; }

die() {
  log "$*" >&2
  exit 1
}

# first_line FILE: sets REPLY to the first line of a file; empty if there is no file
first_line() {
  REPLY=
  [ ! -r "$1" ] || read -r REPLY < "$1" || true
}

# read_arguments ARGUMENTS OF PRETRAIN.PY: sets RUN, JOB and UNTIL_STEP. In the shell, because chain.sh needs no Python:
# it runs on a login node, without the site's file.
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
  [[ $UNTIL_STEP =~ ^[0-9]+$ ]] || die "--until-step is missing, or not a number: '$UNTIL_STEP'"
  [[ $RUN = /* ]] || RUN=$PWD/$RUN
  JOB=$RUN/job
  mkdir -p "$JOB/logs" || die "$RUN cannot be written"
}

# absolute_arguments ARGUMENTS…: sets ARGUMENTS to them, with absolute paths, because some launchers change the folder
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

# load_site: sources the site's file, and exports all that it sets, so that it reaches the ranks
load_site() {
  WSM_SITE=${WSM_SITE:-$WSM_REPO/configs/cluster.env}
  [ -r "$WSM_SITE" ] || die "the site's file $WSM_SITE cannot be read; name yours with WSM_SITE"
  set -a
  # shellcheck source=configs/cluster.env
  source "$WSM_SITE" || die "$WSM_SITE failed"
  set +a
  [ -x "$WSM_PYTHON" ] || die "WSM_PYTHON=$WSM_PYTHON is not a program; set it in $WSM_SITE"
}

# decide COMMAND ARGUMENTS…: asks wsm_ds.training.decide. Logs its messages, and ends this script with exit code 1 if it
# answers "fail". Sets ACTION and ARGUMENT to any other answer, which the caller acts upon.
decide() {
  local answer verb words
  # On a node failure Slurm sends TERM to this shell's children just when srun returns. It must not end Python before
  # Python has answered.
  answer=$(trap '' TERM INT USR1 && exec "$WSM_PYTHON" -m wsm_ds.training.decide "$@") ||
    die "wsm_ds.training.decide $1 has failed"
  ACTION='' ARGUMENT=''
  while read -r verb words; do
    case $verb in
      log) log "$words" ;;
      fail) die "$words" ;;
      *) ACTION=$verb ARGUMENT=$words ;;
    esac
  done <<< "$answer"
}

# leave_if_settled: ends this script if the run is done, or if people must act first
leave_if_settled() {
  decide start "$RUN" --until-step="$UNTIL_STEP"
  [ "$ACTION" != "done" ] || exit 0
}

# is_done: the same rule as wsm_ds.training.job.is_done. In builtins, because `attend` asks every 2 s
is_done() {
  first_line "$JOB/done"
  [[ $REPLY =~ \"step\":\ *([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge "$UNTIL_STEP" ]
}

# begin_attempt: sets WSM_ATTEMPT (exported), LATEST_BEFORE and LOGS. Older attempts can publish nothing any more
begin_attempt() {
  decide begin "$RUN"
  read -r WSM_ATTEMPT LATEST_BEFORE <<< "$ARGUMENT"
  export WSM_ATTEMPT
  LOGS=$JOB/logs/attempt-$WSM_ATTEMPT
}

# decide_for_attempt COMMAND ARGUMENTS…: `decide`, with the arguments that describe this attempt
decide_for_attempt() {
  decide "$1" "$RUN" --until-step="$UNTIL_STEP" --attempt="$WSM_ATTEMPT" --latest-before="$LATEST_BEFORE" \
    --max-crashes="$WSM_MAX_CRASHES" "${@:2}"
}

# site_names: prints the names of the variables that the site's file sets in lines of their own
site_names() {
  sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z_0-9]*)=.*/\2/p' "$WSM_SITE" | sort -u
}

# The variables whose values are written to LOGS/provenance. Of all others that the site's file sets, only the names
# are: the values may be passwords or tokens. WSM_RECORD, in the site's file, adds names.
RECORDED="WSM_PYTHON WSM_REPO WSM_SITE WSM_RANKS_PER_NODE WSM_AGENT WSM_START_S WSM_HANG_S WSM_COLLECTIVE_S WSM_SAVE_S
  WSM_CHECK_S WSM_FREE_BYTES WSM_MAX_CRASHES WSM_LOCAL WSM_ATTEMPT OMP_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME
  DS_ACCELERATOR DEEPSPEED_TIMEOUT GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG NCCL_IB_DISABLE
  NCCL_IB_GID_INDEX NCCL_ALGO NCCL_PROTO NCCL_NET_GDR_LEVEL UCX_NET_DEVICES UCX_TLS FI_PROVIDER
  TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_TRACE_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_EXTENSIONS_DIR
  TRITON_CACHE_DIR PYTHONFAULTHANDLER PYTHONUNBUFFERED HF_HUB_OFFLINE"

# print_environment: prints the variables of RECORDED and WSM_RECORD, and the names of the site's others
print_environment() {
  local name others=''
  for name in $RECORDED ${WSM_RECORD:-}; do
    [ -z "${!name+set}" ] || printf '%s=%q\n' "$name" "${!name}"
  done
  while read -r name; do
    case " ${RECORDED//$'\n'/ } ${WSM_RECORD:-} " in
      *" $name "*) ;;
      *) others+=" $name" ;;
    esac
  done < <(site_names)
  [ -z "$others" ] || echo "also set, not recorded:$others"
}

# note_provenance ARGUMENTS…: writes LOGS/provenance, which only its owner can read: commit, versions, arguments and
# environment of this attempt
note_provenance() (
  umask 077
  {
    printf 'started %(%F %T %z)T\nrun %s\ncheckpoint %s\narguments' -1 "$RUN" "${LATEST_BEFORE:-none}"
    printf ' %q' "$@"
    printf '\njob %s restart %s\nnodes %s\n' "${SLURM_JOB_ID:-none}" "${SLURM_RESTART_COUNT:-0}" "$NODES"
    echo "commit $(git -C "$WSM_REPO" rev-parse HEAD 2>&1) $(git -C "$WSM_REPO" status --porcelain 2>&1 | wc -l) files changed"
    "$WSM_PYTHON" -c 'import importlib.metadata as m, sys; print("python", sys.version.split()[0])
for name in ("torch", "deepspeed", "wsm_ds"): print(name, m.version(name))' 2>&1
    echo "site $WSM_SITE $(cksum < "$WSM_SITE")"
    echo "environment"
    print_environment
  } > "$LOGS/provenance"
)

# start_watchdog: sets WATCHDOG, the pid of a process that ends with 3 when the ranks make no progress for too long
start_watchdog() {
  "$WSM_PYTHON" -m wsm_ds.training.watchdog "$RUN" --timeout-s "$WSM_HANG_S" --start-timeout-s "$WSM_START_S" \
    > "$LOGS/watchdog" 2>&1 &
  WATCHDOG=$!
}

is_alive() { kill -0 "$1" 2> /dev/null; }

# attend PID: waits until the ranks that PID started have ended. Calls end_ranks, which the script defines, when they
# hang. Sets HUNG to the watchdog's message then. This loop is in the shell because only the shell can wait for its
# children and run its traps at the same time.
attend() {
  local ranks=$1 pause done_s='' code=''
  HUNG=''
  while is_alive "$ranks"; do
    sleep 2 &
    pause=$!
    wait -n "$ranks" "$pause" # a trapped signal ends this too
    kill "$pause" 2> /dev/null
    if is_done; then # the watchdog has ended; ranks that hang while they leave would keep the nodes for ever
      : "${done_s:=$SECONDS}"
      [ $((SECONDS - done_s)) -le "$WSM_SAVE_S" ] || end_ranks
    elif [ -z "$code" ] && ! is_alive "$WATCHDOG" && is_alive "$ranks"; then
      wait "$WATCHDOG"
      code=$?
      if [ $code != 0 ] && [ $code != 143 ]; then # it ends with these on SIGTERM, which the ranks get as well
        HUNG=$(tail -n 1 "$LOGS/watchdog")
        log "ending the ranks: ${HUNG:=the watchdog has died}"
        end_ranks
      fi
    fi
  done
  kill "$WATCHDOG" 2> /dev/null
}

# requeue_job [UNFIT NODES]: lets this Slurm job start again, if it may. With unfit nodes, sets ARGUMENT to all nodes
# that the job must not get then.
requeue_job() {
  local job code
  job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
  decide requeue --unfit-nodes="${1:-}" <<< "$job"
  scontrol requeue "$SLURM_JOB_ID"
  code=$? # above 128: the requeue succeeded, and its TERM has ended scontrol before scontrol could say so
  [ $code = 0 ] || [ $code -gt 128 ] || die "Slurm does not requeue this job"
}
