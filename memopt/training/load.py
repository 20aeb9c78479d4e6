"""Loads the model of a run, or of a Hugging Face directory, on one device."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from memopt.models import llama
from memopt.optimizers.registry import find_method
from memopt.state.quantized_params import dequantize_params
from memopt.text.chats import ANSWERS, Chat, ChatEncoder
from memopt.text.tokenizer import TEMPLATE, Tokenizer, load_tokenizer, read_template
from memopt.training.checkpoint import Checkpoints
from memopt.training.config import Config, read_options
from memopt.training.data import COMPLETIONS, begin_as_before, read_history
from memopt.training.describe import describe_run
from memopt.training.directory import is_run, kept_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        path: The directory it is from.
        model_config: Its shapes and options.
        params: Its parameters as nested dicts; those of a run that stores weights in fewer bits are
            quantised, see `memopt.quantize_params`.
        tokenizer: Its tokenizer.
        format: How it is asked: "text", for a continuation, or "chats", by the chat template, which
            is that of a run on chats.
        config: The options of its run; None if it is not from a run.
        step: The step that the parameters are of; None if it is not from a run.
        val_loss: The validation loss at that step, if it was evaluated then.
    """

    path: Path
    model_config: llama.LlamaConfig
    params: Any
    tokenizer: Tokenizer
    format: str = "text"
    config: Config | None = None
    step: int | None = None
    val_loss: float | None = None

    @functools.cached_property
    def model(self) -> llama.Llama:
        """The model. It reads quantised blocks one at a time."""
        return llama.build_model(self.model_config, self.params)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text or, of a run on chats, an answer; the most usual one first."""
        ends = [self.tokenizer.eos_id, *self.model_config.eos_ids]
        last = self._end_of_an_answer() if self.format == "chats" else None
        if last is not None and last in self.tokenizer.special_tokens.values():
            ends = [last, *ends]
        return tuple(dict.fromkeys(ends))

    def _end_of_an_answer(self) -> int | None:
        """The last id of an answer; None if the template refuses all examples of one."""
        system, *turns = ({"role": role, "content": "a"} for role in ("system", "user", ANSWERS))
        with self.chat_encoder() as encoder:
            for messages in (turns, [system, *turns]):
                with contextlib.suppress(ValueError):
                    ids, learned = encoder.encode(Chat(messages))
                    return int(ids[learned][-1])
        return None

    def chat_encoder(self) -> ChatEncoder:
        """Returns what makes ids of chats, by the template of its directory, for use in `with`."""
        template = self.path / TEMPLATE
        return ChatEncoder(self.tokenizer, read_template(template) if template.is_file() else None)


def load_run(
    path: str | Path, step: str | int = "best", *, dequantize: bool = False
) -> LoadedModel:
    """Loads the model of a run on one device, whatever mesh it was trained on.

    The parameters are those to evaluate, see `memopt.eval_params`. The optimizer's state is read
    only if they are made of it.

    Args:
        path: The directory of the run; it may still be trained.
        step: "best", with the lowest validation loss (the last one if none is known); "last"; or a
            step that has a checkpoint.
        dequantize: Decode quantised weights.

    Returns:
        The model, its tokenizer and the options of the run.

    Raises:
        ValueError: There is no such run or checkpoint, or it is damaged.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not is_run("run", path):
        raise ValueError(
            f"{str(path)!r} is a Hugging Face model, not a run: load it by "
            "memopt.models.llama.from_hugging_face."
        )
    config = Config.from_flat(read_options(config_file))
    on_one_device = dataclasses.replace(config.run, mesh="data=1")
    setup = describe_run(dataclasses.replace(config, run=on_one_device), trace=False)
    params_only = find_method(setup.optimizer).eval_params is None
    checkpoints = Checkpoints(path / "checkpoints")
    state, val_loss = checkpoints.read(step, setup.state, params_only=params_only)
    params = setup.eval_params(state)
    tokenizer = load_tokenizer(kept_tokenizer(path, config.text.tokenizer))
    history = read_history(path)
    begin_as_before(tokenizer, history)
    is_completions = history and COMPLETIONS in history[-1].identity
    return LoadedModel(
        path=path,
        model_config=setup.model_config,
        params=dequantize_params(params) if dequantize else params,
        tokenizer=tokenizer,
        format="text" if is_completions else config.text.format,
        config=config,
        step=int(state.step),
        val_loss=val_loss,
    )


def load_model(path: str | Path, step: str | int = "best") -> LoadedModel:
    """Loads the model of a run, as `load_run` does, or of a Hugging Face directory.

    Args:
        path: The directory.
        step: Of a run, see `load_run`.

    Raises:
        ValueError: It is neither, cannot be loaded, or its tokenizer has ids that the model lacks.
    """
    path = Path(path)
    if is_run("run", path):
        return load_run(path, step)
    tokenizer = load_tokenizer(str(path))
    model_config, params = llama.read_hugging_face(path)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {str(path)!r} has {tokenizer.vocab_size} ids, but the model only "
            f"{model_config.vocab_size}: give it the tokenizer that it was trained with."
        )
    return LoadedModel(path, model_config, params, tokenizer)
