"""What peft and transformers' other classes do with a converted model: as with the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import Convert, MakeDense, load

IDS = torch.tensor([[3, 4, 5, 6, 7]])
DENSE = 1, "use: tensor_parallel"  # the source's own function
TRACKED = 4, "use: parallel_track, depth: 2"


def from_seed(make: Any) -> Any:
    """What `make` returns with random weights that are the same each time, in eval mode."""
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3"])
def test_auto_model_gives_the_hidden_state(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    tracked = convert(source, *TRACKED)
    with torch.no_grad():
        found = [
            transformers.AutoModel.from_pretrained(p, attn_implementation="eager")(IDS)[0]
            for p in (source, convert(source, *DENSE), tracked)
        ]
        whole = load(tracked).model(IDS)[0]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], whole)
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (transformers.AutoModelForSequenceClassification, "score"),
        (transformers.AutoModelForTokenClassification, "score"),
        (transformers.AutoModelForQuestionAnswering, "qa_outputs"),
    ],
)
def test_other_heads(
    auto: Any, head: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    # Not Llama: transformers opens its weights for question answering as random ones.
    source = make_dense("mistral")
    tracked = convert(source, *TRACKED)

    def opened(path: Path) -> Any:
        """With the head's new weights from a seed."""
        model = auto.from_pretrained(path, attn_implementation="eager").eval()
        torch.manual_seed(0)
        torch.nn.init.normal_(getattr(model, head).weight)
        return model

    models = [opened(p) for p in (source, convert(source, *DENSE), tracked)]
    models[2].save_pretrained(tmp_path / "saved")
    models.append(auto.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval())
    with torch.no_grad():
        found = [model(IDS)[0] for model in models]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2])


PEFT = {
    "LoRA without target_modules": peft.LoraConfig(init_lora_weights=False),
    "LoRA on all linear layers": peft.LoraConfig(target_modules="all-linear"),
    "IA3 without target_modules": peft.IA3Config(init_ia3_weights=False),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft(name: str, make_dense: MakeDense, convert: Convert) -> None:
    """What it adapts of the source, it adapts of the source's function, converted, and of tracks.

    A prefix is a KV cache of whole layers, which tracks don't have.
    """
    source = make_dense("llama")
    paths = [source, convert(source, *DENSE), convert(source, *TRACKED)]
    models = [from_seed(lambda p=p: peft.get_peft_model(load(p), PEFT[name])) for p in paths]
    changed = [model.get_nb_trainable_parameters()[0] for model in models]
    assert changed[0] == changed[1] and changed[2] > 0
    if name == "prefix tuning":
        with pytest.raises(ValueError, match=r"^the KV cache is filled .* use prompt tuning or"):
            models.pop()(IDS)
    with torch.no_grad():
        found = [model(IDS).logits for model in models]
    assert torch.equal(found[0], found[1])
    assert all(torch.isfinite(logits).all() for logits in found)
