"""Sizes and tensor names of every version, without torch: what a checkpoint must hold to run here."""

from dataclasses import dataclass, replace

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class NativeConfig:
    """The fields of all versions' Configs under their names there; 0 or False where a version lacks one."""

    version: str
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int = 0
    mix_rank: int = 0
    decay_rank: int = 0
    rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    pre_ffn: bool = False
    column: bool = False
    first_value: bool = False
    time_state: bool = False

    @property
    def major(self) -> int:
        return int(self.version[0])

    @property
    def has_gate(self) -> bool:
        return self.version != "5.0" and self.major > 4

    def state_shapes(self, batch: int) -> Shapes:
        """Name → shape of each tensor of a state."""
        shift = (self.n_layer, batch, self.n_embd)
        if self.major == 4:
            att = (self.n_layer, batch, self.dim_att)
            return {"att_shift": shift, "num": att, "den": att, "exp": att, "ffn_shift": shift}
        heads = self.dim_att // self.head_size
        wkv = (self.n_layer, batch, heads, self.head_size, self.head_size)
        return {"att_shift": shift, "wkv": wkv, "ffn_shift": shift}


def read_config(version: str, shapes: Shapes) -> NativeConfig:
    """Every size from official tensor names and shapes. KeyError, ValueError or IndexError when they make no sense."""
    vocab_size, n_embd = shapes["emb.weight"]
    n_layer = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
    pre_ffn = "blocks.0.ffnPre.key.weight" in shapes
    att = f"blocks.{int(pre_ffn and n_layer > 1)}.att."
    dim_att = n_embd if pre_ffn and n_layer == 1 else shapes[att + "key.weight"][0]
    config = NativeConfig(version, vocab_size, n_layer, n_embd, dim_att, dim_ffn, pre_ffn=pre_ffn)
    if version == "4":
        return config
    if dim_att != n_embd:
        raise ValueError(f"a time mix of {dim_att} channels in a model of {n_embd}")
    config = replace(config, time_state=att + "time_state" in shapes)
    if version[0] == "5":
        decay = shapes[att + "time_decay"]
        column = len(decay) == 2 and version == "5.1"
        return with_heads(config, dim_att // decay[0], column=column)
    if version == "6":
        ranks = {"mix_rank": shapes[att + "time_maa_w2"][1], "decay_rank": shapes[att + "time_decay_w1"][1]}
        return with_heads(config, shapes[att + "time_faaaa"][1], **ranks)
    first_value = att + "v1" in shapes
    return with_heads(
        config,
        shapes[att + "r_k"][1],
        decay_rank=shapes[att + "w1"][1],
        rate_rank=shapes[att + "a1"][1],
        value_rank=shapes[f"blocks.{int(n_layer > 1)}.att.v1"][1] if first_value or n_layer > 1 else 32,
        gate_rank=shapes[att + "g1"][1],
        first_value=first_value,
    )


def with_heads(config: NativeConfig, head_size: int, **fields: int) -> NativeConfig:
    if config.dim_att % head_size:
        raise ValueError(f"a head size of {head_size} does not divide the width {config.dim_att}")
    return replace(config, head_size=head_size, **fields)  # type: ignore[arg-type]


def tensor_shapes(config: NativeConfig) -> Shapes:
    """Exactly the tensors that a model with these sizes has, under official names."""
    c, vocab = config.n_embd, config.vocab_size
    shapes: Shapes = {
        "emb.weight": (vocab, c),
        "head.weight": (vocab, c),
        **norm("blocks.0.ln0", c),
        **norm("ln_out", c),
    }
    for layer in range(config.n_layer):
        block = f"blocks.{layer}."
        shapes |= norm(block + "ln1", c) | norm(block + "ln2", c)
        if config.pre_ffn and layer == 0:
            shapes |= {block + "ffnPre." + name: shape for name, shape in channel_mix(config).items()}
        else:
            shapes |= {block + "att." + name: shape for name, shape in time_mix(config, layer).items()}
        shapes |= {block + "ffn." + name: shape for name, shape in channel_mix(config).items()}
    return shapes


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def time_mix(config: NativeConfig, layer: int) -> Shapes:
    c, a, n = config.n_embd, config.dim_att, config.head_size
    mix = (1, 1, c)
    shapes: Shapes = {f"{name}.weight": (a, c) for name in ("receptance", "key", "value")}
    shapes["output.weight"] = (c, a)
    if config.major == 4:
        return shapes | {f"time_mix_{i}": mix for i in "kvr"} | {"time_decay": (a,), "time_first": (a,)}
    heads = a // n
    shapes |= norm("ln_x", a)
    if config.time_state:
        shapes["time_state"] = (heads, n, n)
    if config.major == 5:
        per_head = (heads, n) if config.version == "5.2" else (heads, 1) if config.column else (heads,)
        shapes |= {f"time_mix_{i}": mix for i in "kvr"} | {"time_decay": per_head}
        if not config.has_gate:
            return shapes | {"time_first": per_head}
        return shapes | {"time_mix_g": mix, "gate.weight": (a, c), "time_faaaa": per_head}
    if config.major == 6:
        r, d = config.mix_rank, config.decay_rank
        shapes |= {f"time_maa_{i}": mix for i in "xwkvrg"} | {"gate.weight": (a, c), "time_faaaa": (heads, n)}
        shapes |= {"time_maa_w1": (c, 5 * r), "time_maa_w2": (5, r, c)}
        return shapes | {"time_decay": (1, 1, a), "time_decay_w1": (c, d), "time_decay_w2": (d, a)}
    ranks = {"w": config.decay_rank, "a": config.rate_rank, "v": config.value_rank, "g": config.gate_rank}
    for letter, rank in ranks.items():
        if letter == "v" and layer == 0 and not config.first_value:
            continue
        shapes |= {f"{letter}1": (c, rank), f"{letter}2": (rank, a)}
        if letter != "g":
            shapes[f"{letter}0"] = mix
    return shapes | {f"x_{i}": mix for i in "rwkvag"} | {"k_k": mix, "k_a": mix, "r_k": (heads, n)}


def channel_mix(config: NativeConfig) -> Shapes:
    c, f = config.n_embd, config.dim_ffn
    shapes: Shapes = {"key.weight": (f, c), "value.weight": (c, f)}
    if config.major == 7:
        return shapes | {"x_k": (1, 1, c)}
    prefix = "time_maa_" if config.major == 6 else "time_mix_"
    return shapes | {"receptance.weight": (c, c), prefix + "k": (1, 1, c), prefix + "r": (1, 1, c)}
