"""What trains and measures: the learner, features and their cache, trainable parameters, splits."""
