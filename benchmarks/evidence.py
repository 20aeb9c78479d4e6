"""The table of all methods on docs/methods.md: cost, the paper's claim, and what was measured here.

The formula of the state and the use are the registry's, the bytes that a step moves from
`benchmarks.traffic`, and the losses from the runs of `memopt compare`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.comparison import VERDICT, by_method
from benchmarks.traffic import of_case
from memopt.comparison.analysis import Summary
from memopt.comparison.rows import BASELINE
from memopt.comparison.words import NOTHING, short_number
from memopt.markdown import markdown_table
from memopt.optimizers.registry import METHODS, available


class Claim(NamedTuple):
    """The result that a paper is known for.

    Attributes:
        text: The claim; "ppl" is validation perplexity on C4.
        matches: The method whose loss it reaches, or goes below, on language models; "" for another
            claim.
    """

    text: str
    matches: str = ""


#: Of the papers in the column "source" of docs/methods.md.
CLAIMS: Mapping[str, Claim] = {
    "adafactor": Claim("results comparable to Adam's for translation", "adamw"),
    "adagrad_norm": Claim("converges with any first step size"),
    "adalomo": Claim("on par with AdamW in fine-tuning and further pre-training", "adamw"),
    "adam_atan2": Claim("no ε; invariant to the gradients' scale"),
    "adam_mini": Claim("on par with AdamW or better, 39M to 13B", "adamw"),
    "adopt": Claim("converges with any b2; better than Adam on most tasks", "adamw"),
    "amsgrad": Claim("converges where Adam does not"),
    "apollo": Claim("ppl 14.20 at 1B; AdamW 15.56", "adamw"),
    "apollo_mini": Claim("ppl 14.17 at 1B; AdamW 15.56", "adamw"),
    "badam": Claim("fine-tunes Llama-3 8B on one RTX 3090, above LoRA's scores"),
    "came": Claim("BERT in batches of 32k: better than Adam", "adamw"),
    "fira": Claim("ppl 14.31 at 1B; AdamW 15.56", "adamw"),
    "flora": Claim("results of full-size momentum in sublinear memory"),
    "frugal": Claim("better than other methods with the same memory"),
    "galore": Claim("ppl 15.64 at 1B; AdamW 15.56", "adamw"),
    "lamb": Claim("BERT in batches of 32k without loss of accuracy"),
    "lars": Claim("ResNet-50 in batches of 32k without loss of accuracy"),
    "ldadam": Claim("accurate pre-training and fine-tuning in a subspace", "adamw"),
    "lion": Claim("similar or better losses than Adam's for language models", "adamw"),
    "lomo": Claim("fine-tunes 65B on eight GPUs of 24 GB"),
    "mkor": Claim("up to 2.57× faster than LAMB on BERT"),
    "muon": Claim(
        "half of AdamW's compute ([Liu et al., 2025](https://arxiv.org/abs/2502.16982))",
        "adamw",
    ),
    "normuon": Claim("22% fewer steps than Adam at 1.1B, and fewer than Muon", "muon"),
    "oasis": Claim("no learning rate to tune"),
    "online_subspace_descent": Claim("lower perplexity than other low-rank methods"),
    "racs": Claim("ppl 13.52 at 1.3B; Adam 16.44", "adamw"),
    "rmnp": Claim("Muon's loss without its products, GPT-2 small", "muon"),
    "scale": Claim("matches or exceeds Adam, 60M to 1B", "adamw"),
    "sinkgd": Claim("up to 3× faster than Adam, to 1B", "adamw"),
    "slim_adam": Claim("matches Adam without up to 98% of its second moments", "adamw"),
    "sm3": Claim("AdaGrad's results with far less memory"),
    "soap": Claim("40% fewer steps than AdamW, 360M and 660M", "adamw"),
    "subtrack": Claim("loss 3.29 at 350M after 10k steps; Adam 3.40", "adamw"),
    "tag": Claim("less forgetting over a sequence of tasks"),
}


def table(traffic: dict[str, Any], runs: dict[str, Any]) -> str:
    """A row for each method of memopt, in the order of their names."""
    rows_of_traffic = of_case(traffic["results"], "stacked", "float32")
    moved = {row["optimizer"]: f"{row['traffic']:.1f}" for row in rows_of_traffic}
    measured = by_method(runs["results"])
    sizes = _sizes(measured)
    losses = [f"{size}: − {BASELINE}, {VERDICT}" for size in sizes]
    head = ["method", "state", "traffic", "the paper's claim", *losses, "use it for"]
    rows = [
        [
            f"`{name}`",
            METHODS[name].state,
            moved.get(name, NOTHING),
            CLAIMS[name].text,
            *(_verdict(measured.get(name, {}).get(size)) for size in sizes),
            METHODS[name].when,
        ]
        for name in sorted(available("memopt"))
    ]
    return markdown_table(head, rows, words=["state", *head[3:]])


def not_confirmed(runs: dict[str, Any]) -> str:
    """A sentence on the methods that are worse here than those that they match in their papers."""
    worse = []
    for baseline in dict.fromkeys(claim.matches for claim in CLAIMS.values() if claim.matches):
        measured = by_method(runs["results"], baseline)
        for name in (name for name, claim in CLAIMS.items() if claim.matches == baseline):
            differences = [
                f"{size}: {found.difference.loss:+.2f}"
                for size, found in measured.get(name, {}).items()
                if found.difference and found.verdict == "worse"
            ]
            if differences:
                worse.append(f"`{name}` against `{baseline}` ({', '.join(differences)})")
    return f"Losses higher than the papers claim: {', '.join(worse) or 'none'}.\n"


def _sizes(measured: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    return list(dict.fromkeys(size for of in measured.values() for size in of))


def _verdict(summary: Summary | None) -> str:
    if summary is None or summary.difference is None:
        return NOTHING
    return f"{short_number(summary.difference.loss, '+.2f')}, {summary.verdict}"
