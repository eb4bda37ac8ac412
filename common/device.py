"""Where tensors are computed."""

from typing import Any

import torch


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware multiplies it faster (CUDA, AVX-512 BF16 or AMX), else a context that
    does nothing.

    For generators, fakes and what is computed from them; sums and norms over faces stay float32.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cuda" or capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
