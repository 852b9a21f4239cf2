"""What a job can ask for: its sections and the rules between them."""
