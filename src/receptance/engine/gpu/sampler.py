"""Drawing tokens on the GPU, one block a row: `engine.sampling.sample` up to rounding, without a sort."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from receptance.engine.table_sampler import TableSampler
from receptance.ops import cuda

THREADS, BINS, LIST = 1024, 2048, 4096
SUMS_BYTES = BINS * 12 + LIST * 5 + THREADS // 32 * 16 + 96
ROW_BYTES = 128 * 1024  # room for the logits of a block
SHARED_BYTES = SUMS_BYTES + ROW_BYTES

CLUSTERS = (16, 4), (64, 2)  # up to how many rows so many blocks share one


class GpuSampler(TableSampler):
    """Logits are tensors [n, ≥ vocab] on the device, float32 or dtype (float16 or bfloat16)."""

    def __init__(
        self,
        vocab: int,
        eos_id: int,
        weight: Callable[[], NDArray[np.float32]],
        device: torch.device,
        dtype: torch.dtype = torch.float16,
    ):
        super().__init__(vocab, eos_id, weight)
        self.vocab, self.device, self.dtype = vocab, device, dtype
        self._kernels: dict[int, cuda.Kernel] = {}
        self._can_share = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9

    def _kernel(self, cluster: int) -> cuda.Kernel:
        """A row's logits go to `cluster` blocks."""
        if cluster not in self._kernels:
            macros = {"BFLOAT16": 1} if self.dtype == torch.bfloat16 else {}
            program = cuda.load(
                Path(__file__).with_name("sampler.cu"),
                CLUSTER=cluster,
                SHARED_BYTES=SHARED_BYTES,
                ROW_BYTES=ROW_BYTES,
                **macros,
            )
            self._kernels[cluster] = program.sample
        return self._kernels[cluster]

    def _place(self, array: NDArray[Any]) -> tuple[Any, int]:
        there = torch.from_numpy(array.view(np.uint8)).to(self.device, copy=True)
        return there, there.data_ptr()

    def _enter(self, row: int) -> None:
        super()._enter(row)
        entry = self._table[row]
        if entry["biases"] or entry["seen"]:
            room = torch.empty(-(-self.vocab // 4) * 4, device=self.device)
            self._held[row].append(room)
            entry["logits"] = room.data_ptr()

    @torch.inference_mode()
    def launch(self, logits: Tensor, table: Tensor, tokens: Tensor, *, again: Tensor | None = None) -> None:
        """Draw into tokens, int64 [n]; -1 where logits are not numbers. Can be captured.

        table uint8 [n · ROW.itemsize]: `entries`. again int64 [n]: gets the tokens too (0 for -1), as next inputs.
        """
        rows, stride = len(logits), logits.stride(0)
        if stride % 4 or stride < self.vocab:
            raise ValueError(
                f"rows of logits lie {stride} apart; the sampler needs a multiple of 4, at least {self.vocab}"
            )
        is_wide = logits.dtype == torch.float32
        cluster = next((n for most, n in CLUSTERS if rows <= most), 1) if self._can_share else 1
        self._kernel(cluster)(
            (cluster * rows,), THREADS, logits if is_wide else None, None if is_wide else logits, self.vocab, stride,
            table, tokens, again, shared=SHARED_BYTES, chained=True, cluster=cluster,
        )  # fmt: skip

    @torch.inference_mode()
    def _draw(self, logits: Tensor, entries: NDArray[Any]) -> list[int]:
        if logits.dtype not in (torch.float32, self.dtype):
            logits = logits.float()
        if logits.shape[1] % 4 or not logits.is_contiguous():
            logits = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 4)).contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self.device)
        self.launch(logits, torch.from_numpy(entries.view(np.uint8)).to(self.device), tokens)
        drawn: list[int] = tokens.tolist()
        return drawn
