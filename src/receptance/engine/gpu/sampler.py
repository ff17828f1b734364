"""Drawing tokens on the GPU, one block a row: `engine.sampling.sample` up to rounding, without a sort."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from receptance.engine.params import SamplingParams
from receptance.engine.sampling import Counts
from receptance.errors import ConfigError
from receptance.ops import cuda

THREADS, BINS = 1024, 2048
SHARED_BYTES = BINS * 12 + THREADS // 32 * 16 + 32
MOST_BIASES = 4096  # of all rows of a batch


class GpuSampler:
    """Sampling parameters and counts of up to `rows` rows of a batch, in buffers that stay where they are.

    Row i of a batch is drawn with the parameters of row i, and counts in row slots[i] of `occurrence` and `seen`
    [slots + 1, V], as `engine.sampling.Counts` has them. weight [V]: `engine.sampling.digit_weight`.
    """

    def __init__(
        self, rows: int, slots: int, vocab: int, weight: Tensor, *, eos_id: int = 0, dtype: torch.dtype = torch.float16
    ):
        device = self.device = weight.device
        self.vocab, self.eos_id, self.rows = vocab, eos_id, rows
        self.weight = weight.float().contiguous()
        self._params = torch.zeros(rows, 12, device=device)
        self._bias_ids = torch.zeros(MOST_BIASES, dtype=torch.int32, device=device)
        self._bias_values = torch.zeros(MOST_BIASES, device=device)
        self.occurrence = torch.zeros(slots + 1, vocab, device=device)
        self.seen = torch.zeros(slots + 1, vocab, dtype=torch.uint8, device=device)
        self.uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._adjusted = torch.empty(0, device=device)
        macros = {"BFLOAT16": 1} if dtype == torch.bfloat16 else {}
        self._kernel = cuda.load(Path(__file__).with_name("sampler.cu"), **macros).sample
        self.set([SamplingParams()] * rows)

    def set(self, params: Sequence[SamplingParams]) -> None:
        """The parameters of rows 0, 1, … from now on. Raises ConfigError for a bias on an id beyond the vocabulary."""
        floats, ints, ids, values = [], [], [], []
        for p in params:
            pairs = [*p.bias_pairs, *([(self.eos_id, -torch.inf)] if p.ignore_eos else [])]
            for token, value in pairs:
                if token >= self.vocab:
                    raise ConfigError(
                        f"logit_bias has token id {token}, but the vocabulary's ids are 0 to {self.vocab - 1}"
                    )
                ids.append(token)
                values.append(value)
            top_p = p.top_p if p.top_p < 1 else 2.0
            floats.append(
                [p.temperature, top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty,
                 p.penalty_decay]
            )  # fmt: skip
            top_k = min(p.top_k or self.vocab, self.vocab)
            ints.append([top_k, int(p.has_penalties), len(ids) - len(pairs), len(ids), int(p.penalize_digits)])
        if len(ids) > MOST_BIASES:
            raise ConfigError(f"{len(ids)} logit biases in one batch; the GPU sampler takes {MOST_BIASES}")
        table = torch.cat([torch.tensor(floats), torch.tensor(ints, dtype=torch.int32).view(torch.float32)], 1)
        self._params[: len(params)] = table.to(self.device)
        if ids:
            self._bias_ids[: len(ids)] = torch.tensor(ids, dtype=torch.int32).to(self.device)
            self._bias_values[: len(ids)] = torch.tensor(values).to(self.device)

    def start(self, slot: int, prompt: Sequence[int]) -> None:
        """Nothing generated yet after this prompt."""
        self.occurrence[slot] = 0
        self.seen[slot] = 0
        self.seen[slot, torch.tensor(sorted(set(prompt)), dtype=torch.long, device=self.device)] = Counts.PROMPT

    def draw(
        self, logits: Tensor, slots: Tensor, uniforms: Tensor, *, allowed: Tensor | None = None,
        again: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each row's next token for logits [B, ≥ V], -1 where they are not numbers: int64 [B], until the next call.

        Can be captured. slots int32 [B]; uniforms float64 [B]; allowed int32 [B, ceil(V / 32)]: a bit for each token
        that may come; again int64 [B]: gets the tokens too (0 for -1), the next step's inputs.
        """
        rows, stride = len(logits), logits.stride(0)
        if stride % 4 or stride < self.vocab:
            raise ValueError(
                f"rows of logits lie {stride} apart; the sampler needs a multiple of 4, at least {self.vocab}"
            )
        if self._adjusted.numel() < rows * stride:
            self._adjusted = torch.empty(max(self.rows, rows) * stride, device=self.device)
        is_wide = logits.dtype == torch.float32
        self._kernel(
            (rows,), THREADS, logits if is_wide else None, None if is_wide else logits, self._adjusted, self.vocab,
            stride, self._params, self._bias_ids, self._bias_values, slots, self.occurrence, self.seen, self.weight,
            allowed, uniforms, self.tokens, again, shared=SHARED_BYTES, chained=True,
        )  # fmt: skip
        return self.tokens[:rows]
