#!/usr/bin/env bash
# PID 1 of one host of the test cluster, in new net, uts, mount, ipc and pid namespaces.
#   host.sh NAME STATE [DIR…]     DIR…: folders of the real machine's /tmp that all hosts share
# The host has its own name, network, /run, /tmp, /dev/shm and /sys; the rest of the file system is shared: the "NFS".
set -euo pipefail
name=$1 state=$2
shared=("${@:2}")

hostname "$name"
mount --make-rprivate /
ip link set lo up
mount -t sysfs sysfs /sys || true # the devices of this network namespace; some containers refuse it, nothing needs it
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /run/lock /run/munge /run/sshd /run/slurm/spool

# An empty /tmp, with the shared folders at their places in it.
for i in "${!shared[@]}"; do
  mkdir -p "/run/shared/$i"
  mount --rbind "${shared[$i]}" "/run/shared/$i"
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
for i in "${!shared[@]}"; do
  mkdir -p "${shared[$i]}"
  mount --rbind "/run/shared/$i" "${shared[$i]}"
done

# Names, slurm.conf and ssh's settings of the cluster; no resolver, so that a look-up never waits for one.
echo "$name" > /run/hostname
: > /run/resolv.conf
mount --bind /run/hostname /etc/hostname
mount --bind /run/resolv.conf /etc/resolv.conf
mount --bind "$state/etc/hosts" /etc/hosts
mount --bind "$state/etc/slurm" /etc/slurm
mount --bind "$state/etc/ssh_config" /etc/ssh/ssh_config
install -m 0400 "$state/etc/munge.key" /run/munge/munge.key

: > /run/ready
trap 'exit 0' TERM INT
while :; do
  sleep 3600 &
  wait $! || true # bash reaps orphans meanwhile
done
