"""The file of a user's reward function: where it lies, and that it stays what it was when the run started.

Its content decides the weights, so the recipe in the run folder holds its SHA-256.
"""

import hashlib
from pathlib import Path

from reward.config import FunctionConfig, RewardConfig

KEY = "reward.components.function"


def pin_function(config: RewardConfig) -> RewardConfig:
    """The same with the digest of the function's file filled in. Raises ValueError if it is another or unreadable."""
    function = config.components.function
    if function is None:
        return config
    require_unchanged(function)
    return _with_function(config, function.model_copy(update={"sha256": _digest(function)}))


def locate_function(config: RewardConfig) -> RewardConfig:
    """The same with the function's path made absolute, for a process that works in another folder."""
    function = config.components.function
    if function is None:
        return config
    return _with_function(config, function.model_copy(update={"path": str(Path.cwd() / function.path)}))


def require_unchanged(function: FunctionConfig) -> None:
    """Raises ValueError if the file is not the one that `sha256` tells."""
    found = _digest(function)
    if function.sha256 not in (None, found):
        raise ValueError(
            f"{KEY}: {function.path} has SHA-256 {found}, the recipe says {function.sha256}: the file was changed. "
            "Restore it and go on with --resume, or start a new run with sha256 null"
        )


def _digest(function: FunctionConfig) -> str:
    file = Path(function.path.rpartition(":")[0])
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{KEY}.path: cannot read {file} in {Path.cwd()}: {error.strerror}") from error


def _with_function(config: RewardConfig, function: FunctionConfig) -> RewardConfig:
    return config.model_copy(update={"components": config.components.model_copy(update={"function": function})})
