"""A real site: its processes, and the tasks that it answers."""
