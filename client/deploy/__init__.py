"""A real site: starting its processes, and answering the server's requests."""
