"""
What keeps fine-tuning from forgetting the text before it (001 section 2.3; 003), as options of
train_sft.py. theta* is --init; x is a row of the text that it was pretrained on.

  --ewc         L_task + lambda/2 sum_i F_i (theta_i - theta*_i)^2          Kirkpatrick et al. 2017
                F_i = E_x[(d log p_theta*(x) / d theta_i)^2]
  --l2_to_base  L_task + c/2 |theta - theta*|^2                             Li et al. 2018
  --kl_to_base  L_task + c E_x[KL(pi_theta* || pi_theta)], a token's mean   Li and Hoiem 2016
  --replay      a share of each step's rows is x, with its next-token loss

F is a mean of squares and no square of a mean: at theta*, where pretraining has ended, the
gradients of many x add up to almost nothing, and yet each says which weights its x depends on.

The KL is an expectation under the base, because all that the base says is to stay: it is large
where a continuation that the base finds likely has become unlikely. KL(pi_theta || pi_theta*) would
be content with a model that has kept one continuation of many.

A row of text has more targets than one of conversations, and a target of --replay counts like any
other: its share of the loss is larger than its share of the rows.

Logged at each evaluation, nats per token of held-out text: old_loss, -log p_theta; base_old_loss,
that of theta*; kl_old, the KL above. And drift, |theta - theta*|, unless --peft lets the base stand
still.
"""
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import corpus
import evaluate
import lora
from data import Batch, PackedExamples, TokenStream, row_numbers
from plumbing import inputs
from plumbing.claim import sha256
from plumbing.options import refuse_unread
from scoring import token_logps

READERS = tuple(f"--{name}" for name in inputs.OLD_TEXT)
READ_BY = {"fisher_examples": ("--ewc",), "replay_data": READERS}
OLD_FIGURES = ("old_loss", "base_old_loss", "kl_old", "drift")
FISHER = "fisher.safetensors"
HELD_OUT = 64                         # rows of the figures, the same every time
KL_ROWS = 4                           # read at once, because their logits are (rows, T, V)


# ---------------------------------------------------------------------- the math

def fisher_information(model: nn.Module, rows: Iterable[Batch]) -> dict[str, Tensor]:
    """F_i = E_x[(d log p(x) / d theta_i)^2] (001 section 2.3), x one row, by the parameters' names:
    the empirical Fisher information, because x is text and not a sample of the model's."""
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    n = 0
    model.eval()                               # without a router's noise
    for batch in rows:
        logp = token_logps(model.logps, batch).sum()
        # zeros for an expert that no token visits
        gradients = torch.autograd.grad(logp, parameters.values(), materialize_grads=True)
        for name, gradient in zip(parameters, gradients):
            fisher[name] += gradient ** 2
        n += 1
    model.train()
    return {name: total / n for name, total in fisher.items()}


def squared_distance(model: nn.Module, theta: dict[str, Tensor],
                     fisher: dict[str, Tensor] | None = None) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2, scalar; without `fisher` each F_i is 1. theta: theta*."""
    total = 0.0
    for name, parameter in model.named_parameters():
        squares = (parameter - theta[name]) ** 2
        if fisher is not None:
            squares = fisher[name] * squares
        total = total + squares.sum()
    return total


def kl_per_token(model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
    """KL(pi_theta* || pi_theta) of each prediction, (B, T-1) in nats, 0 where no target is: the sum
    over the whole vocabulary, and so exact."""
    base = base_logits(reference, batch).log_softmax(-1)                       # (B, T-1, V)
    own = logits(model, batch).log_softmax(-1)
    kl = F.kl_div(own, base, reduction="none", log_target=True).sum(-1)
    return kl * batch.loss_mask[:, 1:]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T-1, V) fp32; entry t - 1 predicts token t."""
    return model(batch.tokens[:, :-1], batch.documents[:, :-1], batch.positions[:, :-1])


@torch.no_grad()
def base_logits(reference: nn.Module, batch: Batch) -> Tensor:
    if isinstance(reference, lora.Base):
        [model] = reference.models
        with lora.adapters_off(model):
            return logits(model, batch)
    return logits(reference, batch)


# ---------------------------------------------------------------------- what there was before

def check_options(cfg) -> None:
    """Raises ValueError for options that nothing reads or that do not go together."""
    refuse_unread(cfg, READ_BY)
    peft = cfg.adapters.peft
    # the base's weights stand still, and text without virtual tokens is read as before
    is_idle = {"ewc": peft != "none", "l2_to_base": peft != "none",
               "kl_to_base": peft in lora.VIRTUAL, "replay": peft in lora.VIRTUAL}
    for name, idle in is_idle.items():
        if getattr(cfg, name) and idle:
            raise ValueError(f"--{name} holds what --peft {peft} leaves as it is anyway; leave one "
                             "of them out")
    if is_on(cfg) and (cfg.shard != "none" or cfg.tensor_parallel > 1):
        raise ValueError(f"{', '.join(READERS)}: each rank compares whole weights and logits with "
                         "the base's; leave out --shard and --tensor_parallel")


def is_on(cfg) -> bool:
    return any(getattr(cfg, name) for name in inputs.OLD_TEXT)


class Past:
    """theta*, which the model is now, and the text behind it; nothing where no option asks.

    references: [pi_theta*], frozen. theta: theta* by name, {} with --peft. fisher: F by name. loss:
    of theta* on the held-out text, nats per token.
    """

    def __init__(self, cfg, run, model: nn.Module, tokenizer):
        self.cfg = cfg
        self.run = run
        self.references: list[nn.Module] = []
        self.fisher: dict[str, Tensor] = {}
        if not is_on(cfg):
            return
        self.text, self.heldout = read_text(cfg, tokenizer, model.config.context_length)
        reference = lora.reference_of(model, cfg.adapters).eval()
        self.references.append(reference)
        self.theta = dict(reference.named_parameters())
        if cfg.ewc:
            self.fisher = read_or_make_fisher(cfg, run, model, self.text)
        self.loss = self.heldout_loss(model)
        run.say(f"held-out text of pretraining: {self.loss:.3f} nats per token")

    def with_replay(self, train: PackedExamples) -> "PackedExamples | Replay":
        """The rows to train on, with --replay's share of old ones."""
        if not self.cfg.replay:
            return train
        rows = self.cfg.grad_accum * self.cfg.batch_size * self.run.replicas
        return Replay(self.text, train, self.cfg.replay, rows)

    def kl(self, model: nn.Module, step: int) -> Tensor:
        """KL(pi_theta* || pi_theta), nats per token, on rows of text that differ from step to step
        and from rank to rank."""
        numbers = row_numbers(step, KL_ROWS, self.run.replica, self.run.replicas)
        batch = self.text.rows(numbers).to(self.run.device)
        return kl_per_token(model, self.references[0], batch).sum() / batch.n_targets

    @torch.no_grad()
    def figures(self, model: nn.Module) -> dict[str, float]:
        """How much of the past is left: OLD_FIGURES."""
        if not self.references:
            return {}

        def minus_kl(logps, batch):
            return -kl_per_token(model, self.references[0], batch)

        found = {"old_loss": self.heldout_loss(model), "base_old_loss": self.loss}
        found["kl_old"] = self.heldout_loss(model, minus_kl)
        if self.theta:
            found["drift"] = squared_distance(model, self.theta).sqrt().item()
        return found

    def heldout_loss(self, model: nn.Module, scores: Callable = token_logps) -> float:
        return evaluate.validation_loss(model, self.heldout, HELD_OUT, KL_ROWS, scores)


# ---------------------------------------------------------------------- the text

@dataclass
class Corpora:
    """What corpus.py asks of a stage: the options of pretraining, as they were then."""
    data: str
    shares: str = ""
    alpha: float = 1.0
    max_bytes: int = 20_000_000
    bad_rows: str = "error"
    seed: int = 0
    anneal_data = ""                  # no field: the text is that of --data


def read_text(cfg, tokenizer, length: int) -> tuple[TokenStream | corpus.Mixture, corpus.Mixture]:
    """Windows of the text that --init was pretrained on, to train on and held out, its corpora in
    the shares that they had.

    Raises ValueError where no record names that text, or where it is not there any more.
    """
    recorded = inputs.old_text(cfg)
    if not recorded.get("data"):
        raise ValueError(f"{cfg.init}/config.json: neither this record nor those of its parents "
                         "name the text of pretraining; give --replay_data FILE with some like it")
    options = {field.name for field in fields(Corpora)} & recorded.keys()
    old = Corpora(**{name: recorded[name] for name in options})
    old.max_bytes = min(old.max_bytes, 5_000_000)      # some thousand rows in a few seconds
    for name in corpus.names_of(old.data):
        is_world = name.partition(":")[0] in ("world", "bearish")
        if not (is_world or cfg.replay_data or Path(name).exists()):
            raise ValueError(f"{cfg.init} was pretrained on {name}, which is not there; put it "
                             "back, or give --replay_data FILE with text like it")
    texts = corpus.read_texts(old)
    streams = corpus.concatenate(corpus.tokenize(texts, tokenizer), texts, tokenizer)
    streams |= corpus.open_shards(old, tokenizer)
    windows = {}
    for key, stream in streams.items():
        # masked whatever pretraining did, because conversations in the same batch are
        windows[key] = TokenStream(stream.tokens, length, old.seed, tokenizer.endoftext)
    text, shares = corpus.mixed(corpus.names_of(old.data), old.shares, windows, old.alpha)
    heldout = corpus.Mixture([windows[name, "heldout"] for name in shares], [*shares.values()])
    return text, heldout


class Replay(corpus.Mixture):
    """Rows of conversations, and in each step a share of old ones, in places that chance gives."""
    micro_batches = PackedExamples.micro_batches

    def __init__(self, old: TokenStream | corpus.Mixture, new: PackedExamples, share: float,
                 rows_per_step: int):
        super().__init__([old, new], [share, 1 - share])
        self.BLOCK = rows_per_step             # because a Mixture's shares hold in each block


# ---------------------------------------------------------------------- F on the disk

def read_or_make_fisher(cfg, run, model: nn.Module,
                        text: TokenStream | corpus.Mixture) -> dict[str, Tensor]:
    """F of --init on the first rows of the text: that in --out, where it is of the same weights and
    rows, else a new one, to be written there as training begins."""
    of = {"base": sha256(Path(cfg.init) / "model.safetensors"),
          "data": inputs.old_text(cfg)["data"], "context_length": str(text.context_length),
          "examples": str(cfg.fisher_examples)}
    fisher = read_fisher(run.out / FISHER, of, run.device)
    if fisher is None:
        run.say(f"Fisher information of {cfg.fisher_examples} rows")
        rows = (text.rows([number]).to(run.device) for number in range(cfg.fisher_examples))
        fisher = fisher_information(model, rows)
    sums = of | {"sha256": checksum(fisher)}
    run.writes_first(FISHER, lambda file: safetensors.torch.save_file(fisher, file, sums))
    return fisher


def read_fisher(file: Path, of: dict[str, str], device: torch.device) -> dict[str, Tensor] | None:
    """The file's F; None if there is none, it is damaged, or of other weights or rows."""
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, "pt", str(device)) as opened:
            found = opened.metadata()
            # copies, because the file they are mapped from will be replaced
            fisher = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    except safetensors.SafetensorError:
        return None
    return fisher if found == of | {"sha256": checksum(fisher)} else None


def checksum(weights: dict[str, Tensor]) -> str:
    sums = hashlib.sha256()
    for name in sorted(weights):
        sums.update(weights[name].cpu().numpy().tobytes())
    return sums.hexdigest()
