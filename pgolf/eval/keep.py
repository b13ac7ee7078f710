"""A killed evaluation goes on: what is scored and learned so far, saved from time to time.

Every rank writes a file of its own; a save counts when all of them are whole and of the same round, so a process that
dies while saving leaves the save before. Files carry what they belong to, and a stranger's are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pgolf.dist import Dist


class Keeper:
    """Saves an evaluation's state in `folder` every `seconds`, as `label`.

    what: names of what the evaluation is of (artifact, data, evaluator, ranks); a save with other names is ignored.
    say: gets a line when an evaluation goes on from a save.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        what: dict[str, str],
        dist: Dist,
        *,
        seconds: float = 60.0,
        say: Callable[[str], None] = lambda text: None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.label, self.dist, self.seconds, self.say, self.now = folder, label, dist, seconds, say, now
        self.what = {**what, "label": label, "ranks": str(dist.world_size)}
        self.began = self.last = now()
        self.before = 0.0  # seconds that earlier processes took

    def load(self) -> tuple[int, float, dict[str, Any]] | None:
        """(rounds done, seconds they took, state) of the newest save that all ranks have. A collective."""
        found = {done: data for path in self._files() if (data := self._read(path)) for done in [data["done"]]}
        common = set.intersection(*map(set, self.dist.gather_objects(list(found))))
        if not common:
            return None
        data = found[max(common)]
        self.before = data["seconds"]
        self.say(f"{self.label}: goes on behind round {data['done']}, saved {self.before:.1f} s into the evaluation")
        return data["done"], self.before, data["state"]

    def maybe(self, done: int, state: Callable[[], dict[str, Any]]) -> None:
        """After each round but the last: saves where it is time, by rank 0's clock. A collective."""
        now = self.now()
        if not self.dist.broadcast_object(now - self.last >= self.seconds):
            return
        seconds = self.dist.broadcast_float(self.before + now - self.began)
        data = {"what": self.what, "done": done, "seconds": seconds, "state": state()}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.label}.{done}.rank{self.dist.rank}.pt"
        temp = path.with_suffix(".part")
        torch.save(data, temp)
        temp.replace(path)
        self.dist.barrier()  # now the save counts, and the one before may go
        for old in self._files():
            if old != path:
                old.unlink(missing_ok=True)
        self.last = self.now()

    def done(self) -> None:
        """The evaluation is over: nothing to go on from."""
        self.dist.barrier()
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.label}.*.rank{self.dist.rank}.pt"))

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A save of this very evaluation; None for anything else."""
        try:
            data = torch.load(path, weights_only=True)
            return data if data["what"] == self.what and isinstance(data["done"], int) else None
        except Exception:  # a damaged pickle raises anything; the evaluation starts anew
            return None
