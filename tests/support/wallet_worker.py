"""`python -m tests.support.wallet_worker JSON`: onboarding in a process of its own, to be killed at any moment.

Its clock runs faster than the wall's, the same in every process: nobody waits for a minute to pass.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from agents.sweeper import Sweeper
from tests.support.in_process import Ground
from tests.support.wallet_rig import Rig, with_policy


@dataclass
class FastClock:
    since: datetime
    speed: float

    def __call__(self) -> datetime:
        return self.since + (datetime.now(UTC) - self.since) * self.speed

    def forward(self, seconds: float) -> None:
        self.since -= timedelta(seconds=seconds / self.speed)


@dataclass
class Address:
    base_url: str


async def main(given: dict[str, Any]) -> None:
    clock: Any = FastClock(datetime.fromisoformat(given["since"]), given["speed"])
    nobody: Any = None
    at = Ground(given["dsn"], given["bootstrap"], given["prefix"], nobody, nobody, clock)
    circle: Any = Address(given["circle"])
    async with Rig(at, circle).worker(with_policy(**given["policy"])) as services:
        # tells what a performer that was killed had committed and not told: as a worker's process has it
        sweeping = asyncio.create_task(Sweeper(services).work())
        print("ready", flush=True)
        while services.stop.reason is None:
            await asyncio.sleep(0.1)
        sweeping.cancel()
    print(services.stop.reason, flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
