"""Runs of a comparison whose results are known."""


def run(method="adamw", loss=2.0, seed=0, rate=0.001, tuned=True, **changes):
    """One run whose loss falls linearly from 4 at step 0 to `loss` at step 100."""
    end = 4.0 if loss is None else loss
    curve = [[step, 4.0 + (end - 4.0) * step / 100] for step in range(25, 101, 25)]
    return {
        **{"method": method, "optimizer": method, "options": {}, "size": "2M", "batch_size": 8},
        **{"seed": seed, "learning_rate": rate, "tuned": tuned, "steps": 100, "tokens": 6400},
        **{"val_loss": loss, "val_losses": curve, "diverged": loss is None},
        **{"key": f"{method} {loss} {seed} {rate}"},
        **{"state_bytes": 1000, "parameter_bytes": 500, "parameters": 125, "step_seconds": 0.02},
        **{"tuned_as": method, "state": None, "weights": None, "release": False, "source": None},
        **{"schedule": "cosine", "warmup": 0.1, "final_learning_rate": 0.0, "seconds": 2.0},
        **{"seq_len": 8, "text": "42a9ff", "eval_tokens": 512, "step_cpu_seconds": 0.03},
        **{"command": "memopt compare", "machine": {"cpu": "abacus"}, "versions": {"jax": "0.10"}},
    } | changes


def seeds(method, *losses, **changes):
    """Tuned runs with these losses, one for each seed."""
    return [run(method, loss, seed, **changes) for seed, loss in enumerate(losses)]
