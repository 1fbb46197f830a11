"""What a segment costs by itself, from what it does where it stands.

A segment moves the residual stream by some d from where the dense model has it. To second order
KL(source || moved) is then half of the mean square of d's product with the gradient of the
log-probability of a token that the source samples: the mean of that square is the Fisher
information (Martens, arXiv 1412.1193, section 5). Tokens are taken to be moved one at a time. So a
segment runs for the layer or two after which all of it is merged, not to the end of the model, and
one pass back through the model serves all of them.

Shapes: N windows, T tokens in each, D residual stream width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ptconvert.measure.batch import BatchSize
from ptconvert.measure.divergence import tokens_at_once
from ptconvert.measure.head import Head
from ptconvert.measure.progress import Progress
from ptconvert.plan.segments import Segment, alone
from ptconvert.schedule.schedule import Schedule

_SEED = 0


class Perturbations:
    """The dense model's streams on some windows, and the gradients there.

    `model` holds every layer as tracks, `dense` is what the source runs, `streams` are those
    (N, T, D) that enter some layers, the first among them; they and the gradients are held before
    each `spacing`-th layer.
    `layers_run` counts what was computed: layers times windows, one of a pass back as two.
    """

    def __init__(
        self,
        model: Any,
        dense: Schedule,
        streams: Mapping[int, torch.Tensor],
        spacing: int,
        batch: BatchSize,
        progress: Progress,
    ) -> None:
        self._decoder, self._head = model.get_decoder(), Head(model)
        self._batch, self.layers_run = batch, 0
        self._dense, self.layers = dense, dense.layers
        with torch.no_grad():
            # not as inference tensors, through which nothing can be differentiated
            self._streams = {layer: stream.clone() for layer, stream in streams.items()}
            for layer in (*range(0, self.layers, spacing), self.layers):
                if layer not in self._streams:
                    before = max(kept for kept in self._streams if kept < layer)
                    self._streams[layer] = self._run(self._dense, before, layer)
        self._gradients = self._back(progress)

    def kl(self, segment: Segment) -> float:
        """KL(source || the dense model with this segment), nats per token, to second order."""
        schedule = alone(segment, self.layers)
        begin = max(layer for layer in self._streams if layer <= segment.layer)
        merged = min(segment.merged, self.layers)
        end = min(layer for layer in self._streams if layer >= merged)
        with torch.inference_mode():
            # in fp32: squares of small numbers vanish in 16 bits, and those of large ones overflow
            moved_NTD = self._run(schedule, begin, end).float() - self._streams[end].float()
            products_NT = (moved_NTD * self._gradients[end].float()).sum(-1)
        return 0.5 * float(products_NT.square().mean())

    def _run(self, schedule: Schedule, begin: int, end: int) -> torch.Tensor:
        """The stream (N, T, D) that a schedule gives before layer `end`, from that before `begin`,
        both of which are the dense model's boundaries: all before them is merged."""
        stream_NTD = self._streams[begin]
        stages = _stages(schedule, begin, end)
        parts, device = list[torch.Tensor](), self._decoder.device
        while (done := sum(map(len, parts))) < len(stream_NTD):

            def run(size: int, done: int = done) -> torch.Tensor:
                return self._layers(schedule, stages, stream_NTD[done : done + size].to(device))

            parts.append(self._batch.fitting(run).cpu())
        self.layers_run += (end - begin) * len(stream_NTD)
        return torch.cat(parts)

    def _layers(self, schedule: Schedule, stages: range, stream_BTD: torch.Tensor) -> torch.Tensor:
        ended_BTD: torch.Tensor = self._decoder.run_stages(schedule, stages, stream_BTD)
        return ended_BTD

    def _back(self, progress: Progress) -> dict[int, torch.Tensor]:
        """The gradients (N, T, D) of the summed log-probability of sampled tokens, by the layer
        before which the stream is held. From one such to the one before, so that activations of the
        layers between are held and no others."""
        kept = sorted(self._streams)
        found = {layer: torch.empty_like(self._streams[layer]) for layer in kept}
        done, windows = 0, len(found[self.layers])
        batch = BatchSize(min(windows, self._batch.size), "cpu")  # what fits here is less
        while done < windows:
            progress("sensitivities: the way back", done, windows)

            def run(size: int, done: int = done) -> int:
                rows = slice(done, done + size)
                gradient_BTD = self._of_head(rows)
                found[self.layers][rows] = gradient_BTD.cpu()
                for begin, end in zip(reversed(kept[:-1]), reversed(kept[1:]), strict=True):
                    stream_BTD = self._streams[begin][rows].to(gradient_BTD.device)
                    stream_BTD.requires_grad_()
                    stages = _stages(self._dense, begin, end)
                    ended_BTD = self._layers(self._dense, stages, stream_BTD)
                    (gradient_BTD,) = torch.autograd.grad(ended_BTD, stream_BTD, gradient_BTD)
                    found[begin][rows] = gradient_BTD.cpu()
                return len(gradient_BTD)

            done += batch.fitting(run)
        self.layers_run += 3 * self.layers * windows
        return found

    def _of_head(self, rows: slice) -> torch.Tensor:
        """The gradient (B, T, D) at the last layer's end: of final norm and output head, which
        take each token by itself, so that few logits are held."""
        stream_BTD = self._streams[self.layers][rows]
        found_PD = torch.empty_like(stream_BTD).flatten(0, 1).to(self._decoder.device)
        at_once = tokens_at_once(self._head.weight.shape[0])
        window = stream_BTD.shape[1]
        for number, stream_TD in enumerate(stream_BTD, rows.start):
            generator = torch.Generator(found_PD.device).manual_seed(_SEED + number)
            for first in range(0, window, at_once):
                part_PD = stream_TD[first : first + at_once].to(found_PD.device).requires_grad_()
                logp_PV = self._head(self._decoder.finish(part_PD[None])[0]).float().log_softmax(-1)
                token_P1 = torch.multinomial(logp_PV.detach().exp(), 1, generator=generator)
                (gradient_PD,) = torch.autograd.grad(logp_PV.gather(-1, token_P1).sum(), part_PD)
                at = (number - rows.start) * window + first
                found_PD[at : at + len(gradient_PD)] = gradient_PD
        return found_PD.view_as(stream_BTD)


def _stages(schedule: Schedule, begin: int, end: int) -> range:
    """The stages that run the layers [begin, end), before which just those before them have run."""
    return range(schedule.ran.index(2 * begin), schedule.ran.index(2 * end))
