from __future__ import annotations

import json

import pytest

from embedding_common import errors, refusals
from embedding_common.contract import ModelCard

CARD = ModelCard(id="m", fingerprint="f", dimension=4, max_tokens=16)


def test_every_problem_has_a_status() -> None:
    ours = {kind for kind in errors.Problem.__subclasses__() if kind.__module__ == errors.__name__}
    assert set(refusals.STATUS) == ours


def test_an_error_carries_all_it_knows_and_leaves_out_the_rest() -> None:
    status, body = refusals.error_body(errors.InvalidRequest("m", field="f", limit=1, value=2), "id")
    assert status == 422
    assert json.loads(body) == {
        "error": "m", "error_type": "Validation", "field": "f", "limit": 1, "value": 2, "request_id": "id",
    }  # fmt: skip
    assert set(json.loads(refusals.error_body(errors.Unavailable("m"), "id")[1])) == {
        "error",
        "error_type",
        "request_id",
    }


def test_the_model_named_must_be_served() -> None:
    assert refusals.check_model(None, ["a", "b"]) == "a"
    assert refusals.check_model("b", ["a", "b"]) == "b"
    with pytest.raises(errors.UnknownModel, match="'c' is not served here; available: a, b"):
        refusals.check_model("c", ["a", "b"])


def test_no_more_dimensions_than_the_model_has() -> None:
    refusals.check_dimensions(None, CARD)
    refusals.check_dimensions(4, CARD)
    with pytest.raises(errors.InvalidRequest, match="dimensions: m has 4, got 5"):
        refusals.check_dimensions(5, CARD)


def test_a_text_that_may_not_be_cut_is_refused_with_its_size() -> None:
    refusal = refusals.refuse_truncated(3, 20, CARD)
    assert (refusal.field, refusal.limit, refusal.value) == ("texts[3]", 16, 20)
