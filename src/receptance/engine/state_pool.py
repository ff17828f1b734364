"""Where states live: rows of the runner's pool, then host memory, then files."""

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from receptance.engine.runner import Runner
from receptance.errors import CheckpointError


class Parked:
    """A state that has no row: in host memory, or in a file. It is dropped when nothing holds this object any more."""

    __slots__ = ("_pool", "key", "nbytes")

    def __init__(self, pool: "StatePool", key: int, nbytes: int):
        self._pool, self.key, self.nbytes = pool, key, nbytes

    def __del__(self) -> None:
        self._pool._forget(self.key)


class StatePool:
    """Rows of a runner and any number of parked states.

    host_bytes: of parked states in memory; the least recently used go to files beyond that. folder: of those files;
    None: a temporary one. Files live as long as the pool.
    """

    def __init__(self, runner: Runner, *, host_bytes: int = 2 << 30, folder: str | Path | None = None):
        self.runner, self.host_bytes = runner, host_bytes
        self.parked_bytes = 0  # in memory
        self.spilled = 0  # to files
        self._free = list(range(runner.slots - 1, -1, -1))
        self._memory: OrderedDict[int, Any] = OrderedDict()
        self._files: dict[int, Path] = {}
        self._next = 0
        self._given_folder = None if folder is None else Path(folder)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A row for a new sequence; its content is whatever was there, so load or reset it."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def park(self, state: Any) -> Parked:
        """Keep a state of the runner's own kind."""
        key, nbytes = self._next, state.nbytes
        self._next += 1
        self._memory[key] = state
        self.parked_bytes += nbytes
        self._spill()
        return Parked(self, key, nbytes)

    def get(self, parked: Parked) -> Any:
        """The state, from memory or from its file. Raises CheckpointError where the file was lost or damaged."""
        state = self._memory.get(parked.key)
        if state is not None:
            self._memory.move_to_end(parked.key)
            return state
        path = self._files.pop(parked.key)
        try:
            state = self.runner.unpack(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: a state that was moved out of memory cannot be read ({error})") from None
        path.unlink(missing_ok=True)
        self._memory[parked.key] = state
        self.parked_bytes += parked.nbytes
        self._spill(keep=parked.key)
        return state

    def _spill(self, keep: int | None = None) -> None:
        while self.parked_bytes > self.host_bytes and self._memory:
            key = next(iter(self._memory))
            if key == keep and len(self._memory) == 1:
                return
            state = self._memory[key]
            path = self._place() / f"{key}.state"
            path.write_bytes(self.runner.pack(state))  # an error leaves the state in memory
            del self._memory[key]
            self._files[key] = path
            self.parked_bytes -= state.nbytes
            self.spilled += 1

    def _place(self) -> Path:
        if self._folder is None:
            if self._given_folder is not None:
                self._given_folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="receptance-states-", dir=self._given_folder)
        return Path(self._folder.name)

    def _forget(self, key: int) -> None:
        state = self._memory.pop(key, None)
        if state is not None:
            self.parked_bytes -= state.nbytes
        elif (path := self._files.pop(key, None)) is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._memory.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
