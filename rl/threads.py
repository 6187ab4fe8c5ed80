"""How OpenMP threads wait. Must be in the environment before torch is imported; imports nothing."""

# Between two operators a thread spins for some 50 microseconds, then sleeps. Sleeping at once costs a wake-up of about
# 40 microseconds for every operator (a training step took 127 ms instead of 75, no faster than one thread); spinning on
# would take the cores from the actor whose turn it is.
THREAD_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "0"}
