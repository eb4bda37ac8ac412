"""Where tensors are computed."""

from typing import Any

import torch

from common.errors import ConfigError

_chosen = ""


def use_device(name: str) -> None:
    """Compute on `name` (cpu, cuda or cuda:N) in this process; "auto" leaves the choice to `pick_device`.

    Apple's mps is not among them: it has no float64, in which the norms are taken that the clipping bound rests on. Raises
    ConfigError where there is no such device.
    """
    global _chosen
    if name == "auto":
        _chosen = ""
        return
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise ConfigError(f"device {name!r}: choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= count:
        raise ConfigError(f"device {name!r}: torch sees {count} CUDA devices here; choose cpu, or auto")
    _chosen = name


def pick_device() -> torch.device:
    """The device that was chosen, else the first CUDA device where there is one, else the CPU."""
    return torch.device(_chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware multiplies it faster (CUDA, AVX-512 BF16 or AMX), else a context that
    does nothing.

    For generators, fakes and what is computed from them; sums and norms over faces stay float32.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cuda" or capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
