"""What may be kept from one call for later ones, which on CUDA may be on other streams."""

import torch
from torch import Tensor


def may_keep(result: Tensor) -> bool:
    """Whether a result may serve later calls on any stream. On CUDA waits for it, and for the
    readers of what it replaces; but nothing that a graph captures may be kept, since it is
    computed only when the graph is replayed."""
    if type(result) is not Tensor:  # a proxy that is traced
        return False
    if not result.is_cuda:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    torch.cuda.synchronize(result.device)
    return True
