#!/usr/bin/env bash
# Train on one node or many without SLURM, one process a GPU: start the same line on every node.
#
#   launch/torchrun.sh +experiment=moe_100m                                     one node, all of its GPUs
#   NODES=2 HOST=10.0.0.1 launch/torchrun.sh +experiment=moe_2b                 on both nodes; HOST is either's address
#
# The arguments are those of train.py. From the environment: NODES (1), PROCESSES a node (default: as many as GPUs), HOST
# and PORT (29400) where the nodes meet, RUN (moesaic), a word that keeps runs apart which meet at the same place.
set -euo pipefail

code=$(dirname "$(dirname "$(readlink -f "$0")")")
# shellcheck source=environment.sh
source "$code/launch/environment.sh"

# After SIGTERM the processes save; torchrun kills them half a minute later unless told to wait longer. Read from
# torch 2.13 on; before, half a minute it is.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}

for name in NODES PROCESSES; do
  [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || { echo "error: $name must be a number of at least 1, not ${!name}" >&2; exit 78; }
done
if [ -z "${PROCESSES:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: no GPU here: set PROCESSES, how many processes to start" >&2
  exit 78
fi

meeting=(--standalone)
if ((${NODES:-1} > 1)); then
  [ -n "${HOST:-}" ] || { echo "error: NODES=$NODES needs HOST, the address of one of them" >&2; exit 78; }
  meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29400}" --rdzv-id "${RUN:-moesaic}")
fi
exec torchrun "${meeting[@]}" --nproc-per-node "${PROCESSES:-gpu}" "$code/train.py" "$@"
