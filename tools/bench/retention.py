#!/usr/bin/env python
"""The experiment on forgetting: its runs, the commands that make them, and the tables of what came out.

    python tools/bench/retention.py --list
    python tools/bench/retention.py --run search/ntp50_1e-3 --work DIR
    python tools/bench/retention.py --table

DIR and what is kept: experiments.py beside this file; besides, stores/debian and text/debian (tools/bench/debian_text.py)
and stores/own (bico-ds prepare replay).
"""

from __future__ import annotations

from experiments import Experiment, Run, search

BLENDS = ("0.50", "0.70", "0.90")
FACTS = "objectives.1.sources=[name_description]"


def replay(store: str, share: float) -> str:
    """The setting that adds a store as one more source."""
    return f"data.sources+={{name: {store}, store: stores/{store}, token_share: {share}}}"


def final(seed: int, lr: str, *settings: str, recipe: str = "smollm2_135m_bico") -> Run:
    """560 updates on the full sets, with Debian's texts as half of the tokens of NTP steps."""
    common = (
        f"seed={seed}",
        f"optimizer.lr={lr}",
        "evaluation.every_steps=280",
        replay("debian", 0.5),
        FACTS,
    )
    return Run(steps=560, settings=(*common, *settings), recipe=recipe, full_sets=True, blends=BLENDS)


RUNS = {
    "search/facts_5e-4": search("5e-4"),
    "search/facts_1e-3": search("1e-3"),
    "search/ntp10_1e-3": search("1e-3", replay("debian", 0.1), FACTS),
    "search/ntp25_1e-3": search("1e-3", replay("debian", 0.25), FACTS),
    "search/ntp50_1e-3": search("1e-3", replay("debian", 0.5), FACTS),
    "search/all50_1e-3": search("1e-3", replay("debian", 0.5)),
    "search/own50_1e-3": search("1e-3", replay("own", 0.5), FACTS),
    "search/ntp50_5e-4": search("5e-4", replay("debian", 0.5), FACTS),
    "final/keep_seed1": final(1, "1e-3"),
    "final/keep_5e-4": final(1, "5e-4"),
    "final/keep_seed2": final(2, "1e-3"),
    "final/keep_lora": final(1, "5e-3", "retention={kl: 0.5, on: [debian]}", recipe="smollm2_135m_bico_lora"),
}

FORGETTING = Experiment(name="retention", runs=RUNS, texts=("TEXT.txt", "text/debian/prose.txt"))
main = FORGETTING.command(__doc__)


if __name__ == "__main__":
    main.start()
