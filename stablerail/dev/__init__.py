"""Real parts for a machine that has none: Kafka, PostgreSQL and an EVM chain with USDC, without containers.

`make demo`, `make test` and `stablerail dev up` start them; a deployment has its own and never imports this package.

toolchain   what the machine has (Java, node), or the wheel that carries it
fetch       what the machine lacks: Kafka's jars, anvil, USDC's bytecode, each checked against a lock file
processes   children that end when their parent ends, however it ends
kafka, postgres, anvil, usdc   one part each
parts       all of them in one directory
"""
