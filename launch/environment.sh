# Settings that every process of a run wants, on one node or many. Sourced by train.sbatch and torchrun.sh; what the
# caller's environment already says wins.

# a crash inside a native library leaves the stack of every Python thread in the log
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
# lines reach the log when they are printed, also those of a process that is then killed
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
# NCCL says what went wrong (a dead link, a peer that left) instead of a bare "unhandled system error"
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# experts get another number of tokens every step; segments that grow keep that from fragmenting the GPU's memory
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# multicast through NVLink switches fails to start where jobs or containers share them
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
