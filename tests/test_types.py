"""`jaxadv.types`: the library's own functions match its protocols."""

import inspect
import typing

import pytest

from jaxadv import logistic, losses, objectives, perturb, types

OBJECTIVES = {
    "natural": objectives.natural(logistic.logits),
    "adversarial": objectives.adversarial(logistic.logits, perturb.loss, eps=0.5),
    "mixed": objectives.mixed(logistic.logits, perturb.loss, eps=0.5),
    "virtual": objectives.kl_regularized(logistic.logits, perturb.vat, eps=0.5),
    "noisy": objectives.noisy(logistic.logits, sigma=0.5),
    "representation": objectives.representation(
        lambda params, x: x, logistic.logits, perturb.loss, eps=0.5
    ),
}
OBJECTIVES["memory"] = objectives.with_memory(OBJECTIVES["adversarial"])


def accepts(function, protocol):
    """Bind the calls that the protocol allows to the function's signature."""
    parameters = list(inspect.signature(protocol.__call__).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(positional) + len(keywords) == len(parameters)
    signature = inspect.signature(function)
    required = {p.name: None for p in keywords if p.default is p.empty}
    signature.bind(*positional, **required)
    signature.bind(*positional, **{p.name: None for p in keywords})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_factory_makes_an_objective(name):
    accepts(OBJECTIVES[name], types.Objective)


def test_the_logistic_model_is_an_apply_fn():
    accepts(logistic.logits, types.ApplyFn)


@pytest.mark.parametrize("loss", [losses.margin, losses.dlr])
def test_the_losses_are_loss_fns(loss):
    accepts(loss, types.LossFn)


PROTOCOLS = ("ApplyFn", "EncodeFn", "LossFn", "Objective", "PerturbFn", "TrainFn")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_documented(name):
    protocol = getattr(types, name)
    assert typing.Protocol in protocol.__mro__
    assert protocol.__doc__
    assert protocol.__call__.__doc__
