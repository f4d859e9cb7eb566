"""A tiny random Llama as a Hugging Face directory and as a GGUF file, and its forward pass in NumPy float64."""

import json

import numpy as np

from qwix.interop.safetensors import write_tensors
from tests.interop import gguf_writer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(seed=0, tied=True):
    """The weights under their Hugging Face names, (out, in)."""
    rng = np.random.default_rng(seed)
    width, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["hidden_size"] // 2
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
    shapes |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    shapes |= {"mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    named = {"model.embed_tokens": (CONFIG["vocab_size"], width), "model.norm": (width,)}
    if not tied:
        named["lm_head"] = (CONFIG["vocab_size"], width)
    for i in range(CONFIG["num_hidden_layers"]):
        named |= {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}
    # Large enough for attention to be far from uniform.
    return {
        f"{name}.weight": rng.normal(len(shape) == 1, 0.3, shape).astype(np.float32) for name, shape in named.items()
    }


def write_hugging_face(directory, weights, **settings):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | settings))
    write_tensors(directory / "model.safetensors", weights)
    return directory


def write_gguf(path, weights, kinds=None, **metadata):
    """The same for llama.cpp; `kinds` are tensor types by name, float32 by default."""
    sizes = {
        "general.architecture": "llama",
        "llama.block_count": CONFIG["num_hidden_layers"],
        "llama.context_length": CONFIG["max_position_embeddings"],
        "llama.embedding_length": CONFIG["hidden_size"],
        "llama.feed_forward_length": CONFIG["intermediate_size"],
        "llama.attention.head_count": CONFIG["num_attention_heads"],
        "llama.attention.head_count_kv": CONFIG["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
        "llama.rope.freq_base": CONFIG["rope_theta"],
    }
    named = {}
    for name, value in weights.items():
        parts = name.removesuffix(".weight").split(".")
        heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}.get(parts[-1])
        if heads:  # llama.cpp turns neighbours, Hugging Face the first half against the second.
            value = np.concatenate(
                [np.stack(np.split(head, 2), 1).reshape(head.shape) for head in np.split(value, heads)]
            )
        if parts[:2] == ["model", "layers"]:
            short = f"blk.{parts[2]}.{_GGUF['.'.join(parts[3:])]}.weight"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-1]] + ".weight"
        named[short] = (value, (kinds or {}).get(short, gguf_writer.FLOAT32))
    gguf_writer.write(path, sizes | metadata, named)
    return path


def forward(weights, ids):
    """Logits (tokens, vocabulary) of one sequence, as the paper has it, one head and one token after the other."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * w[f"{name}.weight"]

    heads, kv_heads, d = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], 16
    theta = CONFIG["rope_theta"] ** (-2 * np.arange(d // 2) / d)

    def turn(x, position):
        z = (x[: d // 2] + 1j * x[d // 2 :]) * np.exp(1j * position * theta)
        return np.concatenate([z.real, z.imag])

    x = w["model.embed_tokens.weight"][ids]
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = norm(x, f"{at}.input_layernorm")
        q, k, v = (n @ w[f"{at}.self_attn.{p}_proj.weight"].T for p in "qkv")
        mixed = np.zeros((len(ids), heads * d))
        for h in range(heads):
            own, shared = (
                slice(h * d, h * d + d),
                slice(h // (heads // kv_heads) * d, (h // (heads // kv_heads) + 1) * d),
            )
            for t in range(len(ids)):
                query = turn(q[t, own], t)
                scores = np.array([query @ turn(k[s, shared], s) for s in range(t + 1)]) / np.sqrt(d)
                p = np.exp(scores - scores.max())
                mixed[t, own] = (p / p.sum()) @ v[: t + 1, shared]
        x = x + mixed @ w[f"{at}.self_attn.o_proj.weight"].T
        m = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (m @ w[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


# 96 tokens: two controls, a space, printable characters, and three that merges make.
TOKENS = ["<|begin|>", "<|end|>", "Ġ", *map(chr, range(33, 123)), "th", "Ġth", "in"]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def tokenizer_metadata(**changes):
    """A byte-level tokenizer as a GGUF file has it."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": ["t h", "Ġ th", "i n"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}
