"""Writes the ready specs for fewer ranks: the same schedules, with as many tracks as ranks.

    python examples/specs.py        # specs/NAME-4-ranks.yaml and specs/NAME-2-ranks.yaml

Each of `specs` that holds layers as tracks is for as many ranks as it has tracks. On fewer ranks
each would run several tracks one after another, so there the number of tracks has to be another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ptconvert.spec.document import read_spec

SPECS = Path(__file__).parents[1] / "specs"
RANKS = (4, 2)
SUFFIX = re.compile(r"-\d+-ranks$")
TITLE = re.compile(r"^(# [^:\n]*):", re.MULTILINE)
TRACKS = re.compile(r"^(tracks: )\d+( +).*$", re.MULTILINE)


def variants() -> Iterator[tuple[Path, str]]:
    """File and text of each ready spec for fewer ranks than its model's own."""
    for path in sorted(SPECS.glob("*.yaml")):
        spec = read_spec(path)
        if SUFFIX.search(path.stem) or not spec.schedule().track_layers:
            continue
        for ranks in RANKS:
            if ranks < spec.tracks:
                text = TITLE.sub(rf"\1, for {ranks} ranks:", spec.text, count=1)
                text = TRACKS.sub(rf"\g<1>{ranks}\g<2># one for each of {ranks} GPUs", text)
                yield path.with_stem(f"{path.stem}-{ranks}-ranks"), text


if __name__ == "__main__":
    for file, text in variants():
        file.write_text(text, encoding="utf-8")
