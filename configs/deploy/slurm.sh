#!/usr/bin/env bash
# A run over the nodes of a SLURM job: Ray's head on the first, workers on the others, then `pmdflow up` on the first.
#     sbatch configs/deploy/slurm.sh configs/cluster.yaml run.name=mine
# The same command again resumes it. Its shell part is run by a test; it was not tried on a real cluster.
#SBATCH --job-name=pmdflow
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

config=${1:?a configuration file, then KEY=VALUE overrides}
shift
port=${RAY_PORT:-6379}
# One token for all nodes: the home directory is shared. Without: export RAY_AUTH_MODE=disabled
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$head:$port

on=(srun --overlap --nodes=1 --ntasks=1) # one node, beside what else runs there; no function: a signal must reach srun

running=()
"${on[@]}" --nodelist="$head" ray start --head --node-ip-address="$head" --port="$port" --block &
running+=($!)
for _ in $(seq 60); do
    "${on[@]}" --nodelist="$head" ray status --address="$address" >/dev/null 2>&1 && break
    sleep "${RAY_WAIT_S:-2}"
done
for node in "${nodes[@]:1}"; do
    "${on[@]}" --nodelist="$node" ray start --address="$address" --block &
    running+=($!)
done

"${on[@]}" --nodelist="$head" pmdflow up "$config" "cluster.address=$address" "$@" &
up=$!
# SLURM sends SIGTERM to this shell, 120 s before the end: the run drains and saves.
signalled=""
trap 'signalled=1; kill -TERM "$up" 2>/dev/null || true' TERM
code=0
wait "$up" || code=$?
while [ -n "$signalled" ]; do # a signal ends the wait, not the run
    signalled="" code=0
    wait "$up" || code=$?
done
kill "${running[@]}" 2>/dev/null || true
exit "$code"
