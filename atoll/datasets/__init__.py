"""Built-in sources of data, a file each."""
