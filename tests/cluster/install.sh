#!/usr/bin/env bash
# Installs what the test cluster and the script checks need, where something is missing and it may: as root, with apt.
# Elsewhere it says what is missing and succeeds: tests/launch then skips, and with CI=true fails.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2 procps shellcheck)
commands=(slurmctld slurmd srun munged pdsh sshd ssh ip nsenter shellcheck)

missing() {
  local command
  for command in "${commands[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || printf '%s ' "$command"
  done
}

[ -n "$(missing)" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "the test cluster needs: $(missing)(apt-get install --no-install-recommends ${packages[*]})"
  exit 0
fi

# The daemons run in the test cluster's namespaces only: apt must not start them on this machine.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm /usr/sbin/policy-rc.d' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${packages[@]}" > /dev/null
[ -z "$(missing)" ] || { echo "still missing after apt-get install: $(missing)" >&2; exit 1; }
