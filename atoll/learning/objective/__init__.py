"""What a client's training minimises: the task's loss, corrected for class imbalance, smoothed or taught."""
