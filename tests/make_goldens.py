"""Makes tests/goldens with torch and transformers: python tests/make_goldens.py [--data=FOLDER].

Tiny random models in every variant that the ports implement, saved as Hugging Face folders, with
what Hugging Face computes for them. With --data (as CROSSDICT_DATA) also token ids and losses of
the real models there. Needs torch; the tests that read the results do not.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GOLDENS = Path(__file__).parent / "goldens"
GPT2 = dict(
    model_type="gpt2", vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4, n_inner=64
)
SHAPE = dict(vocab_size=61, max_position_embeddings=24, hidden_size=32, num_hidden_layers=3)
NEOX = SHAPE | dict(model_type="gpt_neox", num_attention_heads=2, intermediate_size=64)
LLAMA = SHAPE | dict(model_type="llama", num_attention_heads=4, intermediate_size=48)
LLAMA |= dict(num_key_value_heads=2)
ROPE = dict(rope_type="default")
# The head size of NEOX is 16: a quarter of it is 4 dims, enough for two frequencies.
VARIANTS = {
    "gpt2-gelu_new": GPT2,
    "gpt2-relu": GPT2 | dict(activation_function="relu", n_inner=None),
    "gpt2-gelu-n_inner": GPT2 | dict(activation_function="gelu", n_inner=40),
    "gpt2-silu-unscaled": GPT2 | dict(activation_function="silu", scale_attn_weights=False),
    "gpt2-inverse-layer": GPT2
    | dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2-untied": GPT2 | dict(tie_word_embeddings=False, layer_norm_epsilon=1e-2),
    "gpt_neox-parallel-quarter-old": NEOX
    | dict(rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True),
    "gpt_neox-parallel-full-new": NEOX
    | dict(rope_parameters=ROPE | dict(rope_theta=500.0, partial_rotary_factor=1.0))
    | dict(hidden_act="gelu_new"),
    "gpt_neox-sequential-quarter-new": NEOX
    | dict(rope_parameters=ROPE | dict(rope_theta=100.0, partial_rotary_factor=0.25))
    | dict(use_parallel_residual=False, layer_norm_eps=1e-2),
    "gpt_neox-sequential-full-old": NEOX
    | dict(use_parallel_residual=False, hidden_act="gelu_new", rotary_pct=1.0, rotary_emb_base=500),
    "gpt_neox-relu-tied-no-bias": NEOX
    | dict(hidden_act="relu", tie_word_embeddings=True, attention_bias=False),
    "llama-grouped-untied-new": LLAMA
    | dict(rope_parameters=ROPE | dict(rope_theta=500.0), rms_norm_eps=1e-2),
    "llama-grouped-tied-old": LLAMA | dict(tie_word_embeddings=True, rope_theta=100.0),
    "llama-biases-wide-heads": LLAMA
    | dict(attention_bias=True, mlp_bias=True, head_dim=12, num_key_value_heads=1)
    | dict(hidden_act="gelu_pytorch_tanh"),
}
BLOCKS = {  # where each family keeps its blocks, and in them attention and MLP
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
}
TEXT = (
    "Once upon a time there was a little bear. He lived in a big tree near the river.",
    "One day the bear saw a red boat. He wanted to go far away, but his mom said no.",
    "The bear was sad. Then a small bird came and said, 'Do not cry, we can play here.'",
    "They played with stones and leaves all day. At night the bear was happy and went to bed.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with models/ inside")
    data = parser.parse_args().data
    torch.manual_seed(0)
    for name, raw in VARIANTS.items():
        make_variant(GOLDENS / name, raw)
        print(name)
    if data:
        for folder in sorted((data / "models").iterdir()):
            print(folder.name, make_losses(folder, GOLDENS / f"loss-{folder.name}.npz"))
            make_greedy(folder, GOLDENS / f"greedy-{folder.name}.npz")


def make_variant(folder: Path, raw: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.dumps(raw, indent=2) + "\n"
    (folder / "config.json").write_text(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    redraw(model)
    model.half().save_pretrained(folder)
    (folder / "config.json").write_text(config)  # in the spelling of the variant
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    np.savez_compressed(folder / "golden.npz", **run(model, raw["model_type"]))


@torch.no_grad()
def redraw(model) -> None:
    """All parameters from a normal: fresh biases of 0 and norms of 1 would hide mistakes."""
    for name, parameter in model.named_parameters():
        parameter.normal_()
        if parameter.ndim == 1:
            parameter.mul_(0.3).add_(1.0 if name.endswith("weight") else 0.0)
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.mul_(0.25)


@torch.no_grad()
def run(model, model_type: str) -> dict[str, np.ndarray]:
    """tokens, logits, and the residual, attention and MLP outputs of every block."""
    tokens = torch.randint(model.config.vocab_size, (2, 12))
    blocks, attention, mlp = BLOCKS[model_type]
    seen = {}
    for layer, block in enumerate(model.get_submodule(blocks)):
        for kind, part in (("attn_out", attention), ("mlp_out", mlp)):
            keep(seen, f"{kind}.{layer}", block.get_submodule(part))
        keep(seen, f"resid_post.{layer}", block)
    output = model.eval()(tokens, output_hidden_states=True)
    for layer in range(model.config.num_hidden_layers):
        seen[f"resid_pre.{layer}"] = output.hidden_states[layer].numpy()
    return seen | {"tokens": tokens.numpy().astype(np.int32), "logits": output.logits.numpy()}


def keep(seen: dict, name: str, module) -> None:
    def hook(module, inputs, output):
        seen[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    module.register_forward_hook(hook)


@torch.no_grad()
def make_losses(folder: Path, file: Path) -> float:
    """Token ids of TEXT and the mean loss, in nats a token, that Hugging Face gives on them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXT]
    length = min(len(row) for row in rows) // 2 * 2
    length = min(length, AutoConfig.from_pretrained(folder).max_position_embeddings)
    tokens = torch.tensor([row[:length] for row in rows])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = model(tokens, labels=tokens).loss.item()
    np.savez_compressed(file, tokens=tokens.numpy().astype(np.int32), loss=np.float64(loss))
    return loss


@torch.no_grad()
def make_greedy(folder: Path, file: Path) -> None:
    """Token ids of a prompt, and the likeliest ones behind it, as Hugging Face generates them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("One day, ", add_special_tokens=False, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    new = min(40, model.config.max_position_embeddings - prompt.shape[1])
    whole = model.generate(
        prompt, do_sample=False, min_new_tokens=new, max_new_tokens=new, eos_token_id=None
    )
    parts = prompt[0], whole[0, prompt.shape[1] :]
    names = ("prompt", "continuation")
    np.savez_compressed(file, **{n: p.numpy().astype(np.int32) for n, p in zip(names, parts)})


if __name__ == "__main__":
    main()
