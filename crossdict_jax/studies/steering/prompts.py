"""Prompts for a language model: as a user gave them, or the beginnings of held-out documents."""

import os
from pathlib import Path

import numpy as np

from crossdict_jax.activations.pairing import byte_ends_batch, normalize
from crossdict_jax.activations.passages import select_passages
from crossdict_jax.activations.store import Store
from crossdict_jax.activations.text import read_txt
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError

MOST_TOKENS = 48  # new ones of a text, where the settings leave it to the context
DOCUMENTS = 4  # held-out ones that begin prompts, where none are given
PROMPT_TOKENS = 12  # of each such beginning: the start of a sentence


def read_prompts(config: Config, store: Store, model: str, tokenizer) -> list[np.ndarray]:
    """Returns the prompts as tokens int32 [length], with a BOS where the model wants one.

    Raises:
      UserError: a prompt is blank or cannot be tokenized, or the file of prompts cannot be read.
    """
    front = [] if store.has_bos(model) is None else [store.has_bos(model)]
    text = config.steer.prompts
    if not text:
        passages = select_passages(store, model, documents=DOCUMENTS, seed=config.seed)
        _, first = np.unique(passages.document, return_index=True)
        length = len(front) + PROMPT_TOKENS
        return [passages.tokens[w][:length] for w in passages.window[first]]
    prompts = [text]
    if text.lower().endswith(".txt"):
        try:
            prompts = read_txt(Path(os.path.expanduser(text))).removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(
                f"steer.prompts={text} cannot be read ({error}); name a UTF-8 file with a prompt a "
                "line, or give one prompt."
            ) from error
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(f"steer.prompts={text!r} holds a blank prompt; write something in each.")
    return [np.array([*front, *tokens_of(p, model, tokenizer)], np.int32) for p in prompts]


def tokens_of(text: str, model: str, tokenizer) -> np.ndarray:
    """Returns the tokens of a text; UserError naming characters that the vocabulary lacks."""
    (read,) = byte_ends_batch([text], tokenizer)
    if read.ends is not None:
        return read.ids
    characters = list(dict.fromkeys(normalize(text)))
    alone = zip(characters, byte_ends_batch(characters, tokenizer))
    unknown = [repr(character) for character, tokens in alone if tokens.ends is None]
    lack = f"no tokens for {', '.join(unknown)}" if unknown else "other text for it"
    raise UserError(
        f"steer.prompts: the vocabulary of {model} has {lack} in {text!r}; write the prompt "
        "without."
    )


def new_tokens(asked: int, prompts: list[np.ndarray], context: int, model: str) -> int:
    """Returns how many tokens are written behind every prompt; 0 asks for what fits."""
    longest = max(map(len, prompts))
    if longest + max(asked, 1) > context:
        raise UserError(
            f"A prompt of steer.prompts has {longest} tokens, and {max(asked, 1)} behind it "
            f"(steer.tokens={asked}) do not fit into the {context} positions that {model} reads; "
            "give shorter prompts or ask for fewer tokens."
        )
    return asked or min(MOST_TOKENS, context - longest)
