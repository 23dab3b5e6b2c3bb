"""`jaxadv.report`: the contents of a report, and its cost, predicted beforehand."""

import functools
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadv
from jaxadv import attack, certify, evaluate, host, perturb, report
from jaxadv.evaluate import _budget, _check

N, D, SIGMA, EPS = 40, 3, 0.5, 0.4
KEY = jax.random.key(3)
ATTACKS = {"one": partial(attack.pgd, steps=1), "pgd": partial(attack.pgd, steps=5)}
DRAWS = (1000, 4000)


def net(w, x):
    return x @ w


@functools.cache
def problem():
    """A linear net of two classes, examples not near distance EPS, labels and distances."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(D, 2)), rng.normal(size=(200, D))
    normal = w[:, 0] - w[:, 1]
    lead = x @ normal / np.linalg.norm(normal)
    near = (abs(abs(lead) - EPS) < 0.02) | (abs(lead) < 0.02)
    x, lead = x[~near][:N].astype(np.float32), lead[~near][:N]
    y = (lead < 0).astype(int)
    y[::10] = 1 - y[::10]  # these are misclassified
    distance = np.where(np.arange(N) % 10, abs(lead), 0)
    return w.astype(np.float32), x, y, distance


def run(attacks=ATTACKS, eps=EPS, **kwargs):
    w, x, y, _ = problem()
    asked = {"sigma": SIGMA, "draws": DRAWS, "key": KEY} | kwargs
    return report.robustness(net, w, x, y, attacks, eps=eps, batch_size=20, **asked)


@pytest.fixture(autouse=True)
def checked(request, monkeypatch):
    """Lets the check find nothing, since it compiles for long; what it is given."""
    given = []

    def check(apply_fn, params, x, y, **kwargs):
        given.append((x, y, kwargs))
        return evaluate.Report((), {})

    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(evaluate, "check", check)
    return given


@functools.cache
def found():
    return run()


# Contents


def test_on_a_linear_net_the_accuracies_are_exact():
    *_, distance = problem()
    accuracy = found().figures()["accuracy"]
    assert accuracy["clean"] == 0.9
    assert accuracy["one step"] == accuracy["robust"] == np.mean(distance > EPS)
    masks = found().masks
    np.testing.assert_array_equal(masks["robust"], distance > EPS)
    # For a linear net with two classes, the smoothed classifier is the net itself.
    assert not np.any(masks["certified"] & (distance <= EPS))
    assert np.all(masks["certified"][distance > 1.3 * EPS])
    assert not np.any(masks["smoothed"] & (distance == 0))
    assert np.all(masks["smoothed"][distance > 0.3 * EPS])


def test_each_part_is_the_direct_call_with_the_same_key():
    w, x, y, _ = problem()
    how = {"key": KEY, "batch_size": 20}
    attacked = evaluate.attack_and_score(net, w, x, y, ATTACKS, eps=EPS, **how)
    chex.assert_trees_all_equal(found().attacked.outcome, attacked.outcome)
    chex.assert_trees_all_equal(found().attacked.r, attacked.r)
    certificate = certify.certify(
        net, w, x, y, sigma=SIGMA, radii=(EPS,), stages=DRAWS, **how
    )  # fmt: skip
    chex.assert_trees_all_equal(found().certificate, certificate)


def test_the_check_runs_on_examples_spread_over_the_data_set(monkeypatch, checked):
    monkeypatch.setattr(report, "_CHECKED", 4)
    found = run(sigma=None, bounds=(-9, 9))
    assert (found.checked.flags, found.setting["checked"]) == ((), 4)
    _, x, y, _ = problem()
    ((*looked_at, how),) = checked
    chex.assert_trees_all_equal(looked_at, [x[::10], y[::10]])
    assert how == {
        "eps": EPS, "norm": "l2", "bounds": (-9, 9), "steps": 50, "key": KEY, "batch_size": 20
    }  # fmt: skip
    # On three devices, one example for each: four wouldn't be so many for each, and six too many.
    monkeypatch.setattr(host, "spread", lambda x: host.Spread(None, 3))
    assert report._looked_at(x).tolist() == [0, 13, 26]


def test_what_no_certificate_reaches_is_classified_all_the_same():
    *_, distance = problem()
    found = run({"one": ATTACKS["one"]}, eps=1.4)
    assert np.any(found.certificate.abstained & (distance > 0.3 * EPS))
    assert np.all(found.masks["smoothed"][distance > 0.3 * EPS])
    assert not np.any(found.masks["smoothed"] & (distance == 0))


def test_probabilities_are_pointed_out_once():
    w, x, y, _ = problem()

    def softmax(w, x):
        return jax.nn.softmax(x @ w)

    with pytest.warns(UserWarning, match="expected logits, got outputs in") as caught:
        report.robustness(softmax, w, x, y, {"step": perturb.loss}, eps=EPS, key=KEY)
    assert [each.filename for each in caught] == [__file__]


def test_one_step_accuracy_is_that_under_a_single_step():
    def wave(params, x):  # class 1 wins only between 0.52 and 1.05
        lead = 0.5 + jnp.cos(4 * x[:, 0])
        return jnp.stack([lead, jnp.zeros_like(lead)], axis=1)

    x, y = jnp.array([[0.1]]), jnp.array([0])
    seen = report.robustness(wave, None, x, y, {"pgd": ATTACKS["pgd"]}, eps=1.5, key=KEY)
    assert seen.figures()["accuracy"] == {"clean": 1, "one step": 1, "robust": 0}


@pytest.mark.parametrize("draws", [1000, np.array([1000])], ids=["one", "array"])
def test_numbers_may_be_numpys(draws):
    found = run({"one": ATTACKS["one"]}, eps=np.float32(0.5), sigma=np.float32(0.5), draws=draws)
    said = json.loads(found.to_json())
    assert (said["eps"], said["sigma"], said["draws"]) == (0.5, 0.5, [1000])
    cost = report.cost(net, *problem()[:2], ATTACKS, sigma=np.float32(0.5), draws=draws)
    assert cost.certify.passes == (1100, 0)


def test_perturbed_examples_stay_in_the_box():
    x, y, box = np.array([[1.0, 0.5]]), np.array([0]), (np.array([0.9, 0]), np.array([1, 0.6]))
    for bounds, robust in ((None, 0), (box, 1)):
        seen = report.robustness(
            lambda _, x: x, None, x, y, {"pgd": ATTACKS["pgd"]}, eps=0.8, key=KEY, bounds=bounds
        )
        assert seen.figures()["accuracy"] == {"clean": 1, "one step": robust, "robust": robust}


def test_the_setting_has_everything_the_figures_depend_on():
    bounds = -np.inf, np.array([8.0, np.inf, 9.0])
    setting = run({"one": ATTACKS["one"]}, sigma=None, bounds=bounds).setting
    assert (setting["n"], setting["eps"], setting["norm"]) == (N, EPS, "l2")
    assert setting["bounds"] == [None, [8.0, None, 9.0]]
    assert setting["key"] == jax.random.key_data(KEY).tolist()
    assert setting["methods"] == {"one": "jaxadv.attack._pgd.pgd(steps=1)"}
    assert (setting["sigma"], setting["draws"]) == (None, None)
    assert setting["versions"]["jaxadv"] == jaxadv.__version__
    assert setting["versions"]["jax"] == jax.__version__
    assert setting["versions"]["numpy"] == np.__version__
    assert setting["device"] == "cpu x1"
    assert (found().setting["sigma"], found().setting["draws"]) == (SIGMA, list(DRAWS))


def test_json_has_all_figures():
    assert json.loads(found().to_json()) == found().figures()
    assert set(found().figures()["interval"]) == {
        "clean", "one step", "robust", "smoothed", "certified"
    }  # fmt: skip


def by_hand(certificate=None, flags=(), **setting):
    """A report of four examples."""
    true = np.ones(4, bool)
    outcome = evaluate.Outcome(
        clean=np.array([1, 1, 1, 0], bool), robust=np.array([1, 0, 0, 0], bool),
        norm=np.zeros(4), zero=~true, nonfinite=~true, invalid=np.array([0, 0, 0, 1], bool),
    )  # fmt: skip
    stages = {
        "pgd": evaluate.Stage(
            outcome.clean, outcome.clean & ~outcome.robust, 1.5,
            evaluate.Passes(7 * outcome.clean, 6 * outcome.clean), evaluate.Passes(2028, 2024),
        ),
        "min|e": evaluate.Stage(outcome.robust, ~true, 0.5),
    }  # fmt: skip
    setting = {
        "n": 4, "eps": 0.5, "norm": "l2", "bounds": [0.0, 1.0], "key": [0, 7],
        "methods": {"pgd": "pgd", "min|e": "mine"}, "checked": 4, "sigma": None, "draws": None,
        "versions": {"jaxadv": "0.2.0", "jax": "0.10.2"}, "device": "cpu x1",
    } | setting  # fmt: skip
    one_step = outcome._replace(
        robust=np.array([1, 1, 0, 0], bool), zero=np.array([0, 1, 0, 1], bool)
    )
    result = evaluate.Result(outcome, np.zeros((4, 2)), stages)
    return report.Robustness(setting, one_step, result, evaluate.Report(flags, {}), certificate)


def test_markdown_of_a_small_case():
    certificate = certify.Certificate(
        label=np.zeros(4, int), counts=np.array([[9, 1], [9, 1], [6, 4], [4, 6]]),
        samples=np.full(4, 10), lower=np.zeros(4), radius=np.array([0.6, 0.5, 0.0, 0.0]),
        abstained=np.array([0, 0, 1, 1], bool),
    )  # fmt: skip
    flags = (evaluate.Flag("budget", "it has not converged; raise steps", "weak attack"),)
    assert (
        by_hand(certificate, flags, sigma=0.25).to_markdown()
        == """\
# Robustness in l2 at eps 0.5

| On 4 examples | Accuracy | 95% interval |
|---|---|---|
| Clean | 0.7500 | 0.3006 to 0.9544 |
| One step | 0.5000 | 0.1500 to 0.8500 |
| Worst of 2 attacks | 0.2500 | 0.0456 to 0.6994 |
| Clean, smoothed | 0.7500 | 0.3006 to 0.9544 |
| Certified, smoothed | 0.5000 | 0.1500 to 0.8500 |

| Attack | Tried | Misclassified | Passes per example |
|---|---|---|---|
| pgd | 3 | 2 | 1,013 |
| min\\|e | 1 | 0 | not counted |

- x + r lies within [0.0, 1.0].
- Smoothed refers to a different classifier: the net's most frequent prediction under Gaussian \
noise of standard deviation 0.25. Each certificate is wrong with a probability of at most 0.001. \
Attacks run on the net itself.
- 1 of 4 one-step perturbations are exactly 0: no usable gradient.
- 1 of 4 labels are none of the net's classes, and count as wrong.
- Flag `budget`, weak attack: it has not converged; raise steps.
- Key [0, 7]; jaxadv 0.2.0, jax 0.10.2; cpu x1.
"""
    )


def test_markdown_names_autoattack_and_warns_that_no_flag_proves_nothing():
    standard = evaluate.autoattack("linf")
    text = by_hand(norm="linf", bounds=None, methods=report._described(standard)).to_markdown()
    assert "| AutoAttack | 0.2500 |" in text
    assert "smoothed" not in text
    assert "- x + r may have any value.\n" in text
    assert "- `evaluate.check` raised no flag on 4 of the examples, which proves nothing.\n" in text


def test_a_report_resumes_where_it_was_interrupted(tmp_path):
    seen = []
    first = run(store=tmp_path, progress=seen.append)
    assert [at.attack for at in seen if at.done == at.of][:4] == [
        *ATTACKS,
        "draws 0 to 100",
        "draws 100 to 1100",
    ]
    again = run(store=tmp_path, progress=pytest.fail)  # no batch is run again
    assert again.figures() == first.figures()
    with pytest.raises(ValueError, match="expected the same evaluation as in store"):
        run(store=tmp_path, eps=0.3)


# Cost


def passes_of(method, n_classes, norm):
    """The passes of an attack on a net that nothing fools: all logits tie, and y is class 0."""
    x, y = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, int)

    def tied(z, x):
        return jnp.broadcast_to(z[None], (len(x), n_classes))

    how = {"eps": 1.0, "key": KEY, "norm": norm}
    _, info = attack.with_info(method)(tied, jnp.zeros(n_classes), x, y, **how)
    return int(info.forward[0]), int(info.backward[0])


FEW = {"steps": 4}
# name: attack, number of classes, norm, and how many fewer forward passes it takes
EXACT = {
    "apgd": (partial(attack.apgd, restarts=3, **FEW), 4, "linf", 0),
    "apgd in l1": (partial(attack.apgd, restarts=2, **FEW), 4, "l1", 0),
    "a step in l1": (partial(attack.apgd, steps=1), 4, "l1", 0),
    "fewer classes": (partial(attack.apgd_multitargeted, **FEW), 3, "l2", 0),
    "malt": (partial(attack.apgd_multitargeted, n_targets=2, order="distance", **FEW), 5, "l2", 0),
    "fab": (partial(attack.fab, n_targets=2, restarts=2, **FEW), 4, "l2", 0),
    "square": (partial(attack.square, **FEW), 4, "linf", 0),
    "pgd": (partial(attack.pgd, restarts=3, **FEW), 4, "l2", 0),
    "fmn": (partial(attack.fmn, **FEW), 4, "l2", 64),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_predicted_passes_are_those_on_a_net_that_nothing_fools(name):
    method, n_classes, norm, fewer = EXACT[name]
    method = partial(method, norm=norm)
    forward, backward = _budget.most(method, n_classes)
    assert passes_of(method, n_classes, norm) == (forward - fewer, backward)
    near = evaluate.NearBoundary(method, within=0.5)
    assert _budget.most(partial(near), n_classes) == (forward, backward)


def test_the_passes_of_all_attacks_of_ensembles_and_checks_are_predicted():
    for norm in ("l1", "l2", "linf"):
        ensembles = evaluate.autoattack(norm), evaluate.fast_autoattack(norm)
        for attacks in (*ensembles, _check.attacks_of(norm, 50)):
            assert all(_budget.most(method, 10) for method in attacks.values())
    drawn = {name: _budget.most(a, 10) for name, a in evaluate.autoattack(samples=20).items()}
    assert drawn == dict.fromkeys(("apgd-ce", "apgd-dlr"), (20 * 102, 20 * 101))


def counting(tally):
    """The net, which adds the rows that pass through it, forward and backward, to `tally`."""

    def add(place, rows):
        tally[place] += rows

    @jax.custom_vjp
    def counted(z):
        jax.debug.callback(partial(add, 0), len(z))
        return z

    def forward(z):
        return counted(z), None

    def backward(_, g):
        jax.debug.callback(partial(add, 1), len(g))
        return (g,)

    counted.defvjp(forward, backward)
    return lambda w, x: counted(x @ w)


@pytest.mark.slow
def test_a_report_takes_no_more_passes_than_predicted():
    w, x, y, _ = problem()
    tally = np.zeros(2, int)
    counted = counting(tally)
    asked = {"sigma": SIGMA, "draws": DRAWS, "batch_size": 20}
    cost = report.cost(counted, w, x, ATTACKS, **asked)
    jax.effects_barrier()
    tally[:] = 0
    found = report.robustness(counted, w, x, y, ATTACKS, eps=EPS, key=KEY, **asked)
    jax.effects_barrier()
    parts = [cost.one_step, *cost.attacks.values(), cost.check, cost.certify]
    most = sum(part.examples * np.array(part.passes) for part in parts)
    # Some examples are done early, and not all draws are needed.
    assert np.all(tally <= most)
    assert np.all(tally > most / 3)
    assert found.checked == evaluate.check(counted, w, x, y, eps=EPS, key=KEY, batch_size=20)


def test_seconds_are_computed_from_passes_timed_on_a_batch(monkeypatch):
    times = iter([2.0, 6.0, 4.0, 2.0])  # forward; forward and backward
    monkeypatch.setattr(report, "_timed", lambda call: next(times) + 0 * len(call()))
    w, x, *_ = problem()
    found = report.cost(net, w, x, ATTACKS, sigma=SIGMA, draws=DRAWS, batch_size=20)
    assert found.attacks["pgd"] == (N, (8, 5), N * (8 * 0.1 + 5 * 0.2))
    assert found.one_step == (N, (6, 2), N * (6 * 0.1 + 2 * 0.2))
    assert found.certify == (N, (4100, 0), N * 410.0)
    parts = [found.one_step, *found.attacks.values(), found.check, found.certify]
    assert found.seconds == sum(part.seconds for part in parts)
    noisy = report.cost(net, w, x, ATTACKS, batch_size=20)
    assert noisy.attacks["pgd"].seconds == N * 8 * 0.2


def test_an_attack_of_unknown_cost_leaves_the_time_unknown():
    w, x, *_ = problem()
    known = report.cost(net, w, x, {"step": perturb.loss}, batch_size=20)
    assert known.attacks["step"].passes == (2, 2)
    assert known.seconds > 0

    def mine(apply_fn, params, x, y, *, eps, key=None, bounds=None, steps=5, samples=None,
             restarts=None, n_targets=None):  # fmt: skip
        return 0 * x

    for own in (attack.ddn, mine):
        found = report.cost(net, w, x, {"own": own}, batch_size=20)
        assert found.attacks["own"] == (N, None, None)
        assert found.seconds is None


# Bad input


def never(apply_fn, params, x, y, /, *, eps, key=None, bounds=None):
    pytest.fail("an attack was run")


W, X, Y, _ = problem()
# name: the call, the error
BAD = {
    "sizes": (lambda: run(eps=np.full(N, EPS)), ValueError),
    "no size": (lambda: run(eps=None), TypeError),
    "a seed": (lambda: run(key=0), TypeError),
    "no key": (lambda: run(key=None), TypeError),
    "keys": (lambda: run(key=jax.random.split(KEY, N), sigma=None), ValueError),
    "one attack": (lambda: run(attack.pgd), TypeError),
    "no attack": (lambda: run({}), ValueError),
    "a number": (lambda: run({"pgd": 3}), TypeError),
    "no examples": (
        lambda: report.robustness(net, W, X[:0], Y[:0], eps=EPS, key=KEY), ValueError
    ),
    "the cost of no examples": (lambda: report.cost(net, W, X[:0]), ValueError),
    "the cost of one attack": (lambda: report.cost(net, W, X, attack.pgd), TypeError),
    "two norms": (lambda: report.cost(net, W, X, ATTACKS, norm="linf"), ValueError),
    "a certificate in linf": (lambda: run({"never": never}, norm="linf"), ValueError),
    "too few draws": (lambda: run({"never": never}, draws=(3,)), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_about_bad_input_say_what_was_expected_and_what_was_passed(name):
    function, error = BAD[name]
    with pytest.raises(error, match=r"(?s)expected .*got .*;"):
        function()


@pytest.mark.parametrize("function", [report.cost, report.robustness])
def test_under_a_trace_the_error_says_that_it_loops_on_the_host(function):
    how = {} if function is report.cost else {"eps": EPS, "key": KEY}
    labels = () if function is report.cost else (Y,)
    with pytest.raises(TypeError, match="loops over a data set on the host"):
        jax.jit(lambda x: function(net, W, x, *labels, **how))(X)
