"""Names that come from outside: of models, sessions, states and requests."""

import re
import secrets

NAME = re.compile(r"[a-z0-9._-]{1,128}")  # never a path: no slash, and no file is called by it


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None and text.strip(".") != ""


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
