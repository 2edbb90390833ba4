#!/usr/bin/env bash
# A real SLURM cluster on this machine, to try a profile on before it meets a cluster, and for the tests.
#
#   launch/slurm_dev.sh up       install what is missing (Debian, Ubuntu), start what is not running; again: apply options
#   launch/slurm_dev.sh down     cancel its jobs, stop its daemons, remove its folder
#   launch/slurm_dev.sh status   which daemons run (exit 1: not all of them), which nodes are there
#   launch/slurm_dev.sh env      for your shell: eval "$(launch/slurm_dev.sh env)"
#
# up and down need root; root and whoever called sudo may submit. Several clusters live side by side, each with its
# own SLURM_ROOT and SLURM_BASE_PORT.
# Nodes are slurmd processes that share this machine: they claim more than it has. No systemd, nothing in /etc.
#
#   SLURM_ROOT=/tmp/ssl-diversity-slurm  folder of everything; the configuration is slurm.conf in it
#   SLURM_BASE_PORT=16800                ports: slurmctld this one, slurmdbd the next, slurmd of node K: + 10 + K
#   SLURM_NODES=3                        nodes: node1, node2, ...
#   SLURM_NODE_CPUS=2                    CPUs that each node claims
#   SLURM_NODE_MEM_MB                    memory that each node claims (default: its share of this machine)
#   SLURM_NODE_GPUS=2                    GPUs that each node pretends to have, 0 to 5; there is nothing behind them
#   SLURM_NODE_TIMEOUT=10                seconds of silence until a node is taken for dead and its jobs are requeued;
#                                        the controller takes some 25 s at least
#   SLURM_MAX_ARRAY=1001                 MaxArraySize: the largest index of a job array, plus one
#   SLURM_MAX_SUBMIT=-1                  jobs a user may have submitted at a time (-1: any number)
#   SLURM_GRACE=20                       seconds from the signal of a preemption to its end
#   SLURM_ACCT=1                         accounting (slurmdbd, MariaDB); 0: without sacct and SLURM_MAX_SUBMIT
#
# Partitions: main, and high, which preempts main: --signal, SLURM_GRACE seconds, requeue.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
umask 022

ROOT=${SLURM_ROOT:-/tmp/ssl-diversity-slurm}
PORT=${SLURM_BASE_PORT:-16800}
NODES=${SLURM_NODES:-3}
CPUS=${SLURM_NODE_CPUS:-2}
MEM_MB=${SLURM_NODE_MEM_MB:-$(awk -v nodes="$NODES" '/^MemTotal/ {print int($2 / 1024 * 0.9 / nodes)}' /proc/meminfo)}
GPUS=${SLURM_NODE_GPUS:-2}
ACCT=${SLURM_ACCT:-1}
MAX_SUBMIT=${SLURM_MAX_SUBMIT:--1}
export SLURM_CONF=$ROOT/slurm.conf # for the daemons and the clients below
MYSQL=$ROOT/mysql.sock
MUNGE=$ROOT/munge.sock

say() { printf 'slurm_dev: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

node_names() { seq -f 'node%.0f' "$NODES"; }

# Daemons are known by their pid files: NAME.pid, and slurmd.NODE.pid.
runs() { [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && ! grep -qs '^State:.*zombie' "/proc/$1/status"; }
alive() {
  local pid
  pid=$(cat "$ROOT/$1.pid" 2>/dev/null) && runs "$pid" "${1%%.*}"
}

wait_for() {
  local what=$1 seconds=$2
  shift 2
  for _ in $(seq $((seconds * 5))); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.2
  done
  tail -n 5 "$ROOT"/log/"${what%% *}"*.log >&2 || true
  die "$what is not up after $seconds s; its log is in $ROOT/log"
}

install_packages() {
  local need=()
  command -v munged >/dev/null || need+=(munge)
  command -v slurmctld >/dev/null || need+=(slurm-wlm)
  if [ "$ACCT" = 1 ]; then
    command -v slurmdbd >/dev/null || need+=(slurmdbd)
    command -v mariadbd >/dev/null || need+=(mariadb-server)
  fi
  [ ${#need[@]} = 0 ] && return
  command -v apt-get >/dev/null || die "missing: ${need[*]}, and no apt-get here; install them, then try again"
  say "installing ${need[*]}"
  # RUNLEVEL=1: the packages' own services stay off
  { apt-get update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y --no-install-recommends "${need[@]}"; } >"$ROOT/log/apt.log" 2>&1 && return
  tail -n 15 "$ROOT/log/apt.log" >&2
  die "could not install ${need[*]}; do it by hand (apt-get install ${need[*]}), then try again"
}

check_port() {
  alive "$1" || ! (exec 3<>"/dev/tcp/127.0.0.1/$2") 2>/dev/null \
    || die "port $2, for $1, is taken by another program; choose others: SLURM_BASE_PORT=$((PORT + 100))"
}

check_ports() {
  local k
  check_port slurmctld "$PORT"
  [ "$ACCT" = 0 ] || check_port slurmdbd $((PORT + 1))
  for k in $(seq "$NODES"); do check_port "slurmd.node$k" $((PORT + 10 + k)); done
}

slurm_conf() {
  local k devices=(/dev/null /dev/zero /dev/full /dev/random /dev/urandom)
  cat <<X
ClusterName=dev
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for as long as credentials are valid
AuthInfo=socket=$MUNGE,cred_expire=5
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
PlugStackConfig=$ROOT/plugstack.conf
MailProg=/bin/true
FirstJobId=$(cat "$ROOT/first_job_id")
MaxArraySize=${SLURM_MAX_ARRAY:-1001}
MinJobAge=3600
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=${SLURM_NODE_TIMEOUT:-10}
DefMemPerCPU=$((MEM_MB / CPUS))
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,NoShared
X
  # where the machine's name is a loopback address, listen there only
  case $(getent hosts "$(hostname)") in 127.*) echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" ;; esac
  if [ "$ACCT" = 1 ]; then
    cat <<X
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$MUNGE
AccountingStorageEnforce=limits,qos
X
  else
    echo "AccountingStorageType=accounting_storage/none"
  fi
  [ "$GPUS" = 0 ] || echo "GresTypes=gpu"
  for k in $(seq "$NODES"); do
    echo "NodeName=node$k NodeHostname=node$k NodeAddr=127.0.0.1 Port=$((PORT + 10 + k)) State=UNKNOWN" \
      "CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM_MB" \
      "$([ "$GPUS" = 0 ] || echo "Gres=gpu:$GPUS")"
  done
  : >"$ROOT/gres.conf" # devices that exist everywhere stand for the GPUs; nothing opens them
  for k in "${devices[@]:0:GPUS}"; do echo "NodeName=node[1-$NODES] Name=gpu File=$k" >>"$ROOT/gres.conf"; done
  cat <<X
PartitionName=main Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=${SLURM_GRACE:-20} State=UP
PartitionName=high Nodes=node[1-$NODES] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
X
}

slurmdbd_conf() {
  cat <<X
AuthType=auth/munge
AuthInfo=socket=$MUNGE
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
X
}

configure() {
  # ids that an earlier cluster in this folder has not given
  [ -f "$ROOT/first_job_id" ] || echo $(($(date +%s) % 60000000 + 1)) >"$ROOT/first_job_id"
  : >"$ROOT/plugstack.conf"
  (umask 077 && slurmdbd_conf >"$ROOT/slurmdbd.conf")
  slurm_conf >"$SLURM_CONF.new"
  if ! cmp -s "$SLURM_CONF.new" "$SLURM_CONF"; then
    stop_slurm # started again with the new options; running jobs go on
    stop slurmdbd
    mv "$SLURM_CONF.new" "$SLURM_CONF"
  fi
  rm -f "$SLURM_CONF.new"
}

start_munge() {
  alive munged && return
  rm -f "$MUNGE" "$MUNGE.lock"
  munged --force --key-file="$ROOT/munge.key" --socket="$MUNGE" --pid-file="$ROOT/munged.pid" \
    --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munged.seed" </dev/null >>"$ROOT/log/munged.log" 2>&1
  wait_for munged 10 munge -S "$MUNGE" -n
}

start_mariadb() {
  alive mariadbd && return
  if [ ! -d "$ROOT/mysql/mysql" ]; then
    mariadb-install-db --no-defaults --user=root --datadir="$ROOT/mysql" --skip-test-db \
      --auth-root-authentication-method=socket >"$ROOT/log/mariadb-install.log" 2>&1 \
      || die "mariadb-install-db failed; see $ROOT/log/mariadb-install.log"
  fi
  setsid mariadbd --no-defaults --user=root --datadir="$ROOT/mysql" --socket="$MYSQL" --skip-networking \
    --pid-file="$ROOT/mariadbd.pid" --log-error="$ROOT/log/mariadbd.log" --innodb-buffer-pool-size=64M \
    --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
    </dev/null >/dev/null 2>&1 &
  wait_for mariadbd 60 mariadb-admin --no-defaults --socket="$MYSQL" ping
  chmod 644 "$ROOT/mariadbd.pid" # for status
}

start_accounting() {
  start_mariadb
  if ! alive slurmdbd; then
    MYSQL_UNIX_PORT=$MYSQL slurmdbd </dev/null >>"$ROOT/log/slurmdbd.log" 2>&1 \
      || die "slurmdbd did not start: $(tail -n 3 "$ROOT/log/slurmdbd.log")"
    wait_for slurmdbd 30 sacctmgr -n show cluster
  fi
  sacctmgr -n show cluster format=cluster | grep -qw dev || sacctmgr -i add cluster dev >/dev/null
  local user
  sacctmgr -n show account dev format=account | grep -qw dev || sacctmgr -i add account dev >/dev/null
  for user in root ${SUDO_USER:-}; do
    sacctmgr -n show assoc user="$user" account=dev format=user | grep -qw "$user" \
      || sacctmgr -i add user "$user" account=dev defaultaccount=dev >/dev/null
  done
  sacctmgr -i modify qos normal set MaxSubmitJobsPerUser="$MAX_SUBMIT" >/dev/null
}

controller_answers() { scontrol ping | grep -q 'is UP'; }
nodes_ready() { [ "$(sinfo -h -N -p main -o %t | grep -cE '^(idle|mix|alloc|comp)$')" = "$NODES" ]; }
# A node whose slurmd came back while the controller was busy may stay down until the next ping, and one on which a
# killed controller finds its own job ("Duplicate jobid") is drained until somebody asks for it: ask.
nodes_return() {
  local node
  nodes_ready && return
  for node in $(sinfo -h -N -p main -o '%N %t %E' | awk '$2 ~ /^down/ || /Duplicate jobid/ {print $1}'); do
    scontrol update nodename="$node" state=resume || true
  done
  return 1
}

start_slurm() {
  local node
  alive slurmctld || slurmctld </dev/null >>"$ROOT/log/slurmctld.log" 2>&1
  wait_for slurmctld 20 controller_answers
  for node in $(node_names); do
    mkdir -p "$ROOT/spool/$node"
    alive "slurmd.$node" || slurmd -N "$node" </dev/null >>"$ROOT/log/slurmd.$node.log" 2>&1
  done
  wait_for "slurmd (not all of $NODES nodes)" 90 nodes_return
}

up() {
  [ "$(id -u)" = 0 ] || die "up needs root: sudo $0 up"
  if [ -n "$(ls -A "$ROOT" 2>/dev/null)" ] && [ ! -f "$ROOT/munge.key" ]; then
    die "$ROOT holds something else; choose an empty folder: SLURM_ROOT=..."
  fi
  mkdir -p "$ROOT"/{log,state,spool,mysql}
  [ -f "$ROOT/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$ROOT/munge.key")
  install_packages
  check_ports
  configure
  start_munge
  [ "$ACCT" = 0 ] || start_accounting
  start_slurm
  say "$NODES nodes of $CPUS CPUs and $MEM_MB MB are up; for your shell: eval \"\$($0 env)\""
}

stop() {
  local pid name=${1%%.*}
  if alive "$1"; then
    pid=$(cat "$ROOT/$1.pid") # which the daemon removes before it ends
    kill "$pid"
    for _ in $(seq 100); do
      runs "$pid" "$name" || break
      sleep 0.1
    done
    if runs "$pid" "$name"; then
      say "$1 (process $pid) did not end when asked to: killed"
      kill -9 "$pid"
      while runs "$pid" "$name"; do sleep 0.1; done
    fi
  fi
  rm -f "$ROOT/$1.pid"
}

stop_slurm() {
  local file
  for file in "$ROOT"/slurmd.*.pid; do
    [ ! -e "$file" ] || stop "$(basename "$file" .pid)"
  done
  stop slurmctld
}

cancel_jobs() { # while the daemons are there to do it: a slurmd that is stopped leaves its jobs running
  alive slurmctld && controller_answers || return 0
  squeue -h -o %A | sort -u | xargs -r scancel || true
  for _ in $(seq 50); do
    [ -n "$(squeue -h)" ] || return 0
    sleep 0.2
  done
}

strays() { # processes of this cluster that know themselves in a job, and steps: a killed slurmd leaves them behind
  local folder
  for folder in /proc/[0-9]*; do
    grep -qszxF "SLURM_CONF=$SLURM_CONF" "$folder/environ" || continue
    [ "$(cat "$folder/comm" 2>/dev/null)" = slurmstepd ] || grep -qsz '^SLURM_JOB_ID=' "$folder/environ" || continue
    echo "${folder#/proc/}"
  done
}

kill_strays() { # by their ids, and what they start meanwhile
  local pids
  while pids=$(strays) && [ -n "$pids" ]; do
    kill -9 $pids 2>/dev/null || true
    sleep 0.1
  done
}

down() {
  [ -f "$ROOT/munge.key" ] || { say "nothing to stop in $ROOT"; return; }
  [ "$(id -u)" = 0 ] || die "down needs root: sudo $0 down"
  cancel_jobs
  stop_slurm
  kill_strays
  stop slurmdbd
  stop mariadbd
  stop munged
  rm -rf "$ROOT"
  say "down"
}

status() {
  local name daemons="munged slurmctld $(node_names | sed 's/^/slurmd./')" missing=0
  [ "$ACCT" = 0 ] || daemons="munged mariadbd slurmdbd ${daemons#munged}"
  for name in $daemons; do
    if alive "$name"; then
      echo "$name $(cat "$ROOT/$name.pid")"
    else
      echo "$name -"
      missing=1
    fi
  done
  [ $missing = 1 ] || sinfo -N -S N,P -o '%N %P %T %c CPUs %m MB %G'
  return $missing
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  -h | --help | help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" ;;
  *) die "usage: $0 up|down|status|env, or --help" ;;
esac
