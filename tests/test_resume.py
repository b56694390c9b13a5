"""Every stage, stopped by a signal and killed between two checkpoints: resumed, it writes the same
figures and weights, bit for bit, as the run that nothing stops. On two ranks: test_killed.py."""
import json
from pathlib import Path

import pytest
import safetensors.torch
import stages
import torch
from tiny_runs import same_run

from plumbing.checkpoints import newest_checkpoint
from plumbing.folders import sha256

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return stages.write_inputs(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def folder(inputs, tmp_path) -> Path:
    """The inputs in a folder of the test's own."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_that_was_stopped_or_killed_ends_bit_for_bit_the_same(folder, stage, capsys):
    stages.straight_stopped_and_killed(folder, stage)
    stages.assert_same_end(folder, stage)
    said = capsys.readouterr().err
    assert "stopped after step 2; everything is saved in" in said
    assert "going on from step 3" in said and "going on from step 4" in said


# ---------------------------------------------------------------------- former versions

def as_before(checkpoint: Path, likelihood: float = 0.0) -> None:
    """Rewrite a checkpoint as the first version wrote it: other names of heads and of DPO's model,
    the state of torch's GradScaler, a list of tokens, and 0 for sizes that are computed."""
    dpo = "dpo" in str(checkpoint)
    for file in checkpoint.glob("*.safetensors"):
        weights = {}
        for name, weight in safetensors.torch.load_file(file).items():
            if name.startswith("head."):
                head = "scalar_head" if len(weight) == 1 else "next_sentence_head"
                name = name.replace("head", head, 1)
                if head == "scalar_head":
                    weights["likelihood"] = torch.tensor([likelihood])
                    weights["likelihood_unit"] = torch.tensor([1.5])
            weights[name.removeprefix("trunk.")] = weight
        file.unlink()
        name = "policy" if dpo else file.stem
        safetensors.torch.save_file(weights, checkpoint / f"{name}.safetensors")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    state["scaler"] = {}
    for figures in state["pending"]:
        if figures["tokens"] == [0]:
            del figures["tokens"]
    torch.save(state, checkpoint / "state.pt")
    meta = json.loads((checkpoint / "meta.json").read_text())
    del meta["meta_sha256"]
    meta["config"] |= {"n_kv_heads": 0, "likelihood": False}
    meta["sha256"] = {file.name: sha256(file) for file in checkpoint.iterdir()
                      if file.name != "meta.json"}
    (checkpoint / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("stage", ["pretrain", "denoise", "sft", "lora", "rm", "dpo", "ppo"])
def test_a_checkpoint_of_a_former_version_goes_on_bit_for_bit(folder, stage, capsys):
    """Weights by their former names; the optimizer's numbers by the order of parameters."""
    out = folder / f"{stage}_former"
    stages.run(folder, stage, f"{stage}_straight")
    stages.run_until("stopped", 2, folder, stage, out.name)
    as_before(newest_checkpoint(out))
    stages.run(folder, stage, out.name, resume=True)
    assert same_run(out, folder / f"{stage}_straight")
    said = capsys.readouterr().err
    assert "going on from step 3" in said and "the run began with" not in said


def test_a_reward_model_that_reads_log_p_is_not_gone_on_with(folder):
    stages.run_until("stopped", 2, folder, "rm", "rm_former")
    as_before(newest_checkpoint(folder / "rm_former"), likelihood=0.25)
    with pytest.raises(ValueError, match='step_000003: its model is not the one of this run.*'
                                         'weight "likelihood" of 0.25'):
        stages.run(folder, "rm", "rm_former", resume=True)
