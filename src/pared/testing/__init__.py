"""The conformance suite: what holds for every technique, to be run on your own.

    from pared.testing import cases, conformance

    conformance(MyTechnique)                    # raises a Nonconformance that lists every broken promise

    @pytest.mark.parametrize("case", cases(MyTechnique), ids=str)    # or one test per promise
    def test_conformance(case):
        case()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

from pared.technique import Technique
from pared.testing import declarations, network, replacing, training
from pared.testing.nets import NETS, net
from pared.testing.observing import Nonconformance

__all__ = ["NETS", "Case", "Nonconformance", "cases", "conformance", "net"]

_OF_THE_CLASS = (
    declarations.it_has_a_capability,
    declarations.it_is_final,
    declarations.it_names_its_paper,
    declarations.every_setting_is_described,
    declarations.every_setting_rejects_bad_values,
)
_OF_ANY_SETTINGS = (
    replacing.sites_do_not_overlap,
    replacing.refusals_have_reasons,
    replacing.build_reads_no_weights,
    replacing.the_structure_survives_json,
    replacing.fit_is_deterministic,
    replacing.shape_type_and_device_are_kept,
    replacing.predicted_bits_are_coded_bytes,
    replacing.cost_is_known_from_shapes,
    replacing.relax_equals_fit,
    replacing.it_saves_and_loads,
)
_OF_TYPICAL_SETTINGS = (
    replacing.the_original_is_untouched,
    replacing.it_loads_without_the_class,
    replacing.it_chains,
    replacing.the_export_agrees,
)
_OF_THE_NETWORK = (
    network.it_has_one_site,
    network.it_acts_on_a_copy,
    network.it_is_deterministic,
    network.it_keeps_the_type,
    network.it_computes_nearly_the_same,
    network.it_reads_what_it_says,
)
_OF_THE_NETWORK_TYPICALLY = (network.it_saves_and_loads_both_ways, network.its_export_agrees)
_ONLY_ON: dict[Callable[..., None], tuple[str, ...]] = {
    replacing.it_saves_and_loads: ("perceptron",),
    replacing.it_chains: ("convolution", "recurrent"),
    replacing.the_export_agrees: ("convolution", "attention", "recurrent"),
}
"""What takes long is checked on some of the nets."""


@dataclass(frozen=True)
class Case:
    """One promise of one technique, on one net where it is about nets. Call it: it raises if the promise is broken."""

    check: Callable[..., None]
    subject: Technique | type[Technique]
    net: str | None = None

    def __str__(self) -> str:
        subject = self.subject.__name__ if isinstance(self.subject, type) else str(self.subject)
        return "-".join(part for part in (self.check.__name__, subject, self.net) if part)

    def __call__(self) -> None:
        arguments: list[Any] = [self.subject] if self.net is None else [self.subject, net(self.net)]
        self.check(*arguments)


def cases(*subjects: Technique | type[Technique], nets: Iterable[str] = NETS) -> list[Case]:
    """All promises of techniques.

    Args:
        subjects: a class is tested as such and with each setting of its `ladder`; a technique with its own settings.
        nets: which of the nets `NETS`.
    """
    nets = tuple(nets)
    return [case for subject in subjects for case in _cases(subject, nets)]


def conformance(*subjects: Technique | type[Technique], nets: Iterable[str] = NETS) -> None:
    """Run all cases, but those that need what is not installed.

    Raises:
        Nonconformance: lists every broken promise.
    """
    broken = []
    for case in cases(*subjects, nets=nets):
        try:
            case()
        except SkipTest:
            continue
        except Exception as error:  # whatever a technique raises is a broken promise
            broken.append(f"{case}: {type(error).__name__}: {error}")
    if broken:
        raise Nonconformance("\n".join([f"{len(broken)} promises are broken:", *broken]))


def _cases(subject: Technique | type[Technique], nets: tuple[str, ...]) -> list[Case]:
    if isinstance(subject, Technique):
        return _of_settings(subject, nets, typical=False)
    found = [Case(check, subject) for check in _OF_THE_CLASS]
    if declarations.replaces(subject) and not declarations.prepares(subject) and not declarations.is_of_networks(subject):
        found.append(Case(replacing.its_ladder_gets_harsher, subject))
    rungs = [subject(**rung) for rung in subject.ladder] or [subject()]
    for place, rung in enumerate(rungs):
        found += _of_settings(rung, nets, typical=place == len(rungs) // 2)
    return found


def _of_settings(technique: Technique, nets: tuple[str, ...], typical: bool) -> list[Case]:
    found = [Case(declarations.settings_survive_a_recipe, technique)]
    wanted: list[Callable[..., None]] = []
    if declarations.is_of_networks(type(technique)):
        wanted += [*_OF_THE_NETWORK, *(_OF_THE_NETWORK_TYPICALLY if typical else ())]
    elif declarations.replaces(type(technique)):
        wanted += [*_OF_ANY_SETTINGS, *(_OF_TYPICAL_SETTINGS if typical else ())]
    if declarations.shapes_training(type(technique)):
        wanted.append(training.its_loss_can_be_trained)
    if declarations.prepares(type(technique)):
        wanted.append(training.preparing_keeps_the_function)
    for check in wanted:
        found += [Case(check, technique, name) for name in nets if name in _ONLY_ON.get(check, NETS)]
    return found
