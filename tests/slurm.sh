#!/usr/bin/env bash
# A Slurm of one node on this machine, to see a grid run on a cluster before there is one:
#
#   sudo tests/slurm.sh install        # Debian's packages; the only step that installs anything
#   sudo tests/slurm.sh start
#   make report PROFILE=slurm
#   sudo tests/slurm.sh status|stop    # stop cancels what runs and leaves nothing behind
#
# All it writes lies in one folder, except the link /etc/slurm/slurm.conf, where job steps look whatever SLURM_CONF says.
# Each job gets a TMPDIR of its own that goes with it, as on clusters whose nodes share no scratch.
set -euo pipefail

FOLDER=/run/lthlib-slurm
CONF=/etc/slurm/slurm.conf
NODE=${HOSTNAME%%.*}
PATH=$PATH:/usr/sbin:/sbin

die() { echo "error: $*" >&2; exit 1; }
ours() { [ "$(readlink "$CONF" || true)" = "$FOLDER/slurm.conf" ]; }

install_packages() {
    command -v apt-get >/dev/null || die "this installs Debian packages; elsewhere install slurmctld, slurmd and munge yourself."
    apt-get update
    # An update of the same packages may start their services, which this Slurm does without.
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
}

write_files() {
    install -d -m 0711 "$FOLDER"
    install -d -m 0700 "$FOLDER"/{state,spool,log}
    install -d -m 0711 "$FOLDER"/{munge,scratch}
    (umask 077; head -c 1024 /dev/urandom > "$FOLDER/munge/key")
    cat > "$FOLDER/prolog" <<X
#!/bin/sh
install -d -m 0700 -o "\$SLURM_JOB_UID" "$FOLDER/scratch/\$SLURM_JOB_ID"
X
    cat > "$FOLDER/task-prolog" <<X
#!/bin/sh
echo "export TMPDIR=$FOLDER/scratch/\$SLURM_JOB_ID"
X
    cat > "$FOLDER/epilog" <<X
#!/bin/sh
rm -rf "$FOLDER/scratch/\$SLURM_JOB_ID"
X
    chmod 0755 "$FOLDER"/{prolog,task-prolog,epilog}
    cat > "$FOLDER/slurm.conf" <<X
ClusterName=lthlib
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.log
Prolog=$FOLDER/prolog
TaskProlog=$FOLDER/task-prolog
Epilog=$FOLDER/epilog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
MinJobAge=600
KillWait=5
$(slurmd -C | head -n 1) NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName=main Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
X
}

start() {
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null || die "there is no $program here; $0 install installs Debian's."
    done
    [ "$(id -u)" = 0 ] || die "starting Slurm takes root: sudo $0 start."
    if [ -e "$CONF" ] || [ -L "$CONF" ]; then
        ours || die "$CONF is there already: this machine has a Slurm of its own, which this script leaves alone."
        ! running slurmctld || die "it runs already; $0 stop stops it."
    fi
    rm -rf "$FOLDER"
    write_files
    mkdir -p /etc/slurm
    ln -sfn "$FOLDER/slurm.conf" "$CONF"
    trap 'stop >/dev/null 2>&1; die "Slurm did not start."' ERR
    munged --force --socket="$FOLDER/munge/socket" --key-file="$FOLDER/munge/key" --pid-file="$FOLDER/munge/pid" \
        --log-file="$FOLDER/munge/log" --seed-file="$FOLDER/munge/seed" --num-threads=2 2> "$FOLDER/log/munged"
    slurmctld -c
    slurmd -N "$NODE"
    for _ in $(seq 30); do
        if [ "$(sinfo -h -o %t 2>/dev/null)" = idle ]; then
            trap - ERR
            status
            return
        fi
        sleep 1
    done
    tail -n 5 "$FOLDER"/log/slurm*.log >&2
    false
}

# running NAME: whether the process that wrote NAME's pid file still is that program.
running() { [ -r "$FOLDER/$1.pid" ] && [ "$(cat "/proc/$(cat "$FOLDER/$1.pid")/comm" 2>/dev/null)" = "$1" ]; }

end() {
    running "$1" || return 0
    local process
    process=$(cat "$FOLDER/$1.pid")
    kill "$process"
    for _ in $(seq 100); do
        kill -0 "$process" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$process"
}

stop() {
    ours || { echo "it does not run"; return; }
    if running slurmctld; then
        squeue -h -o %A | xargs -r timeout 10 scancel || true
        for _ in $(seq 20); do
            [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
            sleep 1
        done
    fi
    end slurmd
    end slurmctld
    if [ -r "$FOLDER/munge/pid" ]; then
        munged --stop --socket="$FOLDER/munge/socket" 2>/dev/null || true
    fi
    rm -f "$CONF"
    rm -rf "$FOLDER"
    echo "stopped"
}

status() {
    ours && running slurmctld && running slurmd || { echo "it does not run"; return 3; }
    sinfo -o "%P %t: %D node, %c cores, %m MB"
    squeue -o "%i %T %M of %l %k"
}

case "${1:-}" in
    install) install_packages ;;
    start | stop | status) "$1" ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
