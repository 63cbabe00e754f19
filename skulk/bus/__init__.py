"""The bus: the only user of nats-py. Typed subjects, two forms (nats-server, memory), streams that end once."""
