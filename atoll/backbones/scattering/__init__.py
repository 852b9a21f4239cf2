"""`atoll:scattering`: its filters, and the transform."""
