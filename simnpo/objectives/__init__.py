"""The forget objectives. Each is one frozen dataclass that holds its formula, its weight and its source.

They differ in what they must see before the gradient of a token is known:

    sequence.py    the sum of a sequence's log-probabilities                SimNPO, NPO, GradAscent, NNPO, KTO
    pairs.py       that of a sequence and of its alternate answer           DPO, SimPO
    tokenwise.py   the token's own log-probability                          WGA, TNPO, WTNPO, SatImp, Unlikelihood, ...
    rows.py        the token's whole row of logits, by a few sums over it   MaxEntropy, InvertedHinge, ...

`methods.py` names them for the command line.
"""

from simnpo.objectives.pairs import DPO, PairObjective, SimPO
from simnpo.objectives.rows import PDU, InvertedHinge, MaxEntropy, RowObjective, SmoothedGradAscent
from simnpo.objectives.sequence import (
    KTO,
    NNPO,
    NPO,
    GradAscent,
    SequenceObjective,
    SimNPO,
    npo_loss,
    simnpo_loss,
)
from simnpo.objectives.tokenwise import CATNIP, TNPO, WGA, WTNPO, JensUn, SatImp, TokenObjective, Unlikelihood

Objective = SequenceObjective | PairObjective | TokenObjective | RowObjective

__all__ = [
    "CATNIP",
    "DPO",
    "KTO",
    "NNPO",
    "NPO",
    "PDU",
    "TNPO",
    "WGA",
    "WTNPO",
    "GradAscent",
    "InvertedHinge",
    "JensUn",
    "MaxEntropy",
    "Objective",
    "PairObjective",
    "RowObjective",
    "SatImp",
    "SequenceObjective",
    "SimNPO",
    "SimPO",
    "SmoothedGradAscent",
    "TokenObjective",
    "Unlikelihood",
    "npo_loss",
    "simnpo_loss",
]
