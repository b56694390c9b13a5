"""
Task-specific fine-tuning (001 section 2.2, 004): one linear head on a pretrained model, for classes
of texts, labels of words and answer spans.

  1. INITIALIZE         theta <- theta*, the LM head replaced by W, b; 004: what of theta is frozen
  2. DATA FORMATTING    texts as tokens, with their labels (labels.py)
  3. TRAINING LOOP      3.1 sample  3.2 forward  3.3 backward  3.4 update
  4. RETURN theta_ft

Minimise the mean over all texts, words or answers of

    class    -log softmax(W h + b)_c                  h: the pooled state of the text (--pool)
    tokens   -log softmax(W h_t + b)_c                h_t: the state at the last token of a word
    span     -log p(a_start | x) - log p(a_end | x)   p: softmax over the passage's tokens t of one
                                                      of the two numbers W h_t + b

--pool: last, a decoder's last token, which alone has seen all others; cls, an encoder's first; mean
over all. A question's answer is the likeliest legal span: start <= end, inside the passage, at most
--max_span tokens. --train freezes by the size of the data (004): little, train the head; more, the
last blocks too; much, all. --unfreeze gradual begins with the head, and lets one more layer learn,
from the top down, every --unfreeze_every steps (Howard & Ruder 2018).

Differs from the document:
  2.2  the pooled state is not always that of [CLS], which a decoder has not.
  3.4  the gradient is clipped; the learning rate warms up and falls by a cosine to a tenth.

    python train_classifier.py                           # moods in the embedded world: all right
    python train_classifier.py --family inference        # what follows: 83 %, by the first word
    python train_classifier.py --task tokens --data words.jsonl --train last_k --last_k 1
    python train_classifier.py --task span --optimizer muon --lr 4e-3 --steps 800 --n_examples 20000
                                         # 84 % exact: a decoder chooses a start before it reads on
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import labels
import lora
from heads import WithHead
from labels import LabelledBatch, LabelledTexts
from model import parameter_count
from plumbing.folders import load_any_model, trunk_of
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line, nested, refuse_unread
from plumbing.run import start
from readers import read_classes, read_spans, read_words

READERS = {"class": read_classes, "tokens": read_words, "span": read_spans}
# Of each architecture, the usual one first.
POOLS = {"decoder": ("last", "mean"), "prefix": ("last", "mean"), "encoder": ("cls", "mean")}


@dataclass
class Config(Options):
    init: str = "out/pretrain"        # model folder to start from; a head in it is replaced
    out: str = "out/classifier"       # model folder to write
    task: str = "class"               # what has a label: class | tokens | span
    data: str = "world"               # texts with labels: world, world:SEED or JSONL
    family: str = ""                  # of a world's classes: inference; empty: sentiment
    n_examples: int = 5000            # how many to take, at most, >= 1
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # texts longer than the context: error | left | drop
    context_length: int = 0           # tokens of a text; 0: the model's own
    pool: str = ""                    # last|mean (decoder), cls|mean (encoder); empty: not mean
    max_span: int = 30                # longest answer, in tokens, >= 1
    train: str = "all"                # what learns: head | last_k (blocks, and the head) | all
    last_k: int = 2                   # so many blocks and the norm behind them, >= 1
    unfreeze: str = "at_once"         # how --train says it: at_once | gradual (from the head down)
    unfreeze_every: int = 50          # steps until the next layer learns as well, >= 1
    steps: int = 300                  # optimizer steps (T_ft), >= 1
    batch_size: int = 16              # texts per step and rank, >= 1
    optimizer: str = "adamw"          # adamw | adam | muon
    lr: float = 1e-3                  # peak learning rate
    warmup: int = 30                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    eval_every: int = 100             # steps between evaluations
    eval_examples: int = 500          # held-out texts, >= 1
    save_every: int = 200             # steps between checkpoints
    adapters: lora.Options = nested(lora.Options)          # what learns of the layers of --train


# ---------------------------------------------------------------------- the loss

def class_nll(logits: Tensor, classes: Tensor) -> Tensor:
    """-log softmax(logits)_c (001 section 2.2). logits: (n, C); classes: (n,) -> (n,) nats."""
    logps = logits.log_softmax(-1)
    return -logps.gather(1, classes[:, None]).squeeze(1)


def span_nll(values: Tensor, span: Tensor, passage: Tensor) -> Tensor:
    """-log p(a_start) - log p(a_end), each a softmax over the passage (001 section 2.2).

    values: (B, T, 2), for start and end; span: (B, 2); passage: (B, T) bool -> (B,) nats.
    """
    values = values.masked_fill(~passage[..., None], -torch.inf)
    starts, ends = values.unbind(-1)                                           # (B, T) each
    a_start, a_end = span.unbind(1)                                            # (B,) each
    start_nll = class_nll(starts, a_start)
    end_nll = class_nll(ends, a_end)
    return start_nll + end_nll


def pooled(values: Tensor, real: Tensor, pool: str) -> Tensor:
    """W h + b of the pooled state h: (B, T, C) -> (B, C). real: (B, T) bool, False on padding.

    values are W h_t + b at every token; their mean is W mean(h_t) + b, because W is linear.
    """
    n_real = real.sum(1, keepdim=True)                                         # (B, 1)
    if pool == "mean":
        total = (values * real[..., None]).sum(1)
        return total / n_real
    if pool == "cls":
        return values[:, 0]
    rows = torch.arange(len(values), device=values.device)
    return values[rows, n_real.squeeze(1) - 1]


def numbers_of(model: Callable, batch: LabelledBatch, cfg: Config) -> Tensor:
    """All that the head says about the labels: class (B, C), tokens (n, C), span (B, T, 2)."""
    inputs = {"documents": batch.documents}
    if batch.segments is not None:
        inputs["segments"] = batch.segments
    values = model(batch.tokens, **inputs)                                     # (B, T, C)
    if cfg.task == "class":
        return pooled(values, batch.loss_mask, cfg.pool)
    if cfg.task == "tokens":
        return values[batch.loss_mask]
    return values


def nll_of(numbers: Tensor, batch: LabelledBatch, cfg: Config) -> Tensor:
    """-log p of each label, in nats."""
    if cfg.task == "span":
        return span_nll(numbers, batch.labels, batch.loss_mask)
    return class_nll(numbers, batch.labels)


# ---------------------------------------------------------------------- held-out texts

def best_span(values: Tensor, passage: Tensor, max_span: int) -> Tensor:
    """The legal span i <= j < i + max_span of the passage with the largest start_i + end_j, which
    is log p up to a constant. values: (B, T, 2); passage: (B, T) bool -> (B, 2)."""
    starts, ends = values.unbind(-1)
    sums = starts[:, :, None] + ends[:, None, :]                               # (B, T, T)
    legal = passage[:, :, None] & passage[:, None, :]
    legal = legal.triu().tril(max_span - 1)                                    # 0 <= j - i
    sums = sums.masked_fill(~legal, -torch.inf)
    best = sums.flatten(1).argmax(1)                                           # (B,): i T + j
    T = passage.shape[1]
    first = best // T
    last = best % T
    return torch.stack([first, last], 1)


@torch.no_grad()
def heldout_figures(model: WithHead, heldout: LabelledTexts, cfg: Config) -> dict:
    """Loss in nats per label, and how good the answers to the task are (labels.py)."""
    nll = []
    answers = []
    truths = []
    for batch in heldout.epoch(cfg.batch_size):
        batch = batch.to(model.device)
        numbers = numbers_of(model, batch, cfg)
        nll.append(nll_of(numbers, batch, cfg).cpu())
        if cfg.task == "span":
            numbers = best_span(numbers, batch.loss_mask, cfg.max_span)
        answers.append(numbers.cpu())
        truths.append(batch.labels.cpu())
    figures = {"val_loss": torch.cat(nll).mean().item()}
    return figures | heldout.figures(torch.cat(answers), torch.cat(truths))


# ---------------------------------------------------------------------- what is frozen, and the run

def layers_of(model: WithHead) -> list[list[nn.Parameter]]:
    """The trainable parameters from the top down: the head, the blocks, the embeddings."""
    # not trainable are a base under --peft, and an untied LM head, on which nothing here depends
    def trainable(module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters() if p.requires_grad]

    trunk = model.trunk
    blocks = [trainable(block) for block in reversed(trunk.blocks)]
    blocks[0] += trainable(trunk.norm)                     # behind the last block
    inside = {p for block in blocks for p in block}
    embeddings = [p for p in trainable(trunk) if p not in inside]
    return [trainable(model.head), *blocks, embeddings]


def n_learning(step: int, n: int, cfg: Config) -> int:
    """How many layers from the top learn in a step, of the n that ever will."""
    if cfg.unfreeze == "gradual":
        return min(n, 1 + step // cfg.unfreeze_every)
    return n


def freeze(layers: list[list[nn.Parameter]], n: int) -> None:
    """Let the first n layers learn, and no other."""
    for i, layer in enumerate(layers):
        for parameter in layer:
            parameter.requires_grad_(i < n)


def refuse_misfits(cfg: Config, trunk) -> None:
    """Raises ValueError for options that do not go together, or not with this model."""
    refuse_unread(cfg, {"pool": ("class",), "family": ("class",), "max_span": ("span",)},
                  choice="task")
    refuse_unread(cfg, {"last_k": ("last_k",), "unfreeze": ("last_k", "all")}, choice="train")
    refuse_unread(cfg, {"unfreeze_every": ("gradual",)}, choice="unfreeze")
    pools = POOLS.get(trunk.architecture)
    if pools is None:
        raise ValueError(f"--init {cfg.init} is an {trunk.architecture}; give a decoder or an "
                         "encoder")
    if cfg.pool not in ("", *pools):
        raise ValueError(f"--pool {cfg.pool}: of an {trunk.architecture} give "
                         f"{' or '.join(pools)}")
    n_blocks = len(trunk.blocks)
    if cfg.train == "last_k" and cfg.last_k > n_blocks:
        raise ValueError(f"--last_k {cfg.last_k}: the model has {n_blocks} blocks")


def read_rows(cfg: Config) -> tuple[list[dict], list[dict]]:
    """The texts to train on and the held-out ones."""
    read = READERS[cfg.task]
    options = {"seed": cfg.seed, "bad_rows": cfg.bad_rows}
    if cfg.family:
        options["family"] = cfg.family
    train = read(cfg.data, split="train", n=cfg.n_examples, **options)
    heldout = read(cfg.data, split="heldout", n=cfg.eval_examples, **options)
    return train, heldout


def main(cfg: Config) -> dict:
    run = start(cfg, __file__)

    # 1. INITIALIZE
    model, tokenizer = load_any_model(cfg.init, run.device, run.dtype, cfg.context_length)
    trunk = trunk_of(model)
    refuse_misfits(cfg, trunk)
    cfg = replace(cfg, pool=cfg.pool or POOLS[trunk.architecture][0])
    lora.begin(trunk, cfg.adapters, run)
    trunk.eval()                               # because noisy routers would blur what is compared
    trunk.gradient_checkpointing = cfg.gradient_checkpointing
    train_rows, heldout_rows = read_rows(cfg)
    classes = labels.classes_of(train_rows, cfg.task)
    model = WithHead(trunk, len(classes), zero=True)       # W, b: at first all classes are alike
    layers = layers_of(model)
    n_layers = {"head": 1, "last_k": 1 + cfg.last_k, "all": len(layers)}[cfg.train]
    freeze(layers, n_layers)

    # 2. DATA FORMATTING
    train = LabelledTexts(train_rows, classes, tokenizer, trunk, cfg)
    heldout = LabelledTexts(heldout_rows, classes, tokenizer, trunk, cfg)
    forward = run.prepare(model, unused_parameters=cfg.unfreeze == "gradual")
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    majority = labels.majority(train, heldout)
    n_trainable = parameter_count(model, trainable=True)
    run.say(f"{len(train)} texts, {n_trainable:,} parameters train; to beat: {majority:.1%} of the "
            "held-out labels are the most frequent one of training")
    run.forecast(model, length=train.mean_length())

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        freeze(layers, n_learning(step, n_layers, cfg))
        # 3.1 Sample mini-batch
        batch = train.batch(step, cfg.batch_size, run.rank, run.world_size)
        batch = batch.to(run.device)
        # the mean over ranks and not the sum, because DDP will divide the gradients by their number
        n_labels = run.mean_over_ranks(len(batch.labels))

        # 3.2 FORWARD PASS: -log p of each label
        numbers = numbers_of(forward, batch, cfg)
        nll = nll_of(numbers, batch, cfg)
        loss = nll.sum() / n_labels
        # 3.3 BACKWARD PASS
        run.backward(loss)

        # 3.4 UPDATE
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        figures = {"loss": loss}
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, cfg)
        tokens = batch.tokens.numel()
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    lora.end(trunk, cfg.adapters, run)
    # 4. RETURN theta_ft, with what the head's numbers mean
    results = {"classes": classes, "pool": cfg.pool, "majority": majority}
    results |= run.last_with("val_", "accuracy", "macro_", "ece", "entity_", "exact_", "span_")
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
