"""The models: one file per version, each read top to bottom. `VERSIONS` is the registry."""

from receptance.models.base import RWKV, Rule, apply_recipe, fingerprint
from receptance.models.state import State
from receptance.models.v4 import RWKV4, RWKV4Config
from receptance.models.v5 import RWKV5, RWKV5Config
from receptance.models.v6 import RWKV6, RWKV6Config
from receptance.models.v7 import RWKV7, RWKV7Config

VERSIONS: dict[str, type[RWKV4] | type[RWKV5] | type[RWKV6] | type[RWKV7]] = {
    "4": RWKV4,
    "5.0": RWKV5,
    "5.1": RWKV5,
    "5.2": RWKV5,
    "6": RWKV6,
    "7": RWKV7,
}

__all__ = [
    "RWKV",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "VERSIONS",
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "Rule",
    "State",
    "apply_recipe",
    "fingerprint",
]
