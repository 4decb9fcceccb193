"""What a search chooses from, and what it remembers; optuna proposes."""
