"""Continues text by a model."""

from collections.abc import Sequence

import jax
import numpy as np

from memopt.models.generate import generate
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
    room = config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt has {len(ids)} tokens, but the model reads {config.max_seq_len} at most, its "
            "continuation included: shorten it."
        )
    out = generate(
        loaded.model,
        ids,
        min(max_new_tokens, room),
        temperature=temperature,
        top_p=top_p,
        eos_ids=loaded.end_ids,
        key=jax.random.key(seed),
    )
    written = np.asarray(out)[len(ids) :]
    ended = np.isin(written, loaded.end_ids)
    written = written[: ended.argmax()] if ended.any() else written
    # A tokenizer may drop the space before what it decodes first.
    before, whole = tokenizer.decode(ids), tokenizer.decode([*ids, *written])
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(written)
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]
