#!/usr/bin/env bash
# A real SLURM of virtual nodes on this machine, for tests and for trying a job before submitting it to a cluster.
#
#   slurm/local_cluster.sh up DIR      start it in DIR (at most 55 characters), or restart its missing daemons
#   source DIR/env.sh                  point sbatch, squeue, scontrol and slurm/submit.py at it
#   slurm/local_cluster.sh down DIR    end what was started there; the logs in DIR/log stay
#
# Linux and root; Debian's packages slurmctld, slurmd, slurm-client and munge; no systemd; loopback only. Each node is
# a slurmd with its own hostname, /etc/hosts and process table: kill pid `cut -d' ' -f1 DIR/pids/node2` to lose node2,
# and use `up` to restore it. Partition main is the default; jobs in partition urgent preempt its jobs.
# The variables NODES (2), CPUS (4), MEMORY_MB (16000) and GPUS (0; fake devices) set the size.
set -euo pipefail
export LC_ALL=C
say() { echo "local_cluster: $*" >&2; }
[[ $# -eq 2 && $1 =~ ^(up|down)$ ]] || { echo "use: $0 up|down DIR" >&2; exit 2; }
[[ $(id -u) = 0 ]] || { say "started by $(id -un); only root can make virtual nodes: use sudo"; exit 2; }
DIR=$(realpath -m "$2") PATIENCE=45
# SLURM's sockets lie in DIR, and the path of a socket has at most 107 bytes.
[[ ${#DIR} -le 55 && $DIR =~ ^[A-Za-z0-9_./-]+$ ]] || { say "DIR $DIR: give at most 55 of A-Z a-z 0-9 _ . / -"; exit 2; }
for name in $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SCANCEL)_' || true); do unset "$name"; done
export SLURM_CONF=$DIR/slurm.conf

# ---- processes: DIR/pids/NAME contains "pid start-time", which tells our process from a later one with the same pid
start_time() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 0; s=${s##*) }; set -- $s; [[ $1 = Z ]] || echo "${20}"; }
alive() { local pid at; read -r pid at 2>/dev/null <"$DIR/pids/$1" && [[ -n $at && $(start_time "$pid") = "$at" ]]; }
stop() {
  alive "$1" || return 0
  kill -KILL "$(cut -d' ' -f1 "$DIR/pids/$1")"  # unshare also ends the first process of its namespace, and so all others
  for _ in {1..50}; do alive "$1" || return 0; sleep 0.1; done
  say "$1 does not end"; exit 1
}
spawn() {  # NAME COMMAND...: as a machine of that name
  local name=$1; shift
  setsid unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc "$DIR/machine.sh" "$name" "$@" \
    </dev/null >>"$DIR/log/$name.out" 2>&1 9>&- &
  echo "$! $(start_time $!)" >"$DIR/pids/$name"
}
wait_for() {  # WHAT COMMAND...
  local what=$1; shift
  until "$@" >/dev/null 2>&1; do
    [[ $SECONDS -lt $PATIENCE ]] || { say "no $what within $PATIENCE s"; tail -n 5 "$DIR"/log/* >&2; down; exit 1; }
    sleep 0.1
  done
}
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
down() { for file in "$DIR"/pids/*; do [[ -e $file ]] && stop "${file##*/}"; done; rm -rf "$DIR/pids"; }

if [[ $1 = down ]]; then
  [[ -d $DIR/pids ]] || { say "nothing runs in $DIR"; exit 0; }
  exec 9>"$DIR/lock"; flock -w "$PATIENCE" 9
  down; say "ended $DIR"; exit 0
fi

for program in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client; do
  command -v "${program%:*}" >/dev/null || { say "${program%:*} is absent: apt-get install slurmctld slurmd slurm-client munge"; exit 2; }
done
unshare --uts --mount --pid --fork --mount-proc hostname probe 2>/dev/null ||
  { say "this system does not let root make name spaces (a container without CAP_SYS_ADMIN?): use a virtual machine"; exit 2; }
mkdir -p "$DIR"; exec 9>"$DIR/lock"; flock -w "$PATIENCE" 9

if [[ ! -d $DIR/pids ]]; then  # ---- a new cluster
  nodes=(); for i in $(seq "${NODES:-2}"); do nodes+=("node$i"); done
  port=16817; until free=1; for p in $(seq $port $((port + ${#nodes[@]}))); do ! listening "$p" || free=0; done; [[ $free = 1 ]]; do
    port=$((port + 100)); [[ $port -lt 30000 ]] || { say "no free ports from 16817 to 30000"; exit 1; }
  done
  rm -rf "$DIR"/{log,munge,ctld,spool,gpu}; mkdir -p "$DIR"/{log,pids,munge,ctld,spool}
  chmod 755 "$DIR" "$DIR"/{log,munge,spool}
  for name in "${nodes[@]}"; do mkdir "$DIR/spool/$name"; done
  (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/key")
  { echo "127.0.0.1 localhost slurmctl munge $(hostname) ${nodes[*]}"; grep -v '^127\.' /etc/hosts || true; } >"$DIR/hosts"
  cat >"$DIR/machine.sh" <<END
#!/bin/bash
# NAME COMMAND...: the first process of a machine, which survives COMMAND
hostname "\$1" && mount --bind "$DIR/hosts" /etc/hosts || exit 1
shift; "\$@" & while :; do sleep 3600 & wait \$!; done
END
  chmod 755 "$DIR/machine.sh"
  printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no >"$DIR/cgroup.conf"  # slurmd always loads a cgroup plugin
  cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=slurmctl(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A requeued job may start cred_expire + 1 seconds later; the default is 120.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/ctld/pid
SlurmdPidFile=$DIR/spool/%n/pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Nodes may claim more CPUs than this machine has; impossible jobs are refused at submission.
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
# A preempted job gets its --signal at the start of GraceTime.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
KillWait=15
# Do not reuse job ids of an earlier cluster: logs are named by them.
FirstJobId=$((1000 + $(date +%s) % 60000000))
$([[ ${GPUS:-0} = 0 ]] || echo GresTypes=gpu)
$(for i in "${!nodes[@]}"; do echo "NodeName=${nodes[i]} NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=${CPUS:-4}" \
  "RealMemory=${MEMORY_MB:-16000} $([[ ${GPUS:-0} = 0 ]] || echo "Gres=gpu:$GPUS") State=UNKNOWN"; done)
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 DefaultTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=60 State=UP
END
  if [[ ${GPUS:-0} != 0 ]]; then  # SLURM accepts any character device, but no plain file
    mkdir "$DIR/gpu"; for i in $(seq 0 $((GPUS - 1))); do mknod "$DIR/gpu/$i" c 1 3; done
    echo "Name=gpu File=$DIR/gpu/[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
  cat >"$DIR/env.sh" <<END
for _name in \$(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SUBMITIT)_'); do unset "\$_name"; done; unset _name
export SLURM_CONF=$SLURM_CONF GLOO_SOCKET_IFNAME=lo
END
fi

# ---- start the daemons that do not run
mapfile -t nodes < <(ls "$DIR/spool")
port=$(sed -n 's/^SlurmctldPort=//p' "$SLURM_CONF")
if ! alive munge; then
  rm -f "$DIR"/munge/socket*
  spawn munge munged --foreground --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
    --pid-file="$DIR/munge/pid" --seed-file="$DIR/munge/seed" --log-file="$DIR/munge/log"
fi
wait_for "answer from munged" timeout 2 munge -S "$DIR/munge/socket" -n
alive slurmctl || spawn slurmctl slurmctld -D -f "$SLURM_CONF"
wait_for "answer from slurmctld" listening "$port"  # an earlier slurmd would wait for seconds before its next attempt
ready() {
  local name state number=0
  while read -r name state; do case $state in
    idle | allocated | mixed | completing) number=$((number + 1)) ;;
    drain* | down) timeout 3 scontrol update nodename="$name" state=resume ;;  # after a failed launch, or a kill
  esac; done < <(timeout 3 sinfo -h -N -p main -o '%N %T')
  [[ $number = "${#nodes[@]}" ]]
}
for i in "${!nodes[@]}"; do
  # Restart all of a node whose slurmd is dead.
  if alive "${nodes[i]}" && ! listening $((port + 1 + i)); then sleep 1; listening $((port + 1 + i)) || stop "${nodes[i]}"; fi
  alive "${nodes[i]}" || spawn "${nodes[i]}" slurmd -D -f "$SLURM_CONF" -N "${nodes[i]}"
done
wait_for "${#nodes[@]} ready nodes" ready
say "${#nodes[@]} nodes ready after $SECONDS s; now: source $DIR/env.sh"
