"""A checkpoint's tensors against those that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from types import MappingProxyType

from ptconvert.checkpoint.layout import DenseTensor
from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, same_bytes
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.models.families import CARRIED_BUFFERS
from ptconvert.models.quantised import quantization_of
from ptconvert.models.shape import DTYPE_BYTES, ELEMENT_BYTES, HEAD, ModelShape, is_tied
from ptconvert.models.wrappers import OPTIONAL, TIED, embedding_name, opened_by
from ptconvert.shorten import few

_BASE = "model."  # transformers' name of the model without lm_head in the one with it
# What wrappers leave in tensors' names, and which do.
_LEFT_BY = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel, DDP or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "base_model.model": "peft",
    "language_model": "a multimodal model",
}
_WRAPPERS = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _LEFT_BY))})\.")


def under_own_names(checkpoint: Checkpoint, shape: ModelShape) -> Checkpoint:
    """A dense checkpoint, its tensors under the names that transformers' model has for them.

    As transformers does it, names of an older layout are made today's, a missing `model.` is put
    before a name and one too many is taken away (rename_source_key of its core_model_loading.py),
    and an lm_head that is tied to an embedding that isn't stored is the embedding. Raises
    CheckpointError where two tensors have one name.
    """
    expected = {name for name, _ in shape.tensors()} | {HEAD}
    tensors: dict[str, TensorEntry] = {}
    for given, entry in checkpoint.tensors.items():
        name = _own_name(_todays_name(given, shape), expected, shape.around)
        if name in tensors:
            raise CheckpointError(
                f"{checkpoint.path}: {tensors[name].name} and {given} are the same tensor of "
                f"{shape.model_type}; keep the one that is the model's"
            )
        tensors[name] = entry
    if shape.tied and shape.embedding not in tensors and HEAD in tensors:
        tensors[shape.embedding] = tensors.pop(HEAD)
    return replace(checkpoint, tensors={n: replace(e, name=n) for n, e in tensors.items()})


def _todays_name(name: str, shape: ModelShape) -> str:
    for begins, today in shape.wrapper.older.items() if shape.wrapper else ():
        if name.startswith(begins):
            return today + name.removeprefix(begins)
    return name


def _own_name(name: str, expected: set[str], around: tuple[str, ...]) -> str:
    shorter, longer = name.removeprefix(_BASE), _BASE + name
    if shorter != name and shorter in expected:
        return shorter
    return longer if longer in expected or longer.startswith(around) else name


def overruled(checkpoint: Checkpoint) -> dict[str, object]:
    """What of a dense checkpoint's config.json its tensors overrule where transformers opens it: a
    tied lm_head that is stored, and is not the embedding, is not tied."""
    names = HEAD, embedding_name(checkpoint.config.get("model_type"))
    head, embedding = map(checkpoint.tensors.get, names)
    if not is_tied(checkpoint.config) or head is None or embedding is None:
        return {}
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    return {} if same and same_bytes(head, embedding) else {TIED: False}


def weights_dtype(checkpoint: Checkpoint, shape: ModelShape) -> str:
    """The dtype that the model computes in: config.json's, else the one of all its weights.

    Raises ConfigError where neither says one.
    """
    if shape.dtype is not None:
        return shape.dtype
    weights = (
        (t.dtype, name)
        for name, t in checkpoint.tensors.items()
        if t.dtype in DTYPE_BYTES and not name.endswith(CARRIED_BUFFERS)
    )
    names: dict[str, str] = {}
    for dtype, name in weights:
        names.setdefault(dtype, name)
    if len(names) != 1:
        seen = " and ".join(f"{dtype} ({name})" for dtype, name in names.items())
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: it has no dtype, and the weights are "
            f"{seen or 'of none that is known'}; write the one that the model computes in, such "
            'as "dtype": "bfloat16"'
        )
    return next(iter(names))


def part_dtype(checkpoint: Checkpoint, tensor: DenseTensor) -> str:
    """The dtype of a dense tensor's parts. Raises CheckpointError where they differ."""
    first, *others = (checkpoint.tensors[part.name] for part in tensor.parts)
    for other in others:
        if other.dtype != first.dtype:
            raise CheckpointError(
                f"{checkpoint.path}: {first.name} is {first.dtype} and {other.name} is "
                f"{other.dtype}; parts of one dense tensor must be of one dtype"
            )
    return first.dtype


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    shape: ModelShape,
    quantised: Set[str] = frozenset(),
    orders: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[TensorEntry]:
    """The tensors to carry along as they are, beside the expected ones. Of these the `quantised`
    may be of any dtype; `orders` were checked.

    Raises CheckpointError for tensors missing, unexpected, or of another shape than config.json
    says, or of a dtype that can't be converted.
    """
    others = {n: t for n, t in checkpoint.tensors.items() if n not in expected and n not in orders}
    extras = [entry for entry in others.values() if _is_extra(entry, shape)]
    faults = list(_faults(checkpoint, expected, quantised))
    for begin in shape.wrapper.around if shape.wrapper else ():
        if begin not in OPTIONAL and not any(e.name.startswith(begin) for e in extras):
            faults.append(f"{begin}* is missing")
    if faults == [f"{HEAD} is missing"]:
        faults = [f'{faults[0]}; if it is the embedding, write "tie_word_embeddings": true there']
    unknown = sorted(others.keys() - {e.name for e in extras})
    if faults and (prefixed := _prefixed(checkpoint, expected, unknown, shape)):
        raise CheckpointError(f"{checkpoint.path}: {prefixed}")
    advice = ""
    if quantization_of(checkpoint.config) is not None:
        advice = "; of quantised weights only docs/quantised.md's are known"
    elif unknown and not faults:
        advice = (
            "; transformers leaves out what it doesn't know, so open the model with "
            f"{opened_by(shape.model_type)}, save_pretrained it, and convert that"
        )
    faults += [f"{name} is not a tensor of {shape.model_type}" for name in unknown]
    if faults:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those that config.json describes: "
            f"{few(faults, joint='; ')}{advice}"
        )
    return extras


def _is_extra(entry: TensorEntry, shape: ModelShape) -> bool:
    """Whether a tensor beside the expected ones is harmless: of what is around the model, a tied
    copy, or an old buffer."""
    if entry.name.startswith(shape.around):
        return True
    tied = entry.name == HEAD and shape.tied and entry.shape == (shape.vocabulary, shape.width)
    buffer = entry.name.endswith(CARRIED_BUFFERS) and entry.nbytes > 0 and entry.shape != ()
    return (tied or buffer) and entry.dtype in DTYPE_BYTES


def _faults(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], quantised: Set[str]
) -> Iterator[str]:
    for name, size in expected.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            yield f"{name} is missing"
        elif entry.shape != size:
            yield f"{name} has shape {list(entry.shape)}, not {list(size)}"
        elif entry.dtype not in (ELEMENT_BYTES if name in quantised else DTYPE_BYTES):
            yield f"{name} is {entry.dtype}, not {' or '.join(DTYPE_BYTES)}"


def _prefixed(
    checkpoint: Checkpoint,
    expected: Mapping[str, object],
    unknown: list[str],
    shape: ModelShape,
) -> str | None:
    """What to say where tensors are there, but under names that transformers doesn't know."""
    missing = [name for name in expected if name not in checkpoint.tensors]
    tails = {tail: name for name in missing for tail in (name, name.removeprefix(_BASE))}
    unwrapped = {_WRAPPERS.sub("", name): name for name in reversed(unknown)}
    ends: dict[str, str] = {}
    for one in reversed(unknown):
        parts = one.split(".")
        ends |= {".".join(parts[i:]): one for i in range(1, len(parts))}
    for tail, wanted in tails.items():
        name = unwrapped.get(tail) or ends.get(tail)
        if name is None:
            continue
        own = () if shape.wrapper is None else ("language_model",)
        wrappers = [w for w in dict.fromkeys(_WRAPPERS.findall(name)) if w not in own]
        found = "".join(f"{w}." for w in wrappers) or name.removesuffix(tail)
        left = " and ".join(_LEFT_BY[wrapper] for wrapper in wrappers)
        return (
            f"{name} is there, but not {wanted}: the names "
            f"{'begin with' if name.startswith(found) else 'have'} {found}"
            f"{f', which {left} leaves' if left else ''}, and transformers knows none of them; "
            "rename them without it (load_file and save_file of safetensors.torch) and convert that"
        )
    return None
