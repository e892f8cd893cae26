"""Prompts for a language model: as they were given, or the beginnings of held-out documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossdict_jax.activations.pairing import RebuildError, byte_ends, normalize
from crossdict_jax.activations.splice import select_passages
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError

MOST_TOKENS = 48  # new ones of a text, where the settings leave it to the context


def read_prompts(config: Config, store: Store, model: str, tokenizer) -> list[np.ndarray]:
    """Returns the prompts as tokens int32 [length] each, with a BOS where the model wants one.

    Raises:
      UserError: a prompt is blank, holds what the model's tokenizer has no tokens for, or the
        file of prompts cannot be read.
    """
    if not config.steer.prompts:
        return _beginnings(config, store, model)
    front = [] if store.has_bos(model) is None else [store.has_bos(model)]
    return [
        np.array([*front, *_tokens(text, model, tokenizer)], np.int32)
        for text in _given(config.steer.prompts)
    ]


def new_tokens(asked: int, prompts: list[np.ndarray], context: int, model: str) -> int:
    """Returns how many tokens are written behind every prompt; ``asked`` 0 means what fits.

    Raises:
      UserError: a prompt is longer than the model reads, or with the new tokens it is.
    """
    longest = max(map(len, prompts))
    if longest >= context:
        raise UserError(
            f"A prompt of steer.prompts has {longest} tokens and {model} reads {context} "
            f"positions: nothing fits behind it; give prompts of at most {context - 1} tokens."
        )
    if longest + asked > context:
        raise UserError(
            f"A prompt of {longest} tokens and steer.tokens={asked} are {longest + asked} "
            f"positions, and {model} reads {context}; steer.tokens can be {context - longest} at "
            "most."
        )
    return asked or min(MOST_TOKENS, context - longest)


def _given(text: str) -> list[str]:
    if not text.endswith(".txt"):
        prompts = text.split("|")
    else:
        try:
            prompts = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"steer.prompts={text} cannot be read ({error}); name a UTF-8 file with a prompt a "
                "line, or give prompts with | between."
            ) from error
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError(f"steer.prompts={text!r} holds a blank prompt; write something in each.")
    return prompts


def _tokens(text: str, model: str, tokenizer) -> np.ndarray:
    try:
        return byte_ends(text, tokenizer).ids
    except RebuildError:
        pass
    unknown = [c for c in dict.fromkeys(normalize(text)) if not _is_known(c, tokenizer)]
    which = f"no tokens for {', '.join(map(repr, unknown))}" if unknown else "other text for it"
    raise UserError(
        f"steer.prompts: the vocabulary of {model} has {which} in {text!r}; write the prompt "
        "without."
    )


def _is_known(character: str, tokenizer) -> bool:
    try:
        byte_ends(character, tokenizer)
    except RebuildError:
        return False
    return True


def _beginnings(config: Config, store: Store, model: str) -> list[np.ndarray]:
    """The first tokens of the first windows of held-out documents."""
    settings = config.steer
    passages = select_passages(store, model, documents=settings.documents, seed=config.seed)
    front = 0 if store.has_bos(model) is None else 1
    _, first = np.unique(passages.document, return_index=True)
    windows = [passages.tokens[w] for w in passages.window[first]]
    return [tokens[: front + settings.prompt_tokens] for tokens in windows]
