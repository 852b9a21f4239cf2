"""The frozen blocks below the first tuned one: computed once for every sequence of tokens, kept on disk."""
