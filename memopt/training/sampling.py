"""Continues text by a model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from memopt.models.generate import generate
from memopt.models.llama import Llama
from memopt.training.load import LoadedModel


def continue_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    format: str | None = None,
) -> str:
    """Returns the continuation of a text, or the answer to a message, up to an end token.

    Args:
        loaded: The model, from `load_run` or `load_model`.
        prompt: The text; it may be empty. For chats, the first message of a user.
        max_new_tokens: Tokens to write, at most; fewer where the model's context ends.
        temperature: See `memopt.models.generate.generate`.
        top_p: See there.
        stop: Texts that end the continuation, without them.
        seed: Decides the sample.
        format: "text" or "chats"; None: as the model was trained.

    Raises:
        ValueError: The prompt fills the model's context, or an option is out of its range.
    """
    tokenizer, config = loaded.tokenizer, loaded.model_config
    if (format or loaded.format) == "chats":
        with loaded.chat_encoder() as encoder:
            ids = encoder.prompt([{"role": "user", "content": prompt}])
    else:
        begin = np.array(tokenizer.begin_ids, np.int32)
        ids = np.concatenate([begin, tokenizer.encode(prompt)])
    if "" in stop:
        raise ValueError("stop must not be empty: no text would be left.")
    room = config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt has {len(ids)} tokens, but the model reads {config.max_seq_len} at most, its "
            "continuation included: shorten it."
        )
    [written] = continuations(
        loaded.model,
        ids[None],
        min(max_new_tokens, room),
        temperature=temperature,
        top_p=top_p,
        end_ids=loaded.end_ids,
        key=jax.random.key(seed),
    )
    # A tokenizer may drop the space before what it decodes first.
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *written])
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(written)
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]


def continuations(
    model: Llama,
    prompts: np.ndarray,
    max_new_tokens: int,
    *,
    end_ids: Sequence[int],
    **options: Any,
) -> list[np.ndarray]:
    """Returns the ids that a model writes after each prompt, up to an end.

    Args:
        model: The model.
        prompts: Ids, (prompts, tokens).
        max_new_tokens: Tokens to write, at most.
        end_ids: Tokens that end a continuation, without them.
        options: See `memopt.models.generate.generate`.
    """
    ids = generate(model, prompts, max_new_tokens, eos_ids=end_ids, **options)
    written = np.asarray(ids)[:, prompts.shape[1] :]
    ended = np.isin(written, end_ids)
    lengths = np.where(ended.any(1), ended.argmax(1), written.shape[1])
    return [row[:length] for row, length in zip(written, lengths, strict=True)]
