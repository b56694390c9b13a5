"""experiments/freezing.py: the runs that it asks for, and its table of known figures. Nothing is
trained."""
import pytest

import train_classifier
from experiments import freezing
from plumbing.options import build, refuse_unread


@pytest.mark.parametrize("quick", [False, True])
def test_only_what_learns_and_how_much_there_is_differ(quick, monkeypatch, tmp_path):
    runs = []

    def run(script, **options):
        assert script is train_classifier
        runs.append(build(script.Config, options))
        return {"accuracy": 0.75, "majority": 0.375}
    monkeypatch.setattr(freezing, "run", run)
    monkeypatch.setattr(freezing, "base_models", lambda seed: tmp_path / "base" / str(seed))
    figure = tmp_path / "freezing.png"
    freezing.main(freezing.Config(seeds="3,4", out=str(tmp_path), figure=str(figure),
                                  quick=quick))
    assert figure.stat().st_size > 10_000
    assert len({cfg.out for cfg in runs}) == len(runs) == (8 if quick else 32)
    for cfg in runs:
        assert cfg.init == str(tmp_path / "base" / str(cfg.seed) / "pretrain")
        assert (cfg.data, cfg.family) == (f"world:{cfg.seed}", "inference")
        assert (cfg.steps, cfg.eval_examples) == (100 if quick else 600, 1000)
        assert cfg.lr == (1e-2 if cfg.train == "head" else 1e-3)
        refuse_unread(cfg, {"last_k": ("last_k",)}, choice="train")
        # all layers, 6 of them, learn before the middle
        assert cfg.unfreeze == "at_once" or 5 * cfg.unfreeze_every < cfg.steps / 2
    of_one = [cfg for cfg in runs if cfg.seed == 3]
    assert {cfg.n_examples for cfg in of_one} == ({50, 1000} if quick else {50, 200, 1000, 5000})
    assert len({(cfg.train, cfg.unfreeze) for cfg in of_one}) == 4
    text = figure.with_suffix(".md").read_text()
    assert "the most frequent class: 37.5%" in text and ("(quick)" in text) == quick


def test_the_best_way_is_that_of_the_mean():
    found = {"head": {50: [0.5, 0.75], 200: [0.5, 0.5]}, "all": {50: [0.25, 0.25],
                                                                 200: [0.25, 1.0]}}
    assert freezing.best(found) == {50: "head", 200: "all"}
    lines = freezing.table(found, 0.25, freezing.Config()).splitlines()
    assert "| head | 62.5% (50.0% to 75.0%) | 50.0% (50.0% to 50.0%) |" in lines
    assert lines[-1] == "| the best | head | all |"
