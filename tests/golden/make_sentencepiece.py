"""Makes tests/golden/sentencepiece.json: a small tokenizer and what sentencepiece makes of texts.

    pip install sentencepiece
    python tests/golden/make_sentencepiece.py

Trained as Llama 2's was (BPE, byte fallback, digits apart) on BENCHMARKS.md and weights/FORMAT.md.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).with_suffix("").with_name("sentencepiece.json")
N_PIECES = 600
TEXTS = [
    "",
    "a",
    " a",
    "The weights of a model stay in GPU memory.",
    "  two spaces,   three  spaces and a tail  ",
    "line one\nline two\n\n\tindented",
    "12345 and 3.14159",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich",
    "日本語 and 🙂",
    "def f(x):\n    return x**2  # squared",
    "entropyentropy-coded  matricesmatrices",
    "aaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb",
]


def main() -> None:
    model = io.BytesIO()
    lines = [
        line
        for name in ("BENCHMARKS.md", "weights/FORMAT.md")
        for line in (ROOT / name).read_text("utf-8").splitlines()
        if line
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_PIECES,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = []
    for i in range(processor.vocab_size()):
        kind = 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1
        kinds.append(6 if processor.is_byte(i) else kind)
    golden = {
        "made_by": f"sentencepiece {sentencepiece.__version__}",
        "pieces": [processor.id_to_piece(i) for i in range(processor.vocab_size())],
        "scores": [processor.get_score(i) for i in range(processor.vocab_size())],
        "kinds": kinds,
        "texts": [[text, processor.encode(text)] for text in TEXTS],
    }
    OUT.write_text(json.dumps(golden, ensure_ascii=False, indent=None) + "\n", "utf-8")


if __name__ == "__main__":
    main()
