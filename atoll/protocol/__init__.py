"""What server and client agree on: job, messages, random streams, hashes."""
