"""vLLM's own all-reduce kernels by themselves, for `ptconvert estimate --measure`."""

from __future__ import annotations

import os
import uuid
from typing import Any

import torch
import torch.distributed as dist

from ptconvert.estimate.sweep import SIZES, Own, peers_off


def own_all_reduce(device: torch.device, group: Any) -> Own | None:
    """What vLLM reduces small messages with among the ranks of a gloo group on one machine: its
    custom kernel on GPUs, memory that processes share on CPUs; None where it can't, as without
    peer-to-peer."""
    return _custom(device, group) if device.type == "cuda" else _shared_memory(device, group)


def _custom(device: torch.device, group: Any) -> Own | None:
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    if peers_off():  # which NCCL heeds, and this one doesn't
        return None
    custom = CustomAllreduce(group, device)
    if custom.disabled:
        return None
    return Own("vLLM custom", custom.custom_all_reduce, custom.max_size)


def _shared_memory(device: torch.device, group: Any) -> Own | None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    ident: list[Any] = [uuid.uuid4().hex]  # by which the ranks find each other's memory
    dist.broadcast_object_list(ident, src=dist.get_global_rank(group, 0), group=group)
    os.environ["VLLM_DIST_IDENT"] = ident[0]
    communicator = CpuCommunicator(group, device, group, unique_name="tp:measured")
    if communicator.dist_module is dist:
        return None
    return Own("vLLM shared memory", communicator.all_reduce, SIZES[-1])
