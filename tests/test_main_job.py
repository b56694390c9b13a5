"""experiments/main_job.py: which of several runs is the worst."""
from experiments.main_job import figures_of, table_of
from world.judge import WEIGHTS


def aligned(**changed) -> dict:
    return {"true_reward": 0.75, "win_rate": 0.8, "plain_win_rate": 0.7, "accuracy": 0.875,
            "right_to_wrong": 0.05, "longer": 0.25, "parts": dict.fromkeys(WEIGHTS, 0.75),
            "manners": {"rude": 0.125}} | changed


def test_figures_are_differences_from_sft_and_shares_of_the_gain():
    stages = {"sft": {"accuracy": 0.9375, "true_reward": 0.5, "parts": dict.fromkeys(WEIGHTS, 0.5),
                      "manners": {"rude": 0.25}},
              "rm": {"accuracy": 0.875, "likelihood_accuracy": 0.75},
              "chosen": {"true_reward": 0.625}, "dpo": aligned(), "ppo": aligned()}
    figures = figures_of({"minutes": 10.0, "stages": stages})
    assert figures["dpo: accuracy over sft's"] == -0.0625
    assert figures["dpo: rude, over sft's"] == -0.125
    assert figures["rm: points over log p"] == 0.125
    # Every part has gained as much, so that its share is its weight.
    assert round(figures["ppo: largest part of the gain"], 9) == max(WEIGHTS.values())
    assert round(figures["ppo: courtesy's part of the gain"], 9) == WEIGHTS["courteous"]


def test_the_worst_is_the_highest_of_a_cost_and_the_lowest_of_a_merit():
    wins, rude = "dpo: wins over sft", "dpo: rude, over sft's"
    runs = {"0 bfloat16": {"minutes": 9.0, wins: 0.75, rude: 0.0},
            "1 float32": {"minutes": 14.0, wins: 0.5, rude: 0.1}}
    lines = table_of(runs).splitlines()
    assert "| minutes | 9.000 | 14.000 | 14.000 |" in lines
    assert "| dpo: wins over sft | 0.750 | 0.500 | 0.500 |" in lines
    assert "| dpo: rude, over sft's | 0.000 | 0.100 | 0.100 |" in lines
