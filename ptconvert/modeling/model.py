"""The transformers model: embeddings, a schedule over layers, final norm and lm_head.

One implementation for all families, and for what has one inside; the classes at the end bind it to
each config.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from ptconvert.checkpoint.section import (
    ADAPTER_FOLDER,
    MODELING_FILE,
    SECTION,
    Section,
    read_section,
)
from ptconvert.modeling.config import CONFIGS
from ptconvert.modeling.executor import (
    Communicator,
    OneProcess,
    PerTrack,
    RunSublayer,
    Streams,
    TorchEngine,
    Update,
    run_program,
)
from ptconvert.modeling.layers import (
    Context,
    Placement,
    TrackedLayer,
    dense_layer,
    family_of,
    modeling_module,
    norm_after,
    run_layer,
)
from ptconvert.models.families import FAMILIES, own_name
from ptconvert.models.wrappers import WRAPPERS
from ptconvert.schedule.lower import Step
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

logger = logging.get_logger(__name__)
WHOLE = Placement()
_CUTS = ("tp_plan", "tp_size", "ep_size", "pp_size")  # of transformers' DistributedConfig
_NO_STATES = "tracks have no one state per layer"


class Layers(nn.ModuleList):
    """The layers of a scheduled model, all their tracks or those of one rank, and what runs them.

    A family's forward goes through its layers by a loop or a slice. During a forward pass what it
    gets that way are the turns of `one_pass`; else, and by index, the layers are themselves.

    `communicator` sums over ranks; `entered` is called with each stage's index when it begins, for
    whoever wants to know where a forward pass stands. With a `first_stage` a forward pass begins
    there, where nothing may be outstanding; its `inputs_embeds` are the stream at that stage.
    """

    def __init__(
        self,
        config: Any,
        section: Section,
        placement: Placement,
        communicator: Communicator | None,
    ) -> None:
        super().__init__()
        self.communicator = OneProcess() if communicator is None else communicator
        self.entered: Callable[[int], object] | None = None
        self.first_stage: int | None = None
        self.schedule, self.dense = section.schedule, section.dense
        self.track_count = section.tracks
        self.waiting_weight = section.waiting_weight
        self.family = family_of(config)
        self.one_pass: Pass | None = None
        self.hands_over = False  # a pass by `_HandedOver` instead of running it
        self.local_tracks = [1] * config.num_hidden_layers  # 1 for a layer held dense, too
        self._cache_layer_of = list(range(config.num_hidden_layers))
        for index in range(config.num_hidden_layers):
            if index in self.schedule.track_layers:
                local = placement.local_tracks(self.track_count)
                places, self.local_tracks[index] = self._cache_indices(index, local), len(local)
                guesses = {s.kind: r for s, r in section.guesses.items() if s.layer == index}
                scales = {s.kind: c for s, c in section.scales.items() if s.layer == index}
                wanted = (guesses, scales, section.assigned, section.together)
                self.append(TrackedLayer(config, index, self.track_count, places, *wanted))
            else:
                self.append(dense_layer(config, index, placement, section.together))

    @property
    def norms_sums(self) -> bool:
        """Whether what sublayers give is normed before it joins the stream (post-norm)."""
        first: Any = next(self.children())
        block = self.family.block_of(Kind.MLP, first.template)
        return norm_after(getattr(first, "common", first), block) is not None

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.one_pass is None else iter(self.one_pass.turns())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice) and self.one_pass is not None:
            return self.one_pass.turns()[index]
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return super().__getitem__(index)

    def _cache_indices(self, layer: int, tracks: range) -> dict[int, int]:
        """Places in the KV cache for a layer's tracks: the layer's own, and new ones at the end."""
        first = len(self._cache_layer_of)
        self._cache_layer_of += [layer] * (len(tracks) - 1)
        return dict(zip(tracks, [layer, *range(first, len(self._cache_layer_of))], strict=True))

    def grow(self, cache: Cache | None) -> None:
        """Gives a new cache one entry per track, of the kind that transformers chose per layer.

        Raises ValueError for one that holds keys and values of whole layers.
        """
        layers = getattr(cache, "layers", [])
        if cache is not None and 0 < len(layers) < len(self._cache_layer_of):
            if cache.get_seq_length():
                raise ValueError(
                    f"the KV cache is filled for {len(layers)} layers, but tracks have a cache "
                    f"each, {len(self._cache_layer_of)} in all; instead of prefix tuning, which "
                    "fills it so, use prompt tuning or LoRA"
                )
            for layer in self._cache_layer_of[len(layers) :]:
                layers.append(_copied(layers[layer]))

    def run(
        self, program: tuple[Step, ...], streams: Streams, run_sublayer: RunSublayer
    ) -> torch.Tensor:
        """The merged stream (BSD) after some steps, from the streams before them, which go on."""
        engine = TorchEngine(run_sublayer, self.communicator)
        run_program(program, streams, engine, self.waiting_weight, self.entered, self.scalar)
        return streams.settled()

    def scalar(self, index: int) -> torch.Tensor | None:
        """What the stream is multiplied by after a layer; None where it isn't."""
        if self.family.scalar is None:
            return None
        layer: Any = self[index]
        scalar: torch.Tensor = getattr(getattr(layer, "common", layer), self.family.scalar)
        return scalar


def _copied(layer: Any) -> Any:
    """A layer of a cache once more; by hand, as compilers don't copy tensors deeply."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        own = value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        setattr(copied, name, own)
    return copied


class Pass:
    """One forward pass: the family's forward gives each layer's turn the stream and the keywords of
    that layer, and is given what is merged after the stages whose layers all had their turn.

    What it does to that stream between two turns is done to what is merged. `resumed` is the stream
    (BSD) where the program doesn't begin with the embedded tokens.
    """

    def __init__(self, layers: Layers, resumed: torch.Tensor | None = None) -> None:
        self.layers, self._held, self._resumed = layers, list(layers.children()), resumed
        self.entered: torch.Tensor | None = None
        self._contexts: list[Context] = []
        self._streams: Streams | None = None
        self._left: torch.Tensor | None = None  # what the last turn gave
        self._waiting = layers.schedule.program[layers.first_stage or 0 :]

    def turns(self) -> list[Turn]:
        """What takes the layers' places."""
        return [Turn(self, layer.template) for layer in self._held]

    def take(self, stream_BSD: torch.Tensor, context: Context) -> torch.Tensor:
        """A layer's turn."""
        layers, turn = self.layers, len(self._contexts)
        self._contexts.append(context)
        if turn == 0:
            layers.grow(context.get("past_key_values"))
            self.entered = stream_BSD
        if layers.hands_over:
            if turn + 1 == len(self._held):
                raise _HandedOver(self)
            return stream_BSD
        if self._streams is None:
            self._streams = Streams(stream_BSD if self._resumed is None else self._resumed)
        elif stream_BSD is not self._left:
            self._streams.base = stream_BSD
        later = (i for i, step in enumerate(self._waiting) if step.last_layer > turn)
        ready = next(later, len(self._waiting))
        self._left = layers.run(self._waiting[:ready], self._streams, self.run_sublayer)
        self._waiting = self._waiting[ready:]
        return self._left

    def run_sublayer(self, sublayer: Sublayer, view: PerTrack, keep: bool) -> Update:
        """Runs one sublayer, as the executor wants it."""
        index, layers = sublayer.layer, self.layers
        return run_layer(
            self._held[index],
            layers.local_tracks[index],
            layers.family,
            sublayer.kind,
            view,
            keep,
            self._contexts[index],
        )


@dataclass(eq=False)
class Turn:
    """What takes a layer's place in a family's forward, and tells what it asks the layer."""

    one_pass: Pass
    template: Any

    def __call__(self, stream_BSD: torch.Tensor, *others: Any, **context: Any) -> torch.Tensor:
        assert all(other is None for other in others), "a layer has inputs of its own"
        return self.one_pass.take(stream_BSD, context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.template, name)


class Scheduled(PreTrainedModel):  # type: ignore[misc]
    """What a family's classes of transformers become with a schedule, before them among the bases.

    The model's own forward stays, and with it embeddings, masks, positions, final norm and logits.
    Only its decoder layers aren't run one after the other: they are `Layers`.
    """

    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DenseLayer", "TrackedLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {}  # with tracks there is no state per layer
    _tp_plan: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the LoRA that lies beside quantised weights, which takes peft.

        Raises ValueError where a decoder is opened without what is around it, whose modules have
        other names than the adapter's; and where transformers is to cut the model itself.
        """
        distributed = kwargs.get("distributed_config")
        cuts = {name: kwargs.get(name) for name in ("tp_plan", "tp_size")}
        if isinstance(distributed, Mapping):  # both are taken
            distributed = SimpleNamespace(**distributed)
        cuts |= {name: getattr(distributed, name, None) for name in _CUTS if distributed}
        if asked := [name for name, value in cuts.items() if value not in (None, 1, {})]:
            raise ValueError(
                f"{asked[0]}: transformers would cut layers, but each rank has tracks of its own; "
                "serve it in vLLM or SGLang, or leave this out"
            )
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        section: dict[str, Any] = getattr(model.config, SECTION, None) or {}
        if section.get("adapter"):
            if not hasattr(model, "model"):
                raise ValueError(
                    f"{pretrained_model_name_or_path} has a LoRA beside its weights, which is of "
                    "the model with lm_head; open that, and take its get_decoder()"
                )
            options = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            folder: dict[str, Any] = {k: kwargs[k] for k in options if k in kwargs}
            inside = filter(None, (kwargs.get("subfolder"), ADAPTER_FOLDER))
            folder["subfolder"] = "/".join(inside)
            model.load_adapter(pretrained_model_name_or_path, adapter_kwargs=folder)
        return found

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: neither this nor what begins with it, `generate_batch`, is there."""
        raise ValueError(
            "continuous batching: transformers' paged cache has an entry for each layer, and "
            "tracks one each; use generate, or serve it in vLLM or SGLang"
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with the modelling file beside it, so that the result opens as this
        one did with trust_remote_code. Raises ValueError where an adapter lies beside the weights,
        which transformers would write alone."""
        beside: dict[str, Any] = getattr(self.config, SECTION, None) or {}
        if beside.get("adapter") and getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "transformers would save the LoRA beside the quantised weights alone; copy the "
                "checkpoint's directory"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            text = modeling_source()
            Path(save_directory, MODELING_FILE).write_text(text, encoding="utf-8")

    def forwarded(self, theirs: Callable[..., Any], args: tuple[Any, ...], given: Any) -> Any:
        """The family's own forward of these arguments and keywords.

        Raises ValueError where states of layers are asked for. Where only the config asks for them,
        as its source's may, they are left out, and a warning says so.
        """
        for flag in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if given.get(flag):
                raise ValueError(f"{flag} is not supported: {_NO_STATES}")
            if getattr(self.config, flag, False):
                logger.warning_once(f"{flag} of config.json is left out: {_NO_STATES}")
        if "output_router_logits" in inspect.signature(theirs).parameters:
            given["output_router_logits"] = False  # else it goes by the config
        return theirs(self, *args, **given)


class ScheduledModel(Scheduled):
    """The decoder without lm_head."""

    def __init__(
        self,
        config: Any,
        placement: Placement = WHOLE,
        communicator: Communicator | None = None,
    ) -> None:
        with _without_layers(config):
            super().__init__(config)
        give_layers(self, section_of(config), placement, communicator)
        self.post_init()

    def forwarded(self, theirs: Callable[..., Any], args: tuple[Any, ...], given: Any) -> Any:
        resumed = None
        if self.layers.first_stage is not None:
            resumed = given["inputs_embeds"]  # as they are given, without any multiplier
        self.layers.one_pass = Pass(self.layers, resumed)
        try:
            return super().forwarded(theirs, args, given)
        finally:
            self.layers.one_pass = None

    def entry(self, **inputs: Any) -> tuple[torch.Tensor, RunSublayer]:
        """The stream (BSD) that enters the first layer for a forward pass' arguments, and what runs
        one sublayer on streams of its shape, for the executor."""
        first_stage, self.layers.first_stage = self.layers.first_stage, None
        self.layers.hands_over = True
        try:
            self(**{"use_cache": False, **inputs})
        except _HandedOver as handed_over:
            one_pass = handed_over.one_pass
        finally:
            self.layers.hands_over, self.layers.first_stage = False, first_stage
        assert one_pass.entered is not None
        return one_pass.entered, one_pass.run_sublayer

    def run_stages(
        self, schedule: Schedule, stages: range, stream_BSD: torch.Tensor
    ) -> torch.Tensor:
        """The stream (BSD) after some stages of a schedule, from that before them; nothing may be
        outstanding on either side."""
        program, run = schedule.program[stages.start : stages.stop], self.runner(stream_BSD)
        ended_BSD: torch.Tensor = self.layers.run(program, Streams(stream_BSD), run)
        return ended_BSD

    def runner(self, stream_BSD: torch.Tensor, **inputs: Any) -> RunSublayer:
        """What runs one sublayer on streams shaped as `stream_BSD`, for the executor."""
        return self.entry(inputs_embeds=stream_BSD, **inputs)[1]


class ScheduledAround(Scheduled):
    """A model that has a decoder inside: one with lm_head, one that sees pictures too."""

    def __init__(
        self,
        config: Any,
        placement: Placement = WHOLE,
        communicator: Communicator | None = None,
    ) -> None:
        with _without_layers(config.get_text_config(decoder=True)):
            super().__init__(config)
        # transformers' constructor made the family's own decoder, which has all but the layers
        decoder: Any = self.get_decoder()
        decoder.__class__ = BASE_MODELS[family_of(decoder.config).model_type]
        give_layers(decoder, section_of(config), placement, communicator)
        self.post_init()


def give_layers(
    decoder: Any, section: Section, placement: Placement, communicator: Communicator | None
) -> None:
    """Puts the layers into a decoder that was made without any."""
    config = decoder.config
    decoder.layers = Layers(config, section, placement, communicator)
    for name in family_of(config).ends:
        setattr(decoder, name, config.num_hidden_layers)


def section_of(config: Any, where: str = "config.json") -> Section:
    """The conversion that a model's config describes, dense or converted, as `read_section`."""
    text = config.get_text_config(decoder=True)
    own = {"model_type": text.model_type, SECTION: getattr(config, SECTION, None)}
    return read_section({**vars(text), **own}, where)


@contextlib.contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Lets transformers' constructors make a model that has no layers yet."""
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = layers


class _HandedOver(Exception):  # noqa: N818 - no error: it ends a forward pass before its layers run
    """What the layers of a forward pass would have been given is known."""

    def __init__(self, one_pass: Pass) -> None:
        super().__init__()
        self.one_pass = one_pass


def modeling_source() -> str:
    """The text of the one-file form of this package's model code."""
    if Path(__file__).name == MODELING_FILE:
        return Path(__file__).read_text(encoding="utf-8")
    text: str = importlib.import_module("ptconvert.modeling.export").modeling_source()
    return text


def _class(base: Any, model_type: str, theirs: str) -> Any:
    """A model class with the config class of a model type, made of transformers' own."""
    their_class = getattr(importlib.import_module(modeling_module(model_type)), theirs)
    members = {
        "__doc__": f"A converted {theirs}.",
        "__module__": __name__,
        "config_class": CONFIGS[model_type],
        "forward": _forward(their_class),
        "_no_split_modules": [*base._no_split_modules, *_others(their_class)],
    }
    return type(own_name(theirs), (base, their_class), members)


def _others(their_class: Any) -> list[str]:
    """What of a class beside its decoder's layers must lie on one device."""
    names = their_class._no_split_modules or ()
    return [name for name in names if not name.endswith("DecoderLayer")]


def _forward(theirs: Any) -> Any:
    """A class's own forward, with its signature, by which `generate` and the Trainer know what it
    takes."""

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forwarded(theirs.forward, args, kwargs)

    return forward


BASE_MODELS = {
    name: _class(ScheduledModel, name, f.classes["AutoModel"]) for name, f in FAMILIES.items()
}
CAUSAL_LMS = {
    name: _class(ScheduledAround, name, f.classes["AutoModelForCausalLM"])
    for name, f in FAMILIES.items()
    if f.causal_lm
}
# what is around a language model, without lm_head and with it
_WRAPPING, WRAPPED = (
    {name: _class(ScheduledAround, name, w.classes[auto]) for name, w in WRAPPERS.items()}
    for auto in ("AutoModel", "AutoModelForImageTextToText")
)
BASE_MODELS |= _WRAPPING
MODELS = CAUSAL_LMS | WRAPPED  # which give logits
# by name, for pickle and for a checkpoint's auto_map
globals().update({m.__name__: m for m in (*BASE_MODELS.values(), *MODELS.values())})
