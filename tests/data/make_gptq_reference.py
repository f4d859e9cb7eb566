"""Makes gptq_reference.json: output errors of llm-compressor's GPTQ on a 512 x 512 weight, for tests to compare with.

    pip install llmcompressor datasets      # in an environment of its own; the file names the versions that were used
    python tests/data/make_gptq_reference.py tests/data/gptq_reference.json

The weight is the query projection of a Llama of one layer. Weight and inputs are made by `problem`, which a test can
import: NumPy's generator is the same everywhere.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

WIDTH, TOKENS, WINDOW, EPSILON = 512, 2048, 256, 1e-6


def problem() -> tuple[np.ndarray, np.ndarray]:
    """W (out, in) and X (in, tokens) in float64: inputs that are correlated, some features larger than others."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    table = rng.normal(size=(TOKENS, 64)) @ rng.normal(size=(64, WIDTH)) / 8 + 0.3 * rng.normal(size=(TOKENS, WIDTH))
    table = (table * np.exp(0.7 * rng.normal(size=WIDTH))).astype(np.float32).astype(np.float64)
    x = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True) + EPSILON)
    return w.astype(np.float32).astype(np.float64), x.T


def output_error(w: np.ndarray, q: np.ndarray, x: np.ndarray) -> float:
    """||(W - Q) X||_F / ||W X||_F."""
    return float(np.linalg.norm((w - q) @ x) / np.linalg.norm(w @ x))


def quantized(bits: int, directory: str) -> np.ndarray:
    """What llm-compressor's GPTQ makes of the weight, dequantized."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    w, x = problem()
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=WINDOW,
        rms_norm_eps=EPSILON,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    rows = torch.tensor(x.T, dtype=torch.float32)  # normed once more, which changes nothing
    model.model.embed_tokens.weight.data = rows
    model.model.layers[0].self_attn.q_proj.weight.data = torch.tensor(w, dtype=torch.float32)
    model.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = []
    projection = model.model.layers[0].self_attn.q_proj
    hook = projection.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    ids = np.arange(TOKENS).reshape(-1, WINDOW)
    model(input_ids=torch.tensor(ids))
    hook.remove()
    assert np.allclose(torch.cat(seen).reshape(TOKENS, WIDTH).numpy().T, x, atol=1e-4)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=128)
    scheme = QuantizationScheme(targets=["re:.*q_proj"], weights=weights)
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")), pad_token="?"),
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, dampening_frac=0.01, block_size=128, actorder=None),
        num_calibration_samples=len(ids),
        max_seq_length=WINDOW,
        pipeline="basic",
    )
    return model.model.layers[0].self_attn.q_proj.weight.detach().double().numpy()


def main(path: str) -> None:
    from importlib.metadata import version

    w, x = problem()
    errors = {}
    for bits in (4, 3):
        with tempfile.TemporaryDirectory() as directory:
            errors[f"int{bits}"] = output_error(w, quantized(bits, directory), x)
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    pathlib.Path(path).write_text(json.dumps({"versions": versions, "relative_output_error": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
