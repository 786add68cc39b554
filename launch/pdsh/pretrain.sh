#!/usr/bin/env bash
# Trains as launch/slurm/pretrain.sbatch does, without Slurm: it starts DeepSpeed's pdsh launcher on a list of hosts,
# again and again until the run is done. Run it in tmux or under nohup, where ssh to all hosts works without a password:
#
#   launch/pdsh/pretrain.sh HOSTFILE --run RUN --config configs/zero2_bf16.json --data DATA \
#     --until-step 100000 --save-every 500
#
# HOSTFILE is DeepSpeed's: one "HOST slots=RANKS" per line. To let the ranks save and leave, touch RUN/job/stop, or send
# SIGTERM to this script. configs/cluster.env sets the environment, the timeouts and the network.
set -uo pipefail

WSM_REPO=${WSM_REPO:-$(cd "$(dirname "$0")/../.." && pwd)}
export WSM_REPO
# shellcheck source=launch/attempt.sh
source "$WSM_REPO/launch/attempt.sh" || exit 1

# quoted TEXT: sets REPLY to the text, quoted for the remote shell. DeepSpeed splits its command line at spaces, and
# pdsh expands %, so unusual text becomes $'\x20…', which has neither.
quoted() {
  local text=$1 code i LC_ALL=C
  REPLY=$text
  [[ ! $text =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || return 0
  REPLY="\$'"
  for ((i = 0; i < ${#text}; i++)); do
    printf -v code '%02x' "'${text:i:1}"
    REPLY+="\\x${code: -2}"
  done
  REPLY+="'"
}

# write_site: writes LOGS/site, which the hosts source and only its owner can read. It exports the variables of the
# site's file and two of ours. On a command line every user of a host could see the values.
write_site() (
  umask 077
  for name in WSM_ATTEMPT WSM_REPO $(site_names); do
    [ -z "${!name+set}" ] || printf 'export %s=%q\n' "$name" "${!name}"
  done > "$LOGS/site"
)

# Sets FIRST_HOST, the first host that is fit, and EXCLUDE, the hosts that are left out of this attempt.
check_nodes() {
  local word command
  quoted "$LOGS/site"
  command=". $REPLY && exec $WSM_PYTHON -m wsm_ds.training.node_check"
  for word in "$RUN" --free-bytes "$WSM_FREE_BYTES" --rendezvous "${HOSTS[0]}:$MASTER_PORT"; do
    quoted "$word"
    command+=" $REPLY"
  done
  timeout "$WSM_CHECK_S" pdsh -R ssh -w "$(IFS=, && echo "${HOSTS[*]}")" "$command" > "$LOGS/check" 2>&1
  decide_for_attempt nodes --launcher=pdsh --hosts="$NODES" --timeout-s="$WSM_CHECK_S"
  read -r FIRST_HOST EXCLUDE <<< "$ARGUMENT"
}

# From /, because DeepSpeed's remote `cd` does not quote the current folder. Without .deepspeed_env and MLFLOW_*, whose
# values DeepSpeed would write on the remote command line.
start_ranks() {
  local argument arguments=() site
  quoted "$LOGS/site"
  site=$REPLY
  absolute_arguments --collective-timeout-s "$WSM_COLLECTIVE_S" "$@"
  for argument in "$WSM_REPO/launch/pretrain.py" "${ARGUMENTS[@]}"; do
    quoted "$argument"
    arguments+=("$REPLY")
  done
  (
    cd / || exit 1
    unset "${!MLFLOW@}"
    export DS_ENV_FILE=/dev/null
    exec "$WSM_PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --launcher pdsh --force_multi \
      --venv_script "$site" \
      ${EXCLUDE:+--exclude="$EXCLUDE"} --master_addr "$FIRST_HOST" --master_port "$MASTER_PORT" "${arguments[@]}"
  ) > "$LOGS/ranks" 2>&1 &
  RANKS=$!
}

# signal_ranks SIGNAL: signals the processes that the heartbeats of this attempt name. Fails if there are none.
# DeepSpeed's own way, pkill -f on all hosts, would hit other jobs.
signal_ranks() {
  local host processes code=1
  while read -r host processes; do
    timeout 20 ssh -n -o BatchMode=yes -o ConnectTimeout=10 -- "$host" "kill -s $1 $processes"
    code=0
  done < <(trap '' TERM INT USR1 &&
    exec "$WSM_PYTHON" -m wsm_ds.training.decide processes "$RUN" --attempt="$WSM_ATTEMPT")
  return "$code"
}
ask_to_save() { signal_ranks USR1 || kill "$RANKS"; }
end_ranks() { signal_ranks KILL || kill "$RANKS"; }

HOSTFILE=$(realpath -- "${1:?HOSTFILE, then the arguments of launch/pretrain.py}") || die "no hostfile $1"
shift
read_arguments "$@"
load_site
[[ $WSM_PYTHON =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || die "DeepSpeed's pdsh launcher needs a plain path, not $WSM_PYTHON"
readarray -t HOSTS < <(grep -oE '^[^#[:space:]]+' "$HOSTFILE")
for host in "${HOSTS[@]}"; do # it stands in commands of remote shells, and pdsh and ssh must not take it for an option
  [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "$HOSTFILE: '$host' is not a host's name; begin comments with #"
done
NODES=${HOSTS[*]} SIGNALLED='' RANKS=''
trap 'SIGNALLED=yes; [ -z "$RANKS" ] || ask_to_save' TERM INT USR1

while :; do
  leave_if_settled
  begin_attempt
  MASTER_PORT=$((20000 + RANDOM % 20000))
  log "on $NODES, from ${LATEST_BEFORE:-the beginning}; logs in $LOGS"
  note_provenance "$@"
  write_site
  check_nodes
  start_watchdog
  start_ranks "$@"
  attend "$RANKS"
  wait "$RANKS"
  log "deepspeed has ended with code $?"
  decide_for_attempt end --signal="$SIGNALLED" --hang="$HUNG"
  case $ACTION in
    "done") exit 0 ;;
    saved) exit 75 ;;
  esac
done
