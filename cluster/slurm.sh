#!/usr/bin/env bash
# One run on Slurm: a Ray cluster over the allocated nodes that goes with the job.
#
#   sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh train configs/x.yaml run.path=/shared/runs/x
#
# What follows the script is what would follow `mixer`. The job's exit status is the run's. Two minutes before the time
# limit (and at scancel) the run is asked to stop, so that it can write its checkpoint; the same command goes on from it.
# Needed: the project's folder and its environment (MIXER_VENV, else .venv) on a disk that all nodes share.
#SBATCH --job-name=mixer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=mixer-%j.log
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: sbatch cluster/slurm.sh VERB ARGS..., as in: train configs/x.yaml run.path=/shared/runs/x" >&2; exit 2; }
: "${SLURM_JOB_ID:?start it with sbatch}" "${SLURM_JOB_NODELIST:?start it with sbatch}"

venv=${MIXER_VENV:-${SLURM_SUBMIT_DIR:-$PWD}/.venv}
[[ -d $venv/bin ]] && export PATH=$venv/bin:$PATH
ulimit -n "$(ulimit -Hn)"

# A token of this job's own, in a file that nobody else can read; its name is in the environment, its content nowhere.
umask 077
folder=${MIXER_CLUSTER_DIR:-$HOME/.mixer}/slurm-$SLURM_JOB_ID
mkdir -p "$folder"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_API_SERVER_ADDRESS
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

# Ten ports of this job's own below the range that Linux gives out, so that jobs which share a node do not meet.
port=$((20000 + SLURM_JOB_ID % 1270 * 10))
address=http://127.0.0.1:$((port + 1))
name=${SLURM_JOB_NAME:-mixer}-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
temp=/tmp/ray-$SLURM_JOB_ID  # short: Ray's sockets lie in it
ports=(
    --node-manager-port=$((port + 2)) --object-manager-port=$((port + 3)) --metrics-export-port=$((port + 4))
    --dashboard-agent-listen-port=$((port + 5)) --dashboard-agent-grpc-port=$((port + 6))
    --runtime-env-agent-port=$((port + 7)) --min-worker-port=0 --max-worker-port=0
)

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | tr ' ' '\n' | grep -m1 -E '^[0-9]+(\.[0-9]+){3}$')

steps=()
follower=
finish() {
    local status=$?
    trap - EXIT INT TERM
    if [[ -n $follower ]] && kill -0 "$follower" 2>/dev/null; then
        echo "slurm.sh: asking $name to stop"
        mixer submit --stop "$name" --address "$address" || true
        wait "$follower" || true
    fi
    kill -TERM "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" 2>/dev/null || true
    rm -rf "$folder"
    exit "$status"
}
trap finish EXIT
trap 'exit 143' INT TERM

# The dashboard is the job server too. It listens on the head node's own 127.0.0.1, where this script runs.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --block --disable-usage-stats --temp-dir="$temp" --node-ip-address="$head_ip" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 8)) "${ports[@]}" &
steps+=($!)

echo "slurm.sh: waiting for the head on $head ($head_ip)"
for ((try = 1; ; try++)); do
    answer=$(mixer submit --list --address "$address" 2>&1) && break
    kill -0 "${steps[0]}" 2>/dev/null || { echo "slurm.sh: the head ended; see above" >&2; exit 1; }
    ((try < ${MIXER_START_TRIES:-60})) || { echo "slurm.sh: no head: $answer" >&2; exit 1; }
    sleep 2
done

if ((${#nodes[@]} > 1)); then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --exclude="$head" --overlap \
        ray start --block --disable-usage-stats --address="$head_ip:$port" "${ports[@]}" &
    steps+=($!)
fi

mixer submit --address "$address" --name "$name" "$@" &
follower=$!
wait "$follower"
