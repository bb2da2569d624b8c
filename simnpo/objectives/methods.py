"""The names of the objectives on the command line."""

from dataclasses import fields
from typing import NamedTuple

from simnpo.objectives.pairs import DPO, PairObjective, SimPO
from simnpo.objectives.rows import PDU, InvertedHinge, MaxEntropy, RowObjective, SmoothedGradAscent
from simnpo.objectives.sequence import KTO, NNPO, NPO, GradAscent, SequenceObjective, SimNPO
from simnpo.objectives.tokenwise import CATNIP, TNPO, WGA, WTNPO, JensUn, SatImp, TokenObjective, Unlikelihood


class Method(NamedTuple):
    """What a name stands for.

    objective: its class.   settings: what the name has fixed of it.
    """

    objective: type[SequenceObjective] | type[PairObjective] | type[TokenObjective] | type[RowObjective]
    settings: dict[str, bool]

    def options(self) -> dict[str, float]:
        """What is left to set, with the default of each."""
        return {f.name: f.default for f in fields(self.objective) if f.name not in self.settings}  # type: ignore

    def needs(self) -> list[str]:
        """What it takes beside forget and retain examples, in words."""
        objective = self.objective
        per_token = objective.needs_ref_token_logps
        alternate = objective.needs_alternates or objective.targets_alternate
        return ["reference (one pass before the first step)"] * (objective.needs_ref_logps or per_token) + [
            "alternate answers (field `alternate`, or --alternate)"
        ] * alternate


METHODS = {
    "simnpo": Method(SimNPO, {}),
    "npo": Method(NPO, {}),
    "ga": Method(GradAscent, {"normalize": False}),
    "w-graddiff": Method(GradAscent, {"normalize": True}),
    "n-npo": Method(NNPO, {}),
    "kto": Method(KTO, {}),
    "dpo": Method(DPO, {}),
    "simpo": Method(SimPO, {}),
    "wga": Method(WGA, {}),
    "tnpo": Method(TNPO, {}),
    "wtnpo": Method(WTNPO, {}),
    "satimp": Method(SatImp, {}),
    "unlikelihood": Method(Unlikelihood, {}),
    "ce-u": Method(Unlikelihood, {}),
    "catnip": Method(CATNIP, {}),
    "jensun": Method(JensUn, {}),
    "me": Method(MaxEntropy, {}),
    "sga": Method(SmoothedGradAscent, {}),
    "ihl": Method(InvertedHinge, {}),
    "pdu": Method(PDU, {}),
}


def describe() -> str:
    """Every method with its formula, weight, source, options and needs, to be read by a person."""
    lines = [
        "s: sum of l_t = log p_t over the n tokens of a forget answer; s_ref, q_t: the same of the model before",
        "the first step; z, p: logits and probabilities of a position; sg: without a gradient. The weight is the",
        "derivative in a token's log-probability, dz that in its row of logits. Options: --beta, --gamma,",
        "--method_args. In Python every one of them also takes weights of tokens (token_weights=).",
    ]
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={default:g}" for option, default in method.options().items())
        lines += [
            f"\n{name}" + f"  ({options})" * bool(options),
            *(f"    fixed   {setting}={value}" for setting, value in method.settings.items()),
            f"    loss    {method.objective.formula}",
            f"    weight  {method.objective.weight}",
            f"    source  {method.objective.source}",
        ]
        lines += [f"    needs   {need}" for need in method.needs()]
    return "\n".join(lines)
