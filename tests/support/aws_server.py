"""AWS as far as keys go: moto's server in a process of its own, with the faults of an AWS that has a bad day.

    python -m tests.support.aws_server PORT

moto ignores MessageType=DIGEST and hashes what is a hash already: that is put right here, never in our call.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from stablerail.dev.processes import Child, free_port, port_answers

SIGN, READ = "TrentService.Sign", "secretsmanager.GetSecretValue"
REGION = "eu-central-1"


class Aws:
    """The server, from a test's side."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret-access-key",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.aws_server", str(self.port)]
        self._child = Child(command, log=directory / "aws.log", env=os.environ | self.environment)

    def ready(self) -> bool:
        return port_answers(self.port)

    def close(self) -> None:
        self._child.kill()

    def _call(self, target: str, **body: Any) -> Any:
        service = "kms" if target.startswith("Trent") else "secretsmanager"
        scope = f"AWS4-HMAC-SHA256 Credential=test/20260101/{REGION}/{service}/aws4_request, SignedHeaders=host, Signature=0"
        headers = {
            "X-Amz-Target": target,
            "Content-Type": "application/x-amz-json-1.1",
            "Authorization": scope,
            "X-Amz-Date": "20260101T000000Z",
        }
        with urlopen(Request(self.url, json.dumps(body).encode(), headers), timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def make_key(self, spec: str = "ECC_SECG_P256K1", usage: str = "SIGN_VERIFY") -> str:
        """A new key of KMS; its ARN."""
        made = self._call("TrentService.CreateKey", KeySpec=spec, KeyUsage=usage)
        arn: str = made["KeyMetadata"]["Arn"]
        return arn

    def make_secret(self, name: str, text: str) -> None:
        self._call("secretsmanager.CreateSecret", Name=name, SecretString=text)

    @contextmanager
    def fault(self, target: str, *, code: str = "", hang_s: float = 0, forge: bool = False) -> Iterator[None]:
        """While it lasts `target` is refused with `code`, or answers after `hang_s`, or signs with another key."""
        self._control({"target": target, "code": code, "hang_s": hang_s, "forge": forge})
        try:
            yield
        finally:
            self._control({})

    def _control(self, fault: dict[str, Any]) -> None:
        with urlopen(Request(f"{self.url}/__fault", json.dumps(fault).encode()), timeout=30):
            pass


class _Faulty:
    def __init__(self, app: Any) -> None:
        self._app = app
        self.fault: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/__fault":
            self.fault = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("200 OK", [("Content-Length", "0")])
            return []
        fault = self.fault
        if fault and environ.get("HTTP_X_AMZ_TARGET") == fault["target"]:
            time.sleep(fault["hang_s"])
            if fault["code"]:
                body = json.dumps({"__type": fault["code"], "message": "as the test has it"}).encode()
                start("400 Bad", [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))])
                return [body]
        return self._app(environ, start)  # type: ignore[no-any-return]


def main(port: int) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
    from moto.kms.utils import ECDSAPrivateKey
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    served = _Faulty(DomainDispatcherApplication(create_backend_app))
    other = ec.generate_private_key(ec.SECP256K1())

    def sign(self: Any, message: bytes, _algorithm: str) -> bytes:
        key = other if served.fault.get("forge") else self.private_key
        return key.sign(message, ec.ECDSA(Prehashed(hashes.SHA256())))  # type: ignore[no-any-return]

    ECDSAPrivateKey.sign = sign
    run_simple("127.0.0.1", port, served, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
