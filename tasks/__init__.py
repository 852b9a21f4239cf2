"""What is learnt: data format, backbone and head, loss, metrics."""
