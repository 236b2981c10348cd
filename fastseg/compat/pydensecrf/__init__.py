"""pydensecrf's modules over fastseg's dense CRF: the same names, arguments, results and errors.

Replace ``import pydensecrf.densecrf as dcrf`` by
``import fastseg.compat.pydensecrf.densecrf as dcrf``. Inference uses all of torch's threads (one
in forked processes) and releases the GIL.
"""

from __future__ import annotations

import os

import torch

if hasattr(os, "register_at_fork"):
    # GNU OpenMP's threads do not survive a fork, and a child that asks for them waits for ever.
    # Scripts run inference in forked pools, one thread each.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
