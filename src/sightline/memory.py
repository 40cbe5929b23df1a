"""Does a model fit? Its size against the memory that is free, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sightline.errors import ModelError

GIB = 2**30
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
QUANTIZED = {"4bit": 0.6, "8bit": 1.1}  # bytes per weight with scales; embeddings and norms stay in 16 bits
ROOM = 1.1  # activations and the largest tensor twice while it is converted


def model_bytes(parameters: Mapping[str, int], dtype: str, quantization: str | None = None) -> float:
    """Bytes of the weights once loaded.

    Args:
        parameters: safetensors dtype ("F32", "BF16", "F8_E4M3", "I64", ...) -> number of parameters.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        quantization: None, "4bit" or "8bit".
    """
    if quantization is not None:
        return QUANTIZED[quantization] * sum(parameters.values())
    return sum(count * _bytes(stored, dtype) for stored, count in parameters.items())


def _bytes(stored: str, dtype: str) -> float:
    if dtype in BYTES and stored in ("F64", "F32", "F16", "BF16"):
        return BYTES[dtype]
    digits = "".join(c for c in stored.split("_")[0] if c.isdigit())
    return int(digits) / 8 if digits else 1.0


def free_memory(device: str = "cpu") -> int | None:
    """Free bytes on a device: of the CUDA card, else of the machine or the container; None when unknown."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    known = [n for n in (_available(), _container()) if n is not None]
    return min(known, default=None)


def _available(path: str = "/proc/meminfo") -> int | None:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:  # macOS says only how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container(folder: str = "/sys/fs/cgroup") -> int | None:
    """What a control group (version 2) leaves; file caches that can be dropped count as free."""
    try:
        limit = int(Path(folder, "memory.max").read_text(encoding="ascii"))
        used = int(Path(folder, "memory.current").read_text(encoding="ascii"))
        rows = dict(line.split() for line in Path(folder, "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no control group, or "max"
        return None
    return limit - used + int(rows.get("inactive_file", 0))


def check_fits(
    name: str, parameters: Mapping[str, int] | None, dtype: str, quantization: str | None, device: str
) -> None:
    """Raise ModelError, naming both sizes and the mend, when the model exceeds the free memory of `device`."""
    free = free_memory(device)
    if parameters is None or free is None:
        return
    need = ROOM * model_bytes(parameters, dtype, quantization)
    if need <= free:
        return
    mends = ["device_map='auto'", "a smaller model"]
    if quantization != "4bit":
        mends.insert(0, "quantization='4bit'")
    if quantization is None and need > 1.5 * ROOM * model_bytes(parameters, "bfloat16"):
        mends.insert(0, "dtype='bfloat16'")
    raise ModelError(
        f"model {name!r} needs {need / GIB:.1f} GiB ({quantization or dtype}), but {device} has {free / GIB:.1f} GiB "
        f"free: choose {', '.join(mends[:-1])} or {mends[-1]}"
    )
