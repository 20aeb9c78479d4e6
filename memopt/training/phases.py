"""The schedules of a run that goes on longer, or otherwise, than it was begun."""

import dataclasses
from collections.abc import Sequence

import optax

from memopt import schedules
from memopt.training.config import Config, Optimization, Phase

#: Options that may change with the schedule of a resumed run.
WITH_SCHEDULE = {"learning_rate", "final_learning_rate", "decay", "schedule_option"}


def check_shares(options: Optimization) -> None:
    """Raises unless the options of a schedule that are shares are between 0 and 1.

    Raises:
        ValueError: Names the option.
    """
    for name in ("warmup", "decay", "rewarm", "final_learning_rate"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(options, name)}.")


def follow(phases: Sequence[Phase]) -> optax.Schedule:
    """Returns the learning rate as a function of the updates that the optimizer's state counts.

    Args:
        phases: The schedules, one after another.

    Raises:
        ValueError: A schedule is unknown, or its parts are longer than the whole.

    Example:
        >>> first = Config().first_phase()
        >>> rate = follow([first, dataclasses.replace(first, count=600, schedule="constant")])
        >>> [f"{rate(count):.2g}" for count in (0, 60, 599, 600, 660)]
        ['0', '0.005', '0.0005', '0', '0.005']
    """
    before = optax.constant_schedule(0.0)
    parts = [before, *map(_schedule, phases)]
    return optax.join_schedules(parts, [phase.count for phase in phases])


def resume(there: Config, here: Config, *, step: int, updates: int) -> Config:
    """Returns the options of a resumed run, with the schedules that it follows.

    The schedule it was begun with goes on: after its last step, with the final learning rate. One
    that extends (`memopt.schedules.Shape`) goes on to the new last step, and so does its decay,
    unless it has begun. A schedule that `here` names, and
    that is not the run's already, applies to the remaining steps, from the learning rate reached.

    Args:
        there: The run's options so far.
        here: Those it is resumed with; without a schedule, its own goes on.
        step: Steps it has taken.
        updates: How many of them were applied.

    Raises:
        ValueError: It has taken more steps already, or would go on with a learning rate of 0.

    Example:
        >>> from memopt.training.config import Optimization
        >>> there = Config(optimization=Optimization(steps=20))
        >>> here = Config(optimization=Optimization(steps=100))
        >>> describe_phases(resume(there, here, step=20, updates=20))
        'cosine of 20 steps, from 0 to 0.005 in 2, then 0.0005 until step 100'
    """
    options, phases = here.optimization, there.phases
    last, count = phases[-1], phases[0].count + updates
    if options.steps < step:
        asked = f"{options.steps}"
        if options.epochs is not None:
            asked += f", which is what epochs={options.epochs:g} makes"
        raise ValueError(f"steps must be at least {step}, which were taken, got {asked}.")
    rewarms = bool(options.rewarm and step and not last.step)
    if options.schedule and (rewarms or _replace(last, here) != last):
        if options.steps == step:
            raise ValueError(
                f"schedule {options.schedule!r} has no steps left: give more --steps than {step}."
            )
        reached = float(follow(phases)(count))
        now = dataclasses.replace(last, step=step if updates else 0, count=count, first=reached)
        phases = (*(phase for phase in phases if phase.count < count), _replace(now, here))
    elif options.steps != there.optimization.steps and schedules.SHAPES[last.schedule].extends:
        length, done = options.steps - last.step, count - last.count
        room = length - max(done, last.warmup_steps)
        if done <= last.steps - (last.decay_steps or 0) and room > 0:
            decay = min(max(1, round(options.decay * length)), room) if last.decay_steps else None
            last = dataclasses.replace(last, steps=length, decay_steps=decay)
            phases = (*phases[:-1], last)
    changed = (options.steps, phases) != (there.optimization.steps, there.phases)
    if changed and not _kept_rate(phases[-1], options.steps):
        raise ValueError(
            f"steps up to {options.steps} would have a learning rate of 0, in which the schedule "
            "ends: give --schedule and --rewarm."
        )
    return here.with_phases(*phases)


def describe_phases(config: Config) -> str:
    """Says which schedule applies from which step.

    Args:
        config: The options of a run.

    Example:
        >>> describe_phases(Config())
        'cosine of 600 steps, from 0 to 0.005 in 60'
    """
    phases = config.phases
    stops = [*(phase.step for phase in phases[1:]), config.optimization.steps]
    return "; ".join(_describe(phase, stop) for phase, stop in zip(phases, stops, strict=True))


def _schedule(phase: Phase) -> optax.Schedule:
    decay = {} if phase.decay_steps is None else {"decay_steps": phase.decay_steps}
    return schedules.schedule(
        phase.schedule,
        phase.highest,
        phase.steps,
        init_value=phase.first,
        warmup_steps=phase.warmup_steps,
        end_value=phase.final,
        **decay,
        **phase.options,
    )


def _describe(phase: Phase, stop: int) -> str:
    rate = _schedule(phase)
    text = f"{phase.schedule} of {phase.steps} steps"
    if phase.options:
        text += f" ({', '.join(f'{name}={x}' for name, x in phase.options.items())})"
    text += f", from {rate(0):.3g}"
    if phase.warmup_steps:
        text += f" to {rate(phase.warmup_steps):.3g} in {phase.warmup_steps}"
    if phase.step:
        text = f"from step {phase.step + 1} {text}"
    end = phase.step + phase.steps
    if end < stop:
        text += f", then {_kept_rate(phase, stop):.3g} until step {stop}"
    return text + (f", cut off at step {stop}" if stop < end else "")


def _kept_rate(phase: Phase, stop: int) -> float:
    """The learning rate kept from a schedule's end to step `stop`; its highest if it ends later."""
    ends = phase.step + phase.steps < stop
    return float(_schedule(phase)(phase.steps)) if ends else phase.highest


def _replace(phase: Phase, config: Config) -> Phase:
    """The schedule that `config` names, in place of a phase, to the last step."""
    if not phase.step:
        return config.first_phase(count=phase.count)
    options = config.optimization
    rest = dataclasses.replace(options, steps=options.steps - phase.step, warmup=options.rewarm)
    new = dataclasses.replace(config, optimization=rest).first_phase(
        step=phase.step, count=phase.count
    )
    if not new.warmup_steps:
        highest = min(new.highest, phase.first)
        new = dataclasses.replace(new, highest=highest, final=min(new.final, highest))
    return dataclasses.replace(new, first=phase.first)
