"""Requests generated from our own OpenAPI document: every answer is one that the document promises."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from radixkv_service.app import create_app
from radixkv_service.service import Service
from radixkv_service.settings import ServiceSettings
from tests.service.conftest import ADMIN, KEYS

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LENGTHS = ("max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of")


def operations():
    """Every route and method of the document, as the app writes it."""
    app = create_app(Service(ServiceSettings(model="smollm2")))
    document = schemathesis.openapi.from_dict(app.openapi())
    return [result.ok() for result in document.get_all_operations()]


def short(body):
    """Ask for little: long answers would only be longer."""
    for name in LENGTHS:
        if isinstance(body.get(name), int) and body[name] > 2:
            body[name] = 2
    if not any(name in body for name in LENGTHS[:2]):
        body["max_tokens"] = 2


@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_what_the_document_allows_is_answered_as_it_promises(server, operation):
    key = ADMIN if operation.path in ("/flush_cache", "/reset_prefix_cache") else KEYS["bob"]

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def answered(case):
        if isinstance(case.body, dict) and operation.path.startswith("/v1/"):
            short(case.body)
        response = case.call(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60)
        case.validate_response(response, checks=CHECKS)

    answered()


def test_the_document_names_every_route(server, http):
    paths = http.get("/openapi.json").json()["paths"]
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/models",
        "/v1/sessions",
        "/v1/repositories",
    ):
        assert path in paths
