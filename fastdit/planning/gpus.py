"""What data sheets say of GPUs, for plans made before one is rented. Peaks are hardware.py's; nothing here is measured."""

from typing import NamedTuple

from fastdit.runtime.hardware import peak_tflops


class GPU(NamedTuple):
    """One GPU by its maker's data sheet. GB are 10⁹ bytes, a little less than what the driver shows: plans err safely."""

    device: str  # as CUDA names it
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float  # to the other GPUs of its node, each direction: NVLink, or PCIe where there is none
    watts: int  # TDP
    source: str

    @property
    def flops(self) -> float:
        """Peak in dense bf16 FLOP/s."""
        peak = peak_tflops(self.device)
        assert peak is not None, f"{self.device} has no peak in hardware.py"
        return peak * 1e12


GPUS = {
    "a100-40gb": GPU("A100-SXM4-40GB", 40, 1555, 300, 400, "NVIDIA A100 data sheet, 2021, SXM column"),
    "a100-80gb": GPU("A100-SXM4-80GB", 80, 2039, 300, 400, "NVIDIA A100 data sheet, 2021, SXM column"),
    "h100": GPU("H100 SXM5", 80, 3350, 450, 700, "NVIDIA H100 data sheet, 2023, SXM column"),
    "h200": GPU("H200", 141, 4800, 450, 700, "NVIDIA H200 data sheet, 2024, SXM column"),
    "b200": GPU("B200", 180, 8000, 900, 1000, "NVIDIA DGX B200 data sheet, 2024, an eighth of it"),
    "l40s": GPU("L40S", 48, 864, 32, 350, "NVIDIA L40S data sheet, 2023; PCIe 4.0 × 16"),
    "rtx-4090": GPU("RTX 4090", 24, 1008, 32, 450, "NVIDIA Ada GPU architecture whitepaper 2.0, 2023; PCIe 4.0 × 16"),
}
