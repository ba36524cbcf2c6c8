"""The Lambda runtime's loop, so that the image needs no base of AWS: fetch an event, answer it, repeat.

Source: AWS, "Using the Lambda runtime API" (2018-06-01). Models are loaded before the first event is fetched,
which is the initialisation phase that Lambda times and can provision ahead.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from api.errors import AsrError, BundleError, SettingsError
from serverless.handler import Function, open_function

VERSION = "/2018-06-01/runtime"


class RuntimeApi:
    """Lambda's side of the conversation."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection = http.client.HTTPConnection(address, timeout=None)

    def __enter__(self) -> RuntimeApi:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def next_event(self) -> tuple[str, Any]:
        """Wait for an event; its id and content."""
        self._connection.request("GET", f"{VERSION}/invocation/next")
        response = self._connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ConnectionError(f"runtime API answered {response.status}")
        return response.headers["Lambda-Runtime-Aws-Request-Id"], json.loads(content)

    def respond(self, request_id: str, answer: Any) -> None:
        """Send an answer."""
        self._post(f"{VERSION}/invocation/{request_id}/response", answer)

    def fail(self, request_id: str, error: BaseException) -> None:
        """Report that an event could not be handled: Lambda tries it again where it may."""
        self._post(f"{VERSION}/invocation/{request_id}/error", _described(error))

    def fail_start(self, error: BaseException) -> None:
        """Report that the function cannot start."""
        self._post(f"{VERSION}/init/error", _described(error))

    def _post(self, path: str, body: Any) -> None:
        content = json.dumps(body).encode("utf-8")
        self._connection.request("POST", path, content, {"Content-Type": "application/json"})
        self._connection.getresponse().read()


def _described(error: BaseException) -> dict[str, Any]:
    return {
        "errorType": type(error).__name__,
        "errorMessage": str(error),
        "stackTrace": traceback.format_tb(error.__traceback__),
    }


def serve(api: RuntimeApi, function: Function) -> None:
    """Answer events until the process is ended."""
    while True:
        request_id, event = api.next_event()
        try:
            answer = function(event)
        except Exception as error:
            traceback.print_exc()
            api.fail(request_id, error)
        else:
            api.respond(request_id, answer)


def main() -> int:
    """The container's command."""
    address = os.environ.get("AWS_LAMBDA_RUNTIME_API")
    if not address:
        print(
            "AWS_LAMBDA_RUNTIME_API is not set: this runs inside Lambda or an emulator of it", file=sys.stderr
        )
        return 2
    with RuntimeApi(address) as api:
        try:
            function = open_function()
        except (SettingsError, BundleError, AsrError) as error:
            print(f"error: {error}", file=sys.stderr)
            api.fail_start(error)
            return 1
        try:
            serve(api, function)
        finally:
            function.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
