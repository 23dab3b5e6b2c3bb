"""The attacks that commands take by name."""

from experiments.lib import attacks
from jaxadv import evaluate


def test_each_member_of_the_ensemble_can_run_alone():
    for norm in ("l2", "linf"):
        members = evaluate.autoattack(norm)
        assert attacks.methods("standard", norm) == members
        for name in members:
            assert name in attacks.LABELS
            assert attacks.methods(name, norm) == {name: members[name]}
