"""Tests find the scripts and run them quickly; without a GPU Triton runs interpreted."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"       # read when kernels are defined, so only for these:
    import kernels
    if kernels.launch.INSTALLED:
        import triton.experimental.gluon  # noqa: F401
    del os.environ["TRITON_INTERPRET"]         # what the tests start is to run as users run it

from tiny_runs import make_runs_quick  # noqa: E402  (after the lines above, which kernels must see)

make_runs_quick()
