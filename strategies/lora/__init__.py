"""How LoRA's factors merge: a file a method, each a pure function of one layer's factors."""
