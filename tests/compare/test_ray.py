"""The same comparison on a Ray cluster, started here."""

from pathlib import Path
from typing import Any

import pytest

from rankfold.compare.plan import make_plan
from rankfold.compare.run import compare

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")


def test_on_a_cluster_as_on_this_machine(values: dict[str, Any], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster as Started

    values |= {"contenders": ["lora", {"name": "wide", "method": {"name": "lora", "rank": 999}}], "seeds": 2}
    plan = make_plan(values)
    cluster = Started(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        there = compare(plan, tmp_path / "there", ray=cluster.address)
    finally:
        cluster.shutdown()
    here = compare(plan, tmp_path / "here", jobs=1)
    lora, wide = there.contenders
    assert [run.after for run in lora.runs] == [run.after for run in here.contenders[0].runs]
    assert "rank 999 is over the layer's size" in wide.failures[0].reason
