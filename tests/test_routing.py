"""Every way of routing, by hand and against loops that an eye can check."""
import pytest
import torch

import routing


def routed(routes: routing.Routes) -> set:
    """{(expert, token)} of a dispatch list."""
    offsets = routes.offsets.tolist()
    return {(e, t) for e, (a, b) in enumerate(zip(offsets, offsets[1:]))
            for t in routes.tokens[a:b].tolist()}


def probabilities(N=9, E=4, seed=0):
    return torch.randn(N, E, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# ---------------------------------------------------------------------- choosing

def test_top_k_by_hand():
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    experts, gates = routing.top_k(probs, 2)
    assert experts.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(gates, torch.tensor([[2 / 3, 1 / 3], [5 / 8, 3 / 8]]))


def test_one_expert_keeps_its_probability_as_gate_so_that_the_router_learns():
    logits = torch.zeros(3, 4, requires_grad=True)
    experts, gates = routing.top_k((logits + torch.tensor([0.0, 1, 0, 0])).softmax(-1), 1)
    assert (experts == 1).all() and (gates < 0.5).all()
    gates.sum().backward()
    assert logits.grad.abs().max() > 0.1


def test_a_bias_moves_the_choice_and_no_gate():
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    experts, gates = routing.top_k(probs, 1, bias=torch.tensor([0.0, 0.25, 0.0]))
    assert experts.tolist() == [[1]]
    torch.testing.assert_close(gates, torch.tensor([[0.3]]))


def test_two_levels_by_hand_and_only_inside_the_best_groups():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0]]).log()            # within: 1/4, 3/4 | 1/2, 1/2
    groups = torch.tensor([[4.0, 1.0]]).log()                      # 4/5, 1/5
    both = routing.two_level(logits, groups, 2)
    torch.testing.assert_close(both, torch.tensor([[0.2, 0.6, 0.1, 0.1]]))
    one = routing.two_level(logits, groups, 1)
    torch.testing.assert_close(one, torch.tensor([[0.2, 0.6, 0.0, 0.0]]))
    experts, _ = routing.top_k(one, 2, bias=torch.tensor([0.0, 0.0, 9.0, 9.0]))
    assert set(experts[0].tolist()) == {0, 1}


def test_all_groups_of_two_levels_make_a_distribution():
    p = routing.two_level(torch.randn(5, 6), torch.randn(5, 3), 3)
    torch.testing.assert_close(p.sum(1), torch.ones(5))


def test_noise_has_the_width_that_softplus_gives_it():
    logits = torch.zeros(20_000, 2)
    noise = routing.add_noise(logits, torch.tensor([0.0, 3.0]).expand_as(logits))
    widths = torch.nn.functional.softplus(torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(noise.std(0), widths, rtol=0.03, atol=0)        # 6 deviations


# ---------------------------------------------------------------------- dispatching

@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_pair_is_dispatched_once_with_its_gate(k):
    probs = probabilities()
    experts, gates = routing.top_k(probs, k)
    routes = routing.dispatch(experts, gates, 4)
    assert routes.offsets[0] == 0 and routes.offsets[-1] == 9 * k
    expected = {(e, n): gates[n, i].item() for n in range(9) for i, e in
                enumerate(experts[n].tolist())}
    offsets = routes.offsets.tolist()
    found = {(e, routes.tokens[p].item()): routes.gates[p].item() for e in range(4)
             for p in range(offsets[e], offsets[e + 1])}
    assert found == expected


def test_first_choices_go_before_second_ones_and_early_tokens_before_late_ones():
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])       # expert 0 is full after 2
    keep = routing.within_capacity(experts, 2, 2)
    assert keep.tolist() == [[True, True],       # 0 first at expert 0; second at 1: after token 2
                             [True, False],      # expert 1 took token 2 (a first choice) and 0
                             [True, False],      # its second choice, expert 0, is full
                             [False, False]]     # came third at expert 0
    assert routed(routing.dispatch(experts, torch.ones(4, 2), 2, keep)) == {
        (0, 0), (0, 1), (1, 2), (1, 0)}


def test_within_capacity_equals_a_loop_over_the_queue():
    experts, _ = routing.top_k(probabilities(40, 5), 3)
    keep = routing.within_capacity(experts, 5, 13)
    taken = [0] * 5
    for slot in range(3):
        for n in range(40):
            e = experts[n, slot].item()
            assert keep[n, slot] == (taken[e] < 13)
            taken[e] += 1
    assert 0 < keep.sum() < keep.numel()


def test_capacity_counts_every_choice_of_a_token():
    assert routing.capacity(1.0, 64, 2, 8) == 16                   # 003 would say 8
    assert routing.capacity(1.25, 10, 1, 4) == 4                   # ceil(3.125)


def test_experts_that_nobody_chose_have_empty_ranges():
    routes = routing.dispatch(torch.tensor([[3], [3]]), torch.ones(2, 1), 5)
    assert routes.offsets.tolist() == [0, 0, 0, 0, 2, 2]


def test_expert_choice_gives_every_expert_its_best_tokens_and_the_same_work():
    probs = probabilities(12, 3)
    routes = routing.expert_choice(probs, 4)
    assert routes.offsets.tolist() == [0, 4, 8, 12]
    for e in range(3):
        mine = routes.tokens[4 * e:4 * e + 4]
        assert probs[mine, e].min() >= probs[:, e].sort().values[8]
        torch.testing.assert_close(routes.gates[4 * e:4 * e + 4], probs[mine, e])


# ---------------------------------------------------------------------- balancing

def test_the_balance_loss_is_one_at_balance_and_e_at_collapse():
    even = torch.full((8, 4), 0.25)
    experts = torch.arange(8)[:, None] % 4
    assert routing.balance_loss(even, routing.load(experts, 4)) == pytest.approx(1)
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(8, 4)
    assert routing.balance_loss(one, routing.load(one.argmax(1, keepdim=True), 4)) == 4


def test_the_balance_loss_pushes_probability_from_busy_to_idle_experts():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    probs = logits.softmax(-1)
    routing.balance_loss(probs, routing.load(routing.top_k(probs, 1)[0], 2)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_padding_counts_in_no_statistic():
    probs, logits = probabilities(6, 3), torch.randn(6, 3)
    real = torch.tensor([True, True, False, True, False, False])
    experts, _ = routing.top_k(probs, 2)
    load = routing.load(experts, 3, real)
    torch.testing.assert_close(load, routing.load(experts[real], 3))
    torch.testing.assert_close(routing.balance_loss(probs, load, real),
                               routing.balance_loss(probs[real], load))
    torch.testing.assert_close(routing.z_loss(logits, real), routing.z_loss(logits[real]))
    nothing = torch.zeros(6, dtype=torch.bool)
    assert routing.balance_loss(probs, routing.load(experts, 3, nothing), nothing) == 0


def test_load_is_counted_before_dropping_and_sums_to_one():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1]])
    torch.testing.assert_close(routing.load(experts, 4), torch.tensor([3, 2, 1, 0]) / 6)


def test_z_loss_by_hand():
    assert routing.z_loss(torch.zeros(5, 4)) == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_nudging_the_bias_brings_the_load_to_balance():
    """A router that prefers expert 0 by far: after some nudges all experts are chosen alike."""
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    probs = (logits + torch.tensor([3.0, 1.0, 0.0, 0.0])).softmax(-1)
    bias, loads = torch.zeros(4), []
    for _ in range(1500):
        loads.append(routing.load(routing.top_k(probs, 2, bias)[0], 4))
        bias = routing.nudged(bias, loads[-1], 0.001)
    assert loads[0].max() > 0.45 and (loads[-1] - 0.25).abs().max() < 0.02
