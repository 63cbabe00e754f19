"""The bus: the only user of nats-py. Typed subjects, two implementations (nats-server, memory), streams that end once."""
