"""What an attack shows of epsilon: bounds from guesses, and membership scores."""
