#!/usr/bin/env bash
# Start train.py on one machine, on several, or on hosts that this machine emulates.
#
# One machine: one process per GPU, or two if there is no GPU; NPROC sets another number.
#   ./run_ddp.sh [flags of train.py]
#
# Several machines: the same line on each, with its own NODE_RANK; MASTER_ADDR is machine 0.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=192.168.0.10 ./run_ddp.sh ...           (MASTER_PORT=29500)
# Or without ranks: they meet at RDZV, one of them; with 1:4, one to four may take part.
#   NNODES=1:4 RDZV=192.168.0.10:29500 MAX_RESTARTS=3 ./run_ddp.sh --resume auto ...   (RDZV_ID=lte)
#
# Emulated hosts (Linux, root): each has a network of its own, sends at most LINK, and each packet
# DELAY late. One process a host, or NPROC. They reach each other only: download data beforehand.
#   HOSTS=2 LINK=100mbit DELAY=20ms ./run_ddp.sh ...
#
# MAX_RESTARTS (0) is how often torchrun may start failed processes again. Without GPUs,
# OMP_NUM_THREADS, unless set, becomes each process's share of this machine's cores.
# `python train.py --help` lists the flags.

set -euo pipefail

die() {
  echo "run_ddp.sh: $1" >&2
  exit 2
}

fits() { # variable, pattern, rule
  [[ ${!1} =~ ^($2)$ ]] || die "$1=${!1}: must be $3"
}

if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit
fi

# ---- settings, all checked before anything is started or changed ----

HOSTS=${HOSTS-} LINK=${LINK-} DELAY=${DELAY-} RDZV=${RDZV-} NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK-} MASTER_ADDR=${MASTER_ADDR-} MASTER_PORT=${MASTER_PORT:-29500}
NPROC=${NPROC-} MAX_RESTARTS=${MAX_RESTARTS:-0}
count='[1-9][0-9]{0,4}' decimal='[1-9][0-9]*(\.[0-9]+)?'

fits NPROC "($count)?" "a number of processes, 1 or more, or unset"
fits MAX_RESTARTS "0|$count" "a number of restarts, 0 or more"
fits NNODES "$count(:$count)?" "a number of machines such as 2, or with RDZV a range such as 1:4"

if [[ $HOSTS ]]; then
  fits HOSTS "[1-9][0-9]?" "a number of hosts from 1 to 99"
  fits LINK "(${decimal}[kmg]?bit)?" "a rate in bits a second, such as 100mbit, or unset"
  fits DELAY "(${decimal}(us|ms|s))?" "a time such as 20ms, or unset"
  [[ $NNODES == 1 && -z $RDZV$MASTER_ADDR ]] ||
    die "HOSTS=$HOSTS emulates hosts on one machine; unset NNODES, RDZV and MASTER_ADDR"
  [[ $(uname) == Linux ]] || die "HOSTS=$HOSTS needs Linux, but this is $(uname); unset HOSTS"
  for tool in ip tc setsid; do
    command -v $tool >/dev/null ||
      die "HOSTS=$HOSTS needs the command $tool, not found in PATH; install iproute2 and util-linux"
  done
  [[ $EUID == 0 ]] ||
    die "HOSTS=$HOSTS needs root, but this is user $EUID; put sudo env \"PATH=\$PATH\" before HOSTS"
elif [[ $LINK$DELAY ]]; then
  die "LINK=$LINK and DELAY=$DELAY act on emulated hosts only; set HOSTS, or unset both"
elif [[ $RDZV ]]; then
  # Machines count restarts each for itself, so each round of theirs needs a fresh store.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meet=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV" --rdzv-id="${RDZV_ID:-lte}")
elif [[ $NNODES == *:* ]]; then
  die "NNODES=$NNODES is a range, which needs a place to meet; set RDZV=host:port"
elif [[ $MASTER_ADDR ]]; then
  fits MASTER_PORT "$count" "a port such as 29500"
  fits NODE_RANK "0|$count" "this machine's number, 0 on $MASTER_ADDR; or unset MASTER_ADDR"
  ((NODE_RANK < NNODES)) || die "NODE_RANK=$NODE_RANK: must be below NNODES=$NNODES; correct one"
  meet=(--nnodes="$NNODES" --node-rank="$NODE_RANK"
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
elif ((NNODES > 1)); then
  die "NNODES=$NNODES machines must find each other; set MASTER_ADDR and NODE_RANK, or RDZV"
else
  meet=(--standalone) # on a free port: two runs on one machine do not meet
fi

counts=$(python -c 'import torch; print(torch.cuda.device_count(), torch.get_num_threads())' \
  2>/dev/null) || die "python cannot import torch; activate its environment, or pip install torch"
read -r gpus cores <<<"$counts"
if [[ -z $NPROC ]]; then NPROC=$((HOSTS ? 1 : gpus ? gpus : 2)); fi
processes=$((NPROC * ${HOSTS:-1}))
if ((gpus == 0 || (HOSTS && gpus < processes))); then # NCCL refuses a GPU shared by two processes
  gpus=0 share=$((cores / processes))
  export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share ? share : 1))}
fi

train=$(cd "$(dirname "$0")" && pwd)/train.py
torchrun=(python -m torch.distributed.run --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS")
# Behind "--", since torchrun would take --r for an abbreviation of a flag of its own.
[[ $HOSTS ]] || exec "${torchrun[@]}" "${meet[@]}" -- "$train" "$@"

# ---- emulated hosts: a network namespace each, and one more with the switch that joins them ----

run=lte-$$ # no other process has this number, so no other run has these names
made=()

stop() { # ends what still runs, removes what was made, and keeps the exit status
  local status=$? name pid left tick
  trap - EXIT
  trap '' INT TERM HUP # the rest takes a bounded time, and a second signal must not cut it short
  set +e
  for pid in $(jobs -pr); do
    kill -TERM "$pid" # torchrun passes it on and waits 30 s, so that train.py can save
  done
  for ((tick = 0; tick < 400; tick++)); do
    [[ $(jobs -pr) ]] || break
    sleep 0.1
  done
  for name in ${made[@]+"${made[@]}"}; do
    for ((tick = 0; tick < 50; tick++)); do # again and again: a process may fork in between
      left=$(ip netns pids "$name")
      [[ $left ]] || break
      for pid in $left; do kill -KILL "$pid"; done
      sleep 0.1
    done
    ip netns del "$name" # its interfaces go with it, and with them their peers in the switch
  done
  exit "$status"
}

trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

must() { # a kernel may lack what this asks for, and a container may forbid it
  "$@" || die "\`$*\` failed; load the kernel module it needs, or leave the container"
}

namespace() { # noted before it is made: a signal in between must not leave it behind
  [[ ! -e /run/netns/$1 ]] || die "network namespace $1 exists already; use ip netns del $1"
  made+=("$1")
  must ip netns add "$1"
  must ip -n "$1" link set lo up
}

namespace $run-switch
must ip -n $run-switch link add name switch type bridge
must ip -n $run-switch link set switch up
for ((host = 0; host < HOSTS; host++)); do
  namespace $run-$host
  must ip -n $run-switch link add name port$host type veth peer name eth0 netns $run-$host
  must ip -n $run-switch link set port$host master switch up
  must ip -n $run-$host addr add 10.0.0.$((host + 1))/24 dev eth0
  must ip -n $run-$host link set eth0 up
  shape=() # long queues: a network card drops nothing, it makes its sender wait
  [[ -z $LINK ]] || shape=(tbf rate "$LINK" burst 128kb limit 16mb)
  [[ -z $DELAY ]] || shape=(netem delay "$DELAY" ${LINK:+rate "$LINK"} limit 99999)
  [[ -z $LINK$DELAY ]] || must tc -n $run-$host qdisc add dev eth0 root "${shape[@]}"
done
if ((gpus)); then device=GPUs; else device="the CPU"; fi
echo "run_ddp.sh: $HOSTS hosts x $NPROC processes on $device, link ${LINK:-unlimited}," \
  "delay ${DELAY:-none}" >&2

# With setsid Ctrl-C reaches this script only: a second signal would cut torchrun's stopping short.
# NCCL sees that the hosts are one machine, and would go around the network by shared memory.
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export NCCL_NET=Socket NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # or it warns that addresses have no names
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((gpus - 1)))}"
for ((host = 0; host < HOSTS; host++)); do
  mine=${devices[*]:host * NPROC:NPROC}
  CUDA_VISIBLE_DEVICES=${mine// /,} setsid ip netns exec $run-$host "${torchrun[@]}" \
    --nnodes="$HOSTS" --node-rank=$host --master-addr=10.0.0.1 --master-port=29500 \
    --local-addr=10.0.0.$((host + 1)) -- "$train" "$@" </dev/null &
done
for ((host = 0; host < HOSTS; host++)); do
  wait -n || exit # with the status of the first that failed; stop ends the others
done
for ((host = 0; host < HOSTS; host++)); do
  sent=$(ip netns exec $run-$host cat /sys/class/net/eth0/statistics/tx_bytes)
  echo "run_ddp.sh: host $host sent $sent bytes" >&2
done
