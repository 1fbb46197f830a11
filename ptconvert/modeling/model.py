"""The transformers model: embeddings, a schedule over layers, final norm and lm_head.

One implementation for all families; the classes at the end bind it to each family's config.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from ptconvert.checkpoint.section import MODELING_FILE, read_section
from ptconvert.modeling.config import CONFIGS
from ptconvert.modeling.executor import (
    Communicator,
    OneProcess,
    PerTrack,
    RunSublayer,
    TorchEngine,
    Update,
    run_program,
)
from ptconvert.modeling.layers import Placement, TrackedLayer, dense_layer, family_class, run_layer
from ptconvert.models.families import FAMILIES, Family
from ptconvert.schedule.stages import Sublayer

logger = logging.get_logger(__name__)
WHOLE = Placement()
_NO_STATES = "tracks have no one state per layer"
_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def layer_types(config: Any) -> list[str]:
    """What each layer attends to: full_attention or sliding_attention."""
    # Only what the family's config class has counts: any key of a config.json becomes an attribute.
    family = type(config)
    if hasattr(family, "layer_types"):
        return list(config.layer_types)
    windowed = hasattr(family, "sliding_window") and config.sliding_window is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


class PTConvertPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers wants to know about all models of this package."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DenseLayer", "TrackedLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with the modelling file beside it, so that the result opens as this
        one did with trust_remote_code."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            text = modeling_source()
            Path(save_directory, MODELING_FILE).write_text(text, encoding="utf-8")


class PTConvertModel(PTConvertPreTrainedModel):
    """The decoder without lm_head: all its tracks, or those of one rank.

    A rank's model gets the communicator that sums over ranks; `entered` is called with each
    stage's index when it begins, for whoever wants to know where a forward pass stands. A forward
    pass of `inputs_embeds` begins at stage `first_stage`, before which nothing may be outstanding,
    and any ends before `stop_stage`, likewise.
    """

    def __init__(
        self,
        config: Any,
        placement: Placement = WHOLE,
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(config)
        self.communicator = OneProcess() if communicator is None else communicator
        self.entered: Callable[[int], object] | None = None
        self.first_stage = 0
        self.stop_stage: int | None = None
        section = read_section(vars(config))
        self.schedule = section.schedule
        self.track_count = section.tracks
        self.waiting_weight = section.waiting_weight
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        tracked = self.schedule.track_layers
        self._cache_layer_of = list(range(config.num_hidden_layers))
        layers: list[nn.Module] = []
        self._local_tracks = [1] * config.num_hidden_layers  # 1 for a layer held dense, too
        for index in range(config.num_hidden_layers):
            if index in tracked:
                local = placement.local_tracks(self.track_count)
                places = self._cache_indices(index, local)
                self._local_tracks[index] = len(local)
                guesses = {s.kind: r for s, r in section.guesses.items() if s.layer == index}
                layers.append(
                    TrackedLayer(config, index, self.track_count, places, guesses, section.assigned)
                )
            else:
                layers.append(dense_layer(config, index, placement))
        self.layers = nn.ModuleList(layers)
        self.norm = family_class(config, "RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family_class(config, "RotaryEmbedding")(config=config)
        self._layer_types = layer_types(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _cache_indices(self, layer: int, tracks: range) -> dict[int, int]:
        """Places in the KV cache for a layer's tracks: the layer's own, and new ones at the end."""
        first = len(self._cache_layer_of)
        self._cache_layer_of += [layer] * (len(tracks) - 1)
        return dict(zip(tracks, [layer, *range(first, len(self._cache_layer_of))], strict=True))

    def _grow(self, cache: Cache) -> None:
        """Gives a new cache one entry per track, of the kind that transformers chose per layer.

        Raises ValueError for one that holds keys and values of whole layers.
        """
        layers = getattr(cache, "layers", [])
        if 0 < len(layers) < len(self._cache_layer_of):
            if cache.get_seq_length():
                raise ValueError(
                    f"the KV cache is filled for {len(layers)} layers, but tracks have a cache "
                    f"each, {len(self._cache_layer_of)} in all; instead of prefix tuning, which "
                    "fills it so, use prompt tuning or LoRA"
                )
            for layer in self._cache_layer_of[len(layers) :]:
                layers.append(copy.deepcopy(layers[layer]))

    def _masks(
        self,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        stream_BSD: torch.Tensor,
        cache: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The attention mask of each kind of layer; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            name: _MASKS[name](
                config=self.config,
                inputs_embeds=stream_BSD,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
            for name in set(self._layer_types)
        }

    def runner(
        self,
        stream_BSD: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> RunSublayer:
        """What runs one sublayer on streams shaped as `stream_BSD`, for the executor."""
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(stream_BSD.shape[1], device=stream_BSD.device) + seen
            position_ids = position_ids.unsqueeze(0)
        masks = self._masks(attention_mask, stream_BSD, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(stream_BSD, position_ids)

        def run_sublayer(sublayer: Sublayer, view: PerTrack, guess: bool) -> Update:
            attention = dict(
                kwargs,
                attention_mask=masks[self._layer_types[sublayer.layer]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
            layer, tracks = self.layers[sublayer.layer], self._local_tracks[sublayer.layer]
            return run_layer(layer, tracks, sublayer.kind, view, guess, attention)

        return run_sublayer

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoders: ids or embeddings (BS or BSD) in, last hidden state out.

        Raises ValueError when both or neither are given, and for output_hidden_states and
        output_attentions: with tracks there is no one state per layer. Where only the config asks
        for them, as its source's may, they are left out, and a warning says so.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(flag, None):
                raise ValueError(f"{flag} is not supported: {_NO_STATES}")
            if getattr(self.config, flag, False):
                logger.warning_once(f"{flag} of config.json is left out: {_NO_STATES}")
        stream_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if not use_cache and past_key_values is not None and self.training:
            past_key_values = None
        if past_key_values is not None:
            self._grow(past_key_values)
        run_sublayer = self.runner(
            stream_BSD, attention_mask, position_ids, past_key_values, use_cache, **kwargs
        )
        streams = run_program(
            self.schedule.program[self.first_stage : self.stop_stage],
            stream_BSD,
            TorchEngine(run_sublayer, self.communicator),
            self.waiting_weight,
            self.entered,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(streams.settled()),
            past_key_values=past_key_values if use_cache else None,
        )


class PTConvertForCausalLM(PTConvertPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A converted causal language model; its config's class decides the family."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(
        self,
        config: Any,
        placement: Placement = WHOLE,
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(config)
        self.model = PTConvertModel(config, placement, communicator)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' causal models: logits of shape (B, S, vocabulary), loss for labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )


def modeling_source() -> str:
    """The text of the one-file form of this package's model code."""
    if Path(__file__).name == MODELING_FILE:
        return Path(__file__).read_text(encoding="utf-8")
    text: str = importlib.import_module("ptconvert.modeling.export").modeling_source()
    return text


def _of_family(base: Any, family: Family) -> Any:
    """A model class with the config class of a family; its name says which."""
    suffix = base.__name__.removeprefix("PTConvert")
    members = {
        "__doc__": f"A converted {family.prefix}{suffix}.",
        "__module__": __name__,
        "config_class": CONFIGS[family.model_type],
    }
    return type(f"PTConvert{family.prefix}{suffix}", (base,), members)


BASE_MODELS = {name: _of_family(PTConvertModel, family) for name, family in FAMILIES.items()}
CAUSAL_LMS = {name: _of_family(PTConvertForCausalLM, family) for name, family in FAMILIES.items()}
# by name, for pickle and for a checkpoint's auto_map
globals().update({m.__name__: m for m in (*BASE_MODELS.values(), *CAUSAL_LMS.values())})
