"""What a person sees in the terminal, while it runs and when it has ended."""
