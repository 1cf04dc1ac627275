#!/usr/bin/env python
"""The cures of the reversal curse on SmolLM2-135M, side by side: the runs, and the tables of what came out.

    python tools/bench/cures.py --list
    python tools/bench/cures.py --run search/bico --work DIR
    python tools/bench/cures.py --table

DIR and what is kept: experiments.py beside this file. `broken_…` are BICO with one of its three points left out (the label
shift is in bico_same). On the search split all have equal updates and one learning rate; on the full sets the best three
there have equal FLOPs.
"""

from __future__ import annotations

from experiments import ROOT, Experiment, Run, search

CURES = ("ntp", "bico", "bico_same", "abi", "mlm_u", "reverse", "masked_ft", "both_orders", "identity_bridge")
BROKEN = f"imports=[{ROOT}/tools/bench/broken/{{}}.py]"
# Updates of as many FLOPs as 500 of NTP have, by those of an update on the search split.
EQUAL_FLOPS = {"abi": 560, "masked_ft": 534, "bico": 560}


def final(cure: str, seed: int) -> Run:
    """On the full sets; blends with the start model keep some of its language."""
    return Run(
        steps=EQUAL_FLOPS[cure],
        settings=(f"seed={seed}", "optimizer.lr=1e-3", "evaluation.every_steps=280"),
        recipe=f"smollm2_135m_{cure}",
        full_sets=True,
        blends=("0.50", "0.70", "0.90"),
    )


RUNS = {f"search/{cure}": search("1e-3", recipe=f"smollm2_135m_{cure}") for cure in CURES} | {
    "search/abi_seed2": search("1e-3", "seed=2", recipe="smollm2_135m_abi"),
    "search/broken_no_flip": search("1e-3", BROKEN.format("no_flip")),
    "search/broken_placeholder_key": search(
        "1e-3", BROKEN.format("placeholder_key"), "objectives.1.kind=placeholder_key"
    ),
    **{f"final/{cure}_seed{seed}": final(cure, seed) for seed in (1, 2) for cure in EQUAL_FLOPS},
}

SIDE_BY_SIDE = Experiment(name="cures", runs=RUNS, texts=("TEXT.txt",), likelihood=True)
main = SIDE_BY_SIDE.command(__doc__)


if __name__ == "__main__":
    main.start()
