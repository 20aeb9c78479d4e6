"""A run's training step from its options, before anything is opened or written."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, get_args

import jax
import optax

from memopt import optimizers
from memopt.diagnostics import with_diagnostics
from memopt.errors import check_at_least, check_choice
from memopt.models import llama
from memopt.optimizers.registry import find_method
from memopt.state.quantized_state import store_state
from memopt.text.packing import FIELDS
from memopt.training.batches import shares
from memopt.training.config import Config
from memopt.training.control import Controller, Plan
from memopt.training.controllers import controller
from memopt.training.phases import check_shares, follow
from memopt.training.placement import make_mesh
from memopt.training.setup import Setup, abstract_batch, set_up
from memopt.training.step import Predict
from memopt.transforms.stored_update import predict_parameters

#: The method whose placement and extra arguments an optimizer without a name has: none.
PLAIN = "sgd"

#: The least values of options.
LEAST = {
    **dict.fromkeys(("batch_size", "accumulation", "steps", "max_skipped"), 1),
    **dict.fromkeys(("eval_every", "checkpoint_every", "keep", "grow", "num_layers"), 1),
    **dict.fromkeys(("seq_len", "vocab_size", "predict_steps"), 1),
    "learning_rate": 0,
}


def describe_run(
    config: Config,
    *,
    trace: bool = True,
    devices: Sequence[jax.Device] | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Setup:
    """Returns a run's model, mesh, optimizer and training step; touches no file and makes no array.

    Args:
        config: The options of the run.
        trace: Whether to trace the step, which finds what cannot work in it.
        devices: Those to choose from, such as a compiler's. None: all there are.
        tx: An optimizer in place of the one that the options name.

    Returns:
        All that the step is compiled from.

    Raises:
        ValueError: An option, or a combination of them, cannot work; says what to change.

    Example:
        >>> from memopt.training.config import Run
        >>> setup = describe_run(Config(run=Run(mesh="data=1")))
        >>> setup.batch["inputs"].shape, setup.state.params["embed"]["embedding"].shape
        ((8, 128), (264, 192))
    """
    options, flat = config.optimization, config.flat()
    for name, least in LEAST.items():
        check_at_least(name, flat[name], least)
    check_shares(options)
    model_config = _model_config(config)
    rate, carried = follow(config.phases), config.phases[0].count
    learning_rate = (lambda updates: rate(updates + carried)) if carried else rate
    if config.text.batch_size % options.accumulation:
        raise ValueError(
            f"accumulation={options.accumulation} does not divide "
            f"batch_size={config.text.batch_size}: change one."
        )
    method = find_method(options.optimizer)
    if options.state and method.eval_params:
        raise ValueError(
            f"state={options.state} must be left out with optimizer {options.optimizer!r}, whose "
            "state holds weights."
        )
    _check_words(config)
    mesh = make_mesh(config.run.mesh, config.text.batch_size // options.accumulation, devices)
    found = describe_controller(config)
    make = functools.partial(_make_optimizer, config, tx)
    try:
        made, predict = make(rate)
        setup = set_up(
            model_config,
            mesh,
            made,
            abstract_batch(mesh, config.text.batch_size, config.text.seq_len, FIELDS),
            optimizer=options.optimizer if tx is None else PLAIN,
            learning_rate=learning_rate,
            weights=config.architecture.weights,
            release=options.release,
            accumulation=options.accumulation,
            predict=predict,
            remake=make if found else None,
            measure=found.measure if found else None,
        )
        if trace:
            _check_step(setup)
        return setup
    except TypeError as error:  # of an option of another type
        if not options.option:
            raise
        raise ValueError(
            f"optimizer {options.optimizer!r} cannot work with "
            f"option {', '.join(options.option)} ({error})."
        ) from error


def _check_words(config: Config) -> None:
    """Raises if a word is given for an option that takes none, such as nesterov=false."""
    name = config.optimization.optimizer
    method = find_method(name)
    parameters = inspect.signature(method.make).parameters
    for option, value in config.optimizer_options.items():
        check_choice(f"option of {name}:", option, method.defaults)
        parameter = parameters[option]
        takes_words = str in (type(parameter.default), *get_args(parameter.annotation))
        if isinstance(value, str) and not (takes_words or option.endswith("dtype")):
            raise ValueError(
                f"option {option}={value} is neither a number nor True, False or None; {option}: "
                f"{method.help.get(option, 'see Optax').rstrip('.')} (default {parameter.default})."
            )


def describe_controller(config: Config) -> Controller | None:
    """Returns a run's controller, if its options name one.

    Args:
        config: The options of the run.

    Raises:
        ValueError: There is no such controller, or it cannot work in this run; says what to change.
    """
    options, named = config.optimization, config.controller_options
    if options.controller is None:
        if named:
            raise ValueError("controller_option goes with --controller.")
        return None
    phase = config.phases[-1]
    plan = Plan(
        steps=options.steps,
        warmup_steps=phase.step + phase.warmup_steps,
        learning_rate=phase.highest,
        batch_size=config.text.batch_size,
        accumulation=options.accumulation,
        sources=shares(config),
        begins=phase.step,
    )
    return controller(options.controller, plan, named)


def _make_optimizer(
    config: Config, given: optax.GradientTransformation | None, learning_rate: optax.Schedule
) -> tuple[optax.GradientTransformation, Predict | None]:
    """Returns a run's optimizer, and a function that predicts its parameters or None.

    Predictions leave out weight decay, as those of XGrad do.
    """
    options, named = config.optimization, config.optimizer_options

    def measured(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        every = config.run.log_diagnostics
        return with_diagnostics(tx, every=every) if every else tx

    def make(**named: Any) -> optax.GradientTransformation:
        named.setdefault("state", options.state)
        if options.state and named["state"] != options.state:
            raise ValueError(
                f"state is {options.state}, and option state={named['state']}: give one of them."
            )
        return measured(optimizers.optimizer(options.optimizer, learning_rate, **named))

    if given is not None:
        for name in ("option", "predict_steps"):
            if getattr(options, name):
                raise ValueError(
                    f"{name} must be left out with an optimizer that has no name; give it by its "
                    "name, or that of a function, MODULE:FUNCTION."
                )
        return measured(store_state(given, options.state)), None
    steps = options.predict_steps
    if not steps:
        return make(**named), None
    undecayed = (
        {"weight_decay": 0.0} if "weight_decay" in find_method(options.optimizer).defaults else {}
    )
    other = make(**(named | undecayed))
    return make(**named), lambda state, params: predict_parameters(other, state, params, steps)


def _check_step(setup: Setup) -> None:
    """Traces the step, which compiling it then needs not do, to refuse what cannot be released."""
    try:
        with jax.set_mesh(setup.mesh):
            setup.jitted.eval_shape(*setup.arguments)
    except ValueError as error:
        raise ValueError(f"optimizer {setup.optimizer!r} cannot work like this: {error}") from error


def _model_config(config: Config) -> llama.LlamaConfig:
    options = config.architecture
    dtypes: Any = {"param_dtype": options.param_dtype, "compute_dtype": options.compute_dtype}
    for name, dtype in dtypes.items():
        if dtype == "float16":
            raise ValueError(
                f"{name} must be float32 or bfloat16, got float16, in which small gradients are "
                "zero, since the loss is not scaled."
            )
        check_choice(name, dtype, ("float32", "bfloat16"))
    model = options.shape or llama.preset(options.model)
    model = dataclasses.replace(
        model,
        vocab_size=options.vocab_size or model.vocab_size,
        num_layers=options.num_layers or model.num_layers,
        param_dtype=dtypes["param_dtype"],
        dtype=dtypes["compute_dtype"],
        remat=options.remat,
    )
    if config.text.seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={config.text.seq_len} is longer than the {model.max_seq_len} tokens that "
            f"model {options.model!r} accepts: choose a shorter --seq-len."
        )
    return model
