"""Methods that merge LoRA's factors: one file each, a pure function of one layer's factors."""
