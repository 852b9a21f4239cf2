"""Files that hold many examples in a form of their own: IDX, and tar files of WebDataset."""
