#!/usr/bin/env python3
"""How far flash-linear-attention in bfloat16 is from the golden float64 logits: what the engine's bfloat16 is held to.

Prints one JSON line a golden case: {"case", "error"}, the largest error over the largest logit, whole and token by token
(through its cache). Needs a GPU, torch, triton, transformers and safetensors, and flash-linear-attention and fla-core on
PYTHONPATH. engine_test.cc keeps the figures.

    python3 tests/bench/fla_bfloat16_error.py [CASE ...]

Its Triton kernels are not tuned: each takes the least of its configurations, for trying all of them takes minutes a case and
changes their speed.
"""
import json
import pathlib
import sys

import torch
import triton

tuned = triton.autotune


def untuned(configs, *arguments, **options):
    size = lambda config: sum(value for value in config.kwargs.values() if isinstance(value, int))
    return tuned([min(configs, key=lambda config: (config.num_stages, size(config), config.num_warps))], *arguments, **options)


triton.autotune = untuned  # Before the kernels are defined.

from fla.models import DeltaNetConfig, DeltaNetForCausalLM
from safetensors.torch import load_file

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "testdata" / "golden"


def load(folder):
    config = DeltaNetConfig(**json.loads((folder / "config.json").read_text()))
    model = DeltaNetForCausalLM(config).to(torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    for name in [n for n in weights if n.endswith("gate_proj.weight") and n.replace("gate_", "up_") not in weights]:
        gate, up = weights.pop(name).chunk(2)
        weights[name], weights[name.replace("gate_", "up_")] = gate.contiguous(), up.contiguous()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embeddings.weight"]
    model.load_state_dict(weights, strict=True)
    return model.cuda().eval()


def error(logits, want):
    return ((logits.double() - want).abs().max() / want.abs().max()).item()


def main():
    for folder in [GOLDEN / case for case in sys.argv[1:]] or sorted(GOLDEN.glob("fla_*")):
        golden = load_file(folder / "golden.safetensors")
        ids, want = golden["input_ids"].cuda(), golden["logits"].cuda().double()
        model = load(folder)
        with torch.no_grad():
            whole = model(ids, use_cache=True).logits
            steps, cache = [], None
            for t in range(ids.shape[1]):
                answer = model(ids[:, t:t + 1], past_key_values=cache, use_cache=True)
                cache = answer.past_key_values
                steps.append(answer.logits)
        print(json.dumps({"case": folder.name, "error": error(whole, want),
                          "token_by_token": error(torch.cat(steps, 1), want)}), flush=True)


if __name__ == "__main__":
    main()
