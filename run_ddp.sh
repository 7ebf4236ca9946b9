#!/usr/bin/env bash
# Start train.py on one machine, on several, or on hosts that this machine emulates.
#
# One machine: one process per GPU, or two if there is no GPU; NPROC sets another number.
#   ./run_ddp.sh [flags of train.py]
# Several machines: the same line on each, with its own NODE_RANK; MASTER_ADDR is machine 0.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=192.168.0.10 ./run_ddp.sh ...           (MASTER_PORT=29500)
# Machines that come and go: one to four of them, without numbers, meet at RDZV, one of them.
#   NNODES=1:4 RDZV=192.168.0.10:29500 MAX_RESTARTS=3 ./run_ddp.sh --resume auto ...   (RDZV_ID=lte)
# Emulated hosts (Linux, root): each has a network of its own, sends at most LINK, and each packet
# DELAY late. One process a host, or NPROC. They reach each other only: download data beforehand.
#   HOSTS=2 LINK=100mbit DELAY=20ms ./run_ddp.sh ...
#
# MAX_RESTARTS (0) is how often torchrun may start failed processes again. Without GPUs,
# OMP_NUM_THREADS, unless set, becomes each process's share of this machine's cores.

set -euo pipefail
[[ ! ${1-} =~ ^(-h|--help)$ ]] || exec sed -n '2,/^$/s/^# \{0,1\}//p' "$0"

die() {
  echo "run_ddp.sh: $*" >&2
  exit 2
}

fits() { # variable, pattern, what it is not and what to do
  [[ -z ${!1} || ${!1} =~ ^($2)$ ]] || die "$1=${!1} is not $3"
}

# ---- where the processes meet; what torchrun itself refuses is left to it ----

HOSTS=${HOSTS-} LINK=${LINK-} DELAY=${DELAY-} RDZV=${RDZV-} MASTER_ADDR=${MASTER_ADDR-}
NPROC=${NPROC-} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK-} MAX_RESTARTS=${MAX_RESTARTS:-0}
count='[1-9][0-9]{0,4}' decimal='[1-9][0-9]*(\.[0-9]+)?'
fits NPROC "$count" "a number of processes; use 1 or more, or unset it"
fits HOSTS "[1-9][0-9]?" "a number of hosts; use 1 to 99, or unset it"
fits LINK "${decimal}[kmg]?bit" "a rate in bits a second; use one such as 100mbit, or unset it"
fits DELAY "${decimal}(us|ms|s)" "a time; use one such as 20ms, or unset it"

if [[ $HOSTS ]]; then
  [[ $NNODES == 1 && -z $RDZV$MASTER_ADDR ]] ||
    die "HOSTS=$HOSTS emulates hosts on one machine; unset NNODES, RDZV and MASTER_ADDR"
elif [[ $LINK$DELAY ]]; then
  die "LINK=$LINK and DELAY=$DELAY act on emulated hosts only; set HOSTS, or unset both"
elif [[ $RDZV ]]; then
  # Machines count restarts each for itself, so each round of theirs needs a fresh store.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meet=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV" --rdzv-id="${RDZV_ID:-lte}")
elif [[ $MASTER_ADDR && $NNODES =~ ^$count$ ]]; then # torchrun waits for each number below NNODES
  [[ $NODE_RANK =~ ^(0|$count)$ && NODE_RANK -lt NNODES ]] ||
    die "NODE_RANK=$NODE_RANK is not below NNODES=$NNODES; set 0 on $MASTER_ADDR, 1, ... elsewhere"
  meet=(--nnodes="$NNODES" --node-rank="$NODE_RANK"
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
elif [[ $NNODES == 1 ]]; then
  meet=(--standalone) # on a free port: two runs on one machine do not meet
else
  die "NNODES=$NNODES needs RDZV=host:port or, as one number, MASTER_ADDR and NODE_RANK; set these"
fi

if [[ $HOSTS && ${LTE_PRIVATE-} != "$$" ]]; then
  # Start again with a network and mounts that only this process and its children see: the kernel
  # removes them, and all that is made in them, with the last of these, whatever ends it.
  type ip tc setsid unshare >/dev/null 2>&1 ||
    die "HOSTS=$HOSTS needs ip, tc, setsid and unshare; on Linux, install iproute2 and util-linux"
  unshare --net --mount true 2>/dev/null ||
    die "HOSTS=$HOSTS needs root outside a container, but this is user $EUID;" \
      "put sudo env \"PATH=\$PATH\" before HOSTS"
  LTE_PRIVATE=$$ exec unshare --net --mount bash "$0" "$@"
fi

# ---- how many processes, on what ----

counts=$(python -c 'import torch; print(torch.cuda.device_count(), torch.get_num_threads())' \
  2>/dev/null) || die "python cannot import torch; activate its environment, or pip install torch"
read -r gpus cores <<<"$counts"
[[ $NPROC ]] || NPROC=$((HOSTS ? 1 : gpus ? gpus : 2))
if ((gpus == 0 || gpus < NPROC * HOSTS)); then # NCCL refuses a GPU shared by two
  gpus=0 share=$((cores / NPROC / (HOSTS ? HOSTS : 1)))
  export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share ? share : 1))}
fi
torchrun=(python -m torch.distributed.run --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS")
# Behind "--", since torchrun would take --r for an abbreviation of a flag of its own.
train=(-- "$(cd "$(dirname "$0")" && pwd)/train.py" "$@")
[[ $HOSTS ]] || exec "${torchrun[@]}" "${meet[@]}" "${train[@]}"

# ---- emulated hosts: a network namespace each, joined by a switch in this process's own ----

stop() { # at every end, a signal's too; a second signal must not cut it short
  trap '' HUP INT TERM
  set +e
  jobs -pr | xargs -r kill -TERM # torchrun passes it on and waits 30 s, so that train.py can save
  for ((tick = 0; tick < 400; tick++)); do [[ -z $(jobs -pr) ]] || sleep 0.1; done
  ip netns list | cut -d' ' -f1 | xargs -rn1 ip netns pids | xargs -r kill -KILL
}

mount -t tmpfs -o X-mount.mkdir hosts /run/netns # hides network namespaces that are not ours
trap stop EXIT
trap 'die "HOSTS=$HOSTS LINK=$LINK DELAY=$DELAY needs a kernel module, named above; load it"' ERR
ip link add switch up type bridge
echo "run_ddp.sh: $HOSTS hosts x $NPROC processes, $gpus GPUs, link ${LINK:-unlimited}," \
  "delay ${DELAY:-none}" >&2
shape=() # long queues: a network card drops nothing, it makes its sender wait
[[ -z $LINK ]] || shape=(tbf rate "$LINK" burst 128kb limit 16mb)
[[ -z $DELAY ]] || shape=(netem delay "$DELAY" ${LINK:+rate "$LINK"} limit 99999)
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((gpus - 1)))}"
# NCCL sees that the hosts are one machine, and would go around the network by shared memory.
export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
export NCCL_NET=Socket NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # or it warns that addresses have no names

for ((host = 0; host < HOSTS; host++)); do
  ip netns add host$host
  ip -n host$host link set lo up
  ip link add port$host master switch up type veth peer name eth0 netns host$host
  ip -n host$host addr add 10.0.0.$((host + 1))/24 dev eth0
  ip -n host$host link set eth0 up
  [[ -z $LINK$DELAY ]] || tc -n host$host qdisc add dev eth0 root "${shape[@]}"
  mine=${devices[*]:host * NPROC:NPROC}
  # setsid keeps Ctrl-C from torchrun: a second signal would cut its stopping short.
  CUDA_VISIBLE_DEVICES=${mine// /,} setsid ip netns exec host$host "${torchrun[@]}" \
    --nnodes="$HOSTS" --node-rank=$host --master-addr=10.0.0.1 --master-port=29500 \
    --local-addr=10.0.0.$((host + 1)) "${train[@]}" </dev/null &
done
for ((host = 0; host < HOSTS; host++)); do
  wait -n || exit # with the status of the first that failed; stop ends the others
done
for ((host = 0; host < HOSTS; host++)); do
  sent=$(ip netns exec host$host cat /sys/class/net/eth0/statistics/tx_bytes)
  echo "run_ddp.sh: host $host sent $sent bytes" >&2
done
