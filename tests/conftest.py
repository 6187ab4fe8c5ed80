"""What every test relies on: one thread, fixed seeds, no network."""

import os
from pathlib import Path

# Read when torch, its BLAS and the Hugging Face libraries are imported, so they are set before any of them is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Runs with a cache of their own share the compiled kernels all the same.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path.home() / ".cache" / "lockstep" / "kernels"))
# Without a GPU the Triton kernels are tested in Triton's interpreter, which has to be chosen before they are defined.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# A slow machine must not fail a property, and a run must be repeatable.
settings.register_profile("lockstep", deadline=None, derandomize=True)
settings.load_profile("lockstep")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
