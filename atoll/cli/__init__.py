"""The command line: a module for each group of verbs, and what a person sees."""
