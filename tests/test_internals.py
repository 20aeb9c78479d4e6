"""Non-public API of JAX and Grain: a test that fails here names what a release changed."""

import ast
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import internals
from memopt.internals import Call, Cond, Scan, While, trace

LAYERS = jnp.ones((3, 2))


def inner(f, *args):
    """Returns the inner program of the only operation that has one."""
    (found,) = [e.inner for e in trace(f, *args).equations() if e.inner is not None]
    return found


def test_a_part_of_a_traced_function_reads_and_computes_what_its_outputs_need():
    """Fails when `dce_jaxpr_consts` or `jax.core.eval_jaxpr` takes or returns something else."""
    constant = jnp.arange(3.0)
    f = lambda tree, z: (tree["x"] + constant, tree["y"] * z, 1.0)
    program = trace(f, {"x": jnp.ones(3), "y": 2.0}, 3.0)
    assert program.needed().reads == [True, True, True]
    first, second = program.needed([0]), program.needed([1, 2])
    assert (first.reads, second.reads) == ([True, False, False], [False, True, True])
    np.testing.assert_array_equal(first(jnp.ones(3), None, None)[0], [1, 2, 3])
    assert [float(x) for x in second(None, 2.0, 3.0)] == [6.0, 1.0]


def test_arrays_of_a_traced_function_are_told_from_others():
    """Fails when `jax.core.Tracer` is no longer the class of all of them."""
    seen = []
    jax.jit(jax.vmap(jax.grad(lambda x: seen.append(internals.is_traced(x)) or x)))(jnp.ones(3))
    assert (seen, internals.is_traced(jnp.ones(3))) == ([True], False)


def test_a_part_keeps_constants_that_are_still_being_computed():
    """Fails when a traced function's constants may no longer be tracers, as quantised states."""

    @jax.jit
    def f(x):
        both = trace(lambda: (x + 1, x * 2))
        return both.needed([1])()[0]

    assert f(3.0) == 6.0


@pytest.mark.parametrize(
    "loop",
    [
        lambda x, y: jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] * 2), None), (x, y), length=2)[0],
        lambda x, y: jax.lax.cond(True, lambda x, y: (x, y * 2), lambda x, y: (x + 1, y), x, y),
        jax.jit(lambda x, y: (x + 1, y * 2)),
        jax.checkpoint(lambda x, y: (jnp.sin(x), y * 2)),
    ],
    ids=["scan", "cond", "jit", "checkpoint"],
)
def test_what_is_needed_is_told_inside_loops_and_branches(loop):
    """Fails when JAX no longer cuts an operation down to the outputs that are asked for."""
    assert trace(loop, 1.0, 2.0).needed([0]).reads == [True, False]


def test_a_scan_tells_its_constants_from_what_it_carries():
    """Fails when a scan's parameters are called otherwise, as they were until jax 0.11."""

    def f(a, b, carry, layers):
        body = lambda c, layer: ((c[0] + a, c[1] * b, -c[2]), layer * a)
        return jax.lax.scan(body, carry, layers)

    scan = inner(f, 2.0, 3.0, (0.0, 1.0, 2.0), LAYERS)
    assert isinstance(scan, Scan)
    assert (scan.constants, scan.carried) == (2, 3)
    assert [v.aval.shape for v in scan.body.inputs] == [()] * 5 + [(2,)]
    assert [v and v.aval.shape for v in scan.body.outputs] == [()] * 3 + [(2,)]


def test_a_loop_tells_the_constants_of_its_test_from_those_of_its_body():
    """Fails when a while loop's parameters are called otherwise."""

    def f(limit, a, b, *carry):
        body = lambda c: (c[0] + a, c[1] * b)
        return jax.lax.while_loop(lambda c: c[0] < limit, body, carry)

    loop = inner(f, 9.0, 1.0, 2.0, 0.0, 1.0)
    assert isinstance(loop, While)
    assert (loop.test_constants, loop.body_constants) == (1, 2)
    assert len(loop.test.inputs) == 1 + 2
    assert len(loop.body.inputs) == 2 + 2


def test_a_choice_has_the_programs_that_it_chooses_from():
    """Fails when a cond's parameters are called otherwise."""
    f = lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos, lambda x: x], x)
    choice = inner(f, 1, LAYERS)
    assert isinstance(choice, Cond)
    assert [len(branch.inputs) for branch in choice.branches] == [1, 1, 1]
    assert [len(list(branch.equations())) for branch in choice.branches] == [1, 1, 0]


def squared():
    f = jax.custom_vjp(lambda x: x * x)
    f.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))
    return f


@pytest.mark.parametrize(
    "f",
    [jax.jit(jnp.sin), jax.checkpoint(jnp.sin), jax.custom_jvp(jnp.sin), squared()],
    ids=["jit", "checkpoint", "custom_jvp", "custom_vjp"],
)
def test_a_call_has_the_program_that_it_calls(f):
    """Fails when the parameter that holds a called function is called otherwise."""
    if isinstance(f, jax.custom_jvp):
        f.defjvp(lambda x, t: (jnp.sin(x[0]), jnp.cos(x[0]) * t[0]))
    call = inner(f, LAYERS)
    assert isinstance(call, Call)
    assert [e.name for e in call.body.equations()] in (["sin"], ["mul"])


def test_programs_of_other_arrays_than_the_operations_are_no_calls():
    """Fails when a reduction keeps its program elsewhere; then the comparison of shapes may go."""
    product = lambda x: jax.lax.reduce(x, jnp.float32(1), lambda a, b: a * b + 1, (0,))
    (reduction,) = trace(product, LAYERS).equations()
    assert reduction.name == "reduce"
    assert reduction.inner is None


def test_numbers_written_into_a_program_are_no_variables():
    """Fails when JAX keeps such numbers otherwise than as literals."""
    program = trace(lambda x: (x + 2.0, 3.0), 1.0)
    (add,) = program.equations()
    assert add.name == "add"
    assert [v is None for v in add.inputs] == [False, True]
    assert [v is None for v in program.outputs] == [False, True]


def test_random_bits_are_drawn_by_this_name():
    """Fails when JAX draws by another primitive; PerParameterUpdate looks for `random_bits`."""
    draw = lambda: jax.random.normal(jax.random.key(0), (3,))
    names = set()
    pending = [trace(draw)]
    while pending:
        for equation in pending.pop().equations():
            names.add(equation.name)
            if isinstance(equation.inner, Call):
                pending.append(equation.inner.body)
    assert "random_bits" in names


def test_clusters_say_whether_they_are_there_and_which_process_this_is(monkeypatch):
    """Fails when a cluster of JAX answers to other names."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    (slurm,) = [c for c in internals.clusters() if c.name == "slurm"]
    assert slurm.is_env_present()
    assert (slurm.get_process_count(), slurm.get_process_id()) == (4, 2)
    methods = ("is_env_present", "get_process_count", "get_process_id")
    assert all(callable(getattr(c, m)) for c in internals.clusters() for m in methods)


def test_grain_mixes_cuts_and_makes_ahead_and_goes_on_from_its_state():
    """Fails when `grain.experimental` lost one of the three, or it forgets where it stands."""
    pieces = [{"x": np.full(3, i)} for i in range(8)]

    def rows():
        dataset = grain.MapDataset.source(pieces).to_iter_dataset()
        dataset = internals.limited(internals.shuffled(dataset, 6, seed=1), 5)
        return iter(internals.prefetched(dataset, 2))

    reader = rows()
    first = next(reader)["x"].tolist()
    state = reader.get_state()
    rest = [row["x"].tolist() for row in reader]
    assert len(rest) == 4
    assert all(len(row) == 3 for row in [first, *rest])
    assert [first, *rest] != sorted([first, *rest])
    again = rows()
    again.set_state(state)
    assert [row["x"].tolist() for row in again] == rest


def test_no_other_file_takes_what_is_not_public():
    """No other file imports non-public API, so that a new release is met in one place."""
    private = ("jax._src", "jax.interpreters", "jax.extend", "jax.core", "jax.make_jaxpr")
    private += ("jaxlib", "grain.experimental", "grain._src", "optax._src", "flax._src")
    found = []
    for file in sorted(Path(memopt.__file__).parent.rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names.add(ast.unparse(node))
                if node.attr in ("eqns", "jaxpr", "invars"):
                    names.add("jax.core")
        if any(f"{name}.".startswith(f"{prefix}.") for name in names for prefix in private):
            found.append(file.name)
    assert found == ["internals.py"]
