"""What JSON has no number for."""

from __future__ import annotations

import json
import math

from fomoe_flwr.units import finite


def test_infinity_and_what_is_not_defined_are_null_at_any_depth() -> None:
    value = {
        "a": math.inf,
        "b": [1, (2.5, -math.inf)],
        "c": {"d": math.nan, "e": "inf"},
        "f": None,
        "g": True,
    }
    plain = finite(value)
    assert plain == {"a": None, "b": [1, [2.5, None]], "c": {"d": None, "e": "inf"}, "f": None, "g": True}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
