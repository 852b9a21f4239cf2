"""Trained models in the forms that others read: safetensors, transformers and peft folders, ONNX."""
