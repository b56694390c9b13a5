"""mitigations.py: which policy is kept, and when training stops, by hand and in small runs."""
from types import SimpleNamespace

import pytest
import torch
from test_ppo import config
from tiny import END, TOKENIZER, write_rows

import data
import evaluate
import mitigations
import readers
import train_ppo
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from scoring import token_logps
from world.text import text_of


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def kept_after(kls, golds=None, **changes) -> tuple[list, list[str]]:
    """What why_stop() keeps and says, step by step; the policy of step i is the number i."""
    cfg = train_ppo.Config(**changes)
    controller = train_ppo.Controller(0.1)
    kept = torch.nn.Linear(1, 1)
    found, said = [], []
    for step, kl in enumerate(kls):
        actor = torch.nn.Linear(1, 1)
        actor.weight.data.fill_(step)
        looked = {"gold": golds[step]} if golds and golds[step] is not None else {}
        said.append(mitigations.why_stop(actor, kept, controller, kl, looked, cfg))
        found.append(kept.weight.item())
    return found, said


def test_beyond_the_kl_budget_the_last_policy_inside_is_kept():
    kept, said = kept_after([0, 1.5, 2.0, 2.1], kl_budget=2.0)
    assert kept == [0, 1, 2, 2]
    assert said[:3] == [""] * 3 and "its KL of 2.10 nats is beyond --kl_budget 2" in said[3]


def test_gold_stops_when_two_looks_found_no_better_policy():
    kept, said = kept_after([0] * 6, [0.5, None, 0.7, 0.6, None, 0.65], gold="world",
                            gold_patience=2)
    assert kept[0] == 0 and kept[2:] == [2] * 4
    assert said[:5] == [""] * 5 and "--gold was better 2 looks ago: 0.700" in said[5]


def test_a_run_ends_with_the_policy_inside_its_budget(tmp_path):
    train_ppo.main(config(tmp_path, steps=8, lr=3e-2, beta=0.0, kl_target=0.0, kl_budget=0.5))
    rows = read_metrics(tmp_path / "ppo")
    assert len(rows) < 8 and all(row["kl"] <= 0.5 for row in rows)
    train_ppo.main(config(tmp_path, steps=len(rows) - 1, lr=3e-2, beta=0.0, kl_target=0.0,
                          out=str(tmp_path / "plain")))
    found = load_model(tmp_path / "ppo")[0].state_dict()
    sft = load_model(tmp_path / "sft")[0].state_dict()
    assert (len(rows) == 1) == all(torch.equal(found[name], w) for name, w in sft.items())


def test_gold_looks_at_held_out_prompts_and_its_best_policy_is_the_result(tmp_path, monkeypatch):
    seen = []
    real = mitigations.look

    def falling(gold, actor, tokenizer, cfg):
        seen.append(real(gold, actor, tokenizer, cfg))
        assert {row["where"] for row in gold[1]} <= heldout
        return -float(len(seen))
    cfg = config(tmp_path, steps=8, lr=1e-2, gold=str(tmp_path / "rm"), gold_every=1,
                 gold_prompts=5)
    heldout = {row["where"] for row in readers.read_prompts(cfg.prompts, split="heldout")}
    monkeypatch.setattr(train_ppo, "look", falling)
    train_ppo.main(cfg)
    assert len(read_metrics(tmp_path / "ppo")) == 2 and len(seen) == 3     # the third look ended it
    found = load_model(tmp_path / "ppo")[0].state_dict()
    sft = load_model(tmp_path / "sft")[0].state_dict()
    assert all(torch.equal(found[name], w) for name, w in sft.items())


def test_a_language_model_term_keeps_demonstrations_likely(tmp_path):
    rows = [{"prompt": f"{i}?", "response": "yes"} for i in range(40)]
    write_rows(tmp_path / "demonstrations.jsonl", rows)
    losses = {}
    for coef in (0.0, 1.0):
        own = {"lm_data": str(tmp_path / "demonstrations.jsonl")} if coef else {}
        train_ppo.main(config(tmp_path, steps=6, lr=3e-3, lm_coef=coef, overwrite=True, **own))
        model, _ = load_model(tmp_path / "ppo")
        batch = data.response_batch([TOKENIZER.prompt([{"role": "user", "content": "3?"}])],
                                    [[*TOKENIZER.encode("yes"), END]], TOKENIZER.pad, 64)
        losses[coef] = -token_logps(model.logps, batch).sum().item()
    assert losses[1.0] < losses[0.0] - 1


def test_two_rules_for_the_policy_to_keep_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--kl_budget and --gold both say which policy to keep"):
        train_ppo.main(config(tmp_path, kl_budget=1.0, gold="world"))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_gold_looks_at_no_prompt_of_the_exam(tmp_path, seed):
    cfg = config(tmp_path, gold="world", prompts="world", seed=seed, gold_prompts=100)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    _, prompts, _ = mitigations.read_gold(cfg, run, load_model(cfg.init)[1], 10_000)
    looked_at = [prompt["messages"][-1]["content"] for prompt in prompts]
    asked = [text_of(example["prompt"]) for example in evaluate.reward_prompts("world", 500)]
    # a few short ones, such as "hello", are drawn by every seed
    assert len({*looked_at} & {*asked}) <= 10


@pytest.mark.parametrize("changes, message", [
    ({"gold_every": 2}, "--gold_every 2: only --gold would read it"),
    ({"lm_data": "demonstrations.jsonl"}, "--lm_data demonstrations.jsonl: only --lm_coef"),
    ({"kl_target": 0.0, "kl_horizon": 50}, "--kl_horizon 50: only --kl_target would read it"),
    ({"reward_model": "out/rm1"}, "--reward_model is --reward by its former name"),
])
def test_what_no_mitigation_reads_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_ppo.main(config(tmp_path, **changes))
