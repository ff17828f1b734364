"""What a run costs: arithmetic per token, the device's peak, memory used."""

import sys

import torch

from receptance.models import RWKV

# Dense bfloat16 FLOP/s by the maker's data sheet; the first name found in the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A6000": 155e12,
    "A10": 125e12, "MI300X": 1307e12, "MI250X": 383e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def flops_per_token(model: RWKV) -> float:
    """Of a training step, without what activation checkpointing repeats.

    Each element of a matrix that multiplies the token's vector: 2 forward, 4 backward. The WKV operator by its
    recurrence, again three times the forward: 2 FLOPs for each multiply-add on the state.
    """
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1 and min(p.shape) > 1)
    config = model.config
    if config.version == "transformer":
        state = 2 * config.n_embd * config.window  # scores and sum over half of the window on average, 2 FLOPs each
    elif config.version in ("lstm", "gru"):
        state = 0  # its matrices are all
    elif config.version == "4":
        state = 10 * config.dim_att  # num and den: decay, add, read
    else:
        products = 5 if config.version == "7" else 3  # decay, writing k vᵀ, reading; RWKV-7 also erasing, by a and by b
        state = 2 * products * config.n_embd * config.head_size
    return 6.0 * (blocks + model.head.weight.numel()) + 3.0 * float(config.n_layer * state)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak for matrix products in bfloat16; None where it is not known, or for another precision."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU so far; on a CPU the most that the process took."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run could still take; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
