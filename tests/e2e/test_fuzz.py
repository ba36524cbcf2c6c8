"""schemathesis over the whole OpenAPI document of the live service: never a 5xx, always the envelope."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error

from tests.e2e.live import LiveServer


def test_nothing_in_the_document_breaks_the_service(server: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/transcribe",
        "/transcribe/batch",
        "/v1/audio/transcriptions",
        "/v1/models/{model_id}",
    }
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: Case) -> None:
            response = case.call(timeout=30)
            case.validate_response(response, checks=[not_a_server_error])
            assert response.headers["x-request-id"]
            if response.status_code >= 400:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["message"]

        holds()
    assert "Traceback" not in server.log
