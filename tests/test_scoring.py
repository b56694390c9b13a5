"""scoring.py: every function by hand numbers, at its limits, and against slow loops."""
import math

import pytest
import torch
from tiny import END, TOKENIZER, conversation, slow_logps, tiny_model, write_rows

import data
import readers
from data import Batch
from model import ModelConfig, Transformer
from objectives import DenoisingBatch
from scoring import (
    denoised_logps,
    kl_k1,
    kl_k3,
    last_value,
    masked_mean,
    ranked_right,
    response_logps,
    response_rewards,
    score_pairs,
    token_logps,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# p(next | token) of a language of three tokens
BIGRAMS = torch.tensor([[0.5, 0.25, 0.25],
                        [0.1, 0.8, 0.1],
                        [0.2, 0.2, 0.6]])


def bigram_logps(tokens, targets, loss_mask=None, documents=None, positions=None,
                 temperature=1.0, with_entropy=False, **others):
    """Log p of the targets in the language of BIGRAMS, in the form of Transformer.logps."""
    logps = BIGRAMS.log()[tokens, targets]
    return logps if loss_mask is None else logps * loss_mask


def small() -> Transformer:
    """A model of 40 tokens in which no weight is still at its starting zero or one."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=40, context_length=24, d_model=32, n_layers=2,
                                    n_heads=4, n_kv_heads=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_tokens(*shape, seed=1, vocab_size=40):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def a_batch(tokens, loss_mask=None) -> Batch:
    loss_mask = torch.ones_like(tokens).bool() if loss_mask is None else loss_mask
    return Batch(tokens, loss_mask, None, None, torch.arange(len(tokens)))


def made_pairs(n):
    """Prompts and answers of different lengths; the chosen one says yes."""
    return [{"prompt": f"{i}{'?' * (i % 5)}", "chosen": "yes" + "!" * (i % 3),
             "rejected": "no" + "." * (i % 4)} for i in range(n)]


def read_pairs(tmp_path, n):
    rows = readers.read_preferences(write_rows(tmp_path / "pairs.jsonl", made_pairs(n)))
    return data.PreferencePairs(rows, TOKENIZER, 64, seed=0)


def slow_score(model, pair, side):
    """Sum of log p over the answer's bytes and its <|end|>, one prefix at a time."""
    prompt = TOKENIZER.prompt([{"role": "user", "content": pair["prompt"]}])
    answer = [*TOKENIZER.encode(pair[side]), TOKENIZER.end]
    return slow_logps(model, prompt + answer)[len(prompt) - 1:].sum()


# ---------------------------------------------------------------------- log-probs of tokens

def test_entry_t_minus_1_is_the_score_of_token_t_by_hand():
    tokens = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    every = token_logps(bigram_logps, a_batch(tokens))
    torch.testing.assert_close(every.exp(), torch.tensor([[0.25, 0.8, 0.1], [0.6, 0.2, 0.5]]))
    loss_mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()      # nothing predicts token 0
    some = token_logps(bigram_logps, a_batch(tokens, loss_mask))
    torch.testing.assert_close(some, torch.tensor([[0.0, math.log(0.8), math.log(0.1)],
                                                   [0.0, 0.0, math.log(0.5)]]))


def test_documents_and_positions_go_with_the_tokens_that_are_read():
    given = {}

    def watched(tokens, targets, **options):
        given.update(options, tokens=tokens, targets=targets)
    tokens = some_tokens(2, 5)
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]])
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])
    loss_mask = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    batch = Batch(tokens, loss_mask, documents, positions, torch.arange(2))
    token_logps(watched, batch, temperature=0.5)
    for name, expected in (("tokens", tokens[:, :-1]), ("targets", tokens[:, 1:]),
                           ("loss_mask", loss_mask[:, 1:]), ("documents", documents[:, :-1]),
                           ("positions", positions[:, :-1])):
        assert torch.equal(given[name], expected), name
    assert given["temperature"] == 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_token_logps_are_the_log_softmax_of_the_logits_before_each_token(temperature):
    model, tokens = small(), some_tokens(3, 12)
    loss_mask = some_tokens(3, 12, seed=2, vocab_size=2).bool()
    with torch.no_grad():
        scores, entropy = token_logps(model.logps, a_batch(tokens, loss_mask), temperature, True)
        expected = (model(tokens) / temperature).log_softmax(-1)
    assert scores.shape == entropy.shape == (3, 11) and 10 < loss_mask[:, 1:].sum() < 25
    for b in range(3):
        for t in range(1, 12):
            logp = expected[b, t - 1]
            wanted = (logp[tokens[b, t]], -(logp.exp() * logp).sum()) if loss_mask[b, t] else (0, 0)
            assert scores[b, t - 1].item() == pytest.approx(float(wanted[0]), abs=2e-5)
            assert entropy[b, t - 1].item() == pytest.approx(float(wanted[1]), abs=2e-5)


def test_masked_scores_equal_the_unmasked_ones_where_the_mask_is_one():
    model, tokens = small(), some_tokens(3, 12)
    loss_mask = some_tokens(3, 12, seed=2, vocab_size=2).bool()
    every = token_logps(model.logps, a_batch(tokens))
    some = token_logps(model.logps, a_batch(tokens, loss_mask))
    assert (every < 0).all()
    torch.testing.assert_close(some, every * loss_mask[:, 1:], atol=1e-6, rtol=1e-6)


def test_equal_logits_score_minus_log_vocabulary_with_entropy_log_vocabulary():
    model = small()
    torch.nn.init.zeros_(model.embedding.weight)
    for temperature in (0.1, 1.0, 10.0):
        scores, entropy = token_logps(model.logps, a_batch(some_tokens(1, 6)), temperature, True)
        torch.testing.assert_close(scores, torch.full((1, 5), -math.log(40)))
        torch.testing.assert_close(entropy, torch.full((1, 5), math.log(40)))


def test_a_batch_without_targets_scores_zero_and_can_still_be_trained_on():
    model, tokens = small(), some_tokens(2, 6)
    scores = token_logps(model.logps, a_batch(tokens, torch.zeros_like(tokens).bool()))
    scores.sum().backward()
    assert scores.tolist() == [[0.0] * 5] * 2


def test_hidden_tokens_are_scored_beside_their_places_and_rows_of_both_sides_shifted():
    tokens = torch.tensor([[0, 1, 1, 2]])
    loss_mask = torch.tensor([[0, 1, 0, 1]]).bool()
    shifted = DenoisingBatch(tokens, loss_mask, None, None, torch.arange(1))
    torch.testing.assert_close(denoised_logps(bigram_logps, shifted),
                               torch.tensor([[math.log(0.25), 0.0, math.log(0.1)]]))
    beside = DenoisingBatch(tokens, loss_mask, None, None, torch.arange(1),
                            targets=torch.tensor([[2, 2, 2, 0]]))
    torch.testing.assert_close(denoised_logps(bigram_logps, beside),
                               torch.tensor([[0.0, math.log(0.1), 0.0, math.log(0.2)]]))


# ---------------------------------------------------------------------- log-probs of responses

def test_a_response_scores_the_sum_over_its_tokens_by_hand():
    tokens = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    loss_mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    found = response_logps(bigram_logps, a_batch(tokens, loss_mask))
    torch.testing.assert_close(found.exp(), torch.tensor([0.8 * 0.1, 0.6 * 0.2 * 0.5]))


def test_log_probs_are_summed_over_the_answer_and_its_end_only(tmp_path):
    model, pairs = tiny_model(), read_pairs(tmp_path, 6)
    batch = pairs.batch(0, 6)
    with torch.no_grad():
        found = response_logps(model.logps, batch)                     # chosen, then rejected
        expected = [slow_score(model, made_pairs(6)[i], side)
                    for side in ("chosen", "rejected") for i in batch.index.tolist()]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_scored_pairs_stand_in_the_order_of_the_pairs(tmp_path):
    model, pairs = tiny_model(), read_pairs(tmp_path, 11)
    scores = score_pairs(model, pairs, batch_size=4)             # the last batch is smaller
    with torch.no_grad():
        expected = torch.stack([torch.stack([slow_score(model, pair, side) for side in
                                             ("chosen", "rejected")]) for pair in made_pairs(11)])
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------- rewards

def test_the_last_value_by_hand():
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    loss_mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]]).bool()    # with a gap
    assert last_value(values, loss_mask).tolist() == [3, 8, 11]


def test_reward_is_the_scalar_at_the_end_token_of_the_answer():
    model, batch = tiny_model(head="scalar"), conversation(after=TOKENIZER.encode("junk"))
    values = model(batch.tokens)
    place = batch.tokens[0].tolist().index(END, len(TOKENIZER.prompt(
        [{"role": "user", "content": "Is it?"}])))
    assert batch.tokens[0, place] == END
    torch.testing.assert_close(response_rewards(model, batch), values[:, place, 0], rtol=0,
                               atol=0)


def test_tokens_after_the_answer_do_not_move_its_reward():
    model = tiny_model(head="scalar")
    reward = response_rewards(model, conversation())
    for after in ([TOKENIZER.pad] * 9, TOKENIZER.encode("no, never")):
        torch.testing.assert_close(response_rewards(model, conversation(after=after)), reward)
    for other in (conversation(answer="yep"), conversation(question="Is he?")):
        assert not torch.isclose(response_rewards(model, other), reward)


def test_rows_of_different_lengths_get_the_rewards_they_get_alone():
    model = tiny_model(head="scalar")
    sides = [conversation(answer=text) for text in ("a", "a much longer answer", "three")]
    rows = [(b.tokens[0].tolist(), b.loss_mask[0].tolist()) for b in sides]
    together = response_rewards(model, data.right_padded(rows, TOKENIZER.pad, 48, [0, 1, 2]))
    alone = torch.cat([response_rewards(model, batch) for batch in sides])
    torch.testing.assert_close(together, alone)
    assert together.std() > 0.01


def test_a_row_without_an_answer_is_an_error():
    batch = data.response_batch([[1, 2], [3]], [[4], []], TOKENIZER.pad, 64)
    with pytest.raises(ValueError, match="no response token"):
        response_rewards(tiny_model(head="scalar"), batch)


# ---------------------------------------------------------------------- means

def test_a_masked_mean_is_over_the_marked_entries_of_all_rows():
    x = torch.tensor([[1.0, 2, 3], [4, 5, 600]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)         # not (1.5 + 4) / 2
    assert masked_mean(x, torch.ones(2, 3)).item() == pytest.approx(x.mean().item())
    one = torch.zeros(2, 3)
    one[1, 2] = 1
    assert masked_mean(x, one).item() == 600


def test_the_gradient_of_a_masked_mean_is_one_over_the_marked_entries():
    x = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    masked_mean(x, mask).backward()
    torch.testing.assert_close(x.grad, mask / 4)


# ---------------------------------------------------------------------- estimators of the KL

def test_estimators_of_the_kl_by_hand():
    """A token that pi says with 1/2 and pi_ref with 1/4, and one the other way round."""
    logps = torch.tensor([0.5, 0.25]).log()
    ref_logps = torch.tensor([0.25, 0.5]).log()
    log2 = math.log(2)
    assert kl_k1(logps, ref_logps).tolist() == pytest.approx([log2, -log2])
    assert kl_k3(logps, ref_logps).tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2])


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_the_mean_of_an_estimator_under_pi_is_the_kl_divergence(estimator):
    pi, ref = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=pi),
                                              torch.distributions.Categorical(logits=ref))
    mean = (pi.exp() * estimator(pi, ref)).sum()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)


def test_equal_policies_have_estimates_of_exactly_zero():
    logps = torch.randn(5) * 30
    assert torch.equal(kl_k1(logps, logps), torch.zeros(5))
    assert torch.equal(kl_k3(logps, logps), torch.zeros(5))


def test_k3_is_never_negative_and_k1_is():
    logps, ref_logps = torch.randn(2, 1000, dtype=torch.float64)
    assert (kl_k3(logps, ref_logps) >= 0).all()
    assert (kl_k1(logps, ref_logps) < 0).any()


def test_k3_of_a_small_difference_is_half_its_square():
    """exp(d) - 1 - d = d^2 / 2 + d^3 / 6 + ...: within d / 3 of it."""
    difference = torch.tensor([-1e-3, -1e-4, 1e-4, 1e-3], dtype=torch.float64)
    logps = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(kl_k3(logps, difference), difference ** 2 / 2, rtol=4e-4, atol=0.0)


def test_k3_varies_less_than_k1_between_policies_that_are_close():
    pi = torch.randn(1000, dtype=torch.float64).log_softmax(-1)
    ref = (pi + 0.1 * torch.randn(1000, dtype=torch.float64)).log_softmax(-1)

    def variance(estimates):
        mean = (pi.exp() * estimates).sum()
        return (pi.exp() * (estimates - mean) ** 2).sum()
    assert variance(kl_k3(pi, ref)) < 0.02 * variance(kl_k1(pi, ref))


def test_ties_count_half():
    assert ranked_right(torch.tensor([2.0, 0.0, -1.0, 0.5])) == 0.625
    assert ranked_right(torch.zeros(5)) == 0.5
