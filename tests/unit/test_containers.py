"""The image and the compose file: valid, hardened, and their command lines are those of the programs.

No engine is asked: what can be known of an image without one is in its Dockerfile, and what is run in it is run here too
(tests/integration/test_compose_commands.py).
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from connectors.circle.chains import to_circle
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.tokens import usdc_token_id
from stablerail.config import Settings, load_settings
from stablerail.movements import MOVEMENTS, NEEDS
from topics.events import Chain

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.kafka.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line.strip()
]
PROGRAMS = ("bridge", "worker", "api")
ONCE = {name for name, service in SERVICES.items() if service["restart"] == "no"}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As a program in its container reads them."""
    assert all(SERVICES[name]["environment"] == COMPOSE["x-settings"] for name in (*PROGRAMS, "migrate", "topics"))
    for name, value in COMPOSE["x-settings"].items():
        monkeypatch.setenv(name, value)
    return load_settings(env_file=None)


# -- the compose file ------------------------------------------------------------------------------------------------------


def test_the_compose_file_is_valid_by_the_specifications_schema() -> None:
    schema = json.loads((ROOT / "tests" / "schemas" / "compose-spec.json").read_text())
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(COMPOSE))
    assert error is None, f"{error.json_path}: {error.message}"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_unprivileged_writes_nowhere_else_and_is_reached_from_this_machine_only(name: str) -> None:
    service = SERVICES[name]
    user, _, group = service["user"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "userns_mode"}
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", ()))
    for volume in service.get("volumes", ()):
        assert volume.partition(":")[0] in COMPOSE["volumes"], "a named volume, no folder of the host"
    assert "/tmp" in [each.partition(":")[0] for each in service["tmpfs"]]
    for each in service["tmpfs"]:
        folder, _, options = each.partition(":")
        # The engine gives a tmpfs to root and takes the mode of the folder under it: 1777 is /tmp's alone.
        assert folder == "/tmp" or f"uid={user},gid={group}" in options, folder


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_or_built_here_and_says_how_it_is(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["build"] == {"context": ".", "target": "dev"}
        assert re.search(rf"^FROM \S+ AS {service['build']['target']}$", DOCKERFILE, re.MULTILINE)
        assert f"USER {service['user']}\n" in DOCKERFILE
    else:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), service["image"]
    assert ("healthcheck" in service) != (name in ONCE)


def test_nothing_is_waited_for_that_does_not_come() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert how == {"condition": condition}, f"{name} waits for {other}"
    assert set(ONCE) == {"usdc", "migrate", "topics"}
    for job in ONCE:
        assert any(job in service.get("depends_on", {}) for service in SERVICES.values()), job


def test_every_data_keeper_has_a_volume() -> None:
    kept = {name: service["volumes"] for name, service in SERVICES.items() if "volumes" in service}
    assert kept == {
        "kafka": ["kafka:/var/lib/kafka/data"],
        "postgres": ["postgres:/var/lib/postgresql"],
        "anvil": ["anvil:/home/foundry"],
    }
    assert set(COMPOSE["volumes"]) == set(kept)
    assert SERVICES["kafka"]["environment"]["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"


def test_the_programs_settings_are_right_and_enough_for_every_movement(settings: Settings) -> None:
    settings.require(*dict.fromkeys(need for movement in MOVEMENTS for need in NEEDS[movement]))
    settings.require("sumsub_webhook_secret", "rpc_urls")
    assert settings.read_chains == (Chain.MATIC,)
    assert settings.secret("circle_api_key") == TEST_API_KEY
    assert settings.secret("circle_entity_secret") == TEST_ENTITY_SECRET
    assert settings.secret("sumsub_webhook_secret") == SERVICES["kyc"]["environment"]["SUMSUB_WEBHOOK_SECRET"]
    assert settings.circle_usdc_token_ids == {chain: usdc_token_id(to_circle(chain, "testnet")) for chain in Chain}
    anvil = SERVICES["anvil"]["command"]
    assert settings.chain_ids[Chain.MATIC] == int(anvil[anvil.index("--chain-id") + 1])
    for service in ("usdc", "circle"):
        assert settings.usdc_contracts[Chain.MATIC].lower() in " ".join(SERVICES[service]["command"]).lower()


def test_the_database_and_the_broker_are_those_of_the_compose_file(settings: Settings) -> None:
    server = SERVICES["postgres"]["environment"]
    login = f"{server['POSTGRES_USER']}:{server['POSTGRES_PASSWORD']}"
    assert settings.secret("database_url") == f"postgresql://{login}@postgres:5432/{server['POSTGRES_DB']}"
    assert f"DOCKER://{settings.kafka_bootstrap}" in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    header = (ROOT / "docker-compose.kafka.yml").read_text().partition("\nname:")[0]
    assert f"postgresql://{login}@127.0.0.1:5432/{server['POSTGRES_DB']}" in header


def test_each_programs_health_is_asked_at_the_ports_it_serves(settings: Settings) -> None:
    def asked(name: str) -> list[str]:
        return [part for part in SERVICES[name]["healthcheck"]["test"] if part.startswith("http")]

    workers = [f"http://127.0.0.1:{settings.worker_port + number}/readyz" for number in range(len(MOVEMENTS))]
    assert asked("worker") == workers, f"one for each movement: {', '.join(MOVEMENTS)}"
    assert asked("bridge") == [f"http://127.0.0.1:{settings.bridge_port}/readyz"]
    assert asked("api") == [f"http://127.0.0.1:{settings.api_port}/readyz"]
    assert SERVICES["bridge"]["ports"] == [f"127.0.0.1:{settings.bridge_port}:{settings.bridge_port}"]
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{settings.api_port}:{settings.api_port}"]
    assert "ports" not in SERVICES["worker"], "Faust's web has no authentication"


# -- the image -------------------------------------------------------------------------------------------------------------


def test_every_stage_begins_with_a_pinned_image_or_an_earlier_stage() -> None:
    names: list[str] = []
    for keyword, rest in INSTRUCTIONS:
        if keyword == "FROM":
            image, as_, name = rest.split()
            assert as_ == "AS"
            assert image in names or re.fullmatch(r"[\w./]+:\d+\.\d+\.\d+-[\w-]+", image), image
            names.append(name)
    assert names[-1] == "product", "what a build without --target makes"


def test_the_last_stages_hold_what_was_built_and_nothing_to_build_with() -> None:
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert "apt-get" not in DOCKERFILE, "wheels only: no compiler is needed at all"
    assert not re.search(r"\b(pip|npm|gcc|make)\b", runtime)
    assert re.findall(r"COPY (.+)", runtime) == [
        "--from=build /opt/stablerail /opt/stablerail",
        "--from=contracts /contracts /contracts",
    ]
    users = [rest for keyword, rest in INSTRUCTIONS if keyword == "USER"]
    assert users == ["10001:10001"]
    assert "chown" not in DOCKERFILE, "the program cannot change itself"
    assert ["ENTRYPOINT", '["stablerail"]'] in INSTRUCTIONS


def test_nothing_is_fetched_that_is_not_locked() -> None:
    assert not re.search(r"\b(curl|wget|ADD)\b|\|\s*(ba)?sh\b|--index-url|--trusted-host|latest", DOCKERFILE)
    for command in re.findall(r"pip (?:--python \S+ )?install ([^&\n]+)", DOCKERFILE):
        assert "--require-hashes" in command or "--no-index" in command, command
        assert "--no-deps" in command


def test_the_image_gets_only_what_the_build_needs() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {
        part
        for keyword, rest in INSTRUCTIONS
        if keyword == "COPY" and not rest.startswith("--from")
        for part in rest.split()[:-1]
    }
    assert "*" in ignore
    assert {path.partition("/")[0] for path in copied} == kept
    assert all((ROOT / path).exists() for path in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) <= kept


def locked(name: str) -> dict[str, str]:
    """Package -> version, marker and hashes."""
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)(==[^#]+?)(?=^\S|\s+# via|\Z)", text, re.MULTILINE | re.DOTALL))


def test_the_image_installs_the_tested_versions_of_what_the_product_needs_and_no_tool() -> None:
    product, tested = locked("requirements-product.lock"), locked("requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[=<>;]", line)[0] for line in requirements}

    assert names(project["dependencies"]) <= product.keys()
    tools = {name for extra in project["optional-dependencies"].values() for name in names(extra)}
    assert not tools & product.keys()
    for name, pin in product.items():
        assert tested[name].split()[0] == pin.split()[0], f"{name}: run make lock"
        assert set(re.findall(r"sha256:\w+", pin)) == set(re.findall(r"sha256:\w+", tested[name])), name
