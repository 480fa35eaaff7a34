"""What each vendor's webhook says and how it is signed."""

from __future__ import annotations

import hashlib
from datetime import UTC
from typing import Any, Final

from connectors.kyc import onfido, persona, sumsub
from connectors.kyc.sandbox.server import Answer, KycSandbox, RejectType


def _applicant(user_id: str) -> str:
    """The same person, the same id."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:24]


class SumsubSandbox(KycSandbox):
    def body(self, correlation_id: str, user_id: str, answer: Answer, reject_type: RejectType) -> dict[str, Any]:
        applicant_id, created = _applicant(user_id), self.now().astimezone(UTC)
        result: dict[str, Any] = {"reviewAnswer": answer}
        if answer == "RED":
            result |= {"reviewRejectType": reject_type, "rejectLabels": ["DOCUMENT_PAGE_MISSING"]}
        return {
            "applicantId": applicant_id,
            "inspectionId": applicant_id[::-1],
            "applicantType": "individual",
            "correlationId": correlation_id,
            "levelName": "basic-kyc-level",
            "sandboxMode": False,
            "externalUserId": user_id,
            "type": "applicantReviewed",
            "reviewResult": result,
            "reviewStatus": "completed",
            "createdAt": created.strftime("%Y-%m-%d %H:%M:%S+0000"),
            "createdAtMs": created.strftime("%Y-%m-%d %H:%M:%S.") + f"{created.microsecond // 1000:03d}",
            "clientId": "sandbox",
        }

    def signed(self, body: bytes) -> dict[str, str]:
        return sumsub.sign(body, self.secret)


class PersonaSandbox(KycSandbox):
    """JSON:API. Each attempt is signed with its own time, which Persona does not promise."""

    def body(self, correlation_id: str, user_id: str, answer: Answer, reject_type: RejectType) -> dict[str, Any]:
        at = self.now().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        status = "approved" if answer == "GREEN" else "declined" if reject_type == "FINAL" else "failed"
        inquiry = {
            "type": "inquiry",
            "id": f"inq_{_applicant(user_id)}",
            "attributes": {"status": status, "reference-id": user_id, "created-at": at, "completed-at": at},
            "relationships": {},
        }
        attributes = {"name": f"inquiry.{status}", "created-at": at, "payload": {"data": inquiry}}
        return {"data": {"type": "event", "id": f"evt_{correlation_id[4:]}", "attributes": attributes}}

    def signed(self, body: bytes) -> dict[str, str]:
        return persona.sign(body, self.secret, self.now().timestamp())


class OnfidoSandbox(KycSandbox):
    """A Studio workflow run."""

    def body(self, correlation_id: str, user_id: str, answer: Answer, reject_type: RejectType) -> dict[str, Any]:
        at = self.now().astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        status = "approved" if answer == "GREEN" else "declined" if reject_type == "FINAL" else "review"
        run = correlation_id[4:]
        resource = {"id": run, "applicant_id": _applicant(user_id), "customer_user_id": user_id, "status": status}
        payload = {
            "resource_type": "workflow_run",
            "action": "workflow_run.completed",
            "object": {"id": run, "status": status, "completed_at_iso8601": at},
            "resource": {**resource, "reasons": [], "tags": [], "output": {}},
        }
        return {"payload": payload}

    def signed(self, body: bytes) -> dict[str, str]:
        return onfido.sign(body, self.secret)


VENDORS: Final[dict[str, type[KycSandbox]]] = {
    "sumsub": SumsubSandbox,
    "persona": PersonaSandbox,
    "onfido": OnfidoSandbox,
}
