"""Writes peft_reference.json: logits that Hugging Face's `peft` computes for a tiny Llama with adapters.

Run with torch, transformers and peft installed: `python make_peft_reference.py > peft_reference.json`. All tensors are
drawn from NumPy by `draw`, so that the file holds no weights. With a directory that `qwix.interop.peft.save` wrote as
an argument, and one with the base, it prints the logits that peft computes with that instead.
"""

import json
import sys
import tempfile

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 7}},
}


def draw(tensors):
    """Fills tensors, in the order of their names, from one generator."""
    rng = np.random.default_rng(0)
    for name in sorted(tensors):
        values = rng.normal(0, 0.2, tuple(tensors[name].shape)).astype(np.float32)
        if "norm" in name or "magnitude" in name:
            values = 1 + np.abs(values)
        tensors[name].copy_(torch.tensor(values))


def make():
    cases = {}
    with torch.no_grad():
        for name, options in CASES.items():
            model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
            base = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
            draw(base)
            settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
            adapted = get_peft_model(model, LoraConfig(**settings)).eval()
            draw({k: v for k, v in adapted.named_parameters() if "lora_" in k})
            with tempfile.TemporaryDirectory() as directory:
                adapted.save_pretrained(directory)
                from safetensors.numpy import load_file

                shapes = {
                    k: list(v.shape) for k, v in sorted(load_file(directory + "/adapter_model.safetensors").items())
                }
            logits = adapted(torch.tensor([IDS])).logits[0, -1].tolist()
            cases[name] = {"config": settings | {"peft_type": "LORA"}, "shapes": shapes, "logits": logits}
    base_shapes = {k: list(v.shape) for k, v in sorted(base.items())}
    return {"config": CONFIG, "ids": IDS, "shapes": base_shapes, "cases": cases}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[2]), sys.argv[1]).eval()
        print(json.dumps(adapted(torch.tensor([IDS])).logits[0, -1].tolist()))
    else:
        json.dump(make(), sys.stdout, indent=1, sort_keys=True)
        print()
