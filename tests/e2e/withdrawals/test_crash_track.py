"""kill -9 of the real worker at each boundary of track_confirmations: every withdrawal is paid once, and told."""

from __future__ import annotations

import pytest

from tests.support import withdrawal_points
from tests.support.withdrawal_points import Boundary, boundaries, kill_at
from tests.support.withdrawal_rig import WithdrawalRig

pytestmark = pytest.mark.asyncio(loop_scope="module")

rigs, rig = withdrawal_points.rigs, withdrawal_points.rig


@pytest.mark.parametrize("boundary", boundaries("track_confirmations"), ids=str)
async def test_a_worker_killed_there_pays_every_withdrawal_once(rig: WithdrawalRig, boundary: Boundary) -> None:
    await kill_at(rig, boundary)
