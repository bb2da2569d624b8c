"""The paper's synthetic experiment: its data against the definition, and a smaller case of its claim."""

import json

import pytest
import torch

from simnpo.benchmarks.paper import margins, weights
from simnpo.benchmarks.paper.chains import LEAK, OWN_STATES, STATES, chain, kl_to_truth
from simnpo.benchmarks.paper.experiment import PARTS, Size, make_data, training_rows
from simnpo.benchmarks.paper.synthetic import comparison, draw, markdown, retain_kl_when_forgotten, unlearn_both_ways

SMALL = Size(sequences=4000, epochs=8, batch_size=64, hidden=48, blocks=2, unlearn_steps=40, test_sequences=48)


@pytest.mark.parametrize("name", OWN_STATES)
def test_a_chain_stays_among_its_states(name):
    truth, own = chain(name), list(OWN_STATES[name])
    assert torch.allclose(truth.transitions.sum(1), torch.ones(STATES))
    assert torch.allclose(truth.initial[own].sum(), torch.tensor(1 - LEAK))
    assert torch.equal(truth.transitions[own[0]], truth.initial)
    assert torch.allclose(truth.transitions[9], torch.full((STATES,), 0.1))
    sequences = truth.sample(4000, 5, torch.Generator().manual_seed(0))
    assert sequences.shape == (4000, 5)
    # two standard errors of 4000 draws are 0.013
    assert torch.isin(sequences[:, 0], torch.tensor(own)).float().mean().item() == pytest.approx(1 - LEAK, abs=0.02)
    followed = sequences[:, 1][sequences[:, 0] == own[1]]
    assert (followed == own[2]).float().mean().item() == pytest.approx((1 - LEAK) / 3, abs=0.05)


def test_kl_is_zero_for_the_truth_alone():
    truth = chain("forget1")
    sequences = truth.sample(50, 6, torch.Generator().manual_seed(0))
    exact = truth.transitions[sequences[:, :-1]].log()
    assert kl_to_truth(exact, sequences, truth) == pytest.approx(0, abs=1e-6)
    # a model that knows nothing, at one state of the chain's own: log 10 less the entropy
    own = torch.full((1, 2), OWN_STATES["forget1"][0])
    entropy = -(truth.initial * truth.initial.log()).sum()
    assert kl_to_truth(torch.zeros(1, 1, STATES), own, truth) == pytest.approx(
        float(torch.tensor(10.0).log() - entropy)
    )


def test_short_sequences_are_padded_and_not_trained_on():
    data = make_data(PARTS["lengths"], SMALL, torch.Generator().manual_seed(0))
    inputs, targets = training_rows(data.train, ("forget1", "forget2"))
    assert inputs.shape == targets.shape == (1600, 19)
    assert (targets[:800] != -100).all()
    assert (targets[800:] != -100).sum(1).tolist() == [4] * 800
    assert torch.equal(inputs[800:, 1:4], targets[800:, :3])


def test_the_level_is_met_between_two_steps():
    curve = [{"forget1": x, "retain": y} for x, y in ((0.1, 0.0), (0.3, 0.1), (0.5, 0.3), (0.2, 0.9), (0.6, 0.9))]
    assert retain_kl_when_forgotten(curve, "forget1", 0.4) == pytest.approx(0.2)
    assert retain_kl_when_forgotten(curve, "forget1", 0.7) is None
    assert retain_kl_when_forgotten(curve[2:3], "forget1", 0.4) is None


@pytest.mark.slow
def test_simnpo_forgets_at_less_cost(tmp_path):
    """The claim on a narrower model and a fifth of the data, one seed of each part."""
    runs = []
    for name in PARTS:
        curves = unlearn_both_ways(name, 0, SMALL)
        runs.append({"part": name, "seed": 0, "curves": curves, "retrained": curves["SimNPO"][-1]})
    for name, least in (("lengths", 1.5), ("memorisation", 1.1)):
        found = comparison([run for run in runs if run["part"] == name], PARTS[name].decided_on)
        assert found["reached"] == found["seeds"]
        assert found["lower"] == found["seeds"]
        assert found["ratio"] > least
    page = markdown(runs, {"command": "this test"})
    assert page.count("**forget") == 2
    draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_weights_start_where_the_formulas_say(model_dir, forget_file, tmp_path):
    options = [f"--model={model_dir}", f"--data={forget_file}", f"--output={tmp_path}", "--epochs=1"]
    weights.main([*options, "--learning-rate=1e-3"])
    curves = json.loads((tmp_path / "weights.json").read_text())["curves"]
    start = curves["NPO"][0]
    # the reference is the model itself: gradient ascent
    assert start["weights"] == [1.0] * 10
    for n, weight, p in zip(start["num_tokens"], curves["SimNPO"][0]["weights"], start["probability"]):
        # 2/n sigmoid(beta log p) with beta = 2.5
        assert weight == pytest.approx(2 / n * p**2.5 / (1 + p**2.5), rel=1e-2)
    for rows in curves.values():
        assert [row["epoch"] for row in rows] == [0, 1]
        assert sum(rows[1]["probability"]) < sum(rows[0]["probability"])
        assert rows[1]["weights"] != rows[0]["weights"]
    assert "| NPO | 0 | 1 |" in (tmp_path / "weights.md").read_text()
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_margins_have_a_line_a_beta_and_a_column_a_gamma():
    tiny = Size(sequences=64, epochs=1, batch_size=16, hidden=8, blocks=1, unlearn_steps=2, test_sequences=4)
    found = margins.sweep((1.0, 4.0), (0.0, 2.0), 2, tiny)
    assert set(found) == {(1.0, 0.0), (1.0, 2.0), (4.0, 0.0), (4.0, 2.0)}
    assert margins.table({(1.0, 0.0): [0.1, 0.3], (1.0, 2.0): [0.5]}, 2).splitlines()[2] == (
        "| beta 1 | 0.200 ± 0.141 | 0.500 (1 of 2) |"
    )
    assert "not reached (0 of 2)" in margins.table({(1.0, 0.0): []}, 2)
