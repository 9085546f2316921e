#!/usr/bin/env bash
# A Slurm of one node on this machine, to try cluster submission without a cluster. Needs root, and Debian's packages.
# Usage: scripts/slurm_local.sh start|stop FOLDER      FOLDER keeps the daemons' state
# It writes /etc/slurm/slurm.conf; do not run it where a real Slurm is configured.
set -euo pipefail

action=${1:-} folder=${2:-}
mark='# made by scripts/slurm_local.sh'
conf=/etc/slurm/slurm.conf
host=$(hostname -s)

fail() {
    echo "slurm_local: $1" >&2
    exit 1
}

start() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    for daemon in munged slurmctld slurmd sbatch; do
        command -v $daemon >/dev/null || missing=1
    done
    if [ -n "${missing:-}" ]; then
        command -v apt-get >/dev/null || fail "munge and Slurm are not installed, and there is no apt-get"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq munge slurmctld slurmd slurm-client; } \
            >/dev/null 2>&1 || fail "the packages munge, slurmctld, slurmd and slurm-client cannot be installed"
    fi
    mkdir -p "$folder/state" "$folder/spool" /run/munge /etc/slurm
    chown munge: /run/munge
    megabytes=$(($(awk '/^MemTotal/ { print $2 }' /proc/meminfo) / 1280))
    cat >$conf <<EOF
$mark
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$megabytes State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
    munge -n >/dev/null 2>&1 || su -s /bin/sh munge -c 'munged --force' || fail "munged does not start"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        sinfo -h -o %t 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    fail "the node did not become idle within 30 s: $(sinfo 2>&1 | tail -1)"
}

stop() {
    for daemon in slurmd slurmctld; do
        if [ -f "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
    done
}

[ -n "$folder" ] || fail "usage: scripts/slurm_local.sh start|stop FOLDER"
case $action in
start | stop) $action ;;
*) fail "$action: is neither start nor stop" ;;
esac
