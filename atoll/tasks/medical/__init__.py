"""Classification of medical images."""
