"""One machine: in-process engine, Ray, partitioning."""
