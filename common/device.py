"""Where tensors are computed."""

import torch


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU. TF32 is switched off: a clipped norm must not pass its
    bound.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda")
    return torch.device("cpu")
