"""How many OpenMP threads, and how they wait. Imports nothing: the environment must be set before torch is imported."""

# Between two operators a thread spins for some 3 microseconds, then sleeps. A micro-batch of the quickstart on 2 cores,
# alone and beside a busy process: 127 and 145 ms with no spinning, 83 and 205 ms with this much, 75 and 650 ms with
# twenty times as much; 115 ms on one thread.
THREAD_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}

# Operators of a policy that fits a CPU are over in some 100 microseconds, so waking a larger team should cost what it
# saves. An estimate, made with 2 cores at hand; trainer.threads overrides it.
MAX_TRAINER_THREADS = 4
