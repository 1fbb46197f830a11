"""What quantised weights mean, as numbers, where no quantiser's kernels run: on CPUs, and on ranks.

Formats as their own packages define them: compressed-tensors (compressors/), gptqmodel
(nn_modules/qlinear/, whose `convert_gptq_v1_to_v2_format` says that zero points are kept less one),
AutoAWQ (utils/packing_utils.py), transformers (integrations/finegrained_fp8.py, mxfp4.py), and the
OCP Microscaling specification for FP4 (E2M1) and E8M0. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ptconvert.models.quantised import per_element, unit_sizes

# FP4 by its four bits: sign, two of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_SIGNED = (*_FP4, *(-value for value in _FP4))
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output lies where in an int32
_INT_BITS = 32

Kept = Mapping[str, torch.Tensor]


def dequantised(kept: Kept, quantization: Mapping[str, Any]) -> torch.Tensor:
    """The weight (O, I) that tensors mean, or that of all experts (E, I, O), in float32.

    `kept` are the tensors by what ends their names, as `models.quantised` has it.
    """
    if "_blocks" in kept:
        values = _fp4(kept["_blocks"]).flatten(-2)  # (E, O, I)
        return (values * _repeated(_powers(kept["_scales"]), values.shape)).mT
    if "qweight" in kept:
        return _of_inputs_first(kept, quantization)
    units, packed = unit_sizes(quantization), kept.get("weight_packed")
    if packed is not None and packed.dtype == torch.int32:
        return _of_integers(kept, units)
    weight = kept["weight"] if packed is None else packed
    values = _fp4(weight) if weight.dtype == torch.uint8 else weight.float()
    if "weight_zero_point" in kept:
        values = values - _repeated(kept["weight_zero_point"].float(), values.shape)
    scales = kept["weight_scale_inv" if "weight_scale_inv" in kept else "weight_scale"]
    scales = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    if "weight_scale_2" in kept:
        scales = scales * kept["weight_scale_2"].float()
    if "weight_global_scale" in kept:
        scales = scales / kept["weight_global_scale"].float()
    return values * _repeated(scales, values.shape, units)


def _of_integers(kept: Kept, units: frozenset[int]) -> torch.Tensor:
    """Of compressed-tensors' int32, which lie along the inputs, zero points along the outputs."""
    outputs, inputs = kept["weight_shape"].tolist()
    packed, scales = kept["weight_packed"], kept["weight_scale"].float()
    bits = next(b for b in (2, 4, 8) if -(-inputs * b // _INT_BITS) == packed.shape[1])
    values = _unpacked(packed, 1, bits)[:, :inputs]
    zeros = torch.full_like(scales, 1 << (bits - 1))
    if "weight_zero_point" in kept:
        zeros = _unpacked(kept["weight_zero_point"], 0, bits)[:outputs].float()
    index = kept.get("weight_g_idx")
    if index is None:
        index = _in_groups(inputs, scales.shape[1], units)
    return (values - zeros[:, index.long()]) * scales[:, index.long()]


def _of_inputs_first(kept: Kept, quantization: Mapping[str, Any]) -> torch.Tensor:
    """Of GPTQ, AWQ and AutoRound, which have inputs before outputs."""
    packed, zeros, scales = kept["qweight"], kept["qzeros"], kept["scales"].float()
    outputs = scales.shape[1]
    bits = _INT_BITS * zeros.shape[1] // outputs
    if packed.shape[1] != outputs:  # AWQ's lie along the outputs, too
        values, zeros = (_unpacked(one, 1, bits, _AWQ_ORDER) for one in (packed, zeros))
    else:
        values = _unpacked(packed, 0, bits)
        if _less_one(quantization):
            ones = sum(1 << place for place in range(0, _INT_BITS, bits))
            zeros = (zeros.long() + ones) & 0xFFFFFFFF
        zeros = _unpacked(zeros, 1, bits)
    index = kept.get("g_idx")
    if index is None:
        index = _in_groups(len(values), len(scales), unit_sizes(quantization))
    return ((values - zeros[index.long()]) * scales[index.long()]).mT


def _less_one(quantization: Mapping[str, Any]) -> bool:
    """Whether zero points are kept less one: in GPTQ's first format, which AutoRound writes by that
    name only (`GPTQ_FORMAT` of its inference/backend.py)."""
    if quantization.get("quant_method") == "auto-round":
        return "auto_gptq" in str(quantization.get("packing_format"))
    return quantization.get("checkpoint_format") != "gptq_v2"


def _in_groups(inputs: int, groups: int, units: frozenset[int]) -> torch.Tensor:
    """The group of each input, where they follow each other."""
    return torch.arange(inputs) // (per_element(inputs, groups, units) or inputs)


def _unpacked(
    whole: torch.Tensor, axis: int, bits: int, order: Sequence[int] | None = None
) -> torch.Tensor:
    """The unsigned values that share integers along an axis, one after the other."""
    moved = whole.long().movedim(axis, -1)
    shifts = torch.arange(0, _INT_BITS, bits)
    values = (moved[..., None] >> shifts) & ((1 << bits) - 1)
    if order is not None:
        values = values[..., torch.tensor(order).argsort()]
    return values.flatten(-2).movedim(-1, axis)


def _fp4(pairs: torch.Tensor) -> torch.Tensor:
    """The FP4 values (..., 2n) of bytes (..., n), each byte's lower half first."""
    halves = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    return torch.tensor(_FP4_SIGNED)[halves.long()]


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two (E8M0)."""
    return torch.exp2(exponents.float() - 127)


def _repeated(
    scales: torch.Tensor, size: Sequence[int], units: frozenset[int] = frozenset()
) -> torch.Tensor:
    """Scales of groups or blocks along some axes, once for each value."""
    if scales.numel() == 1:
        return scales.flatten()[0]
    scales = scales[:, None] if scales.ndim == 1 else scales
    for axis, length in enumerate(size):
        each = per_element(length, scales.shape[axis], units)
        if each is not None and each > 1:
            scales = scales.repeat_interleave(each, axis).narrow(axis, 0, length)
    return scales
