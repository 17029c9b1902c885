# SPDX-License-Identifier: Apache-2.0
"""The comparison, against numbers worked out by hand."""

from __future__ import annotations

import reports
from hansa.sinks.summary import main_metric, metrics_of, summary


def table(found):
    return {row.name: (row.own, row.everyone) for row in found.rows}


def test_every_average_is_made_as_the_documentation_says():
    found = summary(reports.report())
    assert (found.metric, found.mode) == ("perplexity", "min")
    assert found.sites == ("a", "b")
    assert table(found) == {
        "base": (10.0, 10.0),  # (8 + 12) / 2; pooled
        "local": (5.5, 10.25),  # a's model at a and b's at b: (5 + 6) / 2; (9 + 11.5) / 2
        "federated": (6.75, 7.0),  # (6 + 7.5) / 2; pooled
        "central": (6.0, 6.25),
    }
    assert list(table(found)) == ["base", "local", "federated", "central"]
    assert found.row("local").sites == {"a": 5.0, "b": 6.0}


def test_the_best_is_named_whoever_it_is_and_the_ceiling_takes_no_part():
    found = summary(reports.report())
    assert found.best("own") == "local"
    assert found.best("everyone") == "federated"
    assert found.best_at("a") == "local"
    assert found.best_at("b") == "local"
    higher = summary(reports.report(settings={"evaluation": {"metric": "perplexity", "mode": "max"}}))
    assert higher.mode == "max"
    assert higher.best("everyone") == "local"


def test_a_single_row_is_not_the_best_of_anything():
    found = summary(reports.report(baselines={"central": reports.scores(6.0, a=5.0, b=6.0)}))
    assert [row.name for row in found.rows] == ["federated", "central"]
    assert found.best("own") is None


def test_only_the_sites_that_every_model_was_judged_at_are_averaged():
    values = reports.report()
    del values["baselines"]["local.b"]
    found = summary(values)
    assert (found.sites, found.left_out) == (("a",), ("b",))
    assert table(found) == {"base": (8.0, 10.0), "local": (5.0, 9.0), "federated": (6.0, 7.0), "central": (5.5, 6.25)}
    assert found.judged_at == ["a", "b"]


def test_the_federated_model_is_the_one_that_was_saved():
    values = reports.report()
    values["model"] = {**values["model"], "round": 1}
    assert summary(values).row("federated").everyone == 9.5
    values["model"] = {**values["model"], "round": 2}  # that round was not judged
    assert summary(values).row("federated") is None
    assert summary(values).row("base").everyone == 10.0


def test_an_unfinished_run_shows_the_last_round_that_was_judged():
    rounds = [reports.record(1, 9.5, a=7.5, b=11.0), reports.record(2, None)]
    found = summary(reports.report(model=None, rounds=rounds, baselines={}))
    assert table(found) == {"federated": (9.25, 9.5)}
    assert summary(reports.report(model=None, rounds=[], baselines={})) is None


def test_training_metrics_are_never_compared():
    assert metrics_of(reports.report()) == ["perplexity", "loss"]


def test_the_main_metric():
    def main(names, metric="loss"):
        return main_metric({"evaluation": {"metric": metric, "mode": "min"}}, names)

    assert main(["loss", "accuracy", "perplexity"]) == "perplexity"
    assert main(["loss", "accuracy", "f1", "token_f1"]) == "f1"
    assert main(["loss", "accuracy", "macro_f1"]) == "accuracy"
    assert main(["loss", "accuracy", "macro_f1"], "macro_f1") == "macro_f1"
    assert main(["loss"], "macro_f1") == "loss"
    assert main(["train_loss", "own"]) == "own"
    assert main(["train_loss"]) is None


def test_another_metric_and_its_direction():
    found = summary(reports.report(), "loss")
    assert (found.metric, found.mode) == ("loss", "min")
    assert found.row("federated").everyone == 0.7
    values = reports.report()
    values["baselines"]["base"]["overall"]["accuracy"] = 0.5
    assert summary(values, "accuracy").mode == "max"
    assert table(summary(values, "accuracy")) == {"base": (None, 0.5)}
