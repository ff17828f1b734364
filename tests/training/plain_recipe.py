"""The reference's training step for RWKV-4 and RWKV-7 in plain PyTorch, from the papers' and trainers' formulas.

Nothing of the package is imported: loops over time, one tensor per official name, Adam by its definition. It is the
judge of a whole run; clarity counts, speed does not.
"""

import math

import torch
import torch.nn.functional as F

VOCAB = 257  # bytes, shifted by one; 0 ends a document


class Recipe:
    """The numbers of a run."""

    def __init__(self, *, layers, width, head, ctx, batch, steps, lr, lr_final, warmup, decay, seed):
        self.layers, self.width, self.head, self.ctx, self.batch, self.steps = layers, width, head, ctx, batch, steps
        self.lr, self.lr_final, self.warmup, self.decay, self.seed = lr, lr_final, warmup, decay, seed


# Initial values ------------------------------------------------------------------------------------------------------


class Maker:
    """Makes tensors by name; `orthogonal` and `uniform` draw from one generator, in the checkpoint's order."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = {}

    def value(self, name, x):
        self.tensors[name] = torch.as_tensor(x, dtype=torch.float32).clone()

    def zeros(self, name, *shape):
        self.value(name, torch.zeros(shape))

    def orthogonal(self, name, rows, cols, gain):
        x = torch.empty(rows, cols)
        torch.nn.init.orthogonal_(x, gain, generator=self.generator)
        self.value(name, x)

    def uniform(self, name, rows, cols, bound):
        self.value(name, torch.empty(rows, cols).uniform_(-bound, bound, generator=self.generator))

    def norm(self, name, width, scale=1.0):
        self.value(name + ".weight", torch.full((width,), scale))
        self.zeros(name + ".bias", width)


def tall(rows, cols):
    return math.sqrt(rows / cols) if rows > cols else 1.0


def initial_4(recipe):
    make, c, n_layer = Maker(recipe.seed), recipe.width, recipe.layers
    make.uniform("emb.weight", VOCAB, c, recipe.lr)
    p, n = torch.arange(c).double() / c, torch.arange(c).double()
    for i in range(n_layer):
        at, rho, theta = f"blocks.{i}.", i / (n_layer - 1), 1 - i / n_layer
        for norm in ("ln0", "ln1", "ln2"):
            if norm != "ln0" or i == 0:
                make.norm(at + norm, c)
        make.value(at + "att.time_decay", -5 + 8 * (n / (c - 1)) ** (0.7 + 1.3 * rho))
        make.value(at + "att.time_first", math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))
        make.value(at + "att.time_mix_k", (p**theta).view(1, 1, c))
        make.value(at + "att.time_mix_v", (p**theta + 0.3 * rho).view(1, 1, c))
        make.value(at + "att.time_mix_r", (p ** (theta / 2)).view(1, 1, c))
        make.zeros(at + "att.key.weight", c, c)
        make.orthogonal(at + "att.value.weight", c, c, 1.0)
        make.zeros(at + "att.receptance.weight", c, c)
        make.zeros(at + "att.output.weight", c, c)
        make.value(at + "ffn.time_mix_k", (p**theta).view(1, 1, c))
        make.value(at + "ffn.time_mix_r", (p**theta).view(1, 1, c))
        make.orthogonal(at + "ffn.key.weight", 4 * c, c, tall(4 * c, c))
        make.zeros(at + "ffn.receptance.weight", c, c)
        make.zeros(at + "ffn.value.weight", c, 4 * c)
    make.norm("ln_out", c)
    make.orthogonal("head.weight", VOCAB, c, 0.5 * tall(VOCAB, c))
    return make.tensors


def initial_7(recipe):
    make, c, n_layer, size = Maker(recipe.seed), recipe.width, recipe.layers, recipe.head
    rank = {x: max(32, 32 * round(factor * math.sqrt(c) / 32)) for x, factor in zip("wavg", (2.5, 2.5, 1.7, 5.0))}
    make.uniform("emb.weight", VOCAB, c, 1e-4)
    p, n = torch.arange(c).double() / c, torch.arange(c).double()
    linear = n / (c - 1) - 0.5
    s = (n % size - (size - 1) / 2) / ((size - 1) / 2)
    z = s * s.abs()
    for i in range(n_layer):
        at, rho, theta = f"blocks.{i}.", i / (n_layer - 1), 1 - i / n_layer
        for norm in ("ln0", "ln1", "ln2"):
            if norm != "ln0" or i == 0:
                make.norm(at + norm, c)
        for x, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            make.value(at + f"att.x_{x}", (1 - p ** (power * theta)).view(1, 1, c))
        bias = {"w": -6 + 6 * (n / (c - 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * z,
                "a": -0.19 + 0.3 * z + 0.4 * linear, "v": 0.73 - 0.4 * linear}  # fmt: skip
        for x in "wavg":
            if x != "g":
                make.value(at + f"att.{x}0", bias[x].view(1, 1, c))
            make.zeros(at + f"att.{x}1", c, rank[x])
            make.orthogonal(at + f"att.{x}2", rank[x], c, 0.1 * tall(rank[x], c))
        make.value(at + "att.k_k", (0.71 - 0.1 * linear).view(1, 1, c))
        make.value(at + "att.k_a", torch.full((1, 1, c), 1.02))
        make.value(at + "att.r_k", torch.full((c // size, size), -0.04))
        make.orthogonal(at + "att.receptance.weight", c, c, 1.0)
        make.orthogonal(at + "att.key.weight", c, c, 0.1)
        make.orthogonal(at + "att.value.weight", c, c, 1.0)
        make.zeros(at + "att.output.weight", c, c)
        make.norm(at + "att.ln_x", c, ((1 + i) / n_layer) ** 0.7)
        make.value(at + "ffn.x_k", (1 - p ** (theta**4)).view(1, 1, c))
        make.orthogonal(at + "ffn.key.weight", 4 * c, c, 1.0)
        make.zeros(at + "ffn.value.weight", c, 4 * c)
    make.norm("ln_out", c)
    make.orthogonal("head.weight", VOCAB, c, 0.5 * tall(VOCAB, c))
    return make.tensors


# Forward pass --------------------------------------------------------------------------------------------------------


def shifted(x):
    return F.pad(x, (0, 0, 1, -1))  # the position before; zero at the start


def layer_norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], 1e-5)


def time_mix_4(x, w):
    mixed = [x * w[f"time_mix_{j}"] + shifted(x) * (1 - w[f"time_mix_{j}"]) for j in "kvr"]
    k, v = mixed[0] @ w["key.weight"].T, mixed[1] @ w["value.weight"].T
    decay, bonus = -torch.exp(w["time_decay"]), w["time_first"]
    num = den = torch.zeros_like(k[:, 0])
    top = torch.full_like(num, -1e38)
    out = []
    for t in range(x.shape[1]):
        now = bonus + k[:, t]
        highest = torch.maximum(top, now)
        a, b = torch.exp(top - highest), torch.exp(now - highest)
        out.append((a * num + b * v[:, t]) / (a * den + b))
        highest = torch.maximum(top + decay, k[:, t])
        a, b = torch.exp(top + decay - highest), torch.exp(k[:, t] - highest)
        num, den, top = a * num + b * v[:, t], a * den + b, highest
    return (torch.sigmoid(mixed[2] @ w["receptance.weight"].T) * torch.stack(out, 1)) @ w["output.weight"].T


def channel_mix_4(x, w):
    k = x * w["time_mix_k"] + shifted(x) * (1 - w["time_mix_k"])
    r = x * w["time_mix_r"] + shifted(x) * (1 - w["time_mix_r"])
    hidden = torch.relu(k @ w["key.weight"].T) ** 2
    return torch.sigmoid(r @ w["receptance.weight"].T) * (hidden @ w["value.weight"].T)


def time_mix_7(x, w, v_first):
    batch, time, c = x.shape
    h, n = w["r_k"].shape
    xr, xw, xk, xv, xa, xg = (x + (shifted(x) - x) * w[f"x_{j}"] for j in "rwkvag")
    r, k, v = xr @ w["receptance.weight"].T, xk @ w["key.weight"].T, xv @ w["value.weight"].T
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w["w0"] + torch.tanh(xw @ w["w1"]) @ w["w2"]))
    a = torch.sigmoid(w["a0"] + xa @ w["a1"] @ w["a2"])
    g = torch.sigmoid(xg @ w["g1"]) @ w["g2"]
    v = v if v_first is None else v + (v_first - v) * torch.sigmoid(w["v0"] + xv @ w["v1"] @ w["v2"])
    v_first = v if v_first is None else v_first
    kk = F.normalize((k * w["k_k"]).view(batch, time, h, n), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * w["k_a"])
    r, decay, k, v, a = (z.view(batch, time, h, n) for z in (r, decay, k, v, a))
    state, out = torch.zeros(batch, h, n, n), []  # value × key
    for t in range(time):
        erased = torch.einsum("bhij,bhj->bhi", state, -kk[:, t])
        state = state * decay[:, t, :, None, :]
        state = state + torch.einsum("bhi,bhj->bhij", erased, kk[:, t] * a[:, t])
        state = state + torch.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        out.append(torch.einsum("bhij,bhj->bhi", state, r[:, t]))
    y = torch.stack(out, 1).reshape(batch * time, c)
    y = F.group_norm(y, h, w["ln_x.weight"], w["ln_x.bias"], 64e-5).view(batch, time, c)
    y = y + ((r * k * w["r_k"]).sum(-1, keepdim=True) * v).reshape(batch, time, c)
    return (y * g) @ w["output.weight"].T, v_first


def channel_mix_7(x, w):
    k = x + (shifted(x) - x) * w["x_k"]
    return torch.relu(k @ w["key.weight"].T) ** 2 @ w["value.weight"].T


def part(weights, prefix):
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def logits(version, weights, tokens, n_layer):
    x = layer_norm(weights["emb.weight"][tokens], weights, "blocks.0.ln0")
    v_first = None
    for i in range(n_layer):
        at = f"blocks.{i}."
        att, ffn = part(weights, at + "att."), part(weights, at + "ffn.")
        y = layer_norm(x, weights, at + "ln1")
        if version == "4":
            x = x + time_mix_4(y, att)
            x = x + channel_mix_4(layer_norm(x, weights, at + "ln2"), ffn)
        else:
            mixed, v_first = time_mix_7(y, att, v_first)
            x = x + mixed
            x = x + channel_mix_7(layer_norm(x, weights, at + "ln2"), ffn)
    return layer_norm(x, weights, "ln_out") @ weights["head.weight"].T


# The training step ---------------------------------------------------------------------------------------------------


def batches(tokens, recipe):
    """The community trainer's order: window φ·i³ mod M of the stream, M the "magic prime"."""
    prime = len(tokens) // recipe.ctx - 1
    while prime % 3 != 2 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
        prime -= 1
    phi = int(prime * (math.sqrt(5) - 1) / 2)
    for step in range(recipe.steps):
        rows = []
        for row in range(recipe.batch):
            start = phi * (1 + step * recipe.batch + row) ** 3 % prime * recipe.ctx
            rows.append(tokens[start : start + recipe.ctx + 1])
        yield torch.stack(rows)


def factor_and_decay(version, name, recipe):
    """Learning-rate factor and weight decay of a tensor, by the optimiser table of each version's trainer."""
    factor = 1.0
    if name.endswith(("att.time_decay", "att.w0")):
        factor = 2.0
    elif name.endswith("att.time_first"):
        factor = 3.0
    is_matrix = name.endswith(".weight") and "ln" not in name
    return factor, recipe.decay if is_matrix else 0.0


def learning_rate(step, recipe):
    ratio = recipe.lr_final / recipe.lr
    done = min(max((step - recipe.warmup) / (recipe.steps - recipe.warmup), 0), 1)
    lr = recipe.lr * ((0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * done))
    return lr * (0.01 + 0.99 * step / recipe.warmup) if step < recipe.warmup else lr


def train(version, tokens, recipe, betas=(0.9, 0.99), eps=1e-18, penalty=1e-4):
    """Losses [steps] of a run over the stream of `tokens`, and the initial weights."""
    initial = (initial_4 if version == "4" else initial_7)(recipe)
    weights = {name: x.clone().requires_grad_() for name, x in initial.items()}
    first = {name: torch.zeros_like(x) for name, x in weights.items()}
    second = {name: torch.zeros_like(x) for name, x in weights.items()}
    losses = []
    for step, rows in enumerate(batches(tokens, recipe)):
        z = logits(version, weights, rows[:, :-1], recipe.layers)
        loss = F.cross_entropy(z.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))
        losses.append(loss.item())
        # the penalty pulls each position's largest logit towards zero: the gradient of penalty/2 · max², averaged
        pull = 0.5 * penalty * z.max(-1).values.square().mean()
        names = list(weights)
        found = torch.autograd.grad(loss + pull, [weights[name] for name in names], allow_unused=True)
        gradients = {name: g for name, g in zip(names, found) if g is not None}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        lr = learning_rate(step, recipe)
        with torch.no_grad():
            for name, g in gradients.items():
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                factor, decay = factor_and_decay(version, name, recipe)
                first[name].mul_(betas[0]).add_(g, alpha=1 - betas[0])
                second[name].mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
                m = first[name] / (1 - betas[0] ** (step + 1))
                v = second[name] / (1 - betas[1] ** (step + 1))
                weights[name].mul_(1 - lr * factor * decay)
                weights[name].sub_(lr * factor * m / (v.sqrt() + eps))
    return losses, initial
