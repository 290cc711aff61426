"""What the machine says of itself: what its devices compute in and the peak they are known for, energy used, memory held."""

import os
import re
import resource
import sys
from typing import Any

import torch
from fastdit_kernels.cpu import FAST

# Dense bf16 TFLOP/s with fp32 accumulation, by the name CUDA gives the device: NVIDIA's data sheets, and the Ada whitepaper for
# the RTX 4090. A name must match whole: an A10G is no A10, an RTX 4090 Laptop no RTX 4090, a MIG slice not all of its GPU.
# A V100 is not listed: it has no bf16.
PEAK_TFLOPS = {
    r"A100.*": 312.0,
    r"H100 80GB HBM3|H100 SXM.*": 989.4,
    r"H100 PCIe": 756.0,
    r"H200": 989.4,
    r"B200": 2250.0,
    r"L40S": 362.0,
    r"RTX 4090": 165.2,
    r"A10": 125.0,
}


def peak_tflops(device_name: str, given: float | None = None) -> float | None:
    """The device's peak in dense bf16 TFLOP/s: what the user gave, else what its name is known for, else None."""
    if given:
        return given
    name = re.sub(r"^(NVIDIA )?(GeForce )?", "", device_name)
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def precision(asked: str, device: torch.device | None = None) -> str:
    """A key of DTYPES: what was asked for; for "auto" bf16, or fp32 on a device that has no instructions for bf16.

    GPUs before Ampere have none. Nor have many CPUs: without oneDNN's bf16 instructions a matrix product takes a hundred times
    as long as in fp32. device None: any GPU of gpus.py.
    """
    if asked != "auto":
        return asked
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device | None) -> bool:
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device is None or FAST[torch.bfloat16]


def compute_dtype(asked: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype that --parallel.precision means on the device."""
    return DTYPES[precision(asked, device)]


class Energy:
    """Joules the GPUs this process sees have used, by NVML's counters. They are found by UUID: NVML counts every GPU of the
    machine, in its own order, whatever CUDA_VISIBLE_DEVICES says."""

    def __init__(self, num_gpus: int):
        self.handles: list[Any] = []
        if not num_gpus:
            return
        import pynvml

        self.nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(num_gpus)]
            self.handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}") for uuid in uuids]
        except pynvml.NVMLError:  # no driver library, or no such device to NVML: a MIG slice
            self.handles = []

    def joules(self) -> float | None:
        if not self.handles:
            return None
        try:
            millijoules = sum(self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self.handles)
        except self.nvml.NVMLError:  # no counter: a GPU before Volta
            self.handles = []
            return None
        return millijoules / 1000


def memory_bytes() -> int:
    """Of the first GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held: of the GPU by PyTorch's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
