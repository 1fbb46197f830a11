"""The transform: a plan as pure data, and its execution as a streamed rewrite.

plan_conversion(checkpoint, spec) -> Plan     dense to converted
plan_to_dense(checkpoint) -> Plan             and back, bit for bit
execute(plan, destination) -> None
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.atomic import check_apart, check_destination, new_directory
from ptconvert.checkpoint.calibration import Calibration, order_values, read_orders
from ptconvert.checkpoint.card import model_card
from ptconvert.checkpoint.compensations import added_tensors, figures, most
from ptconvert.checkpoint.config import (
    as_json,
    carried_files,
    converted_config,
    index_text,
    ladder_layers_key,
)
from ptconvert.checkpoint.files import INDEX
from ptconvert.checkpoint.inventory import (
    check_tensors,
    overruled,
    part_dtype,
    under_own_names,
    weights_dtype,
)
from ptconvert.checkpoint.layout import SHARED, DenseTensor, Part, dense_tensors, place, track_stem
from ptconvert.checkpoint.quantised import (
    as_stored,
    check_undoable,
    check_values,
    converted_quantization,
    with_quantised,
)
from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, same_bytes
from ptconvert.checkpoint.section import (
    MODELING_FILE,
    SECTION,
    SPEC_FILE,
    read_section,
    source_config,
    with_digest,
)
from ptconvert.checkpoint.writer import (
    Digests,
    Move,
    Target,
    copy_moves,
    lay_out,
    length,
    write_arrays,
)
from ptconvert.errors import CheckpointError, ConfigError, SpecError
from ptconvert.modeling.export import modeling_source
from ptconvert.models.shape import ModelShape, is_tied, rows
from ptconvert.models.wrappers import TIED
from ptconvert.schedule.schedule import Counts, Schedule
from ptconvert.schedule.theirs import key_of
from ptconvert.spec.document import Spec, parse_spec

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Replica:
    """A source tensor that must hold what another does: the whole of it, or `length` rows from row
    `here`, which are that one's from row `there`."""

    original: str
    copy: str
    rows: tuple[int, int, int] | None = None  # there, here, length

    def differs(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Whether it doesn't."""
        one, other = tensors[self.original], tensors[self.copy]
        if self.rows is not None:
            there, here, length = self.rows
            one, other = one.of_rows(there, length), other.of_rows(here, length)
        return not same_bytes(one, other)


@dataclass(frozen=True)
class Plan:
    """Everything that an execution does: which tensor parts go where, and the files beside them.

    `config` is the result's config.json, less what is known only when all is written. `converted`
    are the tensors of the converted checkpoint that hold the source's and what is around it, in
    order, and `digest` what they must have (going to dense). `replicas` of one must hold the same
    (likewise).
    `computed` are tensors of the result that come from no source tensor: of quantised weights what
    says how large they are, and what the compensations of these values need.
    A plan is `complete` unless it lacks what its spec wants to be computed from a text.
    """

    source: Checkpoint
    shape: ModelShape
    schedule: Schedule
    tracks: int
    targets: tuple[Target, ...]
    moves: tuple[Move, ...]
    config: Mapping[str, object]
    texts: Mapping[str, str]
    carried: tuple[Path, ...]
    converted: tuple[str, ...]
    to_dense: bool = False
    digest: object = None
    replicas: tuple[Replica, ...] = ()
    computed: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    compensations: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(t.nbytes for t in self.targets)

    @property
    def needed_bytes(self) -> int:
        """Bytes of disk that the result takes, tensors and the files beside them."""
        texts = sum(len(t.encode()) for t in (as_json(self.config), *self.texts.values()))
        headers = 256 * len(self.targets)
        return self.nbytes + texts + headers + sum(p.stat().st_size for p in self.carried)

    def summary(self) -> dict[str, Any]:
        """The plan in figures, as `--json` prints it."""
        tracked = sorted(self.schedule.track_layers)
        before = self.shape.dense.counts
        after = self.schedule.counts
        if self.to_dense:
            before, after = after, before
        per_file: dict[str, int] = {}
        for target in self.targets:
            per_file[target.file] = per_file.get(target.file, 0) + target.nbytes
        return {
            "model_type": self.shape.model_type,
            "tracks": self.tracks,
            "schedule": str(self.schedule),
            "layers": self.shape.layers,
            "layers_as_tracks": tracked,
            "tensors_in": len(self.source.tensors),
            "tensors_out": len(self.targets),
            "mtp_tensors": sum(t.name.startswith(self.shape.mtp) for t in self.targets),
            "bytes_in": self.source.nbytes,
            "bytes_out": self.nbytes,
            "files": per_file,
            "all_reduces": _counts(before, after, "all_reduces"),
            "waited_for": _counts(before, after, "waited_for"),
            "bytes_per_token_per_all_reduce": self.shape.bytes_per_token,
            "bytes_per_token": self.shape.bytes_all_reduced(self.schedule),
            "bytes_needed": self.needed_bytes,
            **figures(self.shape, self.tracks, self.compensations),
        }


def _counts(before: Counts, after: Counts, name: str) -> dict[str, int]:
    return {"before": getattr(before, name), "after": getattr(after, name)}


def plan_conversion(
    checkpoint: Checkpoint,
    spec: Spec | None,
    *,
    source_name: str,
    name: str = "DST",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    ladder_layers_config: bool = False,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan that converts a dense checkpoint by a spec.

    Without a spec the checkpoint must be of others' format whose config.json says its schedule
    (`schedule.theirs`). `name` is what the model card calls the result: its directory or
    repository. `ladder_layers_config` writes the Ladder authors' key beside ours. `calibration` is
    what the spec wants to be computed from a text; without it the plan has the largest sizes that
    it can come to, and can't be executed.
    Raises PTConvertError, one line or one per fault of the spec, before anything is written.
    """
    where = str(checkpoint.path / "config.json")
    shape = ModelShape.from_config(checkpoint.config, where).stored_as(checkpoint.tensors)
    checkpoint = under_own_names(checkpoint, shape)
    replaced = overruled(checkpoint)
    shape = replace(shape, tied=is_tied({**checkpoint.config, **replaced}, where))
    spec = _spec_for(checkpoint, shape, spec)
    spec.check(shape)
    schedule = spec.schedule(shape.family.parallel, shape.divisible)
    shape = with_quantised(shape, checkpoint).shared_by(spec.tracks)
    if reason := shape.misaligned(spec.tracks, schedule.track_layers):
        raise SpecError([f"{spec.name}:{spec.lines['tracks']}: {reason}"])
    check_undoable(shape, checkpoint, spec.tracks, schedule.track_layers)
    known = calibration or Calibration()
    known = replace(known, values={**most(shape, schedule, spec), **known.values})
    tensors = list(dense_tensors(shape, schedule, spec.tracks, known.assignments))
    quantised = {t.name for t in tensors if t.quantised}
    extras = check_tensors(checkpoint, {t.name: t.shape for t in tensors}, shape, quantised)
    targets, moves = list[Target](), list[Move]()
    told: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        entry = checkpoint.tensors[tensor.name]
        check_values(entry, tensor.values)
        for part in tensor.parts:
            stem = SHARED if part.track is None else track_stem(part.track, spec.tracks)
            targets.append(Target(part.name, stem, entry.dtype, tensor.part_shape(part)))
            if part.values is not None:
                told[part.name] = as_stored(part.values, entry.dtype)
                continue
            put = range(length(part.indices))
            moves.append(Move(tensor.name, part.name, part.axis, part.indices, put))
    # After the weights: where a config names no dtype, the first tensor of all says it.
    _copy(extras, SHARED, targets, moves)
    dtype = weights_dtype(checkpoint, shape)
    added = added_tensors(shape, schedule, spec.tracks, known.values)
    for one in added:
        stem = SHARED if one.track is None else track_stem(one.track, spec.tracks)
        targets.append(Target(one.name, stem, one.dtype or dtype, one.shape))
    arrays: dict[str, NDArray[Any]] = order_values(shape, schedule, known) | dict(known.tensors)
    missing = [one.name for one in added if one.name not in arrays]
    placed = place(targets, shard_bytes)
    replaced |= converted_quantization(checkpoint.config, shape, spec.tracks, schedule.track_layers)
    config = converted_config(
        checkpoint.config, spec, schedule, source_name, known, replaced, shape.together
    )
    if ladder_layers_config:
        config["ladder_layers"] = ladder_layers_key(spec, schedule)
    texts = {
        INDEX: index_text(placed),
        SPEC_FILE: spec.text,
        MODELING_FILE: modeling_source(),
        "README.md": model_card(
            checkpoint.path, source_name, name, spec, schedule, shape, known.values
        ),
    }
    return Plan(
        source=checkpoint,
        shape=shape,
        schedule=schedule,
        tracks=spec.tracks,
        targets=placed,
        moves=tuple(moves),
        config=config,
        texts=texts,
        carried=carried_files(checkpoint.path, texts),
        converted=(*(part.name for t in tensors for part in t.parts), *_around(extras, shape)),
        computed=told | {one.name: arrays[one.name] for one in added if one.name in arrays},
        compensations=known.values,
        complete=not spec.needs_text or (calibration is not None and not missing),
    )


def plan_to_dense(checkpoint: Checkpoint, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan that undoes a conversion. Raises PTConvertError."""
    where = str(checkpoint.path / "config.json")
    if SECTION not in checkpoint.config:
        raise ConfigError(f"{where} has no {SECTION} section; only converted checkpoints have one")
    section = read_section(checkpoint.config, where)
    if section.trained:
        raise ConfigError(f"{where}: healed since the conversion; the source's weights are gone")
    if overruled(checkpoint):
        raise CheckpointError(_changed(checkpoint.path, "lm_head is not the embedding any more"))
    config = source_config(checkpoint.config, section)
    tied = is_tied(checkpoint.config, where)  # not the source's word, where its tensors overrule it
    shape = ModelShape.from_config({**config, TIED: tied}, where).stored_as(checkpoint.tensors)
    if reason := shape.indivisible(section.tracks):
        raise ConfigError(f"{where}: {reason}")
    tracked = section.schedule.track_layers
    shape = replace(shape, together=section.together)
    shape = with_quantised(shape, checkpoint, section.tracks, tracked)
    assignments = read_orders(checkpoint, shape, section)
    tensors = list(dense_tensors(shape, section.schedule, section.tracks, assignments))
    converted = {part.name: t.part_shape(part) for t in tensors for part in t.parts}
    added = added_tensors(shape, section.schedule, section.tracks, section.compensations)
    converted |= {a.name: a.shape for a in added if a.dtype is None}  # and stay behind
    checked = {a.name: a.shape for a in added if a.dtype is not None}
    quantised = {part.name for t in tensors if t.quantised for part in t.parts}
    extras = check_tensors(checkpoint, converted, shape, quantised, checked)
    targets, moves, replicas = list[Target](), list[Move](), list[Replica]()
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        dtype = part_dtype(checkpoint, tensor)
        targets.append(Target(tensor.name, "model", dtype, tensor.shape))
        if tensor.values is not None:
            arrays[tensor.name] = as_stored(tensor.values, dtype)
            for part in tensor.parts:
                check_values(checkpoint.tensors[part.name], part.values)
            continue
        for part, repeated in _repeated(tensor):
            indices = part.indices
            if sum(same for *_, same in repeated) < (whole := length(indices)):
                take = range(whole)  # what others have too: it is the same
                moves.append(Move(part.name, tensor.name, part.axis, take, indices))
            for original, there, here, same in repeated:
                part_of_it = None if same == whole else (there, here, same)
                assert part_of_it is None or part.axis == 0
                replicas.append(Replica(original.name, part.name, part_of_it))
    _copy(extras, "model", targets, moves)
    placed = place(targets, shard_bytes)
    texts = {INDEX: index_text(placed)} if len({t.file for t in placed}) > 1 else {}
    return Plan(
        source=checkpoint,
        shape=shape,
        schedule=section.schedule,
        tracks=section.tracks,
        targets=placed,
        moves=tuple(moves),
        config=config,
        texts=texts,
        carried=carried_files(checkpoint.path, texts),
        converted=(*(part.name for t in tensors for part in t.parts), *_around(extras, shape)),
        to_dense=True,
        digest=section.tensors_digest,
        replicas=tuple(replicas),
        computed=arrays,
    )


def _around(extras: list[TensorEntry], shape: ModelShape) -> list[str]:
    """The tensors of what is around a model, which the digest is of, too."""
    return sorted(entry.name for entry in extras if entry.name.startswith(shape.around))


def check_converts(plan: Plan) -> None:
    """Raises ConfigError for a conversion that transformers couldn't open, by its source's
    config.json; for whoever plans one and computes much for it, and before anything is written."""
    from ptconvert.modeling.opens import check_opens  # it takes seconds to import

    check_opens(plan.source.config, str(plan.source.path / "config.json"))


def execute(
    plan: Plan,
    destination: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Carries out a plan: `destination` appears whole, or not at all.

    `progress` is called with the bytes written since its last call, from several threads.
    Raises CheckpointError, one line, where files can't be read or written or the disk is full.
    """
    assert plan.complete, "the spec needs a text, and nothing was computed from one"
    check_destination(destination, overwrite)
    check_apart(destination, plan.source.path)
    free = free_bytes(destination)
    if free < plan.needed_bytes:
        raise CheckpointError(_disk_full(plan, destination, free))
    check_replicas(plan)
    if not plan.to_dense:
        check_converts(plan)
    sources, digests = plan.source.tensors, Digests(of_sources=plan.to_dense)
    try:
        with new_directory(destination, overwrite) as directory:
            placed = lay_out(directory, plan.targets)
            copy_moves(sources, placed, plan.moves, progress, digests)
            write_arrays(placed, plan.computed, progress)
            texts = {**plan.texts, "config.json": _config_text(plan, placed, digests)}
            for name, text in texts.items():
                (directory / name).write_text(text, encoding="utf-8")
            for path in plan.carried:
                target = directory / path.relative_to(plan.source.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(_disk_full(plan, destination, free)) from None
        raise CheckpointError(f"{error.filename or destination}: {error.strerror}") from None


def tensors_digest(plan: Plan, entries: Mapping[str, TensorEntry], digests: Digests) -> str:
    """One digest of a converted checkpoint's tensors that hold the source's: the SHA-256 of their
    SHA-256, in the order of the source's tensors and within each in that of its parts."""
    same = {r.copy: r.original for r in plan.replicas if r.rows is None}  # all bytes compared
    whole = hashlib.sha256()
    for name in plan.converted:
        whole.update(digests.of(entries[same.get(name, name)]))
    return f"sha256:{whole.hexdigest()}"


def _config_text(plan: Plan, placed: Mapping[str, TensorEntry], digests: Digests) -> str:
    """config.json of what was written; on the way back, once the tensors were found unchanged."""
    if plan.to_dense:
        check_digest(plan, digests)
        return as_json(plan.config)
    return as_json(with_digest(plan.config, tensors_digest(plan, placed, digests)))


def check_unchanged(plan: Plan) -> None:
    """Raises CheckpointError where the tensors of a converted checkpoint are not the source's any
    more (going to dense). Reads them all."""
    check_replicas(plan)
    check_digest(plan, Digests(of_sources=True))


def check_digest(plan: Plan, digests: Digests) -> None:
    """Raises CheckpointError where the tensors aren't those that the conversion wrote. Checkpoints
    of versions that kept no digest pass."""
    entries = plan.source.tensors
    if plan.digest is not None and tensors_digest(plan, entries, digests) != plan.digest:
        raise CheckpointError(_changed(plan.source.path, "trained, or saved in another type"))


def _changed(path: Path, how: str) -> str:
    return (
        f"{path}: the weights changed since the conversion ({how}), so they are not the source's; "
        "use the source itself"
    )


def check_replicas(plan: Plan) -> None:
    """Raises CheckpointError where copies that must become one tensor differ (going to dense)."""
    for replica in plan.replicas:
        if replica.differs(plan.source.tensors):
            raise CheckpointError(
                f"{replica.copy} differs from {replica.original}: the tracks were trained since "
                "the conversion, and no dense tensor can hold both"
            )


def free_bytes(destination: Path) -> int:
    """Bytes free where `destination` would be written."""
    return shutil.disk_usage(destination.resolve().parent).free


def _disk_full(plan: Plan, destination: Path, free: int) -> str:
    return (
        f"{destination}: the disk is full: {plan.needed_bytes} bytes are needed and {free} were "
        "free at the start; nothing was written"
    )


def _spec_for(checkpoint: Checkpoint, shape: ModelShape, spec: Spec | None) -> Spec:
    """The spec given, or the one that a checkpoint implies whose config.json says a schedule."""
    theirs = key_of(checkpoint.config)
    if spec is not None and theirs is not None:
        raise SpecError(
            [
                f"{spec.name}:1: the source runs a schedule already ({theirs} in its config.json); "
                "leave --spec out to keep it"
            ]
        )
    if spec is not None:
        return spec
    if theirs is None:
        raise SpecError(["a spec is needed: --spec FILE"])
    schedule = read_section(checkpoint.config).schedule
    tracks = max(n for n in range(1, 9) if shape.indivisible(n) is None)
    text = (
        f"# The schedule that {theirs} in the source's config.json stands for.\n"
        f"format: 1\ntracks: {tracks}\nschedule:\n"
        f'  - layers: 0-{shape.layers - 1}\n    stages: "{schedule}"\n'
    )
    return parse_spec(text, SPEC_FILE)


def _copy(extras: list[TensorEntry], stem: str, targets: list[Target], moves: list[Move]) -> None:
    """Adds what copies tensors as they are."""
    for extra in extras:
        every = range(rows(extra.shape))
        targets.append(Target(extra.name, stem, extra.dtype, extra.shape))
        moves.append(Move(extra.name, extra.name, 0, every, every))


def _repeated(tensor: DenseTensor) -> Iterator[tuple[Part, list[tuple[Part, int, int, int]]]]:
    """Each part, with its pieces that an earlier one has too: that part, where the piece begins
    there and here, and its length. All others share the axis."""
    first: dict[object, tuple[Part, int]] = {}
    pieces = [piece for part in tensor.parts for piece in part.pieces]
    groups = max(len(np.atleast_2d(piece)) for piece in pieces)
    covered = np.zeros((groups, rows(tensor.shape[tensor.parts[0].axis :])), np.int32)
    for part in tensor.parts:
        repeated, begin = [], 0
        for piece in part.pieces:
            key = piece if isinstance(piece, range) else piece.tobytes()
            original, there = first.setdefault(key, (part, begin))
            if original is part:
                covered[np.arange(groups)[:, None], np.atleast_2d(piece)] += 1
            else:
                repeated.append((original, there, begin, length(piece)))
            begin += length(piece)
        yield part, repeated
    assert (covered == 1).all(), f"{tensor.name}: parts leave a gap or overlap"
