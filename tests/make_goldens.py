"""Makes tests/goldens with torch and transformers: python tests/make_goldens.py [--data=FOLDER].

Tiny random models in every variant that the ports implement, each drawn for the config.json of its
folder and saved there, with what Hugging Face computes for them; a new folder with that file is a
new variant. With --data (as CROSSDICT_DATA) also token ids and losses of the real models there.
Needs torch; the tests that read the results do not.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GOLDENS = Path(__file__).parent / "goldens"
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
    for file in sorted(GOLDENS.glob("*/config.json")):
        make_variant(file.parent, file.read_text())
        print(file.parent.name)
    if data:
        for folder in sorted((data / "models").iterdir()):
            print(folder.name, make_losses(folder, GOLDENS / f"loss-{folder.name}.npz"))
            make_greedy(folder, GOLDENS / f"greedy-{folder.name}.npz")


def make_variant(folder: Path, config: str) -> None:
    """Draws a model of the text of a config.json, saves it, and runs it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    redraw(model)
    model.half().save_pretrained(folder)
    (folder / "config.json").write_text(config)  # in the spelling of the variant
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    np.savez_compressed(folder / "golden.npz", **run(model, json.loads(config)["model_type"]))


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
