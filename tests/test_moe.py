"""moe.py: every way of routing by hand and against loops that an eye can check, the layer against
loops, and what must not change its answers."""
import pytest
import torch
import torch.nn.functional as F

import data
import moe
from model import ModelConfig, Transformer, active_parameter_count, parameter_count
from moe import MoE
from plumbing.folders import load_model, save_model
from plumbing.optimizers import Muon
from sample import generate
from scoring import token_logps
from tokenizer import Tokenizer

torch.set_num_threads(1)


def routed(routes: moe.Routes) -> set:
    """{(expert, token)} of a dispatch list."""
    offsets = routes.offsets.tolist()
    return {(e, t) for e, (a, b) in enumerate(zip(offsets, offsets[1:]))
            for t in routes.tokens[a:b].tolist()}


def probabilities(N=9, E=4, seed=0):
    return torch.randn(N, E, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# ---------------------------------------------------------------------- choosing

def test_top_k_by_hand():
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    experts, gates = moe.top_k(probs, 2)
    assert experts.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(gates, torch.tensor([[2 / 3, 1 / 3], [5 / 8, 3 / 8]]))


def test_one_expert_keeps_its_probability_as_gate_so_that_the_router_learns():
    logits = torch.zeros(3, 4, requires_grad=True)
    experts, gates = moe.top_k((logits + torch.tensor([0.0, 1, 0, 0])).softmax(-1), 1)
    assert (experts == 1).all() and (gates < 0.5).all()
    gates.sum().backward()
    assert logits.grad.abs().max() > 0.1


def test_a_bias_moves_the_choice_and_no_gate():
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    experts, gates = moe.top_k(probs, 1, bias=torch.tensor([0.0, 0.25, 0.0]))
    assert experts.tolist() == [[1]]
    torch.testing.assert_close(gates, torch.tensor([[0.3]]))


def test_two_levels_by_hand_and_only_inside_the_best_groups():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0]]).log()            # within: 1/4, 3/4 | 1/2, 1/2
    groups = torch.tensor([[4.0, 1.0]]).log()                      # 4/5, 1/5
    both = moe.two_level(logits, groups, 2)
    torch.testing.assert_close(both, torch.tensor([[0.2, 0.6, 0.1, 0.1]]))
    one = moe.two_level(logits, groups, 1)
    torch.testing.assert_close(one, torch.tensor([[0.2, 0.6, 0.0, 0.0]]))
    experts, _ = moe.top_k(one, 2, bias=torch.tensor([0.0, 0.0, 9.0, 9.0]))
    assert set(experts[0].tolist()) == {0, 1}


def test_all_groups_of_two_levels_make_a_distribution():
    p = moe.two_level(torch.randn(5, 6), torch.randn(5, 3), 3)
    torch.testing.assert_close(p.sum(1), torch.ones(5))


def test_noise_has_the_width_that_softplus_gives_it():
    logits = torch.zeros(20_000, 2)
    noise = moe.add_noise(logits, torch.tensor([0.0, 3.0]).expand_as(logits))
    widths = torch.nn.functional.softplus(torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(noise.std(0), widths, rtol=0.03, atol=0)        # 6 deviations


# ---------------------------------------------------------------------- dispatching

@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_pair_is_dispatched_once_with_its_gate(k):
    probs = probabilities()
    experts, gates = moe.top_k(probs, k)
    routes = moe.dispatch(experts, gates, 4)
    assert routes.offsets[0] == 0 and routes.offsets[-1] == 9 * k
    expected = {(e, n): gates[n, i].item() for n in range(9) for i, e in
                enumerate(experts[n].tolist())}
    offsets = routes.offsets.tolist()
    found = {(e, routes.tokens[p].item()): routes.gates[p].item() for e in range(4)
             for p in range(offsets[e], offsets[e + 1])}
    assert found == expected


def test_first_choices_go_before_second_ones_and_early_tokens_before_late_ones():
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])       # expert 0 is full after 2
    keep = moe.within_capacity(experts, 2, 2)
    assert keep.tolist() == [[True, True],       # 0 first at expert 0; second at 1: after token 2
                             [True, False],      # expert 1 took token 2 (a first choice) and 0
                             [True, False],      # its second choice, expert 0, is full
                             [False, False]]     # came third at expert 0
    assert routed(moe.dispatch(experts, torch.ones(4, 2), 2, keep)) == {
        (0, 0), (0, 1), (1, 2), (1, 0)}


def test_within_capacity_equals_a_loop_over_the_queue():
    experts, _ = moe.top_k(probabilities(40, 5), 3)
    keep = moe.within_capacity(experts, 5, 13)
    taken = [0] * 5
    for slot in range(3):
        for n in range(40):
            e = experts[n, slot].item()
            assert keep[n, slot] == (taken[e] < 13)
            taken[e] += 1
    assert 0 < keep.sum() < keep.numel()


def test_capacity_counts_every_choice_of_a_token():
    assert moe.capacity(1.0, 64, 2, 8) == 16                   # 003 would say 8
    assert moe.capacity(1.25, 10, 1, 4) == 4                   # ceil(3.125)


def test_experts_that_nobody_chose_have_empty_ranges():
    routes = moe.dispatch(torch.tensor([[3], [3]]), torch.ones(2, 1), 5)
    assert routes.offsets.tolist() == [0, 0, 0, 0, 2, 2]


def test_expert_choice_gives_every_expert_its_best_tokens_and_the_same_work():
    probs = probabilities(12, 3)
    routes = moe.expert_choice(probs, 4)
    assert routes.offsets.tolist() == [0, 4, 8, 12]
    for e in range(3):
        mine = routes.tokens[4 * e:4 * e + 4]
        assert probs[mine, e].min() >= probs[:, e].sort().values[8]
        torch.testing.assert_close(routes.gates[4 * e:4 * e + 4], probs[mine, e])


# ---------------------------------------------------------------------- balancing

def test_the_balance_loss_is_one_at_balance_and_e_at_collapse():
    even = torch.full((8, 4), 0.25)
    experts = torch.arange(8)[:, None] % 4
    assert moe.balance_loss(even, moe.load(experts, 4)) == pytest.approx(1)
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(8, 4)
    assert moe.balance_loss(one, moe.load(one.argmax(1, keepdim=True), 4)) == 4


def test_the_balance_loss_pushes_probability_from_busy_to_idle_experts():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    probs = logits.softmax(-1)
    moe.balance_loss(probs, moe.load(moe.top_k(probs, 1)[0], 2)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_padding_counts_in_no_statistic():
    probs, logits = probabilities(6, 3), torch.randn(6, 3)
    real = torch.tensor([True, True, False, True, False, False])
    experts, _ = moe.top_k(probs, 2)
    load = moe.load(experts, 3, real)
    torch.testing.assert_close(load, moe.load(experts[real], 3))
    torch.testing.assert_close(moe.balance_loss(probs, load, real),
                               moe.balance_loss(probs[real], load))
    torch.testing.assert_close(moe.z_loss(logits, real), moe.z_loss(logits[real]))
    nothing = torch.zeros(6, dtype=torch.bool)
    assert moe.balance_loss(probs, moe.load(experts, 3, nothing), nothing) == 0


def test_load_is_counted_before_dropping_and_sums_to_one():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1]])
    torch.testing.assert_close(moe.load(experts, 4), torch.tensor([3, 2, 1, 0]) / 6)


def test_z_loss_by_hand():
    assert moe.z_loss(torch.zeros(5, 4)) == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_nudging_the_bias_brings_the_load_to_balance():
    """A router that prefers expert 0 by far: after some nudges all experts are chosen alike."""
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    probs = (logits + torch.tensor([3.0, 1.0, 0.0, 0.0])).softmax(-1)
    bias, loads = torch.zeros(4), []
    for _ in range(1500):
        loads.append(moe.load(moe.top_k(probs, 2, bias)[0], 4))
        bias = moe.nudged(bias, loads[-1], 0.001)
    assert loads[0].max() > 0.45 and (loads[-1] - 0.25).abs().max() < 0.02


# ---------------------------------------------------------------------- the layer

SIZES = {"vocab_size": 40, "context_length": 24, "d_model": 16, "n_layers": 2, "n_heads": 2,
         "n_experts": 6, "top_k": 2}                      # d_ff 48, d_expert 32


def tiny(seed=0, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_tokens(*shape, seed=1):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def expert(layer: MoE, e: int, x):
    gate, up = (layer.w13[e] @ x).chunk(2)
    return layer.w2[e] @ (F.silu(gate) * up)


def layer_by_loops(layer: MoE, x):
    """(N, D) -> (N, D): token after token, queue after queue, from the formulas alone."""
    config, N = layer.config, len(x)
    logits = x @ layer.router.weight.T
    p, allowed = logits.softmax(-1), torch.ones(logits.shape, dtype=torch.bool)
    if config.expert_groups:
        p_group = (x @ layer.group_router.weight.T).softmax(-1)
        of_groups = logits.chunk(config.expert_groups, -1)
        p = torch.cat([p_group[:, g:g + 1] * of_groups[g].softmax(-1)
                       for g in range(config.expert_groups)], -1)
        for n in range(N):
            best = p_group[n].argsort(descending=True)[:config.top_groups].tolist()
            allowed[n] = torch.tensor([e * config.expert_groups // config.n_experts in best
                                       for e in range(config.n_experts)])
    bias = 0 if layer.bias is None else layer.bias
    wants = [[e for e in (p[n] + bias).argsort(descending=True).tolist()
              if allowed[n, e]][:config.top_k] for n in range(N)]
    places, taken, y = None, [0] * config.n_experts, torch.zeros_like(x)
    if config.capacity_factor and layer.training:
        places = -int(-config.capacity_factor * config.top_k * N // config.n_experts)
    for slot in range(config.top_k):
        for n in range(N):
            e = wants[n][slot]
            taken[e] += 1
            if places is None or taken[e] <= places:
                chosen = sum(p[n, i] for i in wants[n]) if config.top_k > 1 else 1
                y[n] += p[n, e] / chosen * expert(layer, e, x[n])
    if config.n_shared_experts:
        gate, up = layer.shared.w13(x).chunk(2, -1)
        y += (F.silu(gate) * up) @ layer.shared.w2.weight.T
    return y


OPTIONS = [{}, {"top_k": 1}, {"n_shared_experts": 2}, {"capacity_factor": 0.7},
           {"capacity_factor": 1.0, "top_k": 3}, {"balance": "bias"}, {"balance": "none"},
           {"expert_groups": 3, "top_groups": 2}, {"expert_groups": 2, "balance": "bias"},
           {"n_experts": 12, "top_k": 1, "d_expert": 8}]          # the last: some experts are empty


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_equals_a_loop_over_its_tokens_in_output_and_gradients(options):
    layer = tiny(**options).blocks[0].mlp
    if options.get("balance") == "bias":
        layer.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x = torch.randn(1, 9, 16, requires_grad=True)
    parameters = [p for p in layer.parameters()]
    upstream = torch.randn(9, 16)
    found = layer(x, None)[0]
    expected = layer_by_loops(layer, x[0])
    torch.testing.assert_close(found, expected)
    for ours, right in zip(torch.autograd.grad(found, [x, *parameters], upstream,
                                               materialize_grads=True),
                           torch.autograd.grad(expected, [x, *parameters], upstream,
                                               materialize_grads=True)):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_expert_choice_equals_a_loop_over_its_experts():
    layer = tiny(router="expert_choice").blocks[0].mlp
    x = torch.randn(9, 16)
    p = (x @ layer.router.weight.T).softmax(-1)
    y = torch.zeros_like(x)
    for e in range(6):
        for n in p[:, e].argsort(descending=True)[:3].tolist():   # 3 = 2 * 9 / 6
            y[n] += p[n, e] * expert(layer, e, x[n])
    torch.testing.assert_close(layer(x[None], None)[0], y)


# ---------------------------------------------------------------------- counts

def test_by_default_an_moe_costs_the_flops_of_the_dense_model_but_for_its_router():
    sizes = {"vocab_size": 40, "d_model": 48, "d_ff": 128, "n_layers": 3}
    dense = ModelConfig(**sizes)
    sparse = ModelConfig(**sizes, n_experts=8, top_k=2)
    assert sparse.d_expert == 64
    assert sparse.matmul_parameters() == dense.matmul_parameters() + 3 * 48 * 8


def test_total_and_active_parameters_by_hand():
    model = tiny(n_dense_layers=1, n_shared_experts=1, d_expert=16)
    attention, norms = 4 * 16 * 16, 2 * 16
    dense, one_expert, router = 3 * 16 * 48, 3 * 16 * 16, 6 * 16
    trunk = 40 * 16 + 16 + 2 * (attention + norms) + dense + router
    assert parameter_count(model) == trunk + 7 * one_expert
    assert active_parameter_count(model) == trunk + 3 * one_expert
    assert model.config.matmul_parameters() == active_parameter_count(model) - 2 * norms - 16


# ---------------------------------------------------------------------- properties

@pytest.mark.parametrize("options", OPTIONS)
def test_generating_with_a_cache_equals_scoring_all_at_once(options):
    model = tiny(**options).eval()
    prompt = some_tokens(1, 5)[0].tolist()
    answer = generate(model, [prompt], 6, (39,), temperature=0.0)[0]
    logits = model(torch.tensor([prompt + answer]))[0, 4:-1]
    assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("options", OPTIONS)
def test_in_evaluation_no_token_sees_later_ones_or_other_rows(options):
    model, tokens = tiny(**options).eval(), some_tokens(3, 8)
    logits = model(tokens)
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 7) % 40
    changed[1] = (changed[1] + 3) % 40
    after = model(changed)
    torch.testing.assert_close(after[0, :5], logits[0, :5])
    torch.testing.assert_close(after[2], logits[2])


def test_expert_choice_is_refused_for_generation():
    with pytest.raises(ValueError, match="expert_choice.*--router token_choice"):
        generate(tiny(router="expert_choice"), [[1, 2]], 3, (39,))


def test_the_order_of_the_experts_changes_nothing():
    model = tiny(balance="bias")
    model.blocks[0].mlp.bias.copy_(torch.linspace(-0.2, 0.2, 6))
    tokens, order = some_tokens(2, 9), torch.randperm(6)
    before = model(tokens)
    for block in model.blocks:
        for weight in (block.mlp.router.weight, block.mlp.w13, block.mlp.w2, block.mlp.bias):
            weight.data = weight.data[order]
    torch.testing.assert_close(model(tokens), before)


def test_a_dropped_token_passes_on_its_residual():
    """All tokens alike: they want the same experts, and only the first two find a place."""
    layer = tiny(capacity_factor=0.5).blocks[0].mlp
    y = layer(torch.ones(1, 12, 16), None)[0]                     # 0.5 * 2 * 12 / 6 = 2 places
    assert (y[:2].abs().amax(1) > 0).all() and (y[2:] == 0).all()
    assert layer.dropped == pytest.approx(10 / 12)
    assert (layer.eval()(torch.ones(1, 12, 16), None).abs().amax(-1) > 0).all()


def test_padding_leaves_load_and_losses_alone():
    model = tiny()
    tokens = some_tokens(2, 10)
    documents = torch.zeros(2, 10, dtype=torch.int32)
    model(tokens[:, :7], documents=documents[:, :7])
    alone = moe.router_loss(model).item(), moe.balance_experts(model)
    documents[:, 7:] = -1
    model(tokens, documents=documents)
    assert moe.router_loss(model).item() == pytest.approx(alone[0], rel=1e-5)
    torch.testing.assert_close(moe.balance_experts(model), alone[1])


def test_packed_examples_mark_their_padding():
    examples = [{"messages": [{"role": "user", "content": "hi"},
                              {"role": "assistant", "content": "ho"}], "where": "row 1"}]
    examples = data.format_examples(examples, Tokenizer.bytes())
    packed = data.PackedExamples(examples, Tokenizer.bytes(), 32, seed=0)
    batch = packed.batch(0, 1)
    padding = batch.tokens == Tokenizer.bytes().pad
    assert padding.any() and torch.equal(batch.documents < 0, padding)


def test_noise_is_for_training_alone():
    model, tokens = tiny(router_noise=True), some_tokens(2, 9)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


# ---------------------------------------------------------------------- balance

def test_the_auxiliary_loss_is_the_sum_of_both_losses_over_the_blocks():
    model = tiny(balance_coef=0.5, z_coef=0.25)
    inputs = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    model(some_tokens(1, 9))
    expected = 0.0
    for block, x in zip(model.blocks, inputs):
        logits = x @ block.mlp.router.weight.T
        p = logits.softmax(-1)
        f = F.one_hot(p.topk(2).indices, 6).sum((0, 1)) / 18
        expected += 0.5 * 6 * (f * p.mean(0)).sum() + 0.25 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(moe.router_loss(model), expected)
    assert moe.router_loss(Transformer(ModelConfig(vocab_size=9))) == 0


def test_biases_are_nudged_towards_idle_experts_after_a_step():
    model = tiny(balance="bias", bias_rate=0.125)
    for _ in range(2):                                             # two micro-batches
        model(some_tokens(2, 9))
    loads = moe.balance_experts(model)
    assert loads.shape == (2, 6)
    torch.testing.assert_close(loads.sum(1), torch.ones(2))
    for block, load in zip(model.blocks, loads):
        assert torch.equal(block.mlp.bias, 0.125 * (1 / 6 - load).sign())
    assert moe.balance_experts(model) is None                         # nothing was routed since
    biases = [block.mlp.bias.clone() for block in model.blocks]
    model(some_tokens(2, 9))
    moe.balance_experts(model, nudge=False)                             # as after a skipped update
    assert all(torch.equal(block.mlp.bias, bias) for block, bias in zip(model.blocks, biases))
    assert moe.balance_experts(model) is None                         # but its load is forgotten


def test_evaluation_counts_in_no_statistic():
    model = tiny()
    with torch.no_grad():
        model(some_tokens(2, 9))
    assert moe.balance_experts(model) is None and moe.router_loss(model) == 0


def train(model, steps=60, **options):
    """The busiest expert's load over its fair share, at first and at last."""
    optimizer = Muon(model, lr=3e-3)
    loads = []
    for step in range(steps):
        tokens = some_tokens(8, 16, seed=step) // 2                # 20 tokens only
        batch = data.Batch(tokens, torch.ones_like(tokens).bool(), None, None, None)
        loss = -token_logps(model.logps, batch).mean()
        (loss + moe.router_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append((6 * moe.balance_experts(model).max()).item())
    return sum(loads[:5]) / 5, sum(loads[-5:]) / 5


@pytest.mark.parametrize("balance", [{"balance": "loss", "balance_coef": 0.1},
                                     {"balance": "bias", "bias_rate": 0.01}])
def test_balancing_evens_out_a_router_that_prefers_one_expert(balance):
    def skewed(**options):
        model = tiny(z_coef=0.0, **options)
        for block in model.blocks:
            block.mlp_norm.weight.data[0] = 3.0
            block.mlp.router.weight.data[0] = 0.3 * block.mlp.router.weight.data[0].abs()
            model.embedding.weight.data[:, 0] = 1.0
            block.mlp.router.weight.data[0, 0] = 1.0
        return model
    first, last = train(skewed(**balance))
    _, without = train(skewed(balance="none"))
    assert first > 2 and last < 2 < 2.5 < without


# ---------------------------------------------------------------------- the rest of the system

def test_muon_makes_the_step_of_every_expert_orthogonal_by_itself_and_leaves_routers_to_adamw():
    model = tiny()
    model(some_tokens(12, 20)).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, lr=1.0)
    optimizer.step()
    step = before["blocks.0.mlp.w13"] - model.blocks[0].mlp.w13
    for e in range(6):
        singular = torch.linalg.svdvals(step[e]) / (0.2 * 64 ** 0.5)
        assert 0.5 < singular.min() and singular.max() < 1.3
    rules = {id(p): group["rule"] for group in optimizer.param_groups for p in group["params"]}
    assert rules[id(model.blocks[0].mlp.router.weight)] == "adamw"
    assert rules[id(model.blocks[0].mlp.w2)] == "muon"


@pytest.mark.parametrize("options", OPTIONS)
def test_a_saved_moe_comes_back_the_same(options, tmp_path):
    tokenizer = Tokenizer.bytes()
    model = tiny(**options, vocab_size=tokenizer.vocab_size)
    save_model(tmp_path, model, tokenizer)
    again, _ = load_model(tmp_path)
    tokens = some_tokens(1, 7)
    assert torch.equal(again(tokens), model(tokens)) and again.config == model.config


def test_gradient_checkpointing_gives_the_same_gradients_with_the_auxiliary_loss():
    found = []
    for checkpointing in (False, True):
        model = tiny(router_noise=True, capacity_factor=1.0)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        (model(some_tokens(2, 9)).sum() + moe.router_loss(model)).backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_compiler_can_trace_an_moe_without_a_break():
    model = tiny(capacity_factor=1.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = some_tokens(2, 9)
    found = []
    for forward in (model, compiled):
        model.zero_grad()
        (forward(tokens).logsumexp(-1).sum() + moe.router_loss(model)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad, said", [
    ({"top_k": 7}, "top_k is 7; a token can choose among 6"),
    ({"router": "best"}, "router is 'best'"), ({"balance": "no"}, "balance is 'no'"),
    ({"expert_groups": 4}, "6 experts cannot stand in expert_groups 4"),
    ({"expert_groups": 3, "top_groups": 1, "top_k": 3}, "top_k is 3; .* among 2"),
    ({"expert_groups": 2, "top_groups": 3}, "top_groups 3")])
def test_sizes_that_do_not_fit_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**SIZES | bad)
