"""Privacy auditing: lower bounds on epsilon from attacks with canaries, and membership scores."""
