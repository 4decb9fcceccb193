"""What a key is made of: content, syntax trees, the code that is reached and the code that is loaded."""
