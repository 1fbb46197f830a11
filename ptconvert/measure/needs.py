"""What a command will hold and how long it will take, worked out before it begins: as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Place(StrEnum):
    """Where something is held. For a device that shares memory, `DEVICE` is `MEMORY`."""

    DEVICE = "device"
    MEMORY = "memory"
    DISK = "disk"


def shares_memory(device: str) -> bool:
    """Whether a device, as torch names it, has no memory of its own."""
    return device.partition(":")[0] in ("cpu", "mps")


@dataclass(frozen=True)
class Held:
    """Something that takes room; `nbytes` are bytes of one process."""

    what: str
    nbytes: int
    place: Place


def spilling(what: str, nbytes: int, limit: int) -> Held:
    """Something that lies in memory up to so many bytes, and beyond them on disk."""
    return Held(what, nbytes, Place.MEMORY if nbytes <= limit else Place.DISK)


@dataclass(frozen=True)
class Phase:
    """A part of a command: what it holds at once, and about how long it takes, in seconds."""

    name: str
    held: tuple[Held, ...]
    seconds: float


@dataclass(frozen=True)
class Needs:
    """All phases, one after the other, on a device such as `cuda`, and what to say of it all."""

    device: str
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """About how long all of it takes."""
        return sum(phase.seconds for phase in self.phases)

    def place(self, held: Held) -> str:
        """Where it is; on the device by its name."""
        if held.place is Place.DISK:
            return str(held.place)
        here = held.place is Place.DEVICE or shares_memory(self.device)
        return self.device if here else str(held.place)

    def peaks(self) -> dict[str, int]:
        """The most bytes held at once, by place."""
        found: dict[str, int] = {}
        for phase in self.phases:
            here: dict[str, int] = {}
            for held in phase.held:
                here[self.place(held)] = here.get(self.place(held), 0) + held.nbytes
            for place, nbytes in here.items():
                found[place] = max(nbytes, found.get(place, 0))
        return found

    def lacking(self, free: Mapping[str, int]) -> Sequence[str]:
        """The places in which there is less room than the peak."""
        return [p for p, nbytes in self.peaks().items() if p in free and nbytes > free[p]]

    def as_json(self, free: Mapping[str, int]) -> dict[str, Any]:
        """All of it, for `--json`; `free` are the bytes that are free by place."""
        return {
            "device": self.device,
            "phases": [
                {
                    "name": phase.name,
                    "seconds": phase.seconds,
                    "held": [
                        {"what": h.what, "bytes": h.nbytes, "place": self.place(h)}
                        for h in phase.held
                    ],
                }
                for phase in self.phases
            ],
            "peak": self.peaks(),
            "free": dict(free),
            "fits": not self.lacking(free),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
