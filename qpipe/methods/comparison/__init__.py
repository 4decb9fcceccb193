"""One model against another: import against source, simulation against deployment."""
