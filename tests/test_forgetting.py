"""forgetting.py: F, the penalties, the KL and replay against slow counts; small runs of
train_sft.py that forget less; and experiments/forgetting.py, which trains nothing here."""
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import stages
import torch
from test_sft import made_rows, packed
from tiny import END, TOKENIZER, slow_logps, tiny_model, write_rows
from tiny_runs import tiny_run, write_corpus
from torch import nn

import data
import forgetting
import lora
import train_pretrain
import train_sft
from experiments import forgetting as experiment
from plumbing import claim
from plumbing.curves import read_metrics
from plumbing.folders import load_model, save_model
from plumbing.options import build

SIZES = {"d_model": 16, "n_layers": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base that can say some of its corpus, in base, and a task in tasks.jsonl."""
    folder = tmp_path_factory.mktemp("forgetting")
    corpus = write_corpus(folder)
    train_pretrain.main(tiny_run(folder / "base", corpus, steps=50, lr=2e-2, n_layers=1,
                                 eval_windows=64, eval_every=50))
    write_rows(folder / "tasks.jsonl", made_rows(60))
    (folder / "tasks.txt").write_text((folder / "tasks.jsonl").read_text())
    return folder


WAYS = {"full": {"track_drift": True}, "ewc": {"ewc": 3.0, "fisher_examples": 20},
        "replay": {"replay": 0.5}, "kl": {"kl_to_base": 3.0}, "l2": {"l2_to_base": 1.0},
        "held": {"l2_to_base": 1e6}}


@pytest.fixture(scope="module")
def results(folder):
    """What each way ends with after the same 25 steps; its model is in folder / way."""
    return {way: tuned(folder, way, **options) for way, options in WAYS.items()}


def tuned(folder, out, **changes) -> dict:
    """What train_sft.py makes of the base, in folder / out."""
    options = {"init": str(folder / "base"), "data": str(folder / "tasks.jsonl"),
               "out": str(folder / out), "steps": 25, "warmup": 0, "batch_size": 4, "lr": 2e-2,
               "context_length": 32, "eval_every": 20, "log_every": 25, "device": "cpu",
               "dtype": "float32"}
    return train_sft.main(build(train_sft.Config, options | changes))


def text_rows(n_windows=3, length=20) -> data.TokenStream:
    """Text of several documents, cut into whole windows."""
    ids = TOKENIZER.encode("a bear sat. it ate. ")
    ids = [*ids, TOKENIZER.endoftext] * 10
    return data.TokenStream(torch.tensor(ids[:n_windows * length + 1]).numpy(), length, 0,
                            TOKENIZER.endoftext)


def slow_row_logp(model, batch) -> torch.Tensor:
    """log p of a batch of one row, document by document; each begins with the <|endoftext|> that
    ended the one before."""
    ids = batch.tokens[0].tolist()
    begins = [0] + [t for t in range(1, len(ids) - 1) if ids[t] == TOKENIZER.endoftext]
    ends = [*begins[1:], len(ids) - 1]
    logps = [slow_logps(model, ids[begin:end + 1]).sum() for begin, end in zip(begins, ends)]
    return sum(logps)


# ---------------------------------------------------------------------- F and the penalties

def test_fisher_information_is_the_mean_of_each_examples_squared_gradient():
    model = tiny_model(**SIZES)
    rows = [text_rows(length=12).rows([number]) for number in range(3)]
    fisher = forgetting.fisher_information(model, rows)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(slow_row_logp(model, row), parameters.values())
                 for row in rows]
    of_the_mean = 0.0
    for name, of_rows in zip(parameters, zip(*gradients)):
        expected = sum(gradient ** 2 for gradient in of_rows) / 3
        torch.testing.assert_close(fisher[name], expected, rtol=1e-3, atol=1e-6)
        of_the_mean += (sum(of_rows) / 3).square().sum().item()
    # the square of the mean gradient is another, smaller number
    assert of_the_mean < 0.9 * sum(values.sum().item() for values in fisher.values())
    assert all(weight.grad is None for weight in parameters.values()) and model.training


class Two(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.tensor(b))


def test_the_penalty_by_hand():
    theta = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.0)}
    fisher = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor(2.0)}
    model = Two([2.0, 4.0], -3.0)
    # 3 * 1 + 0.5 * 4 + 2 * 9, and 1 + 4 + 9
    assert forgetting.squared_distance(model, theta, fisher).item() == 23
    assert forgetting.squared_distance(model, theta).item() == 14
    (5 / 2 * forgetting.squared_distance(model, theta, fisher)).backward()
    # lambda F (theta - theta*), lambda 5
    assert model.a.grad.tolist() == [15, 5] and model.b.grad.item() == -30


def test_at_theta_star_there_is_no_penalty_and_no_pull():
    model = tiny_model(**SIZES)
    theta = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    penalty = forgetting.squared_distance(model, theta, theta)
    penalty.backward()
    assert penalty.item() == 0
    assert all(weight.grad.count_nonzero() == 0 for weight in model.parameters())


# ---------------------------------------------------------------------- the KL

def test_the_kl_is_a_slow_count_and_never_negative():
    base, model = tiny_model(**SIZES), tiny_model(seed=1, **SIZES)
    batch = text_rows(length=7).rows([0, 1])
    batch.loss_mask[1, 3:] = False
    with torch.no_grad():
        kl = forgetting.kl_per_token(model, base, batch)
        logits = [forgetting.logits(each, batch).double() for each in (base, model)]
    for b in range(2):
        for t in range(6):
            p, q = (each[b, t].softmax(0).tolist() for each in logits)
            slow = sum(x * math.log(x / y) for x, y in zip(p, q))
            slow *= batch.loss_mask[b, t + 1].item()
            assert kl[b, t].item() == pytest.approx(slow, rel=1e-4)
    assert (kl >= 0).all() and (kl[1, 2:] == 0).all() and kl.sum() > 1


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_kl_is_0_at_the_start_and_pulls_towards_the_base(peft):
    model = tiny_model(**SIZES)
    options = lora.Options(peft=peft)
    if peft == "lora":
        lora.attach(model, options)
    reference = lora.reference_of(model, options)
    batch = text_rows().rows(range(3))
    assert (forgetting.kl_per_token(model, reference, batch) == 0).all()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    kls = []
    for _ in range(20):
        kl = forgetting.kl_per_token(model, reference, batch).sum() / batch.n_targets
        kl.backward()
        optimizer.step()
        optimizer.zero_grad()
        kls.append(kl.item())
    assert 0 < kls[-1] < 0.5 * kls[0]


# ---------------------------------------------------------------------- replay

def is_old(row) -> bool:
    """No conversation is without <|end|>."""
    return END not in row.tolist()


@pytest.mark.parametrize("share, batch_size, grad_accum, replicas, n_old", [
    (0.25, 4, 2, 1, [2, 2, 2, 2, 2]), (0.1, 4, 1, 1, [0, 0, 1, 0, 1]),
    (0.5, 2, 1, 2, [2, 2, 2, 2, 2]), (0.9, 5, 1, 1, [4, 5, 4, 5, 4])])
def test_replay_has_its_share_of_every_step(tmp_path, share, batch_size, grad_accum, replicas,
                                            n_old):
    new = packed(tmp_path, made_rows(60), 32)
    replay = forgetting.Replay(text_rows(5, 32), new, share, batch_size * grad_accum * replicas)
    cfg = SimpleNamespace(batch_size=batch_size, grad_accum=grad_accum)
    news = []
    for step, n in enumerate(n_old):
        rows = []
        for replica in range(replicas):
            run = SimpleNamespace(replica=replica, replicas=replicas, device="cpu")
            batches = replay.micro_batches(step, cfg, run)
            assert [len(batch.tokens) for batch in batches] == [batch_size] * grad_accum
            for batch in batches:
                rows += batch.tokens
        assert sum(is_old(row) for row in rows) == n
        news += [row.tolist() for row in rows if not is_old(row)]
    # the new rows come in their order, none is lost
    expected = new.rows(range(len(news))).tokens.tolist()
    assert sorted(news) == sorted(expected)


def test_every_token_of_an_old_row_is_a_target(tmp_path):
    replay = forgetting.Replay(text_rows(5, 32), packed(tmp_path, made_rows(60), 32), 0.5, 4)
    batch = replay.batch(0, 4)
    for tokens, mask in zip(batch.tokens, batch.loss_mask):
        assert mask[1:].all() == is_old(tokens)


# ---------------------------------------------------------------------- whole runs

@pytest.fixture
def made(monkeypatch):
    """How often F has been made."""
    times = []
    real = forgetting.fisher_information
    monkeypatch.setattr(forgetting, "fisher_information",
                        lambda *arguments: times.append(1) or real(*arguments))
    return times


def record_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_bases_loss_is_pretrainings_own_validation_loss(folder, results):
    pretraining = record_of(folder / "base")["result"]
    for result in results.values():
        assert result["base_old_loss"] == pytest.approx(pretraining["val_loss"], rel=1e-5)


def test_drift_and_what_is_forgotten_by_hand(folder, results):
    full = results["full"]
    assert [row["step"] for row in read_metrics(folder / "full") if "old_loss" in row] == [19, 24]
    base, _ = load_model(folder / "base")
    model, _ = load_model(folder / "full")
    text = (folder / "corpus.txt").read_text()
    ids = [*TOKENIZER.encode(text[int(0.9 * len(text)):]), TOKENIZER.endoftext]
    squares = loss = kl = 0.0
    with torch.no_grad():
        for a, b in zip(model.parameters(), base.parameters()):
            squares += ((a - b) ** 2).sum().item()
        for first in range(0, len(ids) - 1, 32):
            n = len(ids[first + 1:first + 33])                     # that no window before has
            window = ids[min(first, len(ids) - 33):][:33]
            loss -= slow_logps(model, window)[-n:].sum().item()
            p, q = (each(torch.tensor([window[:-1]]))[0, -n:].double().log_softmax(-1)
                    for each in (base, model))
            kl += (p.exp() * (p - q)).sum().item()
    assert full["drift"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert full["old_loss"] == pytest.approx(loss / (len(ids) - 1), rel=1e-4)
    assert full["kl_old"] == pytest.approx(kl / (len(ids) - 1), rel=1e-4)


@pytest.mark.parametrize("way", ["ewc", "replay", "kl", "l2"])
def test_less_is_forgotten_than_by_full_fine_tuning(results, way):
    full, held = results["full"], results[way]
    assert full["old_loss"] > full["base_old_loss"] + 1
    assert held["old_loss"] < full["old_loss"] - 0.5
    assert held["val_loss"] < 0.7 * held["base_loss"]


def test_a_huge_coefficient_holds_the_weights(results):
    assert results["held"]["drift"] < 0.2 * results["full"]["drift"]


def test_looking_back_changes_nothing_and_by_default_nobody_looks(folder, results):
    plain = tuned(folder, "plain")
    weights = [(folder / out / "model.safetensors").read_bytes() for out in ("plain", "full")]
    assert weights[0] == weights[1]
    assert not plain.keys() & {*forgetting.OLD_FIGURES}
    assert "replay_data" not in record_of(folder / "plain")["inputs"]
    [entry] = record_of(folder / "full")["inputs"]["replay_data"]
    assert entry["file"] == str(folder / "corpus.txt")


@pytest.mark.parametrize("options", [
    {"ewc": 2.0, "fisher_examples": 3, "replay": 0.25}, {"kl_to_base": 1.0, "l2_to_base": 0.1},
    {"kl_to_base": 1.0, "replay": 0.5, "peft": "lora", "lora_rank": 2}])
def test_a_stopped_or_killed_run_ends_bit_for_bit_the_same(tmp_path, monkeypatch, made, options):
    stages.write_inputs(tmp_path)
    options |= {"replay_data": str(tmp_path / "corpus.txt")}
    monkeypatch.setitem(stages.STAGES, "held", (train_sft, stages.EXAMPLES | options))
    stages.straight_stopped_and_killed(tmp_path, "held")
    stages.assert_same_end(tmp_path, "held")
    rows = [row for row in read_metrics(tmp_path / "held_killed") if "old_loss" in row]
    assert len(rows) == 2 and ("drift" in rows[0]) == ("peft" not in options)
    assert len(made) == (3 if "ewc" in options else 0)             # once in each of three folders


# ---------------------------------------------------------------------- F on the disk

def test_f_is_made_once_for_a_base_and_its_examples(folder, results, made):
    def again(**changes) -> dict:
        options = {"ewc": 1.0, "fisher_examples": 3, "steps": 1, "overwrite": True}
        tuned(folder, "kept", **options | changes)
        assert forgetting.FISHER in claim.written(folder / "kept")
        return safetensors.torch.load_file(folder / "kept" / forgetting.FISHER)

    first = again()
    assert len(made) == 1
    second = again()                           # the earlier run, F and all, has made room
    assert len(made) == 1 and not (folder / "kept.old").exists()
    assert all(torch.equal(second[name], values) for name, values in first.items())
    again(fisher_examples=4)
    assert len(made) == 2
    again(fisher_examples=4, init=str(folder / "full"))
    assert len(made) == 3                      # of another base
    again(fisher_examples=4, replay_data=str(folder / "tasks.txt"))
    assert len(made) == 4


def test_a_damaged_f_is_made_again_and_a_strangers_stays(folder, made):
    options = {"ewc": 1.0, "fisher_examples": 3, "steps": 1}
    tuned(folder, "damaged", **options)
    file = folder / "damaged" / forgetting.FISHER
    whole = file.read_bytes()
    for n, damaged in enumerate([whole[:-1] + b"?", whole[:100], b""], 2):
        file.write_bytes(damaged)
        tuned(folder, "damaged", overwrite=True, **options)
        assert len(made) == n and len(file.read_bytes()) == len(whole)
        # the order of the metadata before them is left to chance
        assert file.read_bytes()[-1000:] == whole[-1000:]
    (folder / "foreign").mkdir()
    (folder / "foreign" / forgetting.FISHER).write_text("mine")
    with pytest.raises(ValueError, match=f"{forgetting.FISHER} was not written by a run"):
        tuned(folder, "foreign", overwrite=True, **options)
    assert (folder / "foreign" / forgetting.FISHER).read_text() == "mine"


# ---------------------------------------------------------------------- refusals

@pytest.mark.parametrize("changes, message", [
    ({"replay": 1.0}, r"--replay 1.0: give a number in \[0, 1\)"),
    ({"replay": -0.1}, r"--replay -0.1: give a number in \[0, 1\)"),
    ({"ewc": -1.0}, "--ewc -1.0: give a number >= 0"),
    ({"l2_to_base": math.inf}, "--l2_to_base inf: give a number >= 0"),
    ({"kl_to_base": math.nan}, "--kl_to_base nan: give a number >= 0"),
    ({"ewc": 1.0, "fisher_examples": 0}, "--fisher_examples 0: give a number >= 1"),
    ({"fisher_examples": 9}, "--fisher_examples 9: only --ewc would read it"),
    ({"replay_data": "text.txt"}, "--replay_data text.txt: only --ewc, --l2_to_base, .*--replay, "),
    ({"ewc": 1.0, "peft": "lora"}, "--ewc holds what --peft lora leaves as it is anyway"),
    ({"l2_to_base": 1.0, "peft": "qlora"}, "--l2_to_base holds what --peft qlora leaves as it is"),
    ({"kl_to_base": 1.0, "peft": "prompt"}, "--kl_to_base holds what --peft prompt leaves as it"),
    ({"replay": 0.5, "peft": "prefix"}, "--replay holds what --peft prefix leaves as it is"),
    ({"kl_to_base": 1.0, "shard": "fsdp"}, "leave out --shard and --tensor_parallel"),
    ({"replay": 0.5, "replay_data": "none.txt"}, "none.txt: not found"),
])
def test_what_does_not_go_together_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        tuned(folder, "refused", **changes)


@pytest.mark.parametrize("record, message", [
    ({"stage": "test"}, "base/config.json: neither this record nor .* give --replay_data FILE"),
    ({"stage": "pretrain", "config": {"data": "gone.txt"}},
     "base was pretrained on gone.txt, which is not there; put it back, or give --replay_data"),
    ({"stage": "pretrain", "config": {}}, "base/config.json: neither this record")])
def test_a_base_whose_text_is_not_known_is_refused(folder, tmp_path, record, message):
    base = tmp_path / "base"
    save_model(base, tiny_model(**SIZES), TOKENIZER, **record)
    with pytest.raises(ValueError, match=message):
        tuned(folder, tmp_path / "out", init=str(base), track_drift=True)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    tuned(folder, tmp_path / "out", init=str(base), steps=1, replay=0.5, overwrite=True,
          replay_data=str(folder / "corpus.txt"))


def test_the_text_is_that_of_the_stage_before_the_stage_before(folder, results):
    result = tuned(folder, "third", init=str(folder / "full"), steps=1, track_drift=True)
    assert result["base_old_loss"] == pytest.approx(results["full"]["old_loss"], rel=1e-5)
    [entry] = record_of(folder / "third")["inputs"]["replay_data"]
    assert entry["file"] == str(folder / "corpus.txt")


def test_another_text_is_not_gone_on_with(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    text = tmp_path / "text.txt"
    shutil.copy(folder / "corpus.txt", text)
    record = record_of(tmp_path / "base")
    record["config"]["data"] = str(text)
    (tmp_path / "base" / "config.json").write_text(json.dumps(record))
    options = {"init": str(tmp_path / "base"), "replay": 0.5, "steps": 2}
    tuned(folder, tmp_path / "out", **options)
    text.write_text(text.read_text().replace("bears", "wolfs"))
    with pytest.raises(ValueError, match="--replay_data: .*text.txt is not the one it was"):
        tuned(folder, tmp_path / "out", resume=True, **options)


def test_several_corpora_keep_the_shares_that_pretraining_gave_them(folder, tmp_path):
    (tmp_path / "b.txt").write_text("b" * 2000)
    names = f"{folder / 'corpus.txt'},{tmp_path / 'b.txt'}"
    save_model(tmp_path / "base", tiny_model(**SIZES), TOKENIZER, stage="pretrain",
               config={"data": names, "shares": "0.25,0.75", "seed": 3, "steps": 9})
    cfg = build(train_sft.Config, {"init": str(tmp_path / "base"), "track_drift": True})
    for source in forgetting.read_text(cfg, TOKENIZER, 32):
        rows = source.rows(range(256)).tokens
        assert sum(row.tolist().count(ord("b")) > 20 for row in rows) == 192
        assert source.seed == 3


# ---------------------------------------------------------------------- experiments/forgetting.py

@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(quick=..., seeds=...) -> the Configs of the runs that main() asks for, and the lines of
    the table. Of all runs full fine-tuning alone forgets, 1.5 nats, and is 1 point better."""
    def run(script, **options):
        runs.append(build(script.Config, options))
        forgetting.check_options(runs[-1])

    def last_rows(folder):
        is_full = folder.name.startswith("full")
        return [{"accuracy": 0.76 if is_full else 0.75, "base_old_loss": 1.0, "kl_old": 0.5,
                 "old_loss": 2.5 if is_full else 1.25}]

    def ask(**options):
        experiment.main(experiment.Config(out=str(tmp_path / "out"), **options,
                                          figure=str(tmp_path / "picture.png")))
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        return runs, (tmp_path / "picture.md").read_text().splitlines()

    runs = []
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(experiment, "read_metrics", last_rows)
    monkeypatch.setattr(experiment, "base_models", lambda seed: tmp_path / "base" / str(seed))
    return ask


def test_full_fine_tuning_and_six_ways_by_three_strengths(asked):
    runs, lines = asked(seeds="0,2")
    # of the second seed full fine-tuning, replay and EWC alone
    assert len(runs) == len({cfg.out for cfg in runs}) == 19 + 7
    for cfg in runs:
        assert (cfg.steps, cfg.batch_size, cfg.eval_examples) == (400, 16, 1000)
        assert cfg.track_drift and cfg.optimizer == "muon"
        assert cfg.init.endswith(f"base/{cfg.seed}/pretrain") and cfg.data == f"world:{cfg.seed}"
    first = runs[:19]
    assert [cfg.ewc for cfg in first if cfg.ewc] == [0.001, 0.01, 0.1]
    assert [cfg.replay for cfg in first if cfg.replay] == [0.05, 0.15, 0.3]
    assert [cfg.adapters.lora_rank for cfg in first if cfg.adapters.peft == "lora"] == [16] * 3
    assert sum(cfg.kl_to_base > 0 for cfg in first) == sum(cfg.l2_to_base > 0 for cfg in first) == 3
    assert "| EWC, ewc 0.1 | 75.0% (75.0% to 75.0%) | 0.25 (0.25 to 0.25) | " \
           "0.50 (0.50 to 0.50) |" in lines
    assert lines[-1] == "| seed 2 | replay 0.05 | 1.25 | as it must |"


def test_a_quick_run_is_one_strength_of_each_and_20_steps(asked):
    runs, lines = asked(quick=True)
    assert len(runs) == 7
    assert {(cfg.steps, cfg.seed) for cfg in runs} == {(20, 0)}
    assert lines[0] == "# What is forgotten for what is learned (quick)"


def test_a_run_that_has_learned_less_spares_nothing():
    def of(accuracy, old_loss):
        return {"1": {"accuracy": accuracy, "old_loss": old_loss, "base_old_loss": 1.0}}

    found = {experiment.FULL: {4e-3: of(0.75, 2.0)}, "EWC": {0.1: of(0.74, 1.5), 1: of(0.72, 1.0)},
             "replay": {0.3: of(0.8, 1.875)}}
    assert experiment.spared(found, "1") == ("EWC 0.1", 0.5)
    del found["EWC"][0.1]
    assert experiment.spared(found, "1") == ("replay 0.3", 0.125)
    del found["replay"][0.3]
    assert experiment.spared(found, "1") == ("none", 0.0)
