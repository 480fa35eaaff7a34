"""The program: settings, wiring, worker, command line, HTTP API, and the parts a machine without infrastructure needs."""
