"""Compares Optax's optimizers with recordings and rules for the tables of docs/baselines.md.

    python -m benchmarks.baselines [--optimizers lars dog ...]

An error is the largest difference of a parameter from a run recorded from others' code, see
`benchmarks.parity`, or from a rule in NumPy (`benchmarks.baseline_rules`, in float64), relative to
how far the parameter has moved. Where memopt has the optimizer too, it is measured beside. Every
result is saved as it is found; run it again with some names to replace their rows.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tyro
from rich.console import Console

import memopt
from benchmarks.baseline_rules import RULES
from benchmarks.report import Report
from benchmarks.results import write_pages
from memopt.optimizers.registry import METHODS
from memopt.training.release.per_parameter_update import PerParameterUpdate
from tests.optimizers import recorded_runs
from tests.yardstick import yardstick

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "baselines.json"
STEPS, LAYERS = 6, 3

Make = Callable[[dict[str, Any]], optax.GradientTransformation]


def chain(meta: dict[str, Any], scaled: optax.GradientTransformation) -> Any:
    """Decoupled decay and learning rate of a recording, behind a scaled gradient."""
    decay = optax.add_decayed_weights(meta["hyperparameters"]["weight_decay"])
    return optax.chain(scaled, decay, optax.scale_by_learning_rate(meta["lr"]))


def by_torch(meta: dict[str, Any]) -> dict[str, Any]:
    """The decays and ε of a recording of PyTorch."""
    h = meta["hyperparameters"]
    return {"b1": h["betas"][0], "b2": h["betas"][1], "eps": h["eps"]}


def optax_adafactor(meta: dict[str, Any]) -> Any:
    h, paper = meta["hyperparameters"], lambda count: jnp.minimum(1e-2, 1 / jnp.sqrt(count + 1.0))
    return optax.adafactor(
        meta["lr"] if h.get("relative_step") is False else paper,
        min_dim_size_to_factor=2,
        multiply_by_parameter_scale=h.get("scale_parameter", True),
    )


def optax_adopt(meta: dict[str, Any]) -> Any:
    clips = bool(meta["hyperparameters"]["clip_lambda"])
    return chain(meta, optax.contrib.scale_by_adopt(use_clipping=clips))


def optax_lamb(meta: dict[str, Any]) -> Any:
    h = meta["hyperparameters"]
    tx = optax.lamb(meta["lr"], eps=h["eps"], weight_decay=h["weight_decay"])
    norm = h["max_grad_norm"]
    return tx if norm is None else optax.chain(optax.clip_by_global_norm(norm), tx)


def optax_lars(meta: dict[str, Any]) -> Any:
    h = meta["hyperparameters"]
    decays = {"weight_decay": h["weight_decay"], "eps": h["eps"]}
    return optax.lars(meta["lr"], nesterov=h["nesterov"], **decays)


class Baseline(NamedTuple):
    """An optimizer of Optax, the recordings that it is compared with, and what is to be known.

    Attributes:
        note: what explains its errors.
        runs: the recordings.
        make: makes it as a recording was made.
    """

    note: str = ""
    runs: tuple[str, ...] = ()
    make: Make | None = None


BASELINES = {
    "adagrad": Baseline("its sum of squares starts from 0.1"),
    "adam": Baseline(),
    "adamw": Baseline(
        "", ("adamw_torch",), lambda meta: chain(meta, optax.scale_by_adam(**by_torch(meta)))
    ),
    "ademamix": Baseline("α and β₃ as constants"),
    "cocob": Baseline("a constant learning rate cancels; a schedule weighs gradients"),
    "dadapt_adamw": Baseline("not compared"),
    "dog": Baseline("its paper evaluates an average of the parameters, which Optax leaves out"),
    "dowg": Baseline("adds 1e-4 to the root that it divides by"),
    "mechanic": Baseline("around AdamW; not compared"),
    "momo": Baseline("the learning rate is a bound"),
    "momo_adam": Baseline("the learning rate is a bound"),
    "nadamw": Baseline(),
    "optax_adafactor": Baseline(
        "factors the two longest axes of an array, and none below 128 by default",
        ("adafactor_hf_default", "adafactor_hf_fixed", "adafactor_torch"),
        optax_adafactor,
    ),
    "optax_adopt": Baseline(
        "`add_decayed_weights` behind it decays in step 0, which must not move; memopt's error is "
        "one ulp of the largest weight, in the first step",
        ("adopt", "adopt_noclip", "adopt_wd"),
        optax_adopt,
    ),
    "optax_amsgrad": Baseline(
        "takes the maximum of moments corrected for their bias; both corrections off are the paper",
        ("adamw_amsgrad_torch", "adamw_amsgrad_torch_b95", "amsgrad_paper_formula"),
        lambda meta: chain(meta, optax.scale_by_amsgrad(**by_torch(meta))),
    ),
    "optax_lamb": Baseline(
        "one ratio for a stack", ("lamb_timm", "lamb_timm_plain", "lamb_timm_wd"), optax_lamb
    ),
    "optax_lars": Baseline(
        "the ratio is of ‖G + λW‖, not of ‖G‖ + λ‖W‖, and one for a stack",
        ("lars_timm", "lars_timm_wd_nesterov"),
        optax_lars,
    ),
    "optax_lion": Baseline(
        "",
        ("lion", "lion_wd"),
        lambda meta: optax.lion(meta["lr"], weight_decay=meta["hyperparameters"]["weight_decay"]),
    ),
    "optax_muon": Baseline("takes arrays of two axes only; a stack is left to Adam"),
    "optax_sm3": Baseline(
        "adds 1e-8 inside the root, which the paper and its code do not; a stack is one cover",
        ("sm3_po",),
        lambda meta: optax.sm3(meta["lr"], meta["hyperparameters"]["momentum"]),
    ),
    "prodigy": Baseline("with Adam's bias correction; multiplies ε by the new d"),
    "schedule_free": Baseline("`memopt.eval_params` gives the average"),
    "sgd": Baseline(),
    "sophia": Baseline("Hutchinson's estimator; not compared, since it is random"),
}


def from_recordings(run: str, tx: optax.GradientTransformation) -> float:
    """The largest error against a recording; infinite if it moves where the recording does not."""
    errors = yardstick.compare(run, recorded_runs.follow(tx, *recorded_runs.problem(run)))
    return max(float(error) for steps in errors.values() for error in steps.values())


def from_rule(name: str) -> float:
    """The largest error against the rule in float64, in fifty steps of the yardstick's problem."""
    params, gradients = recorded_runs.problem("adamw_torch")
    vector = lambda tree: np.concatenate([np.ravel(tree[k]) for k in sorted(tree)])[::7].astype(
        float
    )
    start, gradients = vector(params), list(map(vector, gradients))
    losses = [2 / (1 + 0.1 * t) for t in range(len(gradients))]
    options: dict[str, Any] = {
        "ademamix": {"alpha": 6.0, "b3": 0.9999},
        "nadamw": {"weight_decay": 0.0},
    }
    with jax.enable_x64(True):
        tx = memopt.optimizer(name, learning_rate(name), **options.get(name, {}))

        def step(carry: Any, given: Any) -> Any:
            x, state = carry
            u, state = tx.update(given[0], state, x, value=given[1])
            return (x + u, state), x + u

        x, given = jnp.asarray(start), (jnp.asarray(gradients), jnp.asarray(losses))
        run = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), given)[1])
        found = np.asarray(run(x))
    pairs = zip(found, RULES[name](start, gradients, losses), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b - start).max()) for a, b in pairs)


def learning_rate(name: str) -> float:
    """A usual learning rate."""
    return 1.0 if METHODS[name].finds_step else 1e-2


def draw(seed: int) -> np.ndarray:
    """Layers, or their gradients, of different sizes."""
    scale = np.array([1.0, 10.0, 0.1])[:, None, None]
    normal = np.random.default_rng(seed).normal(size=(LAYERS, 16, 24))
    return (scale if seed else scale[::-1]) * normal


def from_layers(name: str) -> float:
    """The largest difference of a stack from the same layers as arrays of their own."""
    with jax.enable_x64(True):

        def run(place: Callable[[np.ndarray], Any]) -> list[Any]:
            tx = memopt.optimizer(name, learning_rate(name))
            loss = lambda p: sum(jnp.square(x).sum() for x in jax.tree.leaves(p))
            params = place(draw(0))
            state, step = tx.init(params), jax.jit(functools.partial(tx.update, obj_fn=loss))
            for t in range(STEPS):
                u, state = step(place(draw(1 + t)), state, params, value=2.0 - 0.1 * t)
                params = optax.apply_updates(params, u)
            return jax.tree.leaves(params)

        [stacked] = run(lambda x: {"layers": jnp.asarray(x)})
        separate = run(lambda x: {"layers": list(map(jnp.asarray, x))})
        pairs = zip(stacked, separate, draw(0), strict=True)
        return max(float(jnp.abs(a - b).max() / jnp.abs(b - x).max()) for a, b, x in pairs)


def is_released(name: str) -> bool:
    """Whether it can update each layer while the backward pass runs."""
    shapes = {"bias": (24,), "blocks": (LAYERS, 16, 24), "norm": (LAYERS, 24)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    try:
        PerParameterUpdate(memopt.optimizer(name, learning_rate(name)), params, [False, True, True])
    except ValueError:
        return False
    return True


def measure(name: str) -> dict[str, Any]:
    """The record of an optimizer of Optax, and of memopt's if there is one."""
    baseline, ours = BASELINES[name], name.removeprefix("optax_")
    record: dict[str, Any] = {"optimizer": name, "runs": list(baseline.runs)}
    record["optax"] = {"stacked": from_layers(name), "released": is_released(name)}
    if baseline.make is not None:
        metas = {run: yardstick.load(run)[2] for run in baseline.runs}
        record["optax"]["errors"] = {
            run: from_recordings(run, baseline.make(meta)) for run, meta in metas.items()
        }
    elif name in RULES:
        record["optax"]["errors"] = {"rule": from_rule(name)}
    if ours != name:
        record["memopt"] = {"stacked": from_layers(ours), "released": is_released(ours)}
        makers = {run: recorded_runs.METHODS[recorded_runs.RUNS[run]][0] for run in baseline.runs}
        record["memopt"]["errors"] = {
            run: from_recordings(run, make(run, False)) for run, make in makers.items()
        }
    return record


def second_update(tx: optax.GradientTransformation, gradients: Sequence[float]) -> float:
    """The last of the updates of a parameter of 1."""
    w = jnp.ones(1)
    state, step = tx.init(w), jax.jit(tx.update)
    for g in gradients:
        u, state = step(jnp.full(1, g), state, w)
    return float(u[0])


def facts() -> list[dict[str, Any]]:
    """Updates of one parameter of 1, by the paper's rule, by Optax and by memopt."""
    outlier, small = [10.0, *[0.01] * 2000], [1e-6]
    adopt = optax.contrib.scale_by_adopt(), optax.add_decayed_weights(0.1), optax.scale(-1.0)
    plain = {"bias_correction_mu": False, "bias_correction_nu": False}
    return [
        {
            "what": "AMSGrad after gradients of 10, then 0.01 two thousand times",
            "paper": -0.01 / (0.001 * 10**2) ** 0.5,
            "optax": second_update(optax.amsgrad(1.0), outlier),
            "memopt": second_update(memopt.amsgrad(1.0), outlier),
        },
        {
            "what": "the same with both bias corrections off",
            "paper": -0.01 / (0.001 * 10**2) ** 0.5,
            "optax": second_update(optax.amsgrad(1.0, **plain), outlier),
        },
        {
            "what": "ADOPT with a decay of 0.1, step 0",
            "paper": 0.0,
            "optax": second_update(optax.chain(*adopt), [1.0]),
            "memopt": second_update(memopt.adopt(1.0, weight_decay=0.1), [1.0]),
        },
        {
            "what": "SM3 after a gradient of 1e-6",
            "paper": -1.0,
            "optax": second_update(optax.sm3(1.0, 0.0), small),
            "memopt": second_update(memopt.sm3(1.0, b1=None), small),
        },
    ]


def read() -> dict[str, Any]:
    """The measurements."""
    if not RESULTS.exists():
        return {"results": [], "facts": []}
    return json.loads(RESULTS.read_text())


def number(x: float | None) -> str:
    """An error, in few characters."""
    if x is None:
        return "–"
    if np.isinf(x) or x < 1e-9:
        return "∞" if np.isinf(x) else "0"
    return f"{x:.2g}" if x > 0.1 else f"{x:.1e}".replace("e-0", "e-")


def errors_table(report: dict[str, Any]) -> str:
    """The table of errors, in Markdown."""
    lines = [
        "| name | against | error | stacked | memopt: error | memopt: stacked | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for r in report["results"]:
        against = ", ".join(f"`{run}`" for run in r["runs"]) or (
            "rule" if "errors" in r["optax"] else "–"
        )
        cells = []
        for found in (r["optax"], r.get("memopt", {})):
            error = max(found["errors"].values()) if found.get("errors") else None
            cells += [number(error), number(found.get("stacked"))]
        note = BASELINES[r["optimizer"]].note
        lines.append(" | ".join([f"| `{r['optimizer']}`", against, *cells, note]) + " |")
    return "\n".join((*lines, ""))


def needs_table(report: dict[str, Any]) -> str:
    """The table of what each optimizer needs, in Markdown."""
    lines = [
        "| name | learning rate | needs | evaluate | release |",
        "|---|---|---|---|:-:|",
    ]
    for r in report["results"]:
        method = METHODS[r["optimizer"]]
        rate = "1, finds its steps" if method.finds_step else "a step size"
        needs = method.needs
        evaluated = "`eval_params`" if method.eval_params else "the parameters"
        cells = [rate, f"`{needs}`" if needs else "", evaluated]
        released = "✓" if r["optax"]["released"] else "refused"
        lines.append(" | ".join([f"| `{r['optimizer']}`", *cells, released]) + " |")
    return "\n".join((*lines, ""))


def facts_table(report: dict[str, Any]) -> str:
    """The table of single updates, in Markdown."""
    lines = ["| update of a parameter of 1 | paper | Optax | memopt |", "|---|--:|--:|--:|"]
    for fact in report["facts"]:
        cells = [f"{fact[k] + 0.0:.5f}" if k in fact else "–" for k in ("paper", "optax", "memopt")]
        lines.append(" | ".join([f"| {fact['what']}", *cells]) + " |")
    return "\n".join((*lines, ""))


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        optimizers: rows to measure; by default all.
    """

    optimizers: tuple[str, ...] = tuple(BASELINES)


def main() -> None:
    """Measures, and replaces the tables in docs/baselines.md."""
    options = tyro.cli(Options, description=__doc__)
    results = {r["optimizer"]: r for r in read()["results"]}
    report = Report("baselines", (), RESULTS, [], facts=facts())
    for name in options.optimizers:
        results[name] = measure(name)
        Console().print(json.dumps(results[name]))
        report.results[:] = [results[name] for name in BASELINES if name in results]
        report.save()
    write_pages()


if __name__ == "__main__":
    main()
