"""Golden traces: every figure of a few small runs after every round, as JSON that a person can review.

    python -m tests.golden            print a digest of every bit of each run (to compare two versions)
    python -m tests.golden --write    write the traces anew
    python -m tests.golden --print    print all traces as one JSON object, by name

`test_golden.py` holds the code against the traces.
"""

# Kernels that are the same on every x86 processor. Others differ in the last bits of a sum, and routers that choose
# another expert for a token or two multiply that, round by round. PyTorch and its libraries read this when they load.
SAME_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
