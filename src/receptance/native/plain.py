"""The forward pass in NumPy: slow, plain, and what the core is judged by. Also its stand-in where it is not compiled.

It reads like docs/maths.md: x [T, C] of one sequence, every version in one function each.
"""

import numpy as np

from receptance.native.arrays import Array, Weights, to_float
from receptance.native.config import NativeConfig

GROUP_NORM_EPS = 64e-5
MIN_LOG_DECAY = np.float32(-np.exp(-0.5))  # version 7

Fields = dict[str, Array]  # of one layer and one sequence; changed in place


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # to infinity, whose reciprocal is the 0 it should be
        return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(eps))
    return np.asarray(centred / scale * weight + bias, np.float32)


class PlainEngine:
    """Keeps all weights as float32: a bfloat16 model takes twice its size in memory."""

    def __init__(self, weights: Weights, config: NativeConfig):
        self.config = config
        self.weights = {name: to_float(x) for name, x in weights.items()}

    def forward(self, tokens: list[int], state: dict[str, Array], last_only: bool) -> Array:
        """Logits [T, V] or [V] of one sequence; state [L, …] is changed in place."""
        w = self.weights
        x = norm(w["emb.weight"][tokens], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])  # [T, C]
        first: list[Array] = []  # version 7: the first layer's values
        for i in range(self.config.n_layer):
            layer = {name: field[i] for name, field in state.items()}
            block = f"blocks.{i}."
            h = norm(x, w[block + "ln1.weight"], w[block + "ln1.bias"])
            before = shifted(h, layer["att_shift"])
            if self.config.pre_ffn and i == 0:
                x = x + self.channel_mix(block + "ffnPre.", h, before)
            else:
                mix = (self.time_mix4, self.time_mix5, self.time_mix6, self.time_mix7)[self.config.major - 4]
                x = x + mix(block + "att.", h, before, layer, first)
            h = norm(x, w[block + "ln2.weight"], w[block + "ln2.bias"])
            x = x + self.channel_mix(block + "ffn.", h, shifted(h, layer["ffn_shift"]))
        x = x[-1] if last_only else x
        return norm(x, w["ln_out.weight"], w["ln_out.bias"]) @ w["head.weight"].T

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[name + ".weight"].T

    def mixed(self, name: str, x: Array, before: Array) -> Array:
        """Versions 4 and 5 weigh the current token, 6 and 7 the difference to the one before."""
        mu = self.weights[name].reshape(-1)
        return x * mu + before * (1 - mu) if self.config.major < 6 else x + (before - x) * mu

    def channel_mix(self, prefix: str, x: Array, before: Array) -> Array:
        mix = {4: "time_mix_", 5: "time_mix_", 6: "time_maa_", 7: "x_"}[self.config.major]
        hidden = np.maximum(self.linear(prefix + "key", self.mixed(f"{prefix}{mix}k", x, before)), 0) ** 2
        out = self.linear(prefix + "value", hidden)
        if self.config.major == 7:
            return out
        return sigmoid(self.linear(prefix + "receptance", self.mixed(f"{prefix}{mix}r", x, before))) * out

    def time_mix4(self, att: str, x: Array, before: Array, layer: Fields, first: list[Array]) -> Array:
        r, k, v = (
            self.linear(att + name, self.mixed(att + "time_mix_" + name[0], x, before))
            for name in ("receptance", "key", "value")
        )
        w, u = -np.exp(self.weights[att + "time_decay"]), self.weights[att + "time_first"]
        num, den, exp = layer["num"], layer["den"], layer["exp"]
        y = np.empty_like(v)
        for t in range(len(x)):
            p = np.maximum(exp, u + k[t])
            e1, e2 = np.exp(exp - p), np.exp(u + k[t] - p)
            y[t] = (e1 * num + e2 * v[t]) / (e1 * den + e2)
            p = np.maximum(exp + w, k[t])
            e1, e2 = np.exp(exp + w - p), np.exp(k[t] - p)
            num[:], den[:], exp[:] = e1 * num + e2 * v[t], e1 * den + e2, p
        return self.linear(att + "output", sigmoid(r) * y)

    def time_mix5(self, att: str, x: Array, before: Array, layer: Fields, first: list[Array]) -> Array:
        r, k, v = (
            self.linear(att + name, self.mixed(att + "time_mix_" + name[0], x, before))
            for name in ("receptance", "key", "value")
        )
        heads = layer["wkv"].shape[0]
        has_gate = self.config.has_gate
        u = self.weights[att + "time_faaaa"] if has_gate else np.exp(self.weights[att + "time_first"])
        w = np.exp(-np.exp(self.weights[att + "time_decay"])).reshape(1, heads, -1)
        y = self.wkv6(att, r, np.broadcast_to(w, (len(x), *w.shape[1:])), k, v, u.reshape(heads, -1), layer["wkv"])
        if has_gate:
            g = self.linear(att + "gate", self.mixed(att + "time_mix_g", x, before))
            y = y * g * sigmoid(g)
        return self.linear(att + "output", y)

    def time_mix6(self, att: str, x: Array, before: Array, layer: Fields, first: list[Array]) -> Array:
        w = self.weights
        heads = layer["wkv"].shape[0]
        low = np.tanh(self.mixed(att + "time_maa_x", x, before) @ w[att + "time_maa_w1"])
        low = low.reshape(len(x), 5, -1).swapaxes(0, 1) @ w[att + "time_maa_w2"]  # [5, T, C]
        inputs = {
            j: x + (before - x) * (w[f"{att}time_maa_{j}"].reshape(-1) + correction)
            for j, correction in zip("wkvrg", low)
        }
        r, k, v = (self.linear(att + name, inputs[name[0]]) for name in ("receptance", "key", "value"))
        g = self.linear(att + "gate", inputs["g"])
        decay = (
            w[att + "time_decay"].reshape(-1)
            + np.tanh(inputs["w"] @ w[att + "time_decay_w1"]) @ w[att + "time_decay_w2"]
        )
        decay = np.exp(-np.exp(decay)).reshape(len(x), heads, -1)
        y = self.wkv6(att, r, decay, k, v, w[att + "time_faaaa"], layer["wkv"])
        return self.linear(att + "output", y * g * sigmoid(g))

    def wkv6(self, att: str, r: Array, w: Array, k: Array, v: Array, u: Array, state: Array) -> Array:
        """Versions 5 and 6, with the norm after it. r, k, v [T, A]; w [T, H, N or 1]; state [H, N, N], value × key."""
        r, k, v = (z.reshape(len(r), state.shape[0], -1) for z in (r, k, v))
        y = np.empty_like(v)  # [T, H, N]
        for t in range(len(r)):
            now = (r[t] * u * k[t]).sum(-1, keepdims=True) * v[t]
            y[t] = (state @ r[t][:, :, None])[:, :, 0] + now
            state[:] = state * w[t][:, None] + v[t][:, :, None] * k[t][:, None]
        return self.group_norm(att, y)

    def time_mix7(self, att: str, x: Array, before: Array, layer: Fields, first: list[Array]) -> Array:
        w, state = self.weights, layer["wkv"]
        inputs = {j: self.mixed(f"{att}x_{j}", x, before) for j in "rwkvag"}
        r, k, v = (self.linear(att + name, inputs[name[0]]) for name in ("receptance", "key", "value"))

        def low(j: str, inner: Array) -> Array:
            return w[f"{att}{j}0"].reshape(-1) + inner @ w[f"{att}{j}2"]

        if not first:
            first.append(v)
        else:
            v = v + (first[0] - v) * sigmoid(low("v", inputs["v"] @ w[att + "v1"]))
        decay = np.exp(MIN_LOG_DECAY * sigmoid(low("w", np.tanh(inputs["w"] @ w[att + "w1"]))))
        a = sigmoid(low("a", inputs["a"] @ w[att + "a1"]))
        g = sigmoid(inputs["g"] @ w[att + "g1"]) @ w[att + "g2"]
        heads = (len(x), state.shape[0], -1)
        kk = (k * w[att + "k_k"].reshape(-1)).reshape(heads)
        kk = kk / np.maximum(np.sqrt((kk * kk).sum(-1, keepdims=True)), np.float32(1e-12))
        k = k * (1 + (a - 1) * w[att + "k_a"].reshape(-1))
        r, k, v, a, decay = (z.reshape(heads) for z in (r, k, v, a, decay))
        y = np.empty_like(v)
        for t in range(len(x)):
            held = state @ -kk[t][:, :, None]  # [H, N, 1]
            b = kk[t] * a[t]
            state[:] = state * decay[t][:, None] + held * b[:, None] + v[t][:, :, None] * k[t][:, None]
            y[t] = (state @ r[t][:, :, None])[:, :, 0]
        bonus = (r * k * w[att + "r_k"]).sum(-1, keepdims=True) * v
        return self.linear(att + "output", (self.group_norm(att, y) + bonus.reshape(len(x), -1)) * g)

    def group_norm(self, att: str, y: Array) -> Array:
        """[T, H, N] → [T, A], each head normed by itself."""
        weight, bias = (self.weights[f"{att}ln_x.{name}"].reshape(y.shape[1:]) for name in ("weight", "bias"))
        return norm(y, weight, bias, GROUP_NORM_EPS).reshape(len(y), -1)


def shifted(x: Array, last: Array) -> Array:
    """The row before each row; `last` [C] stands before the first, and then becomes the last one of x."""
    before = np.concatenate([last[None], x[:-1]])
    last[:] = x[-1]
    return before
