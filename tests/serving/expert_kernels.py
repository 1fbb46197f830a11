"""vLLM's kernels of quantised experts for CPUs, also where there is no AMX, as which vLLM asks for:
they run by AVX-512, too."""

from __future__ import annotations

import torch


def supported() -> bool:
    """Whether they run here."""
    return torch.cpu._is_avx512_bf16_supported()


def install() -> None:
    """Lets vLLM take them in this process."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for kernels in (
        *(cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsMxfp4),
        *(cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsInt8),
    ):
        kernels._supports_current_device = staticmethod(supported)
