"""How fast a site computes: the FLOPs that its tokens really needed there, against its device's peak."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fomoe_flwr.model.base import LanguageModel
from fomoe_flwr.model.spec import token_flops

# Dense bf16 matrix products in Tflop/s, from the makers' data sheets (without sparsity), by a part of the device's
# name; the first that fits.
PEAKS = (
    ("GB200", 2500.0), ("B200", 2250.0), ("GH200", 989.0), ("H200", 989.0), ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0), ("H100", 989.0), ("H800", 989.0), ("A100", 312.0), ("A800", 312.0), ("L40S", 362.0),
    ("L40", 181.0), ("L4", 121.0), ("A40", 150.0), ("A10", 125.0), ("RTX 4090", 165.0), ("RTX 3090", 71.0),
    ("MI355X", 2500.0), ("MI325X", 1307.0), ("MI300X", 1307.0), ("MI250", 362.0),
)  # fmt: skip

_SIDE, _SECONDS = 1024, 0.2  # of the matrices that are multiplied to measure a peak, and how long


def known_peak(device: str, dtype: str) -> float | None:
    """FLOP/s by the data sheet; None for a CPU, for a device that is not in the table, and for fp32, whose products a
    GPU may or may not round."""
    if not device.startswith("cuda") or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in PEAKS if part in name), None)


@functools.cache
def measured_peak(device: str, dtype: str) -> float:
    """FLOP/s of square matrix products, the fastest of those that fit into a moment."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    # A GPU needs larger ones to be busy.
    side = 8 * _SIDE if device.startswith("cuda") else _SIDE
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS or fastest == float("inf"):
        start = time.perf_counter()
        # As a layer multiplies: in bf16 on a CPU, a product the other way round may have no fast kernel.
        product = F.linear(left, right)
        # Waits for the device.
        float(product[0, 0])
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def active_flops(
    module: LanguageModel, seq_len: int, tokens: int, loads_LC: Sequence[Sequence[float]]
) -> float:
    """FLOPs of forward and backward over these tokens: dense part, the router's rows, and the experts that computed.

    A matrix counts 6 a parameter and token, attention 12·S·d a layer of which half is masked away (`spec.token_flops`).
    Ghosts count nothing, nor does what is computed again (train.recompute).

    Args:
        tokens: predicted.
        loads_LC: how often each layer's router chose each of its candidates.
    """
    model = module.config
    whole = token_flops(model, seq_len)
    layers = module.moe_layers
    computed = 0.0
    for moe, load_C in zip(layers, loads_LC, strict=True):
        held = set(moe.resident_experts)
        computed += sum(load for expert, load in zip(moe.candidates, load_C, strict=True) if expert in held)
    rows = sum(len(moe.candidates) for moe in layers) / (len(layers) * model.num_experts)
    of_experts = whole.experts / (len(layers) * model.top_k)
    return tokens * (whole.dense + rows * whole.router) + computed * of_experts
