"""What every forget objective says of itself."""

from typing import ClassVar


class ForgetObjective:
    """What an objective needs beside the targets, and how it is shown to a person.

    needs_ref_logps: the (B,) sums of a reference's log-probabilities.   needs_ref_token_logps: those of its tokens.
    sums_ratio: the log-ratio to the reference is that of the sums, so that errors of single tokens add up.
    needs_alternates: another answer beside each forget sequence.   targets_alternate: the answer to raise stands in the
    targets, not the one to forget.   formula, weight, source: for `simnpo unlearn --list-methods`.
    """

    needs_ref_logps: ClassVar[bool] = False
    needs_ref_token_logps: ClassVar[bool] = False
    sums_ratio: ClassVar[bool] = False
    needs_alternates: ClassVar[bool] = False
    targets_alternate: ClassVar[bool] = False
    formula: ClassVar[str]
    weight: ClassVar[str]
    source: ClassVar[str]
