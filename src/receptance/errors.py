"""The errors a user can cause. The command line prints them without a traceback; Python callers can catch them."""


class ReceptanceError(Exception):
    """Base class: something about the user's input is wrong, and the message says what was found and what to do."""


class CheckpointError(ReceptanceError):
    """A model or state file is damaged, foreign or not what was asked for."""


class TokenizerError(ReceptanceError):
    """A tokenizer file is missing or damaged, or a token id does not exist."""


class ConfigError(ReceptanceError):
    """A configuration value is missing, unknown or out of range."""
